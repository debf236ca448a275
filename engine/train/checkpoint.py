"""Checkpoints, from which training resumes exactly, and end states, from which members' children start.

A file holds a module's weights and buffers, its optimizer's moments, extra tensors, and facts, the step among them.
Batches, masks and dropout are functions of (seed, step), so no random state has to be kept.

A pretraining's folder holds ``last``, ``previous``, which takes over where ``last`` turns out damaged, and ``step-N``
for steps to keep. A file's contents are the same for any number of processes.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from engine.core.tensors import (
    CheckpointError,
    DamagedCheckpoint,
    load_tensors,
    save_tensors,
    with_prefix,
)
from engine.train.member import Member
from engine.train.optim import new_moments

FORMAT = 2
"""Version of these files; another one is refused."""
MODULE, OPTIMIZER, EXTRA = "module.", "optim.", "extra."
"""Prefixes of tensors' names."""
END = "end of a member"


def save_state(
    path: Path,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    facts: Mapping[str, Any],
    extra: Mapping[str, Tensor] | None = None,
) -> None:
    """Save a module, its optimizer's moments, and ``extra`` tensors, whole or not at all."""
    names = {id(p): name for name, p in module.named_parameters()}
    moments = {
        f"{OPTIMIZER}{key}.{names[id(parameter)]}": torch.as_tensor(value)
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
        if value is not None
    }
    tensors = {f"{MODULE}{name}": t for name, t in module.state_dict().items()}
    tensors |= {f"{EXTRA}{name}": t for name, t in (extra or {}).items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    own = {"format": FORMAT, "optimizer_tensors": len(moments)}
    save_tensors(path, tensors | moments, facts={**facts, **own})


def load_state(
    path: Path,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    expected: Mapping[str, Any],
    extra: Mapping[str, Tensor] | None = None,
) -> dict[str, Any]:
    """Bring a new module and optimizer, and ``extra`` tensors, to their saved state; returns the facts.

    Raises CheckpointError where the file is damaged, has other facts than those ``expected``, or lacks or adds a
    tensor; nothing is changed then.
    """
    tensors, facts = load_tensors(path)
    for key, value in {"format": FORMAT, **expected}.items():
        if facts.get(key) != value:
            raise CheckpointError(
                f"{path}: its {key} is {facts.get(key)}, this run's is {value}; resume with what the run began with, "
                "or start a new run"
            )
    weights = with_prefix(tensors, MODULE, module.state_dict(), path)
    more = with_prefix(tensors, EXTRA, extra or {}, path)
    moments = [name for name in tensors if name.startswith(OPTIMIZER)]
    if len(moments) != facts["optimizer_tensors"]:
        raise CheckpointError(
            f"{path}: has {len(moments)} of the optimizer's {facts['optimizer_tensors']} tensors"
        )
    module.load_state_dict(weights)
    for name, tensor in (extra or {}).items():
        tensor.copy_(more[name])
    parameters = dict(module.named_parameters())
    for name in moments:
        _, key, parameter = name.split(".", 2)
        state = optimizer.state[parameters[parameter]]
        if not state:
            state.update(new_moments(optimizer, parameters[parameter]))
        state[key].copy_(tensors[name])
    return facts


def save_member(
    path: Path,
    member: Member,
    *,
    facts: Mapping[str, Any],
    extra: Mapping[str, Tensor] | None = None,
) -> None:
    """Save all that a member needs to resume exactly, and ``extra`` tensors."""
    place = {
        "step": member.step,
        "active": member.active,
        "values": None if member.values is None else member.values.tolist(),
        "start": None if member.start is None else member.start.tolist(),
    }
    save_state(path, member.loss, member.optimizer, facts={**facts, **place}, extra=extra)


def load_member(
    path: Path, member: Member, *, recipe_hash: str, extra: Mapping[str, Tensor] | None = None
) -> dict[str, Any]:
    """Bring a new member, and ``extra`` tensors, to their saved state; returns the facts. Raises as ``load_state``."""
    expected = {"recipe_hash": recipe_hash}
    facts = load_state(path, member.loss, member.optimizer, expected=expected, extra=extra)
    for name in ("values", "start"):
        if facts[name] is not None:
            setattr(member, name, member.ordered.new_tensor(facts[name]))
    member.step = facts["step"]
    return facts


def save_last(
    folder: Path,
    member: Member,
    *,
    facts: Mapping[str, Any],
    extra: Mapping[str, Tensor] | None = None,
    keep: bool = False,
) -> None:
    """Save a member as ``last`` of a folder, its forerunner as ``previous``; with ``keep`` as ``step-N`` too."""
    last, new = folder / "last.safetensors", folder / "new.safetensors"
    save_member(new, member, facts=facts, extra=extra)
    if last.exists():
        os.replace(last, folder / "previous.safetensors")
    os.replace(new, last)
    if keep:
        kept = folder / f"step-{member.step:08d}.safetensors"
        kept.unlink(missing_ok=True)
        try:
            os.link(last, kept)
        except OSError:  # a file system without links
            shutil.copyfile(last, kept)


def load_last(
    folder: Path,
    member: Member,
    *,
    recipe_hash: str,
    warn: Callable[[str], object],
    extra: Mapping[str, Tensor] | None = None,
) -> bool:
    """Bring a new member to the newest state of a folder that is whole; False where none was saved.

    ``warn`` gets a message for each damaged one. Raises CheckpointError where all are, or one does not fit: a run never
    begins again by itself.
    """
    kept = sorted(folder.glob("step-*.safetensors"), reverse=True)
    damaged: DamagedCheckpoint | None = None
    for path in (folder / "last.safetensors", folder / "previous.safetensors", *kept):
        if not path.exists():
            continue
        try:
            load_member(path, member, recipe_hash=recipe_hash, extra=extra)
        except DamagedCheckpoint as error:
            damaged = damaged or error
            warn(f"{error}; looking for the one before it")
            continue
        return True
    if damaged is not None:
        raise CheckpointError(f"{damaged}; there is no whole one before it: start a new run")
    return False


def copy_of(module: nn.Module) -> dict[str, Tensor]:
    """Copies on the CPU of a module's weights and buffers."""
    return {name: tensor.detach().cpu().clone() for name, tensor in module.state_dict().items()}


def save_ends(path: Path, ends: Mapping[int, Mapping[str, Tensor]], **facts: Any) -> None:
    """Write the networks and heads that a member ended with, by seed, for its children to start from.

    Raises OSError where the file can't be written, which then is not there at all.
    """
    tensors = {f"{seed}/{name}": t for seed, state in ends.items() for name, t in state.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_tensors(path, tensors, facts={"kind": END, "seeds": sorted(ends), **facts})


def load_end(path: Path, loss: nn.Module, *, seed: int) -> None:
    """Bring networks and heads to the end that ``save_ends`` wrote for ``seed``.

    Raises CheckpointError for a file that is absent, damaged or another's, and for networks that are built otherwise.
    """
    tensors, facts = load_tensors(path)
    if facts.get("kind") != END:
        raise CheckpointError(f"{path}: not a member's end state, so no child can start from it")
    if seed not in facts["seeds"]:
        seeds = ", ".join(map(str, facts["seeds"]))
        raise CheckpointError(f"{path}: ends of seed {seeds}, not of seed {seed}")
    loss.load_state_dict(with_prefix(tensors, f"{seed}/", loss.state_dict(), path))
