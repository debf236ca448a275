"""Raw frames to normalised RGB and grey clips in Triton: one read of the bytes, both views written."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
from __future__ import annotations

from contextlib import nullcontext

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

from kernels.reference import LUMA

BLOCK = 1024
"""Pixels per program."""
MAX_CLIP = 2**29
"""Most pixels in a clip: positions of its bytes are 32-bit."""

_RED: tl.constexpr = tl.constexpr(LUMA[0])
_GREEN: tl.constexpr = tl.constexpr(LUMA[1])
_BLUE: tl.constexpr = tl.constexpr(LUMA[2])


@triton.jit
def views_kernel(
    frames,  # uint8, clips of F*H*W*3 bytes, clip_stride apart
    mean,  # (3,) float32
    std,  # (3,) float32
    rgb,  # (N, F*H*W, 3)
    grey,  # (N, F*H*W)
    pixels,  # F*H*W
    clip_stride,
    SIZE: tl.constexpr,
):
    """SIZE pixels of one clip, to both views."""
    clip = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0) * SIZE
    frames += clip * clip_stride
    rgb += clip * pixels * 3
    grey += clip * pixels
    mean_r, mean_g, mean_b = tl.load(mean), tl.load(mean + 1), tl.load(mean + 2)
    std_r, std_g, std_b = tl.load(std), tl.load(std + 1), tl.load(std + 2)
    lane = tl.arange(0, SIZE)
    # RGB as one flat row of bytes, so that loads and stores are wide
    for part in tl.static_range(3):
        at = first * 3 + part * SIZE + lane
        inside = at < pixels * 3
        x = tl.load(frames + at, mask=inside, other=0).to(tl.float32)
        channel = at % 3
        centre = tl.where(channel == 0, mean_r, tl.where(channel == 1, mean_g, mean_b))
        scale = tl.where(channel == 0, 1 / std_r, tl.where(channel == 1, 1 / std_g, 1 / std_b))
        tl.store(rgb + at, (x * (1 / 255) - centre) * scale, mask=inside)
    # the same bytes again, from the cache, a pixel's three together
    at = first + lane
    inside = at < pixels
    r = tl.load(frames + at * 3, mask=inside, other=0).to(tl.float32)
    g = tl.load(frames + at * 3 + 1, mask=inside, other=0).to(tl.float32)
    b = tl.load(frames + at * 3 + 2, mask=inside, other=0).to(tl.float32)
    luma = (_RED * r + _GREEN * g + _BLUE * b) * (1 / 255)
    centre = _RED * mean_r + _GREEN * mean_g + _BLUE * mean_b
    scale = 3 / (std_r + std_g + std_b)
    tl.store(grey + at, (luma - centre) * scale, mask=inside)


def clip_views_forward(
    frames: Tensor, mean: Tensor, std: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Launch the kernel; arguments and results as ``kernels.clip_views``.

    Frames whose clips are not contiguous in themselves are copied first. Raises ValueError for clips of
    more than 2**29 pixels.
    """
    num_clips, num_frames, height, width, _ = frames.shape
    pixels = num_frames * height * width
    if pixels > MAX_CLIP:
        raise ValueError(f"a clip of {pixels} pixels: the most is {MAX_CLIP}")
    rgb = torch.empty(frames.shape, dtype=dtype, device=frames.device)
    grey = torch.empty((*frames.shape[:4], 1), dtype=dtype, device=frames.device)
    if frames.numel():
        if not frames[0].is_contiguous():
            frames = frames.contiguous()
        with torch.cuda.device(frames.device) if frames.is_cuda else nullcontext():
            views_kernel[(triton.cdiv(pixels, BLOCK), num_clips)](
                frames, mean.contiguous(), std.contiguous(), rgb, grey, pixels, frames.stride(0),
                SIZE=BLOCK,
            )  # fmt: skip
    return rgb.permute(0, 4, 1, 2, 3), grey.permute(0, 4, 1, 2, 3)
