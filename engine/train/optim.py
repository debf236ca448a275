"""AdamW, Muon or SGD, the schedule of the rate, the step of every training, and the running average of its weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from engine.core.recipe import Optim
from engine.train.muon import Muon, convolutions

Result = TypeVar("Result")
COOLDOWN = 0.4
"""Share of the steps, the last ones, over which a trapezoid falls to zero."""


def make_optimizer(
    parts: Sequence[tuple[nn.Module, float]], settings: Optim, *, fused: bool = True
) -> torch.optim.Optimizer:
    """AdamW, Muon or SGD for modules, each with a factor of the rate; norms and biases are not decayed."""
    groups: list[dict[str, Any]] = []
    for module, factor in parts:
        by_muon = convolutions(module) if settings.name == "muon" else []
        known = {id(p) for p in by_muon}
        others = [p for p in module.parameters() if id(p) not in known]
        decayed = {"weight_decay": settings.weight_decay, "factor": factor}
        if by_muon:
            groups.append({"params": by_muon, "momentum": settings.momentum, **decayed})
        groups.append({"params": [p for p in others if p.dim() > 1], **decayed})
        plain = [p for p in others if p.dim() <= 1]
        groups.append({"params": plain, "weight_decay": 0.0, "factor": factor})
    # not False, which would forbid torch its loop over all tensors at once too
    at_once = True if fused else None
    if settings.name == "sgd":
        return torch.optim.SGD(groups, lr=settings.lr, momentum=settings.momentum, fused=at_once)
    kind = Muon if settings.name == "muon" else torch.optim.AdamW
    return kind(groups, lr=settings.lr, fused=at_once)


def descend(
    optimizer: torch.optim.Optimizer,
    settings: Optim,
    *,
    step: int,
    backward: Callable[[], Result],
    first: int = 0,
) -> Result:
    """Take one step: the schedule's rate times each group's factor, ``backward``, clipped gradients, the optimizer.

    Returns what ``backward`` does, which leaves gradients in the optimizer's parameters; where it raises, none moves.
    """
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(settings, step, first=first) * group["factor"]
    # torch's zero_grad and a walk through the modules take 5 % of a small network's step
    parameters = [weight for group in optimizer.param_groups for weight in group["params"]]
    # before the forward pass, so that gradients and activations never add up
    for weight in parameters:
        weight.grad = None
    result = backward()
    nn.utils.clip_grad_norm_(parameters, settings.grad_clip)
    optimizer.step()
    return result


def learning_rate(settings: Optim, step: int, *, first: int = 0) -> float:
    """Linear warm-up over ``warmup_steps``, then the schedule to zero at ``steps``; joined at ``first``, warmed up to.

    "cosine" falls from the start; "trapezoid" stays, and falls linearly over the last COOLDOWN of the steps.
    """
    if first and step - first < settings.warmup_steps:
        return learning_rate(settings, step) * (step - first + 1) / settings.warmup_steps
    if step < settings.warmup_steps:
        return settings.lr * (step + 1) / settings.warmup_steps
    if settings.schedule == "trapezoid":
        return settings.lr * min(1.0, (settings.steps - step) / (COOLDOWN * settings.steps))
    done = (step - settings.warmup_steps) / (settings.steps - settings.warmup_steps)
    return settings.lr * 0.5 * (1.0 + math.cos(math.pi * done))


def new_moments(optimizer: torch.optim.Optimizer, parameter: Tensor) -> dict[str, Tensor]:
    """A parameter's moments as the optimizer's first step would find or make them, in its memory format."""
    if not isinstance(optimizer, torch.optim.AdamW) or _by_muon(optimizer, parameter):
        # momentum * 0 + gradient is what the first step takes
        return {"momentum_buffer": torch.zeros_like(parameter)}
    # a fused step counts where the parameter is; other steps count on the CPU, where no GPU is waited for
    device = parameter.device if optimizer.defaults["fused"] else torch.device("cpu")
    return {
        "step": torch.zeros((), dtype=torch.float32, device=device),
        "exp_avg": torch.zeros_like(parameter),
        "exp_avg_sq": torch.zeros_like(parameter),
    }


def _by_muon(optimizer: torch.optim.AdamW, parameter: Tensor) -> bool:
    matrices = (group["params"] for group in optimizer.param_groups if "momentum" in group)
    return any(parameter is other for params in matrices for other in params)


def start_moments(optimizer: torch.optim.Optimizer) -> None:
    """Make the moments that the optimizer would make at its first step."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if not optimizer.state[parameter]:
                optimizer.state[parameter].update(new_moments(optimizer, parameter))


class RunningAverage:
    """Exponential moving average of a network's weights and of its batch norms' running statistics, in float32.

    After step k (from 0) the average moves by 1 - d towards the network, d = min(decay, (1 + k) / (10 + k)), so that
    the random weights of the beginning are soon forgotten.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.decay = decay
        self.tensors: dict[str, Tensor] = {
            name: tensor.detach().clone() for name, tensor in network.state_dict().items()
        }

    @torch.no_grad()
    def update(self, network: nn.Module, *, step: int) -> None:
        """Take in the network as it is after ``step``."""
        decay = min(self.decay, (1 + step) / (10 + step))
        now = network.state_dict()
        floats = [name for name, tensor in self.tensors.items() if tensor.is_floating_point()]
        torch._foreach_lerp_(
            [self.tensors[name] for name in floats], [now[name] for name in floats], 1.0 - decay
        )
        for name, tensor in self.tensors.items():
            if not tensor.is_floating_point():
                tensor.copy_(now[name])
