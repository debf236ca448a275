"""A cohort beside one process a member: what is gained by decoding each batch once for all members.

With D for a batch's input and views, and C for a member's step, M members in a cohort cost D + MC a step, and M
processes that share nothing M(D + C): a cohort can be M(D + C) / (D + MC) times as fast, and that is what it is
held against. D and C are taken in the members' own processes, one after the other and nothing decoded ahead. On a
GPU input can hide behind steps on both sides, so that what is reached may lie on either side of that.

The peer is treated as well as can be. It may use the whole machine as the cohort may: on a CPU there are as
many processes at a time as cores, each with its networks, its decoding and its flow on a core of its own, where
none waits for another; on a GPU, which runs networks in turn anyway, one process at a time has the GPU and all
cores. Neither side's time holds the start of a process, of networks or of a compiler, nor the first batches; each
is taken over the same number of steps once under way, in turn with the other. Rates of processes that run at the
same time are added up.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

from engine.bench.base import Bench, timed
from engine.bench.rows import Limit, Row, measured
from engine.core.pool import Evaluator, Job, Lost, ProcessPool
from engine.core.recipe import Recipe, override
from engine.core.runtime import Runtime, make_deterministic
from engine.data.shards.index import ClipIndex
from engine.objective.lossfile import random_weights
from engine.objective.terms import LossWeights
from engine.train.trainer import MemberFailed, Trainer

UNIT = "members/h"
WARM_STEPS, SPARE_STEPS = 3, 3
"""Steps before the clock starts, and batches that are planned but not taken: at both ends of the time taken,
as many are decoded ahead."""
GPU_SIZES, GPU_QUICK, CPU_SIZES, CPU_QUICK = (1, 2, 4, 8, 16), (1, 4), (8,), (4,)
"""Members of the cohorts that are timed."""


@dataclass(frozen=True)
class Costs:
    """Milliseconds of each repeat."""

    input: list[float]
    """D: a batch's input and views."""
    step: list[float]
    """C: a member's step."""

    def gain(self, members: int) -> float:
        """M(D + C) / (D + MC), at the medians."""
        return possible_gain(members, median(self.input), median(self.step))


def possible_gain(members: int, input: float, step: float) -> float:
    """Gain of a cohort of M over M processes that share nothing: M(D + C) / (D + MC)."""
    return members * (input + step) / (input + members * step)


def run(bench: Bench) -> Iterator[Row]:
    """Rows of D, C, the processes, and each cohort."""
    steps, repeats = (3, 1) if bench.quick else (20 if bench.gpu else 12, 3)
    trainer = trainer_for(bench.recipe, bench.videos, bench.runtime, steps=steps)
    gpu_counts, cpu_counts = (GPU_QUICK, CPU_QUICK) if bench.quick else (GPU_SIZES, CPU_SIZES)
    counts: tuple[int, ...] = gpu_counts if bench.gpu else cpu_counts
    cores: Sequence[int | None] = [None]
    if not bench.gpu and hasattr(os, "sched_getaffinity"):
        cores = sorted(os.sched_getaffinity(0))
    together: dict[int, list[float]] = {members: [] for members in counts}
    alone: list[float] = []
    with ExitStack() as stack:
        pools = []
        for core in cores:
            solo = Solo(bench.recipe, bench.videos, bench.runtime, steps, core)
            pools.append(stack.enter_context(closing(ProcessPool(solo, size=1))))
        answers = ask(pools, "costs", [3 if bench.quick else 10] * len(pools))
        both = Costs(*map(list, zip(*(pair for pairs in answers for pair in pairs), strict=True)))
        for turn in range(repeats):
            for members in counts:
                losses = [random_weights(seed) for seed in range(members)]
                together[members].append(1e3 * seconds_a_step(trainer, losses))
            first = turn * len(pools)
            seconds = ask(pools, "train", range(first, first + len(pools)))
            alone.append(1e3 / sum(1 / each for each in seconds))  # of the sum of their rates
    for name, samples in (
        ("input and views of a step (D)", both.input),
        ("step of a member (C)", both.step),
    ):
        n = bench.recipe.optim.batch_size
        yield _row(bench, samples, 1, name=name, count=n, unit="clips/s")
    for members in counts:
        yield from _rows(bench, members, together[members], alone, both, len(pools))


