"""Raw frames to normalised RGB and grey clips: the op beside the same in plain PyTorch.

    python benchmarks/bench_clip_views.py [--json FILE]

Bytes at the floor, which is what the op moves: three bytes of a pixel read once, four numbers written once.
A row is timed only if its numbers agree with the definition's.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bench_weighted_loss import quantiles, report  # puts this repository first on the path, too
from torch import Tensor

import kernels
from kernels.reference import LUMA

SHAPES = {"12x64x64": (16, 12, 64, 64, 3), "20x112x112": (16, 20, 112, 112, 3)}


def plain(
    frames: Tensor, mean: Tensor, std: Tensor, *, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The definition, operation by operation."""
    x = frames.float() / 255
    luma = torch.tensor(LUMA, device=x.device)
    rgb = ((x - mean) / std).to(dtype)
    grey = ((x @ luma - mean @ luma) / std.mean()).to(dtype)
    return rgb.permute(0, 4, 1, 2, 3), grey[:, None]


def cases(case: str, device: str, dtype: torch.dtype) -> list[dict[str, Any]]:
    """Rows of one case."""
    torch.manual_seed(0)
    frames = torch.randint(0, 256, SHAPES[case], dtype=torch.uint8, device=device)
    mean = torch.tensor([0.43, 0.39, 0.37], device=device)
    std = torch.tensor([0.22, 0.22, 0.22], device=device)
    functions: dict[str, Callable[..., tuple[Tensor, Tensor]]]
    functions = {"op": kernels.clip_views, "plain": plain}
    if device == "cuda":
        functions["plain, compiled"] = torch.compile(plain)
    moved = frames.numel() + frames.numel() // 3 * 4 * dtype.itemsize
    want = plain(frames, mean, std, dtype=dtype)
    rows = []
    for name, function in functions.items():
        step = lambda function=function: function(frames, mean, std, dtype=dtype)  # noqa: E731
        torch.testing.assert_close(step(), want, rtol=1e-2, atol=1e-2)
        rows.append(
            {
                "bench": "clip_views",
                "case": f"{case} {str(dtype)[6:]}",
                "what": name,
                "ms": quantiles(step, device),
                "bytes": moved if name == "op" else None,
                "floor_bytes": moved,
            }
        )
    return rows


def main() -> None:
    """Run on the device at hand: one small case on a CPU, all on a GPU."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="append the rows to this JSON Lines file")
    args = parser.parse_args()
    if torch.cuda.is_available():
        plan = [(c, "cuda", d) for c in SHAPES for d in (torch.float32, torch.bfloat16)]
    else:
        plan = [("12x64x64", "cpu", torch.float32)]
    report([row for item in plan for row in cases(*item)], args.json)


if __name__ == "__main__":
    main()
