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

import multiprocessing
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing.connection import Connection
from statistics import median
from typing import Any

import torch

from engine.bench.base import Bench, told
from engine.bench.rows import Limit, Row, per_second, quantiles
from engine.bench.timing import timed
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
        processes = [stack.enter_context(SoloProcess(job, steps=steps)) for job in _jobs(bench)]
        costs = _costs(processes, repeats=3 if bench.quick else 10)
        for turn in range(repeats):
            for members in counts:
                losses = [random_weights(seed) for seed in range(members)]
                together[members].append(1e3 * seconds_a_step(trainer, losses))
            alone.append(_milliseconds_a_member(processes, first=turn))
    yield _row(bench, "input and views of a step (D)", costs.input, members=1, trained=False)
    yield _row(bench, "step of a member (C)", costs.step, members=1, trained=False)
    for members in counts:
        yield from _rows(bench, members, together[members], alone, costs, len(processes))


def _jobs(bench: Bench) -> list[SoloJob]:
    cores: Sequence[int | None] = [None]
    if not bench.gpu and hasattr(os, "sched_getaffinity"):
        cores = sorted(os.sched_getaffinity(0))
    return [SoloJob(bench.recipe, bench.videos, bench.runtime, core) for core in cores]


def _costs(processes: Sequence[SoloProcess], *, repeats: int) -> Costs:
    for process in processes:
        process.ask("costs", repeats)
    pairs = [pair for process in processes for pair in process.answer()]
    return Costs([d for d, _ in pairs], [c for _, c in pairs])


def _milliseconds_a_member(processes: Sequence[SoloProcess], *, first: int) -> float:
    """Milliseconds of one member's step, all processes at work: of the sum of their rates."""
    for number, process in enumerate(processes, start=first * len(processes)):
        process.ask("train", number)
    seconds: list[float] = [process.answer() for process in processes]
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


@dataclass(frozen=True)
class SoloJob:
    """What a process that trains one member at a time works on."""

    recipe: Recipe
    index: ClipIndex
    runtime: Runtime
    core: int | None
    """The one core that it may use; None for all, beside a GPU."""


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
            _wait(trainer.runtime)
            now = time.perf_counter()
            if done > WARM_STEPS:
                return (now - began) / steps
            began = now
    raise AssertionError("more steps than batches")


def costs(trainer: Trainer, weights: LossWeights, *, repeats: int) -> list[tuple[float, float]]:
    """Milliseconds (D, C) of input with views and of a member's step, one after the other, nothing ahead."""
    seed = trainer.recipe.seed
    member = trainer.member(weights, seed=seed)
    wanted = member.alive.modalities
    pipeline, pairs = trainer.pipeline(wanted), []
    for step in range(repeats + 2):
        plan = trainer.plan(step, seed=seed)
        kept: list[Any] = []

        def load(plan: Any = plan, kept: list[Any] = kept) -> None:
            kept.append(trainer.views(pipeline.load(plan), wanted))

        def train(kept: list[Any] = kept) -> None:
            (outcome,) = trainer.step_all([member], kept[0])
            if isinstance(outcome, MemberFailed):
                raise outcome

        pairs.append((timed(load, trainer.runtime.device), timed(train, trainer.runtime.device)))
    return pairs[2:]


def _wait(runtime: Runtime) -> None:
    if runtime.device.type == "cuda":
        torch.cuda.synchronize(runtime.device)


class SoloProcess:
    """A process of its own that trains one member at a time; a context, which ends it."""

    def __init__(self, job: SoloJob, *, steps: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, job, steps), daemon=True)
        self._process.start()
        theirs.close()

    def __enter__(self) -> SoloProcess:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._pipe.send(None)
            self._process.join(timeout=10)
        except OSError:  # it is gone already
            pass
        if self._process.is_alive():
            self._process.terminate()
            self._process.join()

    def ask(self, what: str, number: int) -> None:
        """Have it begin: ``train`` member ``number``, or take ``costs`` as many times."""
        self._pipe.send((what, number))

    def answer(self) -> Any:
        """Its result; raises RuntimeError with its reason where it could not."""
        try:
            answer = self._pipe.recv()
        except (EOFError, ConnectionError):
            raise RuntimeError("cohort: a member's process ended without a word") from None
        if isinstance(answer, str):
            raise RuntimeError(f"cohort: a member's process failed: {answer}")
        return answer


def _serve(pipe: Connection, job: SoloJob, steps: int) -> None:
    if job.core is not None and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {job.core})
    if job.runtime.device.type == "cpu":
        torch.set_num_threads(1)
    elif job.runtime.device.index is not None:
        torch.cuda.set_device(job.runtime.device)
    make_deterministic(job.runtime)
    trainer = trainer_for(job.recipe, job.index, job.runtime, steps=steps)
    while True:
        try:
            order = pipe.recv()
        except EOFError:  # whoever asked is gone
            return
        if order is None:
            return
        what, number = order
        try:
            if what == "train":
                pipe.send(seconds_a_step(trainer, [random_weights(number)]))
            else:
                pipe.send(costs(trainer, random_weights(0), repeats=number))
        except Exception as error:
            pipe.send((str(error).splitlines() or [type(error).__name__])[0])
