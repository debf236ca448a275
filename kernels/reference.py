"""The ops in plain PyTorch: what the kernels compute, the path of tensors off a GPU, and the tests' oracle.

``weighted_loss`` is Eq. 1 as written, differentiated by autograd: read it first. ``weighted_loss_forward``
gives the same numbers and the gradient in one go, and is what a CPU runs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

SUMMED = 1 << 15
"""Most squares that a running sum in float32 takes up."""
LUMA = (0.299, 0.587, 0.114)
"""ITU-R BT.601 weights of red, green and blue."""


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
    """Eq. 1, L = sum_t lambda_t L_t / d_t, left to autograd; arguments and results as ``kernels.weighted_loss``."""
    values = [scalars.new_zeros(0)]
    for s, t, mask, weight in zip(students, teachers, masks, weights, strict=False):
        diff = s.to(weights.dtype) - (t if teacher_grad else t.detach()).to(weights.dtype)
        # where, not a product, for clips that don't count and for gradients of weight 0: 0 * nan is nan
        diff = torch.where((mask != 0).view(-1, *[1] * (s.dim() - 1)), diff, 0.0)
        diff = torch.where(weight != 0, diff, diff.detach())
        per_clip = diff.square().flatten(1).mean(1)
        values.append(
            ((mask * per_clip).sum() / torch.where(mask.sum() > 0, mask.sum(), 1)).view(1)
        )
    terms = torch.cat([*values, scalars]) / divisors
    return torch.where(weights != 0, weights * terms, 0.0).sum(), terms.detach()


def weighted_loss_forward(
    students: Sequence[Tensor],
    teachers: Sequence[Tensor],
    masks: Tensor,
    weights: Tensor,
    divisors: Tensor,
    scalars: Tensor,
    save: bool,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Compute Eq. 1 and its gradient.

    Returns the total (), the values (P+S,) and, if ``save``, the total's gradient to each student (see
    ``empty_grad``), else an empty list. The gradient is zero for clips that don't count and for pairs of
    weight 0, whatever the inputs hold there; a teacher's is its negative.
    """
    accumulate, num_clips = weights.dtype, masks.shape[1]
    kept = masks != 0
    complete, zero = kept.all(1).tolist(), (weights == 0).tolist()
    sizes = [s.numel() // num_clips for s in students]
    count = masks.sum(1, keepdim=True)
    of_pairs, of_scalars = divisors[: len(sizes)], divisors[len(sizes) :]
    shares = masks / torch.where(count > 0, count, 1) / masks.new_tensor(sizes)[:, None]
    shares = shares / of_pairs[:, None]
    coefs = 2 * weights[: len(sizes), None] * shares
    rows = coefs.unsqueeze(2).unbind(0)
    norms, grads = [], []
    for p, (s, t) in enumerate(zip(students, teachers, strict=True)):
        grad = empty_grad(s, t, weights)
        wide = grad if grad.dtype == accumulate else torch.empty_like(grad, dtype=accumulate)
        s, t = (x if x.dtype == accumulate else x.to(accumulate) for x in (s, t))
        torch.sub(s, t, out=wide)
        clips = wide.as_strided((num_clips, sizes[p]), (sizes[p], 1))
        if not complete[p]:
            clips.index_fill_(0, (~kept[p]).nonzero().view(-1), 0.0)
        norms.append(_norms(clips))
        if save:
            if zero[p]:
                wide.zero_()  # not by the product: 0 * nan is nan
            else:
                clips.mul_(rows[p])
            grads.append(grad if wide is grad else grad.copy_(wide))
    squares = torch.stack(norms).square_() if norms else masks
    values = torch.cat([(shares * squares).sum(1), scalars / of_scalars])
    return torch.where(weights != 0, weights * values, 0.0).sum(), values, grads


def _norms(clips: Tensor) -> Tensor:
    """Norms (N,) of the rows (N, E), which read memory once, by sums short enough to be exact in float32."""
    norms: Tensor
    if clips.shape[1] <= SUMMED:
        norms = torch.linalg.vector_norm(clips, dim=1)
    else:
        blocks = [torch.linalg.vector_norm(x, dim=1) for x in clips.split(SUMMED, dim=1)]
        norms = torch.linalg.vector_norm(torch.stack(blocks), dim=0)
    return norms


def empty_grad(student: Tensor, teacher: Tensor, weights: Tensor) -> Tensor:
    """Room for a pair's gradient: bfloat16 for a bfloat16 pair, else the accumulation's dtype.

    float16 is widened: a mean's gradient is below its range until the loss scale comes in, on the way back.
    """
    both = student.dtype == teacher.dtype == torch.bfloat16
    dtype = torch.bfloat16 if both else weights.dtype
    return torch.empty_like(student, dtype=dtype, memory_format=memory_format(student))


def memory_format(x: Tensor) -> torch.memory_format:
    """Layout in which a tensor's clips are read: channels-last where it already is that, else contiguous."""
    if not x.is_contiguous():
        if x.dim() == 5 and x.is_contiguous(memory_format=torch.channels_last_3d):
            return torch.channels_last_3d
        if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
            return torch.channels_last
    return torch.contiguous_format


def clip_views(
    frames: Tensor, mean: Tensor, std: Tensor, *, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Normalised RGB and grey clips; arguments and results as ``kernels.clip_views``."""
    num_clips, num_frames, height, width, _ = frames.shape
    rgb = torch.empty(frames.shape, dtype=dtype, device=frames.device)
    grey = torch.empty((*frames.shape[:4], 1), dtype=dtype, device=frames.device)
    # (x/255 - mean)/std = x * scale + shift, and grey is a weighted sum of the normalised channels; matrix
    # columns of several pixels at once let both run on long rows instead of on rows of three
    pixels = num_frames * height * width
    group = math.gcd(pixels, 16)
    scale, shift = (1 / (255 * std)).repeat(group), (-mean / std).repeat(group)
    luma = std.new_tensor(LUMA) * std / std.mean()
    to_grey = torch.kron(torch.eye(group, dtype=std.dtype, device=std.device), luma[:, None])
    scratch = torch.empty(
        (pixels // max(group, 1), 3 * group), dtype=torch.float32, device=frames.device
    )
    # clip by clip: what one step writes the next finds in the cache
    for n in range(num_clips if pixels else 0):
        clip = rgb[n].view(scratch.shape) if dtype == torch.float32 else scratch
        clip.view(frames.shape[1:]).copy_(frames[n])
        torch.addcmul(shift, clip, scale, out=clip)
        if clip is scratch:
            rgb[n].copy_(clip.view(frames.shape[1:]))
        grey[n].view(-1, group).copy_(clip @ to_grey)
    return rgb.permute(0, 4, 1, 2, 3), grey.permute(0, 4, 1, 2, 3)
