"""Timing, the machine's best speeds, and the comparison of peers, for all parts of the bench."""

from __future__ import annotations

import ctypes
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from engine.bench import rows
from engine.core.recipe import Recipe
from engine.core.runtime import Runtime
from engine.data.shards.index import ClipIndex

Step = Callable[[], Any]

FLUSH_BYTES = {"cuda": 256 * 2**20, "cpu": 64 * 2**20}
"""More than a last-level cache holds: written between repeats, it leaves nothing of the operands there."""
COPY_BYTES = {"cuda": 2**30, "cpu": 2**27}
MATRIX_SIDES = {"cuda": (4096, 8192), "cpu": (512, 1024, 2048)}
MOST_REPEATS = 1000
INDUCTOR: dict[str, dict[str, str | int | bool | Callable[..., Any]]] = {
    "Inductor": {"combo_kernels": False},
    "Inductor, combo kernels": {"combo_kernels": True},
}
"""Peers by torch.compile, and its options."""


@dataclass(frozen=True)
class Bench:
    """The recipe, the device and the videos to measure with."""

    recipe: Recipe
    runtime: Runtime
    index: ClipIndex | None
    """The videos; None for parts that need none."""
    say: Callable[[str], None]
    """Tells the user what is left out, and why."""
    quick: bool = False
    """Fewer repeats, and nothing that takes a CPU long to compile."""

    @property
    def device(self) -> torch.device:
        """Where everything is timed."""
        return self.runtime.device

    @property
    def gpu(self) -> bool:
        """Whether that is a GPU."""
        return self.device.type == "cuda"

    @property
    def videos(self) -> ClipIndex:
        """The videos of a part that needs them."""
        assert self.index is not None
        return self.index

    @property
    def sizes(self) -> str:
        """The network and a batch of input frames, such as ``r3d_18 width 0.25 16x8x48x48``."""
        recipe = self.recipe
        model, clip, n = recipe.model, recipe.clip, recipe.optim.batch_size
        return (
            f"{model.arch} width {model.width:g} {shape(n, clip.num_frames, clip.size, clip.size)}"
        )

    def time(self, steps: Mapping[str, Step], *, flush: bool = False) -> dict[str, list[float]]:
        """Milliseconds of peers' calls: see ``interleaved``."""
        seconds = 0.1 if self.quick else 1.0
        return interleaved(steps, device=self.device, seconds=seconds, flush=flush)

    def copy_bandwidth(self) -> rows.Limit:
        """See ``copy_bandwidth``."""
        return copy_bandwidth(self.device, torch.get_num_threads(), self.quick)

    def matrix_peak(self, dtype: torch.dtype, *, ieee: bool = False) -> rows.Limit:
        """The fastest matrix product in ``dtype``: see ``matrix_peak``.

        float32 on a GPU is measured as convolutions compute it, that is in TF32 where cuDNN may use it, or with
        ``ieee`` as it is written.
        """
        precision = torch.backends.cudnn.conv.fp32_precision  # type: ignore[attr-defined]
        tf32 = self.gpu and dtype == torch.float32 and precision != "ieee" and not ieee
        return matrix_peak(self.device, dtype, torch.get_num_threads(), tf32, self.quick)

    def compiled(self, function: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
        """The function by Inductor, once with and once without combo kernels; on a CPU not in a quick run."""
        if self.quick and not self.gpu:
            return {}
        torch._dynamo.reset()  # sizes of an earlier case would make these dynamic
        return {
            name: torch.compile(function, dynamic=False, options=dict(options))
            for name, options in INDUCTOR.items()
        }

    def agreeing(
        self, part: str, peers: Mapping[str, Callable[[], Sequence[Tensor]]], *, reference: str
    ) -> dict[str, Step]:
        """Peers that give what ``reference`` gives, as near as its dtype rounds; the user is told of the others."""
        expected = peers[reference]()
        kept: dict[str, Step] = {}
        for name, peer in peers.items():
            try:
                for value, true in zip(peer(), expected, strict=True):
                    scale = true.detach().abs().max().item()
                    torch.testing.assert_close(value, true, rtol=2e-2, atol=1e-2 * scale)
                kept[name] = peer
            except AssertionError:
                self.say(f"{part}: {name} is left out: its numbers are not those of {reference}")
            except Exception as error:  # a compiler may fail in any way
                self.say(f"{part}: {name} is left out: {first_line(error)}")
        return kept

    def memory_rows(
        self, steps: Mapping[str, Step], *, ours: Sequence[str], bytes: int, **fields: Any
    ) -> list[rows.Row]:
        """Rows of one operation and its peers, which move at least ``bytes``, beside a copy's bandwidth."""
        fields |= {"limit": self.copy_bandwidth(), "bytes": bytes, "unit": rows.BANDWIDTH}
        return [
            rows.measured(samples, count=bytes / 1e9, name=name, peer=name not in ours, **fields)
            for name, samples in self.time(steps, flush=True).items()
        ]


def shape(*sizes: int) -> str:
    """Sizes as in ``16x12x48x48``."""
    return "x".join(map(str, sizes))


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or else its name."""
    return (str(error).splitlines() or [type(error).__name__])[0]


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


def _fastest(step: Step, device: torch.device, *, quick: bool) -> float:
    """Milliseconds of the fastest call, since a limit is what can be had at best."""
    seconds = 0.1 if quick else 0.5
    return min(interleaved({"": step}, device=device, seconds=seconds, least=5)[""])


def _with_threads(what: str, device: torch.device, threads: int) -> str:
    if device.type == "cuda":
        return what
    return f"{what}, {threads} thread{'s' if threads > 1 else ''}"


@cache
def copy_bandwidth(device: torch.device, threads: int, quick: bool) -> rows.Limit:
    """Bytes read and written a second while a large tensor is copied: the roof of what only moves memory."""
    size = COPY_BYTES[device.type]
    source = torch.ones(size, dtype=torch.int8, device=device)
    target = torch.zeros_like(source)
    ms = _fastest(lambda: target.copy_(source), device, quick=quick)
    name = _with_threads("memory copy", device, threads)
    return rows.Limit(name, rows.gigabytes_per_second(2 * size, ms), rows.BANDWIDTH)


@cache
def matrix_peak(
    device: torch.device, dtype: torch.dtype, threads: int, tf32: bool, quick: bool
) -> rows.Limit:
    """FLOPs a second of a large square matrix product in ``dtype``, the best of a few sizes."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "tf32" if tf32 else "ieee"
    best = 0.0
    try:
        for side in MATRIX_SIDES[device.type][: 2 if quick else None]:
            # drawn at random: a GPU multiplies constants faster, for the power that it saves
            a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
            product = partial(torch.mm, a, b, out=torch.empty_like(a))
            best = max(best, rows.teraflops(2 * side**3, _fastest(product, device, quick=quick)))
    finally:
        matmul.fp32_precision = before
    kind = "TF32" if tf32 else str(dtype)[6:]
    return rows.Limit(_with_threads(f"{kind} matrix product", device, threads), best, rows.COMPUTE)
