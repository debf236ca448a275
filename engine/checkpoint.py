"""Atomic checkpoints: weights as safetensors, and a member's whole state for exact resume.

A run's folder holds ``last``, ``previous``, which takes over where ``last`` turns out damaged, and ``step-N``, where
they are to be kept. What a checkpoint holds is the same for any number of processes.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from engine.train_state import Member


class CheckpointError(ValueError):
    """A checkpoint that can't be read or does not fit: the message names the file and what differs."""


class DamagedCheckpoint(CheckpointError):
    """A checkpoint whose bytes are not those that were written."""


def save_tensors(path: Path, tensors: Mapping[str, Tensor], *, facts: Mapping[str, Any]) -> None:
    """Write tensors and a JSON card of facts; a kill leaves the old file or the new one.

    Raises OSError where the file can't be written, and leaves no part of it.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    whole = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    try:
        told = {"facts": json.dumps(dict(facts)), "crc32": _checksum(whole)}
        save_file(whole, temporary, metadata=told)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except SafetensorError as error:
        raise _os_error(error, path) from None
    finally:
        temporary.unlink(missing_ok=True)


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    """Of names and bytes: safetensors itself notices a file that is too short, but no byte that has changed."""
    crc = 0
    for name in sorted(tensors):
        data: Any = tensors[name].reshape(-1).view(torch.uint8).numpy()
        crc = zlib.crc32(data, zlib.crc32(name.encode(), crc))
    return f"{crc:08x}"


def _os_error(error: SafetensorError, path: Path) -> OSError:
    """What safetensors tells of the system's errors is text alone: "... (os error 28)"."""
    number = re.search(r"os error (\d+)", str(error))
    if number is None:
        return OSError(f"can't write {path}: {error}")
    code = int(number[1])
    return OSError(code, f"can't write the checkpoint: {os.strerror(code)}", str(path))


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read tensors, on the CPU, and facts.

    Raises CheckpointError for a file that is not there, DamagedCheckpoint for one that is not as it was written.
    """
    try:
        with safe_open(path, framework="pt") as file:
            told = file.metadata() or {}
            facts = json.loads(told.get("facts", "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such checkpoint") from None
    except (SafetensorError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DamagedCheckpoint(f"{path}: not a readable safetensors file: {error}") from None
    if "crc32" in told and told["crc32"] != _checksum(tensors):
        raise DamagedCheckpoint(f"{path}: damaged: its checksum is not that of what was written")
    return tensors, facts


def keep_member(
    folder: Path,
    member: Member,
    *,
    facts: Mapping[str, Any],
    extra: Mapping[str, Tensor],
    keep: bool = False,
) -> None:
    """Save a member as ``last`` of a run's folder, its forerunner as ``previous``; with ``keep`` as ``step-N`` too."""
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


def restore_member(
    folder: Path,
    member: Member,
    *,
    recipe_hash: str,
    extra: Mapping[str, Tensor],
    warn: Callable[[str], object],
) -> dict[str, Any] | None:
    """Bring a new member to the newest state of a run's folder that is whole; None where none was saved.

    ``warn`` is told of damaged ones. Raises CheckpointError where all are, or one does not fit: a run never begins
    again by itself.
    """
    kept = sorted(folder.glob("step-*.safetensors"), reverse=True)
    found = [folder / "last.safetensors", folder / "previous.safetensors", *kept]
    damaged: DamagedCheckpoint | None = None
    for path in found:
        if not path.exists():
            continue
        try:
            facts = load_member(path, member, recipe_hash=recipe_hash, extra=extra)
        except DamagedCheckpoint as error:
            damaged = damaged or error
            warn(f"{error}; looking for the one before it")
            continue
        return facts
    if damaged is not None:
        raise CheckpointError(f"{damaged}; there is no whole one before it: start a new run")
    return None


def save_member(
    path: Path,
    member: Member,
    *,
    facts: Mapping[str, Any],
    extra: Mapping[str, Tensor] | None = None,
) -> None:
    """Save all that a member needs to go on exactly: weights, buffers, optimizer state, step, and ``extra`` tensors."""
    tensors = {f"loss.{name}": t for name, t in member.loss.state_dict().items()}
    tensors |= {f"extra.{name}": t for name, t in (extra or {}).items()}
    by_id = {id(p): name for name, p in member.loss.named_parameters()}
    states = {
        f"optim.{key}.{by_id[id(parameter)]}": torch.as_tensor(value)
        for parameter, state in member.optimizer.state.items()
        for key, value in state.items()
        if value is not None
    }
    kept = {"values": member.values, "start": member.start}
    tensors |= {name: tensor for name, tensor in kept.items() if tensor is not None}
    place = {"step": member.step, "computed": member.computed, "active": member.active}
    save_tensors(
        path, {**tensors, **states}, facts={**facts, **place, "optimizer_tensors": len(states)}
    )


def load_member(
    path: Path, member: Member, *, recipe_hash: str, extra: Mapping[str, Tensor] | None = None
) -> dict[str, Any]:
    """Bring a new member, and ``extra`` tensors, to their saved state; returns the facts saved with it.

    Raises CheckpointError where the file is damaged, comes from another recipe, or lacks or adds a tensor.
    """
    tensors, facts = load_tensors(path)
    if facts.get("recipe_hash") != recipe_hash:
        raise CheckpointError(
            f"{path}: made with recipe {facts.get('recipe_hash')}, this run's is {recipe_hash}; "
            "resume with the recipe of the run, or start a new run"
        )
    saved = _fitting(tensors, "loss.", member.loss.state_dict(), path)
    more = _fitting(tensors, "extra.", extra or {}, path)
    states = [name for name in tensors if name.startswith("optim.")]
    if len(states) != facts["optimizer_tensors"]:
        raise CheckpointError(
            f"{path}: has {len(states)} of the optimizer's {facts['optimizer_tensors']} tensors"
        )
    member.loss.load_state_dict(saved)
    for name, tensor in (extra or {}).items():
        tensor.copy_(more[name])
    parameters = dict(member.loss.named_parameters())
    for name in states:
        _, key, parameter = name.split(".", 2)
        target, tensor = parameters[parameter], tensors[name]
        state = member.optimizer.state[target]
        if key in state:
            state[key].copy_(tensor)
        else:
            like = target if tensor.shape == target.shape else None
            state[key] = _placed(tensor, target.device, like)
    for name in {"values", "start"} & tensors.keys():
        setattr(member, name, tensors[name].to(member.weights.device))
    member.step = facts["step"]
    return facts


def _fitting(
    tensors: Mapping[str, Tensor], prefix: str, wanted: Mapping[str, Tensor], path: Path
) -> dict[str, Tensor]:
    """The tensors of a prefix, which must be those wanted in name and shape."""
    saved = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
    for name in sorted(saved.keys() ^ wanted.keys()):
        raise CheckpointError(
            f"{path}: {'has no' if name in wanted else 'has an unknown'} tensor {name}"
        )
    for name, tensor in wanted.items():
        if saved[name].shape != tensor.shape:
            raise CheckpointError(
                f"{path}: {name} has shape {tuple(saved[name].shape)}, not {tuple(tensor.shape)}"
            )
    return saved


def _placed(tensor: Tensor, device: torch.device, like: Tensor | None) -> Tensor:
    """On the device and in the memory format of its parameter, so that sums go in the same order."""
    if like is None:
        return tensor.to(device)
    placed = torch.empty_like(like)
    placed.copy_(tensor)
    return placed
