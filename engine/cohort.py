"""Cohorts: members trained in lockstep, so that each batch is decoded and its views are made once for all.

Members start from equal networks and see equal batches (common random numbers): what differs between their
fitnesses comes from their losses. A member that fails leaves; the others never notice.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch import Tensor

from engine.features import LabelledClips
from engine.fitness import FitnessResult, cohort_fitness, kmeans_fitness
from engine.objective.terms import LossWeights
from engine.runtime import is_device_error, is_out_of_memory
from engine.train import DeviceFailed, MemberFailed, Trainer, device_failed
from engine.train_memory import members_that_fit
from engine.train_state import Member

OnStep = Callable[[int, Sequence[float]], None]
"""Called after each step with the step and the losses of the members at work (nan for those that left)."""


@dataclass(frozen=True)
class MemberJob:
    """A member to train and judge."""

    weights: LossWeights
    start: Path | None = None
    """Where an earlier member's end state lies, its parent's, from which its networks start; None: as initialised."""
    keep: Path | None = None
    """Where to save its end state for its children; None: nowhere."""


@dataclass(frozen=True)
class MemberResult:
    """What training and clustering one loss gave; tensors are on the CPU."""

    state: Literal["complete", "failed", "pruned"]
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
    terms: dict[str, float]
    """Unweighted terms near the end of training, running mean; of the last repeat."""
    rgb: dict[str, Tensor] | None
    """The RGB network's weights; of the last repeat."""
    rungs: tuple[tuple[int, float], ...] = ()
    """Steps trained and fitness measured then, on the way to the end."""
    steps: int = 0
    """Steps trained, of all repeats."""


