"""Eq. 1 in Triton: one pass over all pairs gives their values and gradients.

Every program of one launch takes a chunk of one clip of one pair, writes the chunk's gradient and one partial
sum; a second, small launch adds the sums in a fixed order: no atomics, so the same inputs give the same bits.
What a launch must know of each pair (addresses, size, kind) travels in its arguments, since a table in GPU
memory would take a copy from the host, which a CUDA graph would repeat with stale contents.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import accumulate

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

from kernels.reference import empty_grad, memory_format

BLOCK = 2048
"""Elements that a program takes at a time; twice as many of a 16-bit pair, for as many bytes under way."""
CHUNK = 32768
"""Elements of a program: it moves 200 to 400 kB, ten times as long as finding its pair among 40 takes."""
WARPS = 8
"""Warps of a program: 64 bytes of loads under way a thread."""
SUMS, SUM_WARPS = 16384, 32
"""Partial sums that ``values_kernel`` takes at a time, shared out among the pairs, and its warps."""
SCALE_CHUNK = 2**18
"""Elements of a program of ``scale_kernel``: few programs, since most often there is nothing to do."""
MAX_CLIP = 2**30
"""Most elements in a clip of one pair: positions within a clip are 32-bit."""
MAX_PAIRS = 64
"""Most pairs: five 64-bit facts of each have to fit into 4 kB of arguments."""

_MARK = tl.constexpr(2**62 + 1)
_TYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float64: tl.float64,
}


@triton.jit
def _fact(program, firsts, facts):
    """Decode the fact of a program's pair, which is the last whose first program is not after it."""
    fact = facts[0]
    for p in tl.static_range(1, len(facts)):
        fact = tl.where(program * 2 + _MARK >= firsts[p], facts[p], fact)
    return (fact - _MARK) >> 1


@triton.jit
def _pointer(address, offset, TYPE: tl.constexpr, WIDE: tl.constexpr):
    """Pointer to the element at offset; WIDE promises that it is aligned to 16 bytes."""
    pointer = address.to(tl.pointer_type(TYPE)) + offset
    if WIDE:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _chunk(
    student,
    teacher,
    grad,
    row,
    start,
    end,
    counts,
    learns,
    coef,
    STUDENT: tl.constexpr,
    TEACHER: tl.constexpr,
    GRAD: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
    SAVE: tl.constexpr,
):
    """The sum of squares of a chunk of a clip that begins at row, and the gradient of its elements."""
    SHORT: tl.constexpr = STUDENT.primitive_bitwidth + TEACHER.primitive_bitwidth == 32
    SIZE: tl.constexpr = 2 * BLOCK if SHORT else BLOCK
    student = _pointer(student, row, STUDENT, WIDE)
    teacher = _pointer(teacher, row, TEACHER, WIDE)
    grad = _pointer(grad, row, GRAD, WIDE)
    # a clip that doesn't count is not even read: what it holds can't matter
    seen = tl.where(counts, end, 0)
    if WIDE:
        # what they are already, but the compiler has to see it to mask whole vectors
        end, seen = end // 8 * 8, seen // 8 * 8
    squares = tl.zeros([SIZE], tl.float32)
    for first in range(start, end, SIZE):
        at = first + tl.arange(0, SIZE)
        s = tl.load(student + at, mask=at < seen, other=0.0).to(tl.float32)
        t = tl.load(teacher + at, mask=at < seen, other=0.0).to(tl.float32)
        diff = s - t
        squares += diff * diff
        if SAVE:
            # where, not the product alone: 0 * nan is nan
            tl.store(grad + at, tl.where(learns, coef * diff, 0.0), mask=at < end)
    return tl.sum(squares)


