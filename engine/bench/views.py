"""Raw frames to normalised RGB and grey clips: the engine's op beside the same in plain PyTorch.

Bytes are those of the floor, which is what the op moves: three bytes of a pixel read once, four numbers written
once. FLOPs are counted by hand: a product and a sum for each of three colours, and five operations and again a
product and a sum for grey.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

import kernels
from engine.bench.base import Bench, shape
from engine.bench.rows import Row
from engine.data.views import RGB_MEAN, RGB_STD
from kernels.reference import LUMA

PIXEL_FLOPS = 3 * 2 + 5 + 2
EAGER = "eager"


def plain(
    frames: Tensor, mean: Tensor, std: Tensor, *, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The definition, operation by operation; see ``kernels.clip_views`` for shapes and dtypes."""
    x = frames.float() / 255
    luma = torch.tensor(LUMA, device=x.device)
    rgb = ((x - mean) / std).to(dtype)
    grey = ((x @ luma - mean @ luma) / std.mean()).to(dtype)
    return rgb.permute(0, 4, 1, 2, 3), grey[:, None]


def floor_bytes(pixels: int, dtype: torch.dtype) -> int:
    """The least bytes moved: RGB bytes in, RGB and grey numbers out."""
    return pixels * (3 + 4 * dtype.itemsize)


def run(bench: Bench) -> Iterator[Row]:
    """Rows of a batch of the recipe's size; on a GPU in bf16 too."""
    clip, n = bench.recipe.clip, bench.recipe.optim.batch_size
    frames = clip.num_frames + clip.num_future_frames
    torch.manual_seed(bench.recipe.seed)
    size = (n, frames, clip.size, clip.size, 3)
    raw = torch.randint(0, 256, size, dtype=torch.uint8, device=bench.device)
    mean, std = (torch.tensor(x, device=bench.device) for x in (RGB_MEAN, RGB_STD))
    peers: dict[str, Callable[..., tuple[Tensor, Tensor]]]
    peers = {"kernels.clip_views": kernels.clip_views, EAGER: plain, **bench.compiled(plain)}
    for dtype in (torch.float32, torch.bfloat16) if bench.gpu else (torch.float32,):
        calls = {name: partial(peer, raw, mean, std, dtype=dtype) for name, peer in peers.items()}
        pixels = raw.numel() // 3
        yield from bench.memory_rows(
            bench.agreeing("views", calls, reference=EAGER),
            ours=["kernels.clip_views"],
            bytes=floor_bytes(pixels, dtype),
            part="views",
            shape=f"{shape(*size)} {str(dtype)[6:]}",
            flops=pixels * PIXEL_FLOPS,
        )