def evaluate_cohort(
    trainer: Trainer,
    labelled: LabelledClips,
    *,
    jobs: Sequence[MemberJob],
    seeds: Sequence[int],
    on_step: OnStep | None = None,
) -> list[MemberResult]:
    """Train each job's loss, once a seed, and measure its fitness; results in the order of ``jobs``.

    As many members as fit into memory are trained at once; where they run out of it all the same, the half
    of them, from their start. Neither changes a result. Raises DeviceFailed where the GPU itself does.
    """
    losses = [job.weights for job in jobs]
    at_once = trainer.members_at_once or members_that_fit(trainer, losses, seed=seeds[0])
    results: list[MemberResult] = []
    while len(results) < len(jobs):
        part = losses[len(results) : len(results) + at_once]
        try:
            results += _evaluate_part(trainer, labelled, part, seeds=seeds, on_step=on_step)
            continue
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                if is_device_error(error) and not isinstance(error, DeviceFailed):
                    raise device_failed(error) from error
                raise
            reason = str(error).strip().splitlines()[0] if str(error).strip() else "no memory"
        # only here does no traceback hold the members' tensors any more
        trainer.free_memory()
        if len(part) == 1:
            advice = "try a smaller --set optim.batch_size or clip.size"
            results.append(_failed(f"out of memory: {reason}; {advice}", seeds[0], 0.0))
        else:
            at_once = trainer.members_at_once = -(-len(part) // 2)
            trainer.warn(f"out of memory with {len(part)} members at once: going on with {at_once}")
    return results


def _evaluate_part(
    trainer: Trainer,
    labelled: LabelledClips,
    losses: Sequence[LossWeights],
    *,
    seeds: Sequence[int],
    on_step: OnStep | None,
) -> list[MemberResult]:
    runs = [
        _evaluate_once(trainer, labelled, losses=losses, seed=seed, on_step=on_step)
        for seed in seeds
    ]
    return [_merged(repeats) for repeats in zip(*runs, strict=True)]


def untrained_fitness(trainer: Trainer, labelled: LabelledClips, *, seed: int) -> FitnessResult:
    """Fitness of the RGB network as it is initialised."""
    network = trainer.initial_loss(seed).rgb
    with trainer.clock("fitness"):
        (features,) = labelled.features([network])
        return kmeans_fitness(features, labelled.labels, **_how(trainer, labelled, seed))


def _evaluate_once(
    trainer: Trainer,
    labelled: LabelledClips,
    *,
    losses: Sequence[LossWeights],
    seed: int,
    on_step: OnStep | None,
) -> list[MemberResult]:
    began = time.perf_counter()
    members: list[Member | None] = []
    failed: dict[int, str] = {}
    with trainer.clock("train"):
        for i, weights in enumerate(losses):
            try:
                members.append(trainer.member(weights, seed=seed))
            except ValueError as error:
                failed[i] = str(error)
                members.append(None)
    _train(trainer, members, failed, seed=seed, on_step=on_step)
    alive = [member for member in members if member is not None]
    results = iter(_cluster_all(trainer, labelled, alive, seed))
    seconds = (time.perf_counter() - began) / max(len(losses), 1)
    finished = []
    for i, member in enumerate(members):
        result = failed[i] if member is None else next(results)
        if member is None or isinstance(result, str):
            finished.append(_failed(str(result), seed, seconds))
        else:
            finished.append(_finished(member, result, trainer, seed, seconds))
    return finished


def _train(
    trainer: Trainer,
    members: list[Member | None],
    failed: dict[int, str],
    *,
    seed: int,
    on_step: OnStep | None,
) -> None:
    alive = [member for member in members if member is not None]
    if not alive:
        return
    for step, views in trainer.rounds(alive, seed=seed):
        going = [i for i, member in enumerate(members) if member is not None]
        outcomes = trainer.step_all([member for member in members if member is not None], views)
        losses = [float("nan")] * len(members)
        for i, outcome in zip(going, outcomes, strict=True):
            if isinstance(outcome, MemberFailed):
                members[i], failed[i] = None, str(outcome)
            else:
                losses[i] = outcome
        if on_step is not None:
            on_step(step, losses)
        if all(member is None for member in members):
            return


def _cluster_all(
    trainer: Trainer, labelled: LabelledClips, members: Sequence[Member], seed: int
) -> list[FitnessResult | str]:
    """Fitness of each member, or why it has none: features that are not finite."""
    if not members:
        return []
    with trainer.clock("fitness"):
        features = labelled.features([member.loss.rgb for member in members])
        return cohort_fitness(features, labelled.labels, **_how(trainer, labelled, seed))


def _how(trainer: Trainer, labelled: LabelledClips, seed: int) -> dict[str, Any]:
    return {
        "settings": trainer.recipe.fitness,
        "num_classes": labelled.num_classes,
        "seed": seed,
        "device": trainer.runtime.device.type,
    }


def _finished(
    member: Member, result: FitnessResult, trainer: Trainer, seed: int, seconds: float
) -> MemberResult:
    clips = member.step * trainer.recipe.optim.batch_size
    return MemberResult(
        state="complete",
        fitness=result.value,
        reason=None,
        results=(result,),
        seeds=(seed,),
        seconds=seconds,
        clips_per_second=clips / seconds,
        terms=member.term_values(),
        rgb={
            name: tensor.detach().cpu().clone()
            for name, tensor in member.loss.rgb.state_dict().items()
        },
        steps=member.step,
    )


def _failed(reason: str, seed: int, seconds: float) -> MemberResult:
    return MemberResult("failed", None, reason, (), (seed,), seconds, 0.0, {}, None)


def _merged(repeats: Sequence[MemberResult]) -> MemberResult:
    bad = next((r for r in repeats if r.fitness is None), None)
    last = bad or repeats[-1]
    return MemberResult(
        state=last.state,
        fitness=None if bad else float(np.mean([r.fitness for r in repeats])),
        reason=last.reason,
        results=tuple(result for r in repeats for result in r.results),
        seeds=tuple(seed for r in repeats for seed in r.seeds),
        seconds=sum(r.seconds for r in repeats),
        clips_per_second=float(np.mean([r.clips_per_second for r in repeats])),
        terms=last.terms,
        rgb=last.rgb,
        rungs=last.rungs,
        steps=sum(r.steps for r in repeats),
    )
