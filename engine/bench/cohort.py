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
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from statistics import median

from engine.bench.base import Bench, told
from engine.bench.rows import Limit, Row, per_second, quantiles
from engine.bench.solo import Job, Soloist, seconds_a_step, trainer_for
from engine.lossfile import random_weights

UNIT = "members/h"
GPU_SIZES, GPU_QUICK, CPU_SIZE, CPU_QUICK = (1, 2, 4, 8, 16), (1, 4), 8, 4


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


def sizes(bench: Bench) -> tuple[int, ...]:
    """Members of the cohorts that are timed."""
    if bench.gpu:
        return GPU_QUICK if bench.quick else GPU_SIZES
    return (CPU_QUICK if bench.quick else CPU_SIZE,)


def run(bench: Bench) -> Iterator[Row]:
    """Rows of D, C, the processes, and each cohort."""
    steps, repeats = (3, 1) if bench.quick else (20 if bench.gpu else 12, 3)
    trainer = trainer_for(bench.recipe, bench.videos, bench.runtime, steps=steps)
    counts = sizes(bench)
    together: dict[int, list[float]] = {members: [] for members in counts}
    alone: list[float] = []
    with ExitStack() as stack:
        soloists = [stack.enter_context(Soloist(job, steps=steps)) for job in _jobs(bench)]
        costs = _costs(soloists, repeats=3 if bench.quick else 10)
        for turn in range(repeats):
            for members in counts:
                losses = [random_weights(seed) for seed in range(members)]
                together[members].append(1e3 * seconds_a_step(trainer, losses))
            alone.append(_milliseconds_a_member(soloists, first=turn))
    yield _row(bench, "input and views of a step (D)", costs.input, members=1, trained=False)
    yield _row(bench, "step of a member (C)", costs.step, members=1, trained=False)
    for members in counts:
        yield from _rows(bench, members, together[members], alone, costs, len(soloists))


def _jobs(bench: Bench) -> list[Job]:
    cores: Sequence[int | None] = [None]
    if not bench.gpu and hasattr(os, "sched_getaffinity"):
        cores = sorted(os.sched_getaffinity(0))
    return [Job(bench.recipe, bench.videos, bench.runtime, core) for core in cores]


def _costs(soloists: Sequence[Soloist], *, repeats: int) -> Costs:
    for soloist in soloists:
        soloist.ask("costs", repeats)
    found = [pair for soloist in soloists for pair in soloist.answer()]
    return Costs([d for d, _ in found], [c for _, c in found])


def _milliseconds_a_member(soloists: Sequence[Soloist], *, first: int) -> float:
    """Milliseconds of one member's step, all processes at work: of the sum of their rates."""
    for number, soloist in enumerate(soloists, start=first * len(soloists)):
        soloist.ask("train", number)
    seconds: list[float] = [soloist.answer() for soloist in soloists]
    return 1e3 / sum(1 / each for each in seconds)


def _rows(
    bench: Bench,
    members: int,
    together: list[float],
    alone: list[float],
    costs: Costs,
    processes: int,
) -> Iterator[Row]:
    apart = [members * ms for ms in alone]
    at_once = f"{processes} at a time" if processes > 1 else "one after another"
    peer = _row(bench, f"one process a member, {at_once}", apart, members=members, peer=True)
    best = costs.gain(members)
    gain = median(apart) / median(together)
    limit = Limit("processes' x M(D+C)/(D+MC)", peer.throughput * best, UNIT)
    seconds = bench.recipe.optim.steps / 1e3
    figures = {
        "D, ms": median(costs.input),
        "C, ms": median(costs.step),
        "possible gain": best,
        "gain": gain,
        "share of the possible gain": gain / best,
        "seconds, cohort": median(together) * seconds,
        "seconds, processes": median(apart) * seconds,
    }
    yield _row(bench, "one cohort", together, members=members, limit=limit, figures=figures)
    yield peer
    told_seconds = (
        f"{figures['seconds, cohort']:.1f} s against {figures['seconds, processes']:.1f} s"
    )
    bench.say(
        f"cohort of {members}: {gain:.2f} times one process a member ({told_seconds} for "
        f"{bench.recipe.optim.steps} steps); D {figures['D, ms']:.1f} ms and C {figures['C, ms']:.1f} ms "
        f"allow {best:.2f}: {gain / best:.0%} of it"
    )


def _row(
    bench: Bench,
    name: str,
    samples: list[float],
    *,
    members: int,
    trained: bool = True,
    peer: bool = False,
    limit: Limit | None = None,
    figures: dict[str, float] | None = None,
) -> Row:
    """A row; ``trained``: of members that were trained for a step, else of one part of it for one batch."""
    recipe = bench.recipe
    clip, n = recipe.clip, recipe.optim.batch_size
    size = told(n, clip.num_frames, clip.size, clip.size)
    ms = quantiles(samples)
    hours = ms[1] / 3.6e6 * recipe.optim.steps
    return Row(
        part="cohort",
        name=name,
        shape=f"{recipe.model.arch} width {recipe.model.width:g} {size}, M {members}",
        ms=ms,
        repeats=len(samples),
        throughput=members / hours if trained else per_second(n, ms[1]),
        unit=UNIT if trained else "clips/s",
        limit=limit,
        peer=peer,
        figures=figures or {},
    )
