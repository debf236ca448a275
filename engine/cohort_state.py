"""A member's end state in a file, from which its children start."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from engine.checkpoint import CheckpointError, load_tensors, save_tensors

KIND = "end of a member"


def end_state(loss: nn.Module) -> dict[str, Tensor]:
    """Copies on the CPU of all networks' and heads' weights and batch-norm statistics."""
    return {name: tensor.detach().cpu().clone() for name, tensor in loss.state_dict().items()}


def keep_ends(path: Path, ends: Mapping[int, Mapping[str, Tensor]], **facts: Any) -> None:
    """Write a member's end states, one a seed, to one file: the old file or the new one, never a part.

    Raises OSError where the file can't be written.
    """
    tensors = {f"{seed}/{name}": t for seed, state in ends.items() for name, t in state.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_tensors(path, tensors, facts={"kind": KIND, "seeds": sorted(ends), **facts})


def start_from(path: Path, loss: nn.Module, *, seed: int) -> None:
    """Bring networks and heads to the end state that ``keep_ends`` wrote for ``seed``.

    Raises CheckpointError for a file that is absent, damaged or another's, and for networks that are built otherwise.
    """
    tensors, facts = load_tensors(path)
    if facts.get("kind") != KIND:
        raise CheckpointError(f"{path}: not a member's end state, so no child can start from it")
    if seed not in facts["seeds"]:
        seeds = ", ".join(map(str, facts["seeds"]))
        raise CheckpointError(f"{path}: ends of seed {seeds}, not of seed {seed}")
    prefix = f"{seed}/"
    saved = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
    wanted = loss.state_dict()
    for name in sorted(saved.keys() ^ wanted.keys()):
        raise CheckpointError(
            f"{path}: {'has no' if name in wanted else 'has an unknown'} tensor {name}"
        )
    for name, tensor in wanted.items():
        if saved[name].shape != tensor.shape:
            shapes = f"{tuple(saved[name].shape)}, not {tuple(tensor.shape)}"
            raise CheckpointError(f"{path}: {name} has shape {shapes}")
    loss.load_state_dict(saved)
