"""What the parts share: the recipe and data that choose the sizes, and how a row comes about."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from engine.bench import limits
from engine.bench.rows import BANDWIDTH, Limit, Row, gigabytes_per_second, quantiles
from engine.bench.timing import Step, interleaved
from engine.core.recipe import Recipe
from engine.core.runtime import Runtime
from engine.data.shards.index import ClipIndex

INDUCTOR: dict[str, dict[str, str | int | bool | Callable[..., Any]]] = {
    "Inductor": {"combo_kernels": False},
    "Inductor, combo kernels": {"combo_kernels": True},
}
"""Peers by torch.compile, and its options."""


@dataclass(frozen=True)
class Bench:
    """A run of the bench."""

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

    def time(self, steps: Mapping[str, Step], *, flush: bool = False) -> dict[str, list[float]]:
        """Milliseconds of peers' calls: see ``interleaved``."""
        seconds = 0.1 if self.quick else 1.0
        return interleaved(steps, device=self.device, seconds=seconds, flush=flush)

    def copy_bandwidth(self) -> Limit:
        """See ``limits``."""
        return limits.copy_bandwidth(self.device, quick=self.quick)

    def matrix_peak(self, dtype: torch.dtype, *, ieee: bool = False) -> Limit:
        """See ``limits``."""
        return limits.matrix_peak(self.device, dtype, ieee=ieee, quick=self.quick)

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
        self, part: str, peers: Mapping[str, Callable[[], Sequence[Tensor]]], *, want: str
    ) -> dict[str, Step]:
        """Peers that give what ``want`` gives, as near as its dtype rounds; the user is told of the others."""
        expected = peers[want]()
        kept: dict[str, Step] = {}
        for name, peer in peers.items():
            try:
                for got, true in zip(peer(), expected, strict=True):
                    scale = true.detach().abs().max().item()
                    torch.testing.assert_close(got, true, rtol=2e-2, atol=1e-2 * scale)
            except AssertionError:
                self.say(f"{part}: {name} is left out: its numbers are not those of {want}")
            except Exception as error:  # a compiler may fail in any way
                reason = (str(error).splitlines() or [type(error).__name__])[0]
                self.say(f"{part}: {name} is left out: {reason}")
            else:
                kept[name] = peer
        return kept

    def memory_rows(
        self,
        part: str,
        steps: Mapping[str, Step],
        *,
        shape: str,
        bytes: int,
        flops: int | None,
        ours: Sequence[str],
        note: str = "",
    ) -> list[Row]:
        """Rows of one operation and its peers, which move at least ``bytes``, beside a copy's bandwidth."""
        limit = self.copy_bandwidth()
        rows = []
        for name, samples in self.time(steps, flush=True).items():
            ms = quantiles(samples)
            rows.append(
                Row(
                    part=part,
                    name=name,
                    shape=shape,
                    ms=ms,
                    repeats=len(samples),
                    throughput=gigabytes_per_second(bytes, ms[1]),
                    unit=BANDWIDTH,
                    limit=limit,
                    bytes=bytes,
                    flops=flops,
                    peer=name not in ours,
                    note=note,
                )
            )
        return rows


def told(*sizes: int) -> str:
    """Sizes as in ``16x12x48x48``."""
    return "x".join(map(str, sizes))
