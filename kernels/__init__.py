"""The engine's fused ops: a Triton kernel on a CUDA tensor, plain PyTorch (``kernels.reference``) elsewhere.

Both ops are ``torch.library`` ops, so that ``torch.compile`` keeps them whole in one graph. Triton is optional, and a
kernel that can't be built on a machine gives way to the reference, with a warning.
Under ``TRITON_INTERPRET=1`` the kernels run on CPU tensors, slowly, for tests.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from kernels import reference

try:
    from kernels.clip_views import clip_views_forward
    from kernels.weighted_loss import scale_, weighted_loss_forward

    HAS_TRITON = True
except ModuleNotFoundError as error:
    if (error.name or "").split(".")[0] != "triton":
        raise
    HAS_TRITON = False

__all__ = ["HAS_TRITON", "clip_views", "weighted_loss"]

Result = TypeVar("Result")

__engine_kernels__ = True
"""Tells this package from the registry's package of the same top-level name."""

_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_not_built: dict[str, str] = {}
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def weighted_loss(
    students: Sequence[Tensor],
    teachers: Sequence[Tensor],
    masks: Tensor,
    weights: Tensor,
    divisors: Tensor,
    scalars: Tensor,
    *,
    teacher_grad: bool = False,
) -> tuple[Tensor, Tensor]:
    """Eq. 1 of the paper, L = sum_t lambda_t L_t: P squared-error terms and S ready-made scalar terms.

    Pair p's value is the mean over the clips that count of the mean squared difference within a clip,
    ``sum_n masks[p, n] mean((s_n - t_n)^2) / sum_n masks[p, n] / divisors[p]``, and 0 where no clip counts.

    students, teachers: P tensors each, equal shapes (N, ...) of rank 2 or more within a pair, one N for all;
        float32, bfloat16 or float16, the two sides of a pair independently; accumulated in float32. Any
        strides: a side that is neither contiguous nor channels-last, or laid out unlike its student, is
        copied first on a GPU, which takes at most 64 pairs, and 2**30 elements a clip.
    masks: (P, N) float32, 1 where clip n counts for pair p, 0 where not (such as without sound). What a
        clip that doesn't count holds, nan included, reaches neither values nor gradients.
    weights: (P+S,) float32, pairs first. Not differentiated. A term of weight exactly 0 adds nothing to the
        total and passes no gradient, even where it is nan; its value is computed all the same.
    divisors: (P+S,) float32, above 0: what each term is divided by, in value, total and gradient; 1 leaves it as it
        is. Not differentiated.
    scalars: (S,) float32, the terms that are scalars already; their gradient is the weight over the divisor.
    teacher_grad: let gradients through to the teachers too.

    Returns the total () and the unweighted values (P+S,), divided, both float32; the values carry no gradient. P or
    S may be 0. Gradients have their input's dtype and can't be differentiated again. masks, weights,
    divisors and scalars all in float64 accumulate in float64 instead, without a kernel. Raises ValueError that names
    the argument for shapes, dtypes or devices that don't fit.
    """
    _check_weighted_loss(students, teachers, masks, weights, divisors, scalars)
    if not teacher_grad:
        teachers = [t.detach() for t in teachers]
    inputs = (*students, *teachers)
    save = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    constants = (masks.detach(), weights.detach(), divisors.detach())
    total, values, _ = _weighted_loss(list(students), list(teachers), *constants, scalars, save)
    return total, values


