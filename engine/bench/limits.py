"""What this machine can do, measured once a process: copying memory, multiplying matrices."""

from __future__ import annotations

from functools import cache

import torch

from engine.bench.rows import BANDWIDTH, COMPUTE, Limit, gigabytes_per_second, teraflops
from engine.bench.timing import interleaved

COPY_BYTES = {"cuda": 2**30, "cpu": 2**27}
MATRIX_SIDES = {"cuda": (4096, 8192), "cpu": (512, 1024, 2048)}
VIDEO_DECODERS = {(8, 0): 5, (9, 0): 7}
"""NVDEC units by compute capability: A100 and H100, by their data sheets."""
JPEG_ENGINES = {(8, 0): 5, (9, 0): 7, (10, 0): 7}
"""Hardware JPEG decoders of a GPU, by compute capability (A100, H100, B200)."""


def copy_bandwidth(device: torch.device, *, quick: bool = False) -> Limit:
    """Bytes read and written a second while a large tensor is copied: the roof of what only moves memory.

    The fastest repeat counts, here and below, since a limit is what can be had at best.
    """
    return _copy_bandwidth(device, torch.get_num_threads(), quick)


def matrix_peak(
    device: torch.device, dtype: torch.dtype, *, ieee: bool = False, quick: bool = False
) -> Limit:
    """FLOPs a second of a large square matrix product in ``dtype``, the best of a few sizes.

    float32 on a GPU is measured as convolutions compute it, that is in TF32 where cuDNN may use it, or with
    ``ieee`` as it is written.
    """
    precision = torch.backends.cudnn.conv.fp32_precision  # type: ignore[attr-defined]
    fast = device.type == "cuda" and dtype == torch.float32 and precision != "ieee" and not ieee
    return _matrix_peak(device, dtype, torch.get_num_threads(), fast, quick)


def jpeg_engines(device: torch.device) -> int:
    """Hardware JPEG decoders; 1 where the GPU has none or is not known."""
    return JPEG_ENGINES.get(torch.cuda.get_device_capability(device), 1)


def video_decoders(device: torch.device) -> int:
    """Hardware video decoders; 1 where it is not known."""
    return VIDEO_DECODERS.get(torch.cuda.get_device_capability(device), 1)


@cache
def _copy_bandwidth(device: torch.device, threads: int, quick: bool) -> Limit:
    size = COPY_BYTES[device.type]
    source = torch.ones(size, dtype=torch.int8, device=device)
    target = torch.zeros_like(source)
    took = interleaved(
        {"copy": lambda: target.copy_(source)},
        device=device,
        seconds=0.1 if quick else 0.5,
        least=5,
    )
    name = "memory copy" + _threads_told(device, threads)
    return Limit(name, gigabytes_per_second(2 * size, min(took["copy"])), BANDWIDTH)


@cache
def _matrix_peak(
    device: torch.device, dtype: torch.dtype, threads: int, tf32: bool, quick: bool
) -> Limit:
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "tf32" if tf32 else "ieee"
    best = 0.0
    try:
        for side in MATRIX_SIDES[device.type][: 2 if quick else None]:
            # drawn at random: a GPU multiplies constants faster, for the power that it saves
            a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
            out = torch.empty_like(a)

            def product(a=a, b=b, out=out) -> None:  # type: ignore[no-untyped-def]
                torch.mm(a, b, out=out)

            took = interleaved(
                {"mm": product}, device=device, seconds=0.1 if quick else 0.5, least=5
            )
            best = max(best, teraflops(2 * side**3, min(took["mm"])))
    finally:
        matmul.fp32_precision = before
    kind = "TF32" if tf32 else str(dtype)[6:]
    return Limit(f"{kind} matrix product{_threads_told(device, threads)}", best, COMPUTE)


def _threads_told(device: torch.device, threads: int) -> str:
    if device.type == "cuda":
        return ""
    return f", {threads} thread{'s' if threads > 1 else ''}"
