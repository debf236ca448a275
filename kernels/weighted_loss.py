"""Eq. 1 in Triton: one pass over each pair gives its value and its gradient.

Each clip of a pair is shared out among ``tiles`` programs. Every program writes one partial sum, and a
second kernel adds them in a fixed order: no atomics, so the same inputs give the same bits.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

from kernels.reference import empty_grad, memory_format

BLOCK = 2048
"""Elements that a program takes at a time."""
WARPS = 8
"""Warps of a program: 8 elements a thread; with 16, float32 pairs spill registers on sm_80."""
MAX_TILES = 64
"""Most programs per clip: 16 clips then fill a GPU several times over."""
MAX_CLIP = 2**30
"""Most elements in a clip of one pair: positions within a clip are 32-bit."""


@triton.jit(do_not_specialize=["pair", "num_clips"])
def pair_kernel(
    student,  # (N, E), a clip's elements in memory order
    teacher,  # (N, E)
    masks,  # (P, N) float32
    weights,  # (P+S,) float32
    grads,  # (N, E), d total / d student, written where SAVE
    partials,  # (P, N, tiles) float32: sums of squares over E, each tile's share
    pair,
    num_clips,
    size,  # E
    CLIPS: tl.constexpr,
    SIZE: tl.constexpr,
    SAVE: tl.constexpr,
):
    """One tile of one clip of one pair: its share of the squares, and the gradient of its elements."""
    tile = tl.program_id(0)
    tiles = tl.num_programs(0)
    clip = tl.program_id(1)
    mask = tl.load(masks + pair * num_clips + clip)
    weight = tl.load(weights + pair)
    # a clip that doesn't count is not even read: what it holds can't matter
    end = tl.where(mask != 0, size, 0)
    learns = mask * weight != 0
    n = tl.arange(0, CLIPS)
    count = tl.sum(tl.load(masks + pair * num_clips + n, mask=n < num_clips, other=0.0))
    coef = 2.0 * weight * mask / (tl.where(learns, count, 1.0) * size)
    row = clip.to(tl.int64) * size
    squares = tl.zeros([SIZE], tl.float32)
    for start in range(tile * SIZE, size, tiles * SIZE):
        at = start + tl.arange(0, SIZE)
        s = tl.load(student + row + at, mask=at < end, other=0.0).to(tl.float32)
        t = tl.load(teacher + row + at, mask=at < end, other=0.0).to(tl.float32)
        diff = s - t
        squares += diff * diff
        if SAVE:
            # where, not the product alone: 0 * nan is nan
            tl.store(grads + row + at, tl.where(learns, coef * diff, 0.0), mask=at < size)
    tl.store(partials + (pair * num_clips + clip) * tiles + tile, tl.sum(squares) / size)


@triton.jit(do_not_specialize=["num_clips"])
def values_kernel(
    partials,  # (P, N, TILES) float32
    masks,  # (P, N) float32
    values,  # (P+S,) float32, the first P written
    num_clips,
    TILES: tl.constexpr,
    CLIPS: tl.constexpr,
):
    """One pair's value from its partial sums, in the order of clips."""
    pair = tl.program_id(0)
    total = 0.0
    count = 0.0
    for first in range(0, num_clips, CLIPS):
        n = first + tl.arange(0, CLIPS)
        at = pair * num_clips + n
        mask = tl.load(masks + at, mask=n < num_clips, other=0.0)
        parts = at[:, None] * TILES + tl.arange(0, TILES)[None, :]
        square = tl.sum(tl.load(partials + parts, mask=(n < num_clips)[:, None], other=0.0), axis=1)
        total += tl.sum(mask * square)
        count += tl.sum(mask)
    tl.store(values + pair, total / tl.where(count > 0, count, 1.0))


def weighted_loss_forward(
    students: Sequence[Tensor],
    teachers: Sequence[Tensor],
    masks: Tensor,
    weights: Tensor,
    scalars: Tensor,
    save: bool,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Launch the kernels; arguments and results as ``kernels.reference.weighted_loss_forward``.

    A teacher that is not laid out like its student is copied first. Raises ValueError for a clip of more
    than 2**30 elements in one pair.
    """
    pairs, num_clips = masks.shape
    masks, weights = masks.contiguous(), weights.contiguous()
    values = torch.empty_like(weights)
    grads = [empty_grad(s, t, weights) for s, t in zip(students, teachers, strict=True) if save]
    largest = max((s[0].numel() for s in students), default=1)
    if largest > MAX_CLIP:
        raise ValueError(f"a clip of {largest} elements in one pair: the most is {MAX_CLIP}")
    tiles = min(MAX_TILES, triton.next_power_of_2(triton.cdiv(largest, BLOCK)))
    partials = torch.empty((pairs, num_clips, tiles), dtype=torch.float32, device=masks.device)
    with torch.cuda.device(masks.device) if masks.is_cuda else nullcontext():
        for p, (s, t) in enumerate(zip(students, teachers, strict=True)):
            layout = memory_format(s)
            s, t = s.contiguous(memory_format=layout), t.contiguous(memory_format=layout)
            pair_kernel[(tiles, num_clips)](
                s, t, masks, weights, grads[p] if save else partials, partials,
                p, num_clips, s[0].numel(),
                CLIPS=triton.next_power_of_2(num_clips), SIZE=BLOCK, SAVE=save,
                num_warps=WARPS,
            )  # fmt: skip
        if pairs:
            values_kernel[(pairs,)](partials, masks, values, num_clips, TILES=tiles, CLIPS=16)
    values[pairs:] = scalars
    total = torch.where(weights != 0, weights * values, 0.0).sum()
    return total, values, grads
