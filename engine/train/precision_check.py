"""Compares the step, compiled or in bf16, with eager float32 once, before training."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from statistics import median

import torch

from engine.core.runtime import Runtime, is_device_error, is_out_of_memory, release_memory
from engine.data.views import Views
from engine.objective.loss import EvolvedLoss
from engine.train.compiled import StepBuffers, evaluate
from engine.train.member import Member

OLDEST_CUDNN = 91500
"""bf16 3-D convolutions before 9.15: four times slower, and wrong at large shapes (pytorch 166122, 163539)."""
TOLERANCE = {"bf16": (0.1, 0.5), "float32": (1e-3, 5e-3)}
"""Largest median over the terms, and largest single one, of the differences relative to float32 that pass.

Single terms of deep networks round badly in bf16 (a small distance between two large activations); code that is
wrong moves most of them, or one of them far.
"""
GRADIENT = "gradient norm of the RGB network"


class CanNotCompile(RuntimeError):
    """A step that this machine can't compile; the message says why."""


def check_step(
    member: Member,
    views: Views,
    *,
    buffers: StepBuffers | None,
    runtime: Runtime,
    warn: Callable[[str], object],
) -> None:
    """Compare a member's first step in the run's number format, compiled or not, with eager float32.

    ``warn`` gets one message where they differ, with what to do, or where there is no memory to compare. The member is
    left as it was. Raises CanNotCompile where the compiler fails.
    """
    if runtime.amp and runtime.device.type == "cuda":
        version = torch.backends.cudnn.version() or 0
        if version < OLDEST_CUDNN:
            warn(
                f"cuDNN {version // 10000}.{version // 100 % 100} has slow and partly wrong bf16 3-D convolutions: "
                "install 9.15 or newer (pip install -U nvidia-cudnn-cu13), or --set optim.amp=off"
            )
    exact = _exact(member, views, runtime=runtime, warn=warn)
    before = (
        None if member.state is None else {d: b.clone() for d, b in member.state.blocks.items()}
    )
    try:
        own = _as_configured(member, views, buffers=buffers, runtime=runtime)
    except Exception as error:  # a compiler's own errors are of many kinds
        if buffers is None or is_out_of_memory(error) or is_device_error(error):
            raise
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise CanNotCompile(f"the step can't be compiled ({reason})") from error
    finally:
        if before is not None and member.state is not None:
            for dtype, block in member.state.blocks.items():
                block.copy_(before[dtype])
    fault = (
        None if exact is None else verdict(own, exact, kind="bf16" if runtime.amp else "float32")
    )
    if fault is not None:
        warn(
            f"the first step differs from float32's: {fault}; "
            "compare with --set optim.amp=off and --set optim.compile=off, and see `engine doctor`"
        )


def verdict(own: Mapping[str, float], exact: Mapping[str, float], *, kind: str) -> str | None:
    """Say how a step's terms and gradient norm differ from float32's; None where they agree.

    ``kind`` is the number format, as in TOLERANCE. What isn't finite in float32 either is the member's own fault.
    """
    sound = [name for name, want in exact.items() if math.isfinite(want)]
    bad = [name for name in sound if not math.isfinite(own[name])]
    if bad:
        return f"{', '.join(bad[:3])}{', ...' if len(bad) > 3 else ''} not finite"
    apart = {name: abs(own[name] - exact[name]) / max(abs(exact[name]), 1e-3) for name in sound}
    if not apart:
        return None
    usual, single = TOLERANCE[kind]
    middle = median([apart[name] for name in sound if name != GRADIENT] or [0.0])
    worst = max(apart, key=apart.__getitem__)
    if middle <= usual and apart[worst] <= single:
        return None
    return (
        f"by {middle:.2g} in the median of {len(sound)} values (usual: up to {usual:g}), and most in {worst}, "
        f"which is {own[worst]:.4g}, in float32 {exact[worst]:.4g}"
    )


def _exact(
    member: Member, views: Views, *, runtime: Runtime, warn: Callable[[str], object]
) -> dict[str, float] | None:
    """The step in eager float32; None, with a warning, where memory does not hold it."""
    try:
        return _in_float32(member, views)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
    release_memory(runtime.device)  # only here does no traceback hold the step's tensors any more
    what = "bf16" if runtime.amp else "the compiled step"
    warn(f"no memory for a first step in float32 beside the members: {what} goes unchecked")
    return None


def _in_float32(member: Member, views: Views) -> dict[str, float]:
    loss = twin(member.loss)
    total, values = loss.evaluate(views, member.ordered, member.computed)
    total.backward()
    return _named(member, values, loss.rgb)


def twin(loss: EvolvedLoss) -> EvolvedLoss:
    """A copy with memory of its own, tensor by tensor.

    A plain deep copy of networks that lie in a FlatState would copy the whole of it beside them: a buffer's copy
    takes its storage along.
    """
    return copy.deepcopy(loss, {id(b): b.detach().clone() for b in loss.buffers()})


def _as_configured(
    member: Member, views: Views, *, buffers: StepBuffers | None, runtime: Runtime
) -> dict[str, float]:
    if buffers is None or member.state is None:
        member = copy.copy(member)
        loss = member.loss = twin(member.loss)
    else:
        loss = buffers.loss
    for _ in range(1 if buffers is None else buffers.runs_to_check):
        if buffers is not None and member.state is not None:
            buffers.state.copy_from(member.state)
        loss.zero_grad(set_to_none=True)
        total, values = evaluate(member, views, buffers=buffers, runtime=runtime)
        values = values.clone()
        total.backward()
    named = _named(member, values, loss.rgb)
    loss.zero_grad(set_to_none=True)
    return named


def _named(member: Member, values: torch.Tensor, rgb: torch.nn.Module) -> dict[str, float]:
    named = dict(zip(member.computed, values.tolist(), strict=False))
    gradients = [p.grad for p in rgb.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients).item() if gradients else 0.0
    return {name: named[name] for name in member.active} | {GRADIENT: norm}
