"""Device, number format, seeds and threads: the only global state of the engine."""

from __future__ import annotations

import gc
import os
import random
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from threadpoolctl import ThreadpoolController  # type: ignore[import-untyped]

Result = TypeVar("Result")


@dataclass(frozen=True)
class Runtime:
    """Where tensors live and in which number format the networks run."""

    device: torch.device
    amp: bool
    """Autocast the networks to bf16."""
    processes: int = 1
    """Processes of a run on this machine, which divide its cores (and, on a CPU, its memory) among themselves."""

    @property
    def cores(self) -> int:
        """Cores for this process: its share of those that it may use."""
        return max(1, num_cores() // self.processes)

    @property
    def threads(self) -> int:
        """Threads for decoding: this process's cores, at most 16."""
        return min(self.cores, 16)

    def map(self, function: Callable[[Any], Result], items: Iterable[Any]) -> list[Result]:
        """Apply a function of torch to members: on a CPU side by side, a core each; on a GPU in turn.

        Two threads within one small network wait for each other at every operation; two networks do not.
        """
        if self.device.type != "cpu":
            return [function(item) for item in items]
        return list(_one_thread_each(self.cores).map(function, items))


SWITCH_SECONDS = 1e-4
"""After how long a thread of Python gives way to another. The usual 5 ms is as long as dozens of a small
network's operations, each of which begins in Python."""


@cache
def _one_thread_each(cores: int) -> ThreadPoolExecutor:
    sys.setswitchinterval(SWITCH_SECONDS)
    return ThreadPoolExecutor(cores, "member", initializer=lambda: torch.set_num_threads(1))


LARGE_PRODUCT = 1e9
"""Multiplications of one matrix product from which on a second thread helps more than waiting for it costs."""


@cache
def _thread_pools() -> ThreadpoolController:
    return ThreadpoolController()  # cached: finding the loaded libraries takes milliseconds


@contextmanager
def one_thread(largest_product: float = 0.0) -> Iterator[None]:
    """Limit this thread's BLAS, OpenMP and torch to one thread, unless products are as large as ``LARGE_PRODUCT``.

    With more threads small products take a hundred times as long where other work wants the cores too, and a sum
    depends on which thread ends first.
    """
    if largest_product >= LARGE_PRODUCT:
        yield
        return
    with _thread_pools().limit(limits=1):
        yield


class Clock:
    """Seconds spent per stage: ``with clock("input"): ...``."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Add the time of the block to ``stage``; blocks do not nest."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start


def num_cores() -> int:
    """Cores that this process may use."""
    allowed = hasattr(os, "sched_getaffinity")
    return len(os.sched_getaffinity(0)) if allowed else os.cpu_count() or 1


def format_note(amp: str, runtime: Runtime) -> str | None:
    """What to say where a runtime has not the number format that is asked for; None where it has."""
    if amp != "bf16" or runtime.amp:
        return None
    return "float32 instead of bf16: this CPU has no AMX, and without it bf16 goes wrong"


def choose_runtime(device: str = "auto", *, amp: str = "auto") -> Runtime:
    """Pick the device: ``auto`` takes a GPU where there is one.

    ``amp``: ``auto`` autocasts to bf16 on a GPU and stays in float32 on a CPU; ``off`` forces float32; ``bf16`` is
    taken on a GPU, and on a CPU where ``cpu_has_bf16``. A GPU's device has its number, since "cuda" alone means another
    one to each thread: new ones begin with the first. Raises ValueError for a GPU that is asked for and absent.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(
            f"device {device!r}: no CUDA GPU is visible; use --device cpu or check `engine doctor`"
        )
    chosen = torch.device(device)
    if chosen.type == "cpu":
        return Runtime(chosen, amp == "bf16" and cpu_has_bf16())
    if chosen.index is None:
        chosen = torch.device("cuda", torch.cuda.current_device())
    else:  # what says "cuda" alone in this thread, and CuPy, then mean this one too
        torch.cuda.set_device(chosen)
    return Runtime(chosen, amp in ("bf16", "auto"))


def cpu_has_bf16() -> bool:
    """Whether bf16 can be trusted on this CPU: only where it has AMX's matrix units.

    Elsewhere oneDNN's gradients of bf16 convolutions depend on what memory held before, so that equal seeds differ and
    losses become nan (seen with torch 2.13 on a CPU with AVX-512's bf16: 3x3x3, 32 channels, 2x6x6 positions).
    """
    return bool(torch.cpu._is_amx_tile_supported())


def free_memory(device: torch.device) -> int:
    """Bytes that this process could still take: on a GPU with what its own cache holds unused."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0] + cached)
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = 1024 * next(int(x.split()[1]) for x in lines if x.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return 2**62  # not known on this system
    group = Path("/sys/fs/cgroup")
    with suppress(OSError, ValueError):  # a container may have less, or "max"
        used = int((group / "memory.current").read_text())
        free = min(free, int((group / "memory.max").read_text()) - used)
    return free


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an operation failed for want of memory, on the device or the host."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    signs = ("can't allocate memory", "STATUS_ALLOC_FAILED", "out of memory")
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)


def is_device_error(error: BaseException) -> bool:
    """Whether an error came from the GPU itself: most of them leave this process unable to use it again.

    What can't be recorded in a CUDA graph is none: nothing was run.
    """
    if "captur" in str(error):
        return False
    kind = getattr(torch, "AcceleratorError", ())  # torch has it since 2.8
    signs = ("CUDA error:", "Triton Error [CUDA]")
    return isinstance(error, kind) or (
        isinstance(error, RuntimeError) and str(error).startswith(signs)
    )


def release_memory(device: torch.device) -> None:
    """Collect what nothing refers to any more, and give a GPU's unused cache back."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def set_seed(seed: int) -> None:
    """Seed Python, NumPy and torch; what a member draws at its start is then the same everywhere."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def make_deterministic(runtime: Runtime) -> None:
    """Make equal seeds give equal bits on a CPU; on a GPU, let cuDNN pick its fastest kernels."""
    if runtime.device.type == "cpu":
        torch.use_deterministic_algorithms(True)
        # A debugging aid that takes 13 % of a step.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    else:
        torch.backends.cudnn.benchmark = True


@contextmanager
def ieee_products() -> Iterator[None]:
    """Compute float32 matrix products on a GPU in float32, without TF32, whatever the process has set.

    By the same one of torch's two interfaces that the process has set it by: where they disagree, reading the older
    one (as compilers do) is an error.
    """
    matmul = torch.backends.cuda.matmul
    precise = matmul.fp32_precision
    if precise != "tf32":
        yield
        return
    try:
        older = torch.get_float32_matmul_precision()
    except RuntimeError:  # the newer one is what was set
        older = "highest"
    newer = older == "highest"
    if newer:
        matmul.fp32_precision = "ieee"
    else:
        torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        if newer:
            matmul.fp32_precision = precise
        else:
            torch.set_float32_matmul_precision(older)


def check_kernels_package() -> None:
    """Raise RuntimeError where another installed package called ``kernels`` hides the engine's own."""
    import kernels

    if not getattr(kernels, "__engine_kernels__", False):
        raise RuntimeError(
            f"the package 'kernels' at {Path(kernels.__file__ or '?').parent} is not the engine's: another "
            "package of that name is installed; `pip uninstall kernels`, then install the engine again"
        )
