"""Estimates a search's time and memory, and the work of each worker, from a few steps measured here."""

from __future__ import annotations

import heapq
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean, median
from typing import Any

import torch

from engine.core.display import Display, duration
from engine.core.recipe import Recipe
from engine.core.runtime import Runtime, make_deterministic
from engine.features.extract import LabelledClips
from engine.objective.loss import active_terms
from engine.objective.lossfile import load_loss
from engine.objective.terms import TERM_NAMES
from engine.search.evolve import Data, Workers
from engine.search.packing import idle_workers, job_sizes
from engine.search.records import confirmation_sizes
from engine.search.study import SearchStudy
from engine.train.member import Member
from engine.train.memory import memory_needed, that_many_fit
from engine.train.trainer import Trainer

STEPS = (2, 6)
"""Steps that are not measured (compilation, first batches), and steps that are."""
SAMPLE = 4
"""Most members of the first generation that are measured where losses are sparse, and so differ in what they cost."""


@dataclass(frozen=True)
class Cost:
    """Seconds measured on the search's first members."""

    batch: float
    """A batch and its views, which a cohort shares."""
    step: float
    """A member's step."""
    fitness: float
    """A member's features and their clusters."""

    def job(self, members: int, steps: int, *, side_by_side: int) -> float:
        """Seconds of a cohort's training and judging, with so many members at work at a time."""
        turns = -(-members // side_by_side)
        return steps * (self.batch + turns * self.step) + turns * self.fitness


def dry_run(
    recipe: Recipe, data: Data, *, runtime: Runtime, workers: Workers, display: Display
) -> None:
    """Print terms, members, time, memory and each worker's work; nothing is written."""
    count = 1 if workers.count == 0 else workers.count
    if count is None:
        raise ValueError("--dry-run does not join a cluster: say how many GPUs with --gpus N")
    on_cpu = runtime.device.type == "cpu"
    # On other nodes there may be more or fewer cores: this machine stands for each.
    runtime = replace(runtime, processes=count if workers.address is None else 1)
    make_deterministic(runtime)
    if on_cpu:
        torch.set_num_threads(1)
    trainer = Trainer(recipe, data.videos.index, runtime, warn=display.say)
    labelled = LabelledClips(data.labelled.index, recipe, runtime=runtime)
    facts: dict[str, Any] = {"seed": recipe.seed, "recipe_hash": "", "sound": trainer.sound}
    study = SearchStudy(recipe.search, storage=None, name="", **facts)
    display.say(_terms(trainer))
    display.say(_members(recipe, study, labelled))
    cost = _measure(trainer, labelled, study)
    steps = recipe.optim.steps * recipe.search.repeats
    side_by_side = runtime.cores if on_cpu else 1
    jobs = _jobs(study, count, workers.members_at_once)
    spans = [
        [cost.job(n, steps, side_by_side=side_by_side) for n in generation] for generation in jobs
    ]
    seconds = _schedule(spans, count, waits=study.waits)
    confirm = [
        cost.job(size, recipe.optim.steps, side_by_side=side_by_side)
        for size in confirmation_sizes(recipe.search)
    ]
    seconds += _schedule([confirm[:1], confirm[1:]], count, waits=True)
    for line in (
        f"time: {duration(seconds)} expected; measured here: {1e3 * cost.batch:.0f} ms a batch,"
        f" {1e3 * cost.step:.0f} ms a member's step, {cost.fitness:.2f} s a member's fitness",
        _memory(trainer, workers.members_at_once),
        *_shares(recipe, study, jobs, count, "GPU" if workers.gpus else "worker"),
    ):
        display.say(line)


def _terms(trainer: Trainer) -> str:
    known = active_terms(dict.fromkeys(TERM_NAMES, 1.0), sound=trainer.sound)
    missing = [name for name in TERM_NAMES if name not in known]
    why = f"; without sound there are no {', '.join(missing)}" if missing else ""
    return f"terms: {len(TERM_NAMES)}, of which {len(known)} can be computed on these videos{why}"


def _members(recipe: Recipe, study: SearchStudy, labelled: LabelledClips) -> str:
    search = recipe.search
    trainings = study.total * search.repeats
    fresh = sum(confirmation_sizes(search))
    clips = recipe.optim.steps * recipe.optim.batch_size
    return (
        f"members: {study.total} by {search.method} ({search.population} and {search.rounds} rounds), {trainings}"
        f" trainings of {recipe.optim.steps} steps ({clips} clips), then {fresh} with fresh seeds;"
        f" judged by {len(labelled.clips)} clips"
    )


def _measure(trainer: Trainer, labelled: LabelledClips, study: SearchStudy) -> Cost:
    """Train members for some steps, as far as the recipe has any, and judge one."""
    batches, steps = list[float](), list[float]()
    asked = [each.weights for each in study.ask(SAMPLE if study.settings.sparsity else 1)]
    # nothing may be left of a loss where there is no sound: in a search that member fails
    losses = [loss for loss in asked if active_terms(loss, sound=trainer.sound)]
    for loss in losses or [load_loss("equal")]:
        member = trainer.member(loss, seed=trainer.recipe.seed)
        batch, step = _measure_steps(trainer, member)
        batches.append(batch)
        steps.append(step)
    for _ in range(2):  # the first decodes, which later members are spared
        began = time.perf_counter()
        labelled.fitness([member.loss.rgb], seed=0)
        fitness = time.perf_counter() - began
    return Cost(fmean(batches), fmean(steps), fitness)


def _measure_steps(trainer: Trainer, member: Member) -> tuple[float, float]:
    """Median seconds that a member waits for a batch's views, and of its step."""
    idle, measured = STEPS
    batches, steps = list[float](), list[float]()
    rounds = trainer.rounds([member], seed=trainer.recipe.seed)
    for _ in range(min(idle + measured, trainer.recipe.optim.steps)):
        began = time.perf_counter()
        _, views = next(rounds)
        between = time.perf_counter()
        trainer.step(member, views)
        if trainer.runtime.device.type == "cuda":
            torch.cuda.synchronize()
        batches.append(between - began)
        steps.append(time.perf_counter() - between)
    counted = slice(min(idle, len(steps) - 1), None)
    return median(batches[counted]), median(steps[counted])


def _jobs(study: SearchStudy, workers: int, members_at_once: int | None) -> list[list[int]]:
    """Members of each job of each generation."""
    jobs, number = [], 0
    while number < study.total:
        generation = study.generation(number)
        jobs.append(job_sizes(study.settings, len(generation), workers, members_at_once))
        number = generation.stop
    return jobs


def _schedule(spans: Sequence[Sequence[float]], workers: int, *, waits: bool) -> float:
    """End of the last job, where the worker that is free first takes the next; generations may wait for each other."""
    free = [0.0] * workers
    for generation in spans:
        if waits:
            free = [max(free)] * workers
        for seconds in generation:
            heapq.heapreplace(free, free[0] + seconds)
    return max(free)


def _memory(trainer: Trainer, members_at_once: int | None) -> str:
    seed = trainer.recipe.seed
    member, step = memory_needed(trainer, dict.fromkeys(TERM_NAMES, 1.0), seed=seed)
    fits = that_many_fit(trainer.runtime, per_member=member, per_step=step)
    asked = f" (--members-per-gpu {members_at_once})" if members_at_once else ""
    sizes = f"{member / 2**20:.0f} MiB a member, {step / 2**20:.0f} MiB a step"
    return f"memory: {sizes}; {fits} members fit at once{asked}"


def _shares(
    recipe: Recipe, study: SearchStudy, jobs: list[list[int]], count: int, kind: str
) -> list[str]:
    """Lines on each worker's work in the longest generation, and on the setting to raise where some have none."""
    largest = max(jobs, key=sum)
    each = " or ".join(map(str, sorted(set(largest))))
    lines = [
        f"{count} {kind}{'s' * (count > 1)}: a generation has {sum(largest)} members,"
        f" in {len(largest)} job{'s' * (len(largest) > 1)} of {each}"
    ]
    if idle := idle_workers(study, len(largest), count, kind=kind):
        lines.append(idle)
    return lines
