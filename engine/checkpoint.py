"""Atomic checkpoints: weights as safetensors, and a member's whole state for exact resume."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from engine.train_state import Member


class CheckpointError(ValueError):
    """A checkpoint that can't be read or does not fit: the message names the file and what differs."""


def save_tensors(path: Path, tensors: Mapping[str, Tensor], *, facts: Mapping[str, Any]) -> None:
    """Write tensors and a JSON card of facts; a kill leaves the old file or the new one.

    Raises OSError where the file can't be written, and leaves no part of it.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    whole = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    try:
        save_file(whole, temporary, metadata={"facts": json.dumps(dict(facts))})
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except SafetensorError as error:
        raise _os_error(error, path) from None
    finally:
        temporary.unlink(missing_ok=True)


def _os_error(error: SafetensorError, path: Path) -> OSError:
    """What safetensors tells of the system's errors is text alone: "... (os error 28)"."""
    number = re.search(r"os error (\d+)", str(error))
    if number is None:
        return OSError(f"can't write {path}: {error}")
    code = int(number[1])
    return OSError(code, f"can't write the checkpoint: {os.strerror(code)}", str(path))


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read tensors, on the CPU, and facts; raises CheckpointError for a file that is not a whole one."""
    try:
        with safe_open(path, framework="pt") as file:
            facts = json.loads((file.metadata() or {}).get("facts", "{}"))
            return {name: file.get_tensor(name) for name in file.keys()}, facts
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such checkpoint") from None
    except (SafetensorError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path}: not a readable safetensors file: {error}") from None


def save_member(path: Path, member: Member, *, facts: Mapping[str, Any]) -> None:
    """Save all that a member needs to go on exactly: weights, buffers, optimizer state, step."""
    tensors = {f"loss.{name}": t for name, t in member.loss.state_dict().items()}
    by_id = {id(p): name for name, p in member.loss.named_parameters()}
    states = {
        f"optim.{key}.{by_id[id(parameter)]}": torch.as_tensor(value)
        for parameter, state in member.optimizer.state.items()
        for key, value in state.items()
        if value is not None
    }
    if member.values is not None:
        tensors["values"] = member.values
    place = {"step": member.step, "computed": member.computed, "active": member.active}
    save_tensors(
        path, {**tensors, **states}, facts={**facts, **place, "optimizer_tensors": len(states)}
    )


def load_member(path: Path, member: Member, *, recipe_hash: str) -> dict[str, Any]:
    """Bring a new member to a saved one's state; returns the facts saved with it.

    Raises CheckpointError where the file is damaged, comes from another recipe, or lacks or adds a tensor.
    """
    tensors, facts = load_tensors(path)
    if facts.get("recipe_hash") != recipe_hash:
        raise CheckpointError(
            f"{path}: made with recipe {facts.get('recipe_hash')}, this run's is {recipe_hash}; "
            "resume with the recipe of the run, or start a new run"
        )
    saved = {name[5:]: t for name, t in tensors.items() if name.startswith("loss.")}
    wanted = member.loss.state_dict()
    for name in sorted(saved.keys() ^ wanted.keys()):
        raise CheckpointError(
            f"{path}: {'has no' if name in wanted else 'has an unknown'} tensor {name}"
        )
    for name, tensor in wanted.items():
        if saved[name].shape != tensor.shape:
            raise CheckpointError(
                f"{path}: {name} has shape {tuple(saved[name].shape)}, not {tuple(tensor.shape)}"
            )
    states = [name for name in tensors if name.startswith("optim.")]
    if len(states) != facts["optimizer_tensors"]:
        raise CheckpointError(
            f"{path}: has {len(states)} of the optimizer's {facts['optimizer_tensors']} tensors"
        )
    member.loss.load_state_dict(saved)
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
    if "values" in tensors:
        member.values = tensors["values"].to(member.weights.device)
    member.step = facts["step"]
    return facts


def _placed(tensor: Tensor, device: torch.device, like: Tensor | None) -> Tensor:
    """On the device and in the memory format of its parameter, so that sums go in the same order."""
    if like is None:
        return tensor.to(device)
    placed = torch.empty_like(like)
    placed.copy_(tensor)
    return placed