def clip_views(
    frames: Tensor, mean: Tensor, std: Tensor, *, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Normalised RGB and grey clips of raw frames, in one pass.

    frames: (N, F, H, W, 3) uint8. Clips may lie apart in memory (such as ``frames[:, :T]``); where a clip
        is not contiguous in itself, a GPU copies the frames first.
    mean, std: (3,) float32, of RGB in [0, 1]; std positive.
    dtype: of the results: float32, bfloat16 or float16; computed in float32.

    Returns rgb (N, 3, F, H, W) = (frames / 255 - mean) / std, and grey (N, 1, F, H, W): the BT.601 luma of
    frames / 255, less the luma of ``mean``, over the mean of ``std``. Both are channels_last_3d. Not
    differentiable. Raises ValueError for shapes, dtypes or devices that don't fit.
    """
    if frames.dim() != 5 or frames.shape[-1] != 3 or frames.dtype != torch.uint8:
        raise ValueError(
            f"frames must be uint8 (N, F, H, W, 3), not {frames.dtype} {tuple(frames.shape)}"
        )
    for name, x in (("mean", mean), ("std", std)):
        if x.shape != (3,) or x.dtype != torch.float32 or x.device != frames.device:
            raise ValueError(
                f"{name} must be float32 (3,) on {frames.device}, "
                f"not {x.dtype} {tuple(x.shape)} on {x.device}"
            )
    if dtype not in _DTYPES[:3]:
        raise ValueError(f"dtype must be float32, bfloat16 or float16, not {dtype}")
    rgb, grey = _clip_views(frames, mean.detach(), std.detach(), dtype)
    return rgb, grey


def not_built() -> dict[str, str]:
    """Kernels that could not be built on this machine, and why: the reference does their work."""
    return dict(_not_built)


def _on_kernel(x: Tensor, name: str) -> bool:
    """Whether a Triton kernel takes this tensor."""
    return HAS_TRITON and x.is_cuda != _INTERPRETED and name not in _not_built


def _or_instead(name: str, launch: Callable[[], Result], instead: Callable[[], Result]) -> Result:
    """Launch a kernel, or do what comes instead of one that can't be built, now and from then on.

    Nothing is written before a launch, so what comes instead begins with whole inputs.
    """
    try:
        return launch()
    except Exception as error:  # Triton's own errors, a C compiler's, a linker's: of no common kind
        if not _is_of_building(error):
            raise
        _not_built[name] = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
    text = f"the Triton kernel {name} can't be built here ({_not_built[name]}): PyTorch computes it, slower"
    warnings.warn(text, RuntimeWarning, stacklevel=2)
    return instead()


def _is_of_building(error: Exception) -> bool:
    """Not what a caller did (ValueError), nor the device's memory or state; in the interpreter nothing is built."""
    of_device = (torch.OutOfMemoryError, *filter(None, [getattr(torch, "AcceleratorError", None)]))
    said = str(error)
    # A driver refuses an image that does not suit it at its first launch.
    refused = any(sign in said for sign in ("image", "PTX", "toolchain"))
    from_driver = said.startswith(("CUDA error:", "Triton Error [CUDA]")) and not refused
    at_work = "out of memory" in said or "capturing" in said or from_driver
    others = isinstance(error, (ValueError, MemoryError, *of_device))
    return not (_INTERPRETED or at_work or others)


def _check_weighted_loss(
    students: Sequence[Tensor],
    teachers: Sequence[Tensor],
    masks: Tensor,
    weights: Tensor,
    divisors: Tensor,
    scalars: Tensor,
) -> None:
    pairs = len(students)
    if len(teachers) != pairs:
        raise ValueError(
            f"{pairs} students but {len(teachers)} teachers: give one teacher a student"
        )
    if masks.dim() != 2 or masks.shape[0] != pairs or (pairs and masks.shape[1] == 0):
        raise ValueError(f"masks must be (P, N) = ({pairs}, clips), not {tuple(masks.shape)}")
    if scalars.dim() != 1:
        raise ValueError(f"scalars must be (S,), not {tuple(scalars.shape)}")
    for name, x in (("weights", weights), ("divisors", divisors)):
        if x.shape != (pairs + len(scalars),):
            raise ValueError(
                f"{name} must be (P + S,) = ({pairs + len(scalars)},), not {tuple(x.shape)}"
            )
    dtype = torch.float64 if weights.dtype == torch.float64 else torch.float32
    constants = {"weights": weights, "masks": masks, "divisors": divisors, "scalars": scalars}
    for name, x in constants.items():
        if x.dtype != dtype or x.device != weights.device:
            raise ValueError(
                f"{name} must be {dtype} on {weights.device} (as weights), not {x.dtype} on {x.device}"
            )
    for p, (s, t) in enumerate(zip(students, teachers, strict=True)):
        fits = s.dim() >= 2 and s.shape[0] == masks.shape[1] and s.numel() > 0
        if s.shape != t.shape or not fits:
            raise ValueError(
                f"pair {p}: student {tuple(s.shape)} and teacher {tuple(t.shape)} must have one shape "
                f"(N, ...) of rank 2 or more, none of it 0, with N = {masks.shape[1]} as in masks"
            )
        if s.dtype not in _DTYPES or t.dtype not in _DTYPES:
            raise ValueError(
                f"pair {p}: {s.dtype} and {t.dtype} must be floats of 16, 32 or 64 bits"
            )
        if s.device != weights.device or t.device != weights.device:
            raise ValueError(
                f"pair {p}: student is on {s.device}, teacher on {t.device}, weights on {weights.device}"
            )


@torch.library.custom_op("engine_kernels::weighted_loss", mutates_args=())
def _weighted_loss(
    students: Sequence[Tensor],
    teachers: Sequence[Tensor],
    masks: Tensor,
    weights: Tensor,
    divisors: Tensor,
    scalars: Tensor,
    save: bool,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    arguments = (students, teachers, masks, weights, divisors, scalars, save)
    if _on_kernel(weights, "weighted_loss") and weights.dtype == torch.float32:
        return _or_instead(
            "weighted_loss",
            lambda: weighted_loss_forward(*arguments),
            lambda: reference.weighted_loss_forward(*arguments),
        )
    return reference.weighted_loss_forward(*arguments)


@_weighted_loss.register_fake
def _(
    students: Sequence[Tensor],
    teachers: Sequence[Tensor],
    masks: Tensor,
    weights: Tensor,
    divisors: Tensor,
    scalars: Tensor,
    save: bool,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    pairs = zip(students, teachers, strict=True)
    grads = [reference.empty_grad(s, t, weights) for s, t in pairs if save]
    return weights.new_empty(()), torch.empty_like(weights), grads


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    students, teachers, _, weights, divisors, _, _ = inputs
    _, values, grads = output
    ctx.mark_non_differentiable(values, *grads)
    ctx.set_materialize_grads(False)  # else backward would fill zeros shaped like every gradient
    ctx.save_for_backward(weights, divisors, *grads)
    ctx.dtypes = [(s.dtype, t.dtype) for s, t in zip(students, teachers, strict=True)]


def _backward(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple[Any, ...]:
    weights, divisors, *grads = ctx.saved_tensors
    pairs = len(ctx.dtypes)
    to_students: list[Tensor | None] = [None] * pairs
    to_teachers: list[Tensor | None] = [None] * pairs
    if upstream is None:
        return to_students, to_teachers, None, None, None, None, None
    need_student, need_teacher, *_rest = ctx.needs_input_grad
    for p, (_, dtype) in enumerate(ctx.dtypes):
        if need_teacher[p]:
            to_teachers[p] = _scaled(grads[p], -upstream, dtype)
    kept = [p for p in range(pairs) if need_student[p] and grads[p].dtype == ctx.dtypes[p][0]]
    in_place = _scale_in_place([grads[p] for p in kept], upstream)
    for p, (dtype, _) in enumerate(ctx.dtypes):
        if need_student[p]:
            ready = in_place and p in kept
            to_students[p] = grads[p] if ready else _scaled(grads[p], upstream, dtype)
    to_scalars = weights[pairs:] / divisors[pairs:] * upstream
    return to_students, to_teachers, None, None, None, to_scalars, None


def _scaled(grad: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """grad * scale, multiplied in float32 and rounded once; plain PyTorch, so that a compiler can fuse it."""
    # a scale of no dimensions would be rounded to grad's dtype first
    scale = scale.view([1] * grad.dim())
    return torch.mul(grad, scale, out=torch.empty_like(grad, dtype=dtype))


def _scale_in_place(grads: list[Tensor], upstream: Tensor) -> bool:
    """Scale saved gradients where they lie, for a backward that hands them out; whether that was done.

    Mostly upstream is autograd's 1 and nothing is moved: a second pass over the gradients would add two
    thirds to the bytes of the first. A GPU finds that out for itself, so that nobody waits for it. Never
    while the graph is kept, to be walked again, nor while one is traced, where a compiler fuses the product
    into whatever reads it.
    """
    eager = type(upstream) is Tensor and not torch.compiler.is_compiling()
    if not eager or torch._C._autograd._get_current_graph_task_keep_graph():
        return False
    if _on_kernel(upstream, "scale") and upstream.dtype == torch.float32:

        def launch() -> bool:
            scale_(grads, upstream)
            return True

        return _or_instead("scale", launch, lambda: False)
    return upstream.device.type == "cpu" and upstream.item() == 1


_weighted_loss.register_autograd(_backward, setup_context=_save_for_backward)


@torch.library.custom_op("engine_kernels::clip_views", mutates_args=())
def _clip_views(
    frames: Tensor, mean: Tensor, std: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    if _on_kernel(frames, "clip_views"):
        return _or_instead(
            "clip_views",
            lambda: clip_views_forward(frames, mean, std, dtype),
            lambda: reference.clip_views(frames, mean, std, dtype=dtype),
        )
    return reference.clip_views(frames, mean, std, dtype=dtype)


@_clip_views.register_fake
def _(frames: Tensor, mean: Tensor, std: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    rgb = frames.new_empty(frames.shape, dtype=dtype)
    grey = frames.new_empty((*frames.shape[:4], 1), dtype=dtype)
    return rgb.permute(0, 4, 1, 2, 3), grey.permute(0, 4, 1, 2, 3)
