"""A training step of one member with all terms: forward, Eq. 1, backward, optimizer.

FLOPs are counted by torch over forward and backward (convolutions and matrix products), and the share of the
measured matrix product's peak is called MFU. Bytes are what the eager operations read and write, each
taken alone: caches spare some of it, and a compiler more. On a CPU members train on a thread each, as in a
cohort; a row with all cores' threads stands beside. Compiling takes a CPU minutes, and is timed there only where
the recipe asks for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from engine.bench.base import Bench, Step, first_line
from engine.bench.rows import Row, measured
from engine.core.recipe import override
from engine.core.runtime import choose_runtime, num_cores
from engine.data.views import Views
from engine.objective.lossfile import load_loss
from engine.train.compiled import compile_mode
from engine.train.flops import step_flops
from engine.train.member import Member
from engine.train.trainer import Trainer


@dataclass(frozen=True)
class Variant:
    """A way to compute the step."""

    amp: str
    compile: str
    threads: int

    @property
    def dtype(self) -> torch.dtype:
        """Number format of the products."""
        return torch.bfloat16 if self.amp == "bf16" else torch.float32

    @property
    def name(self) -> str:
        """As in "eager bf16" or "compiled (reduce-overhead) float32, 2 threads"."""
        how = "eager" if self.compile == "off" else f"compiled ({self.compile})"
        threads = f", {self.threads} threads" if self.threads > 1 else ""
        return f"{how} {'bf16' if self.amp == 'bf16' else 'float32'}{threads}"


class TrafficMode(TorchDispatchMode):
    """Counts the bytes of every operation's tensors, in and out; views move nothing."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run the operation and add up."""
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, Tensor)]
            self.bytes += sum(x.nbytes for x in tensors)
        return out


def variants(bench: Bench) -> tuple[Variant, list[Variant]]:
    """The one that the recipe and device choose, and all."""
    amp = "bf16" if bench.runtime.amp else "off"
    optim = bench.recipe.optim
    mode = compile_mode(optim, bench.device, whole=optim.accumulate == 1)
    own = Variant(amp, mode, 1)
    every = [own, Variant("off", "off", 1), Variant("bf16", "off", 1)]
    if not bench.gpu and not bench.quick and num_cores() > 1:
        every.append(Variant(amp, "off", num_cores()))
    if bench.gpu:
        every += [Variant("bf16", mode, 1) for mode in ("default", "reduce-overhead")]
    return own, list(dict.fromkeys(every))


def run(bench: Bench) -> Iterator[Row]:
    """Rows of each variant, taken in turn on one batch."""
    own, every = variants(bench)
    flops, moved = counted(bench)
    steps: dict[str, Step] = {}
    by_name = {variant.name: variant for variant in every}
    for name, variant in by_name.items():
        trainer, member, views = prepared(bench, variant)
        try:
            trainer.step(member, views)
        except Exception as error:  # a compiler may fail in any way
            if variant == own:
                raise
            bench.say(f"step: {name} is left out: {first_line(error)}")
            continue
        steps[name] = _step(trainer, member, views, threads=variant.threads)
    for name, samples in bench.time(steps).items():
        variant = by_name[name]
        with _cpu_threads(variant.threads):
            peak = bench.matrix_peak(variant.dtype)
        yield measured(
            samples,
            count=bench.recipe.optim.batch_size,
            unit="clips/s",
            part="step",
            name=name,
            shape=bench.sizes,
            limit=peak,
            flops=flops,
            bytes=moved[variant.amp] if variant.compile == "off" else None,
            peer=variant != own,
            stage="step" if variant == own else "",
        )


def prepared(bench: Bench, variant: Variant) -> tuple[Trainer, Member, Views]:
    """A trainer and a member of the variant, and a batch's views."""
    recipe = override(
        bench.recipe, [f"optim.amp={variant.amp}", f"optim.compile={variant.compile}"]
    )
    runtime = choose_runtime(str(bench.device), amp=variant.amp)
    trainer = Trainer(recipe, bench.videos, runtime, warn=lambda text: bench.say(f"step: {text}"))
    member = trainer.member(load_loss("equal"), seed=recipe.seed, alone=True)
    _, views = next(trainer.rounds([member], seed=recipe.seed))
    return trainer, member, views


def counted(bench: Bench) -> tuple[int, dict[str, int]]:
    """FLOPs of a step, and the bytes that its eager operations read and write in each number format."""
    moved, flops = {}, 0
    for amp in ("off", "bf16"):
        trainer, member, views = prepared(bench, Variant(amp, "off", 1))
        trainer.step(member, views)  # the first one also checks the number format
        with TrafficMode() as traffic:
            trainer.step(member, views)
        moved[amp], flops = traffic.bytes, step_flops(member, views)
    return flops, moved


def _step(trainer: Trainer, member: Member, views: Views, *, threads: int) -> Step:
    def step() -> None:
        with _cpu_threads(threads):
            trainer.step(member, views)

    on_gpu = trainer.runtime.device.type == "cuda"
    return partial(trainer.step, member, views) if on_gpu else step


@contextmanager
def _cpu_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
