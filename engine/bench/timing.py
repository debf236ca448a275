"""How time is taken: after a warm-up, peers in turn, and with cold caches where memory is what counts."""

from __future__ import annotations

import ctypes
import sys
import time
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

Step = Callable[[], Any]

FLUSH_BYTES = {"cuda": 256 * 2**20, "cpu": 64 * 2**20}
"""More than a last-level cache holds: written between repeats, it leaves nothing of the operands there."""
MOST_REPEATS = 1000


def interleaved(
    steps: Mapping[str, Step],
    *,
    device: torch.device,
    seconds: float,
    flush: bool = False,
    least: int = 3,
) -> dict[str, list[float]]:
    """Milliseconds of each step's calls, taken in turn (A B A B ...), so that drift hits all alike.

    Each is called twice before, which also compiles what is to be compiled. Goes on until the timed calls
    took ``seconds`` a step, and at least ``least`` rounds. ``flush`` empties the caches before each call.
    On a GPU events take the time, each call being waited for.
    """
    for step in steps.values():
        step()
        step()
    samples: dict[str, list[float]] = {name: [] for name in steps}
    spent = 0.0
    buffer = _flush_buffer(device) if flush else None
    for turn in range(MOST_REPEATS):
        if turn >= least and spent >= seconds * len(steps):
            break
        for name, step in steps.items():
            if buffer is not None:
                buffer.zero_()
            samples[name].append(timed(step, device))
            spent += samples[name][-1] / 1e3
    return samples


def timed(step: Step, device: torch.device) -> float:
    """Milliseconds of one call."""
    if device.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        step()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end))
    start = time.perf_counter()
    step()
    return (time.perf_counter() - start) * 1e3


def keep_heap() -> None:
    """Let freed memory stay with the process, as in a long training run: no call pays for getting it back."""
    if sys.platform == "linux":
        try:
            mallopt = ctypes.CDLL(None).mallopt
        except (OSError, AttributeError):  # not glibc
            return
        mallopt(-3, 1 << 25)  # M_MMAP_THRESHOLD
        mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD


@cache
def _flush_buffer(device: torch.device) -> Tensor:
    return torch.empty(FLUSH_BYTES[device.type], dtype=torch.int8, device=device)
