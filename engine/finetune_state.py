"""A fine-tuning's whole state as a file, for exact resume."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from engine.checkpoint import CheckpointError, load_tensors, save_tensors

MODEL, OPTIM = "model.", "optim."


def save_state(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    step: int,
    loss: float,
    facts: Mapping[str, Any],
) -> None:
    """Weights, buffers, the optimizer's moments, and the steps done, whole or not at all."""
    tensors = {f"{MODEL}{name}": tensor for name, tensor in model.state_dict().items()}
    by_id = {id(p): name for name, p in model.named_parameters()}
    tensors |= {
        f"{OPTIM}{key}.{by_id[id(parameter)]}": torch.as_tensor(value)
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
        if value is not None
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    save_tensors(
        path, tensors, facts={**facts, "step": step, "loss": loss, "tensors": len(tensors)}
    )


def load_state(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    facts: Mapping[str, Any],
) -> tuple[int, float]:
    """Bring a new model and optimizer to a saved state: the steps done, and the running loss.

    Raises CheckpointError where the file is damaged, is another run's (``facts`` differ), or lacks or adds a tensor.
    """
    tensors, saved = load_tensors(path)
    for key, value in facts.items():
        if saved.get(key) != value:
            raise CheckpointError(
                f"{path}: its {key} is {saved.get(key)!r}, this run's {value!r}; resume with what the run began"
                " with, or start a new run"
            )
    if saved.get("tensors") != len(tensors):
        raise CheckpointError(f"{path}: has {len(tensors)} of its {saved.get('tensors')} tensors")
    weights = {n.removeprefix(MODEL): t for n, t in tensors.items() if n.startswith(MODEL)}
    own = model.state_dict()
    for name in sorted(weights.keys() ^ own.keys()):
        what = "has no" if name in own else "has an unknown"
        raise CheckpointError(f"{path}: {what} tensor {name}")
    model.load_state_dict(weights)
    parameters = dict(model.named_parameters())
    for name, tensor in tensors.items():
        if name.startswith(OPTIM):
            _, key, parameter = name.split(".", 2)
            target = parameters[parameter]
            optimizer.state[target][key] = _placed(tensor, target)
    return int(saved["step"]), float(saved["loss"])


def _placed(tensor: Tensor, like: Tensor) -> Tensor:
    """In its parameter's memory format, so that kernels take the same path; a counter stays on the CPU."""
    return torch.empty_like(like).copy_(tensor) if tensor.shape == like.shape else tensor