@triton.jit(do_not_specialize=["num_clips"])
def pairs_kernel(
    firsts,  # each pair's first program; this tuple and the next four as ``_encoded`` gives them
    students,  # address of (N, E), a clip's elements in memory order
    teachers,  # address of (N, E)
    grads,  # address of (N, E), d total / d student, written where SAVE
    shapes,  # E * 256 + index in KINDS
    masks,  # (P, N) float32
    weights,  # (P+S,) float32
    divisors,  # (P+S,) float32
    partials,  # (programs,) float32, written: each program's share of its pair's value
    num_clips,
    KINDS: tl.constexpr,  # the pairs' distinct (student's, teacher's, gradient's type, aligned to 16 bytes)
    CLIPS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    SAVE: tl.constexpr,
):
    """One chunk of one clip of one pair: its share of the pair's value, and the gradient of its elements."""
    program = tl.program_id(0).to(tl.int64)
    pair = 0
    for p in tl.static_range(1, len(firsts)):
        pair += (program * 2 + _MARK >= firsts[p]).to(tl.int32)
    place = (program - _fact(program, firsts, firsts)).to(tl.int32)
    student = _fact(program, firsts, students)
    teacher = _fact(program, firsts, teachers)
    grad = _fact(program, firsts, grads)
    shape = _fact(program, firsts, shapes)
    size = (shape // 256).to(tl.int32)
    chunks = tl.cdiv(size, CHUNK)
    clip = place // chunks
    start = place % chunks * CHUNK
    end = tl.minimum(start + CHUNK, size)
    n = tl.arange(0, CLIPS)
    count = tl.sum(tl.load(masks + pair * num_clips + n, mask=n < num_clips, other=0.0))
    mask = tl.load(masks + pair * num_clips + clip)
    weight = tl.load(weights + pair)
    share = mask / (tl.where(mask != 0, count, 1.0) * size) / tl.load(divisors + pair)
    squares = 0.0
    for k in tl.static_range(len(KINDS)):
        if shape % 256 == k:
            squares = _chunk(
                student, teacher, grad, clip.to(tl.int64) * size, start, end,
                mask != 0, mask * weight != 0, 2.0 * weight * share,
                KINDS[k][0], KINDS[k][1], KINDS[k][2], KINDS[k][3], BLOCK, SAVE,
            )  # fmt: skip
    tl.store(partials + program, share * squares)


@triton.jit(do_not_specialize=["pairs", "num_scalars", "longest"])
def values_kernel(
    firsts,  # each pair's first program and, after the last's, the number of programs; as ``_encoded``
    partials,  # (programs,) float32
    weights,  # (P+S,) float32
    divisors,  # (P+S,) float32; those of pairs are in the shares
    scalars,  # (S,) float32
    values,  # (P+S,) float32, written
    total,  # () float32, written
    pairs,
    num_scalars,
    longest,  # most programs of one pair
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """All values, each pair's from its programs' shares in a fixed order, and their weighted sum."""
    row = tl.arange(0, ROWS)
    begin = tl.zeros([ROWS], tl.int32)
    end = tl.zeros([ROWS], tl.int32)
    for p in tl.static_range(len(firsts) - 1):
        begin = tl.where(row == p, ((firsts[p] - _MARK) >> 1).to(tl.int32), begin)
        end = tl.where(row == p, ((firsts[p + 1] - _MARK) >> 1).to(tl.int32), end)
    sums = tl.zeros([ROWS, COLUMNS], tl.float32)
    for column in range(0, longest, COLUMNS):
        at = begin[:, None] + (column + tl.arange(0, COLUMNS))[None, :]
        sums += tl.load(partials + at, mask=at < end[:, None], other=0.0)
    value = tl.sum(sums, axis=1)
    weight = tl.load(weights + row, mask=row < pairs, other=0.0)
    tl.store(values + row, value, mask=row < pairs)
    # where, not the product alone: a term of weight 0 may be nan
    result = tl.sum(tl.where(weight != 0, weight * value, 0.0))
    for first in range(0, num_scalars, ROWS):
        at = first + row
        value = tl.load(scalars + at, mask=at < num_scalars, other=0.0)
        value /= tl.load(divisors + pairs + at, mask=at < num_scalars, other=1.0)
        weight = tl.load(weights + pairs + at, mask=at < num_scalars, other=0.0)
        tl.store(values + pairs + at, value, mask=at < num_scalars)
        result += tl.sum(tl.where(weight != 0, weight * value, 0.0))
    tl.store(total, result)


@triton.jit
def _scale(address, offset, end, factor, TYPE: tl.constexpr, WIDE: tl.constexpr, BLOCK):
    grad = _pointer(address, offset, TYPE, WIDE)
    if WIDE:
        end = end // 8 * 8
    for first in range(0, end, BLOCK):
        at = first + tl.arange(0, BLOCK)
        x = tl.load(grad + at, mask=at < end, other=0.0).to(tl.float32)
        tl.store(grad + at, x * factor, mask=at < end)


@triton.jit
def scale_kernel(
    firsts,  # each gradient's first program; this tuple and the next two as ``_encoded`` gives them
    grads,  # address of (E,), read and written
    shapes,  # E * 256 + index in KINDS
    scale,  # () float32
    KINDS: tl.constexpr,  # the gradients' distinct (type, aligned to 16 bytes)
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """One chunk of one gradient, scaled where it lies; not touched where the scale is 1."""
    factor = tl.load(scale)
    if factor != 1.0:
        program = tl.program_id(0).to(tl.int64)
        offset = (program - _fact(program, firsts, firsts)) * CHUNK
        address = _fact(program, firsts, grads)
        shape = _fact(program, firsts, shapes)
        end = tl.minimum(shape // 256 - offset, CHUNK).to(tl.int32)
        for k in tl.static_range(len(KINDS)):
            if shape % 256 == k:
                _scale(address, offset, end, factor, KINDS[k][0], KINDS[k][1], BLOCK)


def weighted_loss_forward(
    students: Sequence[Tensor],
    teachers: Sequence[Tensor],
    masks: Tensor,
    weights: Tensor,
    divisors: Tensor,
    scalars: Tensor,
    save: bool,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Launch the kernels; arguments and results as ``kernels.reference.weighted_loss_forward``.

    A side that is not laid out like its student's gradient is copied first. Raises ValueError for more than
    64 pairs and for a clip of more than 2**30 elements in one pair.
    """
    pairs, num_clips = masks.shape
    layouts = [memory_format(s) for s in students]
    students = [s.contiguous(memory_format=x) for s, x in zip(students, layouts, strict=True)]
    teachers = [t.contiguous(memory_format=x) for t, x in zip(teachers, layouts, strict=True)]
    grads = [empty_grad(s, t, weights) for s, t in zip(students, teachers, strict=True) if save]
    sizes = [s.numel() // num_clips for s in students]
    if pairs > MAX_PAIRS or max(sizes, default=0) > MAX_CLIP:
        raise ValueError(
            f"{pairs} pairs, of {max(sizes, default=0)} elements in the largest clip: the most that a kernel "
            f"takes is {MAX_PAIRS} pairs and {MAX_CLIP} elements"
        )
    kinds, which = _kinds([students, teachers, grads or students], sizes)
    counts = [num_clips * triton.cdiv(size, CHUNK) for size in sizes]
    firsts = [0, *accumulate(counts)]
    masks, weights, scalars = masks.contiguous(), weights.contiguous(), scalars.contiguous()
    divisors = divisors.contiguous()
    values = torch.empty_like(weights)
    total, partials = (torch.empty(n, device=weights.device) for n in ((), (firsts[-1],)))
    with _device(weights):
        if pairs:
            pairs_kernel[(firsts[-1],)](
                _encoded(firsts[:-1], pad=firsts[-1]), _addresses(students), _addresses(teachers),
                _addresses(grads or students),
                _encoded([size * 256 + k for size, k in zip(sizes, which, strict=True)]),
                masks, weights, divisors, partials, num_clips,
                KINDS=kinds, CLIPS=triton.next_power_of_2(num_clips), BLOCK=BLOCK, CHUNK=CHUNK,
                SAVE=save, num_warps=WARPS,
            )  # fmt: skip
        rows = max(16, triton.next_power_of_2(pairs))
        values_kernel[(1,)](
            _encoded(firsts, pad=firsts[-1]), partials, weights, divisors, scalars, values, total,
            pairs, len(scalars), max(counts, default=0),
            ROWS=rows, COLUMNS=SUMS // rows, num_warps=SUM_WARPS,
        )  # fmt: skip
    return total, values, grads


def scale_(grads: Sequence[Tensor], scale: Tensor) -> None:
    """Multiply tensors without gaps by a float32 number () in one launch, without waiting for the number."""
    if not grads:
        return
    sizes = [grad.numel() for grad in grads]
    kinds, which = _kinds([grads], sizes)
    firsts = [0, *accumulate(triton.cdiv(size, SCALE_CHUNK) for size in sizes)]
    with _device(scale):
        scale_kernel[(firsts[-1],)](
            _encoded(firsts[:-1], pad=firsts[-1]), _addresses(grads),
            _encoded([size * 256 + k for size, k in zip(sizes, which, strict=True)]),
            scale, KINDS=kinds, BLOCK=BLOCK, CHUNK=SCALE_CHUNK, num_warps=WARPS,
        )  # fmt: skip


def _encoded(facts: Sequence[int], pad: int = 0) -> tuple[int, ...]:
    """A launch's integers, one a pair, so that neither what they are nor, within 8, how many compiles anew.

    Triton compiles apart for integers that are 1, are multiples of 16 or need 64 bits: these are all odd and
    need 64.
    """
    return tuple(2 * fact + _MARK.value for fact in (*facts, *[pad] * (-len(facts) % 8)))


def _addresses(tensors: Sequence[Tensor]) -> tuple[int, ...]:
    return _encoded([x.data_ptr() for x in tensors])


def _kinds(
    sides: Sequence[Sequence[Tensor]], sizes: Sequence[int]
) -> tuple[tuple[tuple[object, ...], ...], list[int]]:
    """The distinct kinds of pairs, in an order that is theirs, and each pair's index among them."""
    kinds = [
        (*(x.dtype for x in own), size % 8 == 0 and all(x.data_ptr() % 16 == 0 for x in own))
        for *own, size in zip(*sides, sizes, strict=True)
    ]
    order = sorted(set(kinds), key=str)
    return tuple((*(_TYPES[d] for d in k[:-1]), k[-1]) for k in order), [*map(order.index, kinds)]


def _device(x: Tensor) -> AbstractContextManager[object]:
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()
