"""Eq. 1, forward and backward: the fused op beside a plain sum of mean squared errors.

    python benchmarks/bench_weighted_loss.py [--json FILE]

Pairs are distillation's: five activations of an R3D-18, for three modalities, the target's gradient stopped.
Bytes at the floor, which is what the op itself moves: each student and each teacher read once, each student's
gradient written once. An upstream gradient other than 1, and any on a GPU, adds a read and a write of the
gradient (compiled, that melts into whatever consumes it). A row is timed only if its gradients agree with the
reference's.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

import kernels
from kernels import reference

# channels, frames, height, width of the stem and the four stages
LAYERS = {
    "small": [(16, 8, 16, 16), (16, 8, 16, 16), (32, 4, 8, 8), (64, 2, 4, 4), (128, 1, 2, 2)],
    "r3d_18, 16x112x112": [
        (64, 16, 56, 56),
        (64, 16, 56, 56),
        (128, 8, 28, 28),
        (256, 4, 14, 14),
        (512, 2, 7, 7),
    ],
}
MODALITIES, CLIPS = 3, 16


def quantiles(step: Callable[[], Any], device: str, *, seconds: float = 0.5) -> list[float]:
    """The 20th, 50th and 80th percentile of a step's milliseconds, after a warm-up."""
    if device == "cuda":
        from triton.testing import do_bench  # empties the L2 cache between steps

        return list(do_bench(step, quantiles=[0.2, 0.5, 0.8]))
    if sys.platform == "linux":
        # as in a training step, whose other tensors keep the heap: freed memory stays with the process, and
        # no step pays for getting it back (M_MMAP_THRESHOLD, then M_TRIM_THRESHOLD)
        ctypes.CDLL(None).mallopt(-3, 1 << 25)
        ctypes.CDLL(None).mallopt(-1, 1 << 30)
    for _ in range(5):
        step()
    times: list[float] = []
    while sum(times) < seconds * 1e3 or len(times) < 5:
        start = time.perf_counter()
        step()
        times.append((time.perf_counter() - start) * 1e3)
    times.sort()
    return [times[int(len(times) * q)] for q in (0.2, 0.5, 0.8)]


def report(rows: list[dict[str, Any]], file: Path | None) -> None:
    """Print the rows as a table and append them, each with its versions and device, to a JSON Lines file."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    about = {"device": device, "torch": torch.__version__, "threads": torch.get_num_threads()}
    print(" ".join(f"{k}={v}" for k, v in about.items()))
    print(
        f"{'case':32} {'what':18} {'p20':>9} {'p50':>9} {'p80':>9} ms {'MB':>8} {'floor':>8} {'GB/s':>7}"
    )
    for row in rows:
        p20, p50, p80 = row["ms"]
        floor = row["floor_bytes"]
        moved = f"{row['bytes'] / 1e6:8.1f}" if row["bytes"] else f"{'':8}"
        print(
            f"{row['case']:32} {row['what']:18} {p20:9.3f} {p50:9.3f} {p80:9.3f}    {moved}"
            f" {floor / 1e6:8.1f} {floor / p50 / 1e6:7.1f}"
        )
    if file:
        with file.open("a") as out:
            out.writelines(json.dumps({**row, **about}) + "\n" for row in rows)


def mse_sum(
    students: list[Tensor], teachers: list[Tensor], masks: Tensor, weights: Tensor, scalars: Tensor
) -> tuple[Tensor, Tensor]:
    """What one would write without the op; it knows no masks."""
    del masks
    losses = [F.mse_loss(s, t) for s, t in zip(students, teachers, strict=True)]
    values = torch.cat([torch.stack(losses).float(), scalars])
    return (weights * values).sum(), values


def cases(case: str, device: str, dtype: torch.dtype) -> list[dict[str, Any]]:
    """Rows of one case."""
    torch.manual_seed(0)
    shapes = [(CLIPS, *layer) for layer in LAYERS[case]] * MODALITIES
    draw = lambda shape: torch.randn(shape, device=device, dtype=dtype)  # noqa: E731
    students = [draw(shape).requires_grad_() for shape in shapes]
    teachers = [draw(shape) for shape in shapes]
    masks = torch.ones(len(shapes), CLIPS, device=device)
    weights = torch.rand(len(shapes) + 24, device=device)
    scalars = torch.rand(24, device=device, requires_grad=True)
    inputs = (students, teachers, masks, weights, scalars)

    def step(function: Callable[..., tuple[Tensor, Tensor]]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(function(*inputs)[0], [*students, scalars])

    functions = {"op": kernels.weighted_loss, "sum of mse_loss": mse_sum}
    if device == "cuda":
        functions |= {
            "op, compiled": torch.compile(kernels.weighted_loss),
            "sum, compiled": torch.compile(mse_sum),
        }
    elements, size = sum(s.numel() for s in students), dtype.itemsize
    rows = []
    want = step(reference.weighted_loss)
    for name, function in functions.items():
        for got, grad in zip(step(function), want, strict=True):
            # no gradient is further from the reference's than its dtype rounds
            torch.testing.assert_close(got, grad, rtol=2e-2, atol=1e-2 * grad.abs().max().item())
        rows.append(
            {
                "bench": "weighted_loss",
                "case": f"{case} {str(dtype)[6:]}",
                "what": name,
                "ms": quantiles(lambda function=function: step(function), device),
                "bytes": (5 if device == "cuda" else 3) * elements * size if name == "op" else None,
                "floor_bytes": 3 * elements * size,
            }
        )
    return rows


def main() -> None:
    """Run on the device at hand: small on a CPU, an R3D-18's activations on a GPU."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="append the rows to this JSON Lines file")
    args = parser.parse_args()
    if torch.cuda.is_available():
        plan = [(c, "cuda", d) for c in LAYERS for d in (torch.float32, torch.bfloat16)]
    else:
        plan = [("small", "cpu", torch.float32)]
    report([row for item in plan for row in cases(*item)], args.json)


if __name__ == "__main__":
    main()
