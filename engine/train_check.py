"""What is checked before the first step: that this machine's fast path computes what float32 does."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch

from engine.data.views import Views
from engine.runtime import is_out_of_memory

if TYPE_CHECKING:
    from engine.train import Member, Trainer

OLDEST_CUDNN = 91500
"""bf16 3-D convolutions before 9.15: four times slower, and wrong at large shapes (pytorch 166122, 163539)."""
TOLERANCE = {"bf16": 0.1, "float32": 1e-3}
"""Largest difference of a term, and of RGB's gradient norm, relative to float32's, that is not told."""
GRADIENT = "gradient norm of the RGB network"


def check_step(trainer: Trainer, member: Member, views: Views) -> None:
    """Compare a member's first step in the run's number format, compiled or not, with eager float32.

    Tells ``trainer.warn`` what differs and what to do; changes nothing. Raises RuntimeError where the step
    can't be compiled and the recipe asks for it; where it leaves the choice open, goes on without.
    """
    if trainer.runtime.amp and trainer.runtime.device.type == "cuda":
        version = torch.backends.cudnn.version() or 0
        if version < OLDEST_CUDNN:
            trainer.warn(
                f"cuDNN {version // 10000}.{version // 100 % 100} has slow and partly wrong bf16 3-D convolutions: "
                "install 9.15 or newer (pip install -U nvidia-cudnn-cu13), or --set optim.amp=off"
            )
    exact = _in_float32(member, views)
    before = None if member.state is None else {d: b.clone() for d, b in member.state.blocks.items()}
    try:
        found = _as_configured(trainer, member, views)
    except RuntimeError as error:
        if trainer.seat is None or is_out_of_memory(error):
            raise
        _without_compiling(trainer, member, error)
        return
    finally:
        if before is not None and member.state is not None:
            for dtype, block in member.state.blocks.items():
                block.copy_(before[dtype])
    tolerance = TOLERANCE["bf16" if trainer.runtime.amp else "float32"]
    for name, want in exact.items():
        difference = abs(found[name] - want) / max(abs(want), 1e-3)
        if not difference <= tolerance:
            trainer.warn(
                f"the first step's {name} is {found[name]:.4g}, in float32 {want:.4g}: "
                "compare with --set optim.amp=off and --set optim.compile=off, and see `engine doctor`"
            )


def _in_float32(member: Member, views: Views) -> dict[str, float]:
    loss = copy.deepcopy(member.loss)
    total, values = loss.evaluate(views, member.ordered, member.computed)
    total.backward()
    return _named(member, values, loss.rgb)


def _as_configured(trainer: Trainer, member: Member, views: Views) -> dict[str, float]:
    loss = member.loss
    if trainer.seat is None or member.state is None:
        spare = copy.copy(member)
        spare.loss = loss = copy.deepcopy(member.loss)
        total, values = trainer.evaluate(spare, views)
    else:
        trainer.seat.take(member.state)
        loss = trainer.seat.loss
        loss.zero_grad(set_to_none=True)
        total, values = trainer.evaluate(member, views)
    values = values.clone()
    total.backward()
    found = _named(member, values, loss.rgb)
    loss.zero_grad(set_to_none=True)
    return found


def _named(member: Member, values: torch.Tensor, rgb: torch.nn.Module) -> dict[str, float]:
    named = dict(zip(member.computed, values.tolist(), strict=True))
    gradients = [p.grad for p in rgb.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients).item() if gradients else 0.0
    return {name: named[name] for name in member.active} | {GRADIENT: norm}


def _without_compiling(trainer: Trainer, member: Member, error: RuntimeError) -> None:
    reason = f"the step can't be compiled ({str(error).strip().splitlines()[0]})"
    if trainer.recipe.optim.compile != "auto":
        raise RuntimeError(f"{reason}; go on without by --set optim.compile=off") from error
    trainer.warn(f"{reason}: it runs uncompiled, slower")
    trainer.seat, trainer.mode = None, "off"
