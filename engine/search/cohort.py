"""Cohorts: members trained in lockstep, so that each batch is decoded and its views are made once for all.

Members start from equal networks and see equal batches (common random numbers): what differs between their
fitnesses comes from their losses. A member that fails leaves; the others never notice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from msgspec.structs import replace
from torch import Tensor

from engine.core.recipe import Search, recipe_hash
from engine.core.runtime import is_device_error
from engine.features.extract import LabelledClips
from engine.features.fitness import FitnessResult, kmeans_fitness
from engine.search.cohort_part import (
    CohortRun,
    MemberRun,
    OnStep,
    TooManyMembers,
    first_step,
    how_judged,
    rung_fitness,
    rungs,
)
from engine.search.samplers import Proposal, State
from engine.train.checkpoint import save_ends
from engine.train.memory import CohortMemory
from engine.train.trainer import DeviceFailed, Trainer, device_failed


@dataclass(frozen=True)
class MemberResult:
    """What training and clustering one loss gave; tensors are on the CPU."""

    state: State
    fitness: float | None
    """Mean over repeats; None unless it is complete."""
    reason: str | None
    """Why it failed or was pruned."""
    results: tuple[FitnessResult, ...]
    """One per repeat."""
    seeds: tuple[int, ...]
    seconds: float
    """Its share of its cohort's time, input and clustering included."""
    clips_per_second: float
    learnt: dict[str, Any]
    """What ``Member.learnt`` says at the end of training; of the last repeat, empty where one failed."""
    rgb: dict[str, Tensor] | None
    """The RGB network's weights; of the last repeat."""
    rungs: tuple[tuple[int, float], ...] = ()
    """Steps trained and fitness measured then, on the way to the end."""
    steps: int = 0
    """Steps trained, of all repeats."""

    @property
    def terms(self) -> dict[str, float]:
        """Unweighted terms near the end of training, running mean; of the last repeat."""
        found: dict[str, float] = self.learnt.get("terms", {})
        return found


def evaluate_cohort(
    trainer: Trainer,
    labelled: LabelledClips,
    *,
    members: Sequence[Proposal],
    seeds: Sequence[int],
    memory: CohortMemory | None = None,
    on_step: OnStep | None = None,
    full: bool = False,
) -> list[MemberResult]:
    """Train each member's loss, once a seed, and measure its fitness; results in the order of ``members``.

    As many members as fit into memory are trained at once; where they run out of it all the same, the half
    of them, from their start. Neither changes a result. What ``search.halving`` compares is the whole cohort, of
    which those that are trained from the same step are compared with each other: see ``engine.cohort_rungs``.
    With ``full`` all are trained to the end and on all clips, whatever ``search`` says: what the search found is then
    confirmed by what it did without. ``memory`` is what one cohort leaves for the next.

    Raises DeviceFailed where the GPU itself does, and OSError where an end state can't be written.
    """
    search = trainer.recipe.search
    if full:
        search = replace(search, halving=False, collapse_rank=0.0, clip_bank=0)
    memory = memory or CohortMemory()
    return _evaluate(
        trainer, labelled, members, seeds=seeds, search=search, memory=memory, on_step=on_step
    )


def _evaluate(
    trainer: Trainer,
    labelled: LabelledClips,
    members: Sequence[Proposal],
    *,
    seeds: Sequence[int],
    search: Search,
    memory: CohortMemory,
    on_step: OnStep | None,
) -> list[MemberResult]:
    bank = memory.clips(trainer, search.clip_bank)
    losses = [member.weights for member in members]
    at_once = memory.members_that_fit(trainer, losses, seed=seeds[0], bank=bank)
    results: list[MemberResult] = []
    while len(results) < len(members):
        # what is compared is trained together, in turns; others come one group after the other
        count = len(members) if search.halving else at_once
        part = members[len(results) : len(results) + count]
        try:
            runs = [
                _run(trainer, i, member, seed, search)
                for seed in seeds
                for i, member in enumerate(part)
            ]
            CohortRun(
                trainer,
                labelled,
                runs,
                search=search,
                at_once=at_once,
                bank=bank,
                on_step=on_step,
            ).finish()
            results += _results(trainer, part, runs, search)
            continue
        except TooManyMembers as error:
            size = error.size
        except RuntimeError as error:
            if is_device_error(error) and not isinstance(error, DeviceFailed):
                raise device_failed(error) from error
            raise
        trainer.free_memory()
        at_once = memory.halve(size)
        trainer.warn(f"out of memory with {size} members at once: going on with {at_once}")
    return results


def untrained_fitness(trainer: Trainer, labelled: LabelledClips, *, seed: int) -> FitnessResult:
    """Fitness of the RGB network as it is initialised."""
    network = trainer.initial_loss(seed).rgb
    with trainer.clock("fitness"):
        (features,) = labelled.features([network])
        return kmeans_fitness(features, labelled.labels, **how_judged(trainer, labelled, seed))


def _results(
    trainer: Trainer, members: Sequence[Proposal], runs: Sequence[MemberRun], search: Search
) -> list[MemberResult]:
    """Each member's, in order; the end states that are to be kept are written."""
    results = []
    for i, member in enumerate(members):
        own = [run for run in runs if run.job == i and run.begun]
        results.append(_result(trainer, own, search))
        ends = {run.seed: run.end for run in own if run.end is not None}
        if member.keep is not None and results[-1].state == "complete":
            save_ends(member.keep, ends, recipe_hash=recipe_hash(trainer.recipe))
    return results


def _run(trainer: Trainer, number: int, member: Proposal, seed: int, search: Search) -> MemberRun:
    steps = trainer.recipe.optim.steps
    first = 0 if member.start is None else first_step(search, steps)
    return MemberRun(
        job=number,
        weights=member.weights,
        seed=seed,
        first=first,
        step=first,
        rungs=rungs(search, first=first, steps=steps),
        start=member.start,
        keeps_end=member.keep is not None,
    )


def _result(trainer: Trainer, runs: Sequence[MemberRun], search: Search) -> MemberResult:
    """One member's, of its runs under each seed that was begun."""
    bad = next((run for run in runs if run.failed is not None), None)
    pruned = next((run.pruned for run in runs if run.pruned is not None), None)
    state: State
    state = "failed" if bad else "pruned" if pruned else "complete"
    results = tuple(run.result for run in runs if run.result is not None)
    clips = [(run.step - run.first) * trainer.recipe.optim.batch_size for run in runs]
    speeds = [n / run.seconds if n else 0.0 for n, run in zip(clips, runs, strict=True)]
    common = sorted(set.intersection(*(set(run.looks) for run in runs)))
    return MemberResult(
        state=state,
        fitness=float(np.mean([r.value for r in results])) if state == "complete" else None,
        reason=bad.failed if bad else pruned,
        results=results,
        seeds=tuple(run.seed for run in runs),
        seconds=sum(run.seconds for run in runs),
        clips_per_second=float(np.mean(speeds)),
        learnt={} if bad else runs[-1].learnt,
        rgb=runs[-1].rgb if state == "complete" else None,
        rungs=tuple((at - runs[0].first, rung_fitness(runs, at)) for at in common)
        if search.halving
        else (),
        steps=sum(run.step - run.first for run in runs),
    )