def _rows(
    bench: Bench,
    members: int,
    together: list[float],
    alone: list[float],
    costs: Costs,
    processes: int,
) -> Iterator[Row]:
    """A cohort, and as many members by a process each."""
    apart = [members * ms for ms in alone]
    at_once = f"{processes} at a time" if processes > 1 else "one after another"
    steps = bench.recipe.optim.steps
    rate = {"count": members * 3600 / steps, "unit": UNIT}
    peer = _row(bench, apart, members, name=f"one process a member, {at_once}", peer=True, **rate)
    best = costs.gain(members)
    gain = median(apart) / median(together)
    figures = {
        "D, ms": median(costs.input),
        "C, ms": median(costs.step),
        "possible gain": best,
        "gain": gain,
        "share of the possible gain": gain / best,
        "seconds, cohort": median(together) * steps / 1e3,
        "seconds, processes": median(apart) * steps / 1e3,
    }
    limit = Limit("processes' x M(D+C)/(D+MC)", peer.throughput * best, UNIT)
    extra = {"limit": limit, "figures": figures}
    yield _row(bench, together, members, name="one cohort", **extra, **rate)
    yield peer
    bench.say(
        f"cohort of {members}: {gain:.2f} times one process a member ({figures['seconds, cohort']:.1f} s against "
        f"{figures['seconds, processes']:.1f} s for {steps} steps); D {figures['D, ms']:.1f} ms and "
        f"C {figures['C, ms']:.1f} ms allow {best:.2f}: {gain / best:.0%} of it"
    )


def _row(bench: Bench, samples: list[float], members: int, **fields: Any) -> Row:
    return measured(samples, part="cohort", shape=f"{bench.sizes}, M {members}", **fields)


@dataclass(frozen=True)
class Solo:
    """A process that trains one member at a time: makes its evaluator."""

    recipe: Recipe
    index: ClipIndex
    runtime: Runtime
    steps: int
    core: int | None = None
    """The one core that it may use; None for all, beside a GPU."""

    def __call__(self, workers_here: int) -> Evaluator:
        """An evaluator of ("train", member), in seconds a step, and of ("costs", repeats)."""
        if self.core is not None:
            os.sched_setaffinity(0, {self.core})
        if self.runtime.device.type == "cpu":
            torch.set_num_threads(1)
        else:
            torch.cuda.set_device(self.runtime.device)
        make_deterministic(self.runtime)
        trainer = trainer_for(self.recipe, self.index, self.runtime, steps=self.steps)

        def evaluate(work: tuple[str, int], tell: object) -> Any:
            what, number = work
            if what == "train":
                return seconds_a_step(trainer, [random_weights(number)])
            return costs(trainer, random_weights(0), repeats=number)

        return evaluate


def ask(pools: Sequence[ProcessPool], what: str, numbers: Sequence[int]) -> list[Any]:
    """The results of processes that work at the same time, a number each.

    Raises RuntimeError with the reason where one could not.
    """
    for pool in pools:
        while not pool.idle():  # it is starting
            pool.wait()
    for pool, number in zip(pools, numbers, strict=True):
        pool.submit(Job((what, number)), pool.idle()[0])
    results = []
    for pool in pools:
        while not (ended := pool.wait()):
            pass
        if isinstance(ended[0], Lost):
            raise RuntimeError(f"cohort: a member's process failed: {ended[0].reason}")
        results.append(ended[0].result)
    return results


def trainer_for(recipe: Recipe, index: ClipIndex, runtime: Runtime, *, steps: int) -> Trainer:
    """A trainer whose rounds last ``steps`` and what is not timed."""
    total = WARM_STEPS + steps + SPARE_STEPS
    short = override(recipe, [f"optim.steps={total}", "optim.warmup_steps=0"])
    return Trainer(short, index, runtime)


def seconds_a_step(trainer: Trainer, losses: Sequence[LossWeights]) -> float:
    """Seconds of one step of all members, input included, once under way.

    Raises MemberFailed where a member can't go on.
    """
    seed = trainer.recipe.seed
    steps = trainer.recipe.optim.steps - WARM_STEPS - SPARE_STEPS
    members = [trainer.member(weights, seed=seed) for weights in losses]
    began = 0.0
    rounds = trainer.rounds(members, seed=seed)
    for done, (_, views) in enumerate(rounds, start=1):
        for outcome in trainer.step_all(members, views):
            if isinstance(outcome, MemberFailed):
                raise outcome
        if done in (WARM_STEPS, WARM_STEPS + steps):
            if trainer.runtime.device.type == "cuda":
                torch.cuda.synchronize(trainer.runtime.device)
            now = time.perf_counter()
            if done > WARM_STEPS:
                return (now - began) / steps
            began = now
    raise AssertionError("more steps than batches")


def costs(trainer: Trainer, weights: LossWeights, *, repeats: int) -> list[tuple[float, float]]:
    """Milliseconds (D, C) of input with views and of a member's step, one after the other, nothing ahead."""
    seed = trainer.recipe.seed
    member = trainer.member(weights, seed=seed)
    modalities = member.alive.modalities
    pipeline, pairs = trainer.pipeline(modalities), []
    for step in range(repeats + 2):
        plan = trainer.plan(step, seed=seed)
        kept: list[Any] = []

        def load(plan: Any = plan, kept: list[Any] = kept) -> None:
            kept.append(trainer.views(pipeline.load(plan), modalities))

        def train(kept: list[Any] = kept) -> None:
            (outcome,) = trainer.step_all([member], kept[0])
            if isinstance(outcome, MemberFailed):
                raise outcome

        pairs.append((timed(load, trainer.runtime.device), timed(train, trainer.runtime.device)))
    return pairs[2:]
