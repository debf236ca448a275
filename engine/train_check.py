"""What is checked before the first step: that this machine's fast path computes what float32 does."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch

from engine.data.views import Views
from engine.runtime import Runtime, is_out_of_memory
from engine.train_compiled import Seat, evaluate
from engine.train_state import Member

OLDEST_CUDNN = 91500
"""bf16 3-D convolutions before 9.15: four times slower, and wrong at large shapes (pytorch 166122, 163539)."""
TOLERANCE = {"bf16": 0.1, "float32": 1e-3}
"""Largest difference of a term, relative to float32's, that is not told."""
LOOSER = 4
"""Times that tolerance for RGB's gradient norm: rounding adds up over the layers of backward."""
GRADIENT = "gradient norm of the RGB network"


class CanNotCompile(RuntimeError):
    """A compiled step does not come about on this machine; the message says why."""


def check_step(
    member: Member,
    views: Views,
    *,
    seat: Seat | None,
    runtime: Runtime,
    warn: Callable[[str], object],
) -> None:
    """Compare a member's first step in the run's number format, compiled or not, with eager float32.

    Tells ``warn`` what differs and what to do; changes nothing. Raises CanNotCompile where that is so.
    """
    if runtime.amp and runtime.device.type == "cuda":
        version = torch.backends.cudnn.version() or 0
        if version < OLDEST_CUDNN:
            warn(
                f"cuDNN {version // 10000}.{version // 100 % 100} has slow and partly wrong bf16 3-D convolutions: "
                "install 9.15 or newer (pip install -U nvidia-cudnn-cu13), or --set optim.amp=off"
            )
    exact = _in_float32(member, views)
    before = (
        None if member.state is None else {d: b.clone() for d, b in member.state.blocks.items()}
    )
    try:
        found = _as_configured(member, views, seat=seat, runtime=runtime)
    except RuntimeError as error:
        if seat is None or is_out_of_memory(error):
            raise
        reason = str(error).strip().splitlines()[0]
        raise CanNotCompile(f"the step can't be compiled ({reason})") from error
    finally:
        if before is not None and member.state is not None:
            for dtype, block in member.state.blocks.items():
                block.copy_(before[dtype])
    tolerance = TOLERANCE["bf16" if runtime.amp else "float32"]
    for name, want in exact.items():
        difference = abs(found[name] - want) / max(abs(want), 1e-3)
        if not difference <= tolerance * (LOOSER if name == GRADIENT else 1):
            warn(
                f"the first step's {name} is {found[name]:.4g}, in float32 {want:.4g}: "
                "compare with --set optim.amp=off and --set optim.compile=off, and see `engine doctor`"
            )


def _in_float32(member: Member, views: Views) -> dict[str, float]:
    loss = copy.deepcopy(member.loss)
    total, values = loss.evaluate(views, member.ordered, member.computed)
    total.backward()
    return _named(member, values, loss.rgb)


def _as_configured(
    member: Member, views: Views, *, seat: Seat | None, runtime: Runtime
) -> dict[str, float]:
    if seat is None or member.state is None:
        member = copy.copy(member)
        loss = member.loss = copy.deepcopy(member.loss)
    else:
        seat.take(member.state)
        loss = seat.loss
    loss.zero_grad(set_to_none=True)
    total, values = evaluate(member, views, seat=seat, runtime=runtime)
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
