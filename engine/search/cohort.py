"""A cohort: members trained in lockstep, so that each batch is decoded and its views are made once for all.

Members start from equal networks and see equal batches (common random numbers): what differs between their
fitnesses comes from their losses. A member that fails leaves; the others never notice.

A member is judged at its rungs, after 1/4 and 1/2 of its own steps, and at the end. At 1/4 one whose features have
collapsed is pruned. Under successive halving (Jamieson & Talwalkar 2016), by the rule of Optuna's
``SuccessiveHalvingPruner`` with a reduction factor of 2, the worse half is pruned at both rungs.

Where memory does not hold all members, groups of them take turns between two rungs and wait in files on disk; they
are compared as one cohort. With files or without, in any company, a member's numbers are the same.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from msgspec.structs import replace
from torch import Tensor

from engine.core.recipe import Search, recipe_hash
from engine.core.runtime import is_device_error, is_out_of_memory
from engine.data.clip_bank import ClipBank
from engine.data.views import Views
from engine.features.extract import LabelledClips
from engine.features.fitness import FitnessResult
from engine.search.samplers import Proposal, State
from engine.train.checkpoint import copy_of, load_end, load_member, save_ends, save_member
from engine.train.member import Member
from engine.train.memory import CohortMemory
from engine.train.trainer import DeviceFailed, MemberFailed, Trainer, device_failed

SHARES = (4, 2)
"""Rungs, as what a member's steps are divided by."""
OnStep = Callable[[int, Sequence[float]], None]
"""Called after each step with the step and the losses of the members at work (nan for those that left)."""


@dataclass(frozen=True)
class MemberResult:
    """Outcome of training a loss and clustering its features; tensors are on the CPU."""

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
        terms: dict[str, float] = self.learnt.get("terms", {})
        return terms


@dataclass
class MemberRun:
    """A member's training under one seed."""

    place: int
    """The member's place in the cohort."""
    proposal: Proposal
    seed: int
    first: int
    """The step that it starts from."""
    step: int
    """Steps of the schedule that are behind it."""
    rungs: tuple[int, ...]
    """Steps after which it is judged before the end."""
    member: Member | None = None
    """While it is in memory."""
    parked: Path | None = None
    """The file in which it waits."""
    seconds: float = 0.0
    """Its share of its groups' time, by steps."""
    begun: bool = False
    failed: str | None = None
    pruned: str | None = None
    at_rungs: dict[int, FitnessResult] = field(default_factory=dict)
    result: FitnessResult | None = None
    learnt: dict[str, Any] = field(default_factory=dict)
    """``Member.learnt``."""
    rgb: dict[str, Tensor] | None = None
    end: dict[str, Tensor] | None = None
    """Its end state, where its children are to start from it."""

    @property
    def going(self) -> bool:
        """Whether it is still being trained."""
        return self.failed is None and self.pruned is None and self.result is None

    @property
    def trained(self) -> int:
        """Steps trained."""
        return self.step - self.first


class TooManyMembers(RuntimeError):
    """A group of ``size`` members that memory does not hold; the message is the system's."""

    def __init__(self, reason: str, size: int) -> None:
        super().__init__(reason)
        self.size = size


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

    As many members as fit into memory are trained at once; where memory runs out all the same, half as many, from
    their start. Neither changes a result. ``search.halving`` compares the whole cohort, and within it those that
    train from the same step. With ``full`` all members are trained to the end and on all clips, whatever ``search``
    says. ``memory`` is what one cohort leaves for the next.

    Raises DeviceFailed where the GPU itself does, and OSError where an end state can't be written.
    """
    search = trainer.recipe.search
    if full:
        search = replace(search, halving=False, collapse_rank=0.0, clip_bank=0)
    memory = memory or CohortMemory()
    bank = memory.clips(trainer, search.clip_bank)
    losses = [member.weights for member in members]
    at_once = memory.members_that_fit(trainer, losses, seed=seeds[0], bank=bank)
    results: list[MemberResult] = []
    while len(results) < len(members):
        # what is compared is trained together, in turns; others come one group after the other
        count = len(members) if search.halving else at_once
        cohort = _CohortTraining(trainer, labelled, search, at_once, bank, on_step)
        try:
            results += cohort.evaluate(members[len(results) : len(results) + count], seeds)
            continue
        except TooManyMembers as error:
            size = error.size
        except RuntimeError as error:
            if is_device_error(error) and not isinstance(error, DeviceFailed):
                raise device_failed(error) from error
            raise
        trainer.free_memory()
        memory.members_at_once = at_once = -(-size // 2)
        trainer.warn(f"out of memory with {size} members at once: going on with {at_once}")
    return results


def untrained_fitness(trainer: Trainer, labelled: LabelledClips, *, seed: int) -> FitnessResult:
    """Measure the fitness of the RGB network as it is initialised."""
    network = trainer.initial_loss(seed).rgb
    with trainer.clock("fitness"):
        (result,) = labelled.fitness([network], seed=seed)
    if isinstance(result, str):
        raise ValueError(result)
    return result


@dataclass
class _CohortTraining:
    """Members that are compared, brought to their ends together."""

    trainer: Trainer
    labelled: LabelledClips
    search: Search
    at_once: int
    """Most members in memory."""
    bank: ClipBank | None
    """The clips to train on; None for all."""
    on_step: OnStep | None
    runs: list[MemberRun] = field(default_factory=list)
    rounds: Iterator[tuple[int, Views]] | None = None
    """Steps and views of the only group, which stays in memory."""

    @property
    def steps(self) -> int:
        """Length of the schedule."""
        return self.trainer.recipe.optim.steps

    def evaluate(self, members: Sequence[Proposal], seeds: Sequence[int]) -> list[MemberResult]:
        """Train and judge members; raises TooManyMembers, whereupon nothing is left of any of them."""
        for seed in seeds:
            for place, member in enumerate(members):
                first = 0 if member.start is None else first_step(self.search, self.steps)
                at = rungs(self.search, first=first, steps=self.steps)
                self.runs.append(MemberRun(place, member, seed, first, first, at))
        self._train_all()
        results = []
        for place, member in enumerate(members):
            runs = [run for run in self.runs if run.place == place and run.begun]
            results.append(self._result(runs))
            if member.keep is not None and results[-1].state == "complete":
                ends = {run.seed: run.end for run in runs if run.end is not None}
                save_ends(member.keep, ends, recipe_hash=recipe_hash(self.trainer.recipe))
        return results

    def _train_all(self) -> None:
        ends = sorted({*(rung for run in self.runs for rung in run.rungs), self.steps})
        alone = len(self._groups()) == 1
        with TemporaryDirectory(prefix="members-") as folder:
            for end in ends:
                for group in self._groups():
                    self._advance(group, end, alone=alone)
                    if end < self.steps and not alone:
                        self._park(group, Path(folder))
                if end < self.steps:
                    self._prune(end)
        self.rounds = None  # lets go of the decoders

    def _groups(self) -> list[list[MemberRun]]:
        """Runs of one seed that are in memory together; a loss that failed under one seed is not tried again."""
        failed = {run.place for run in self.runs if run.failed is not None}
        groups = []
        for seed in dict.fromkeys(run.seed for run in self.runs):
            left = [r for r in self.runs if r.seed == seed and r.going and r.place not in failed]
            groups += [left[i : i + self.at_once] for i in range(0, len(left), self.at_once)]
        return groups

    def _advance(self, group: Sequence[MemberRun], end: int, *, alone: bool) -> None:
        """Train a group up to step ``end`` and judge those that have a rung there."""
        began, before = time.perf_counter(), [run.step for run in group]
        reason: str | None = None
        try:
            self._train(group, end, alone=alone)
            self._judge([run for run in group if run.going], end)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            reason = next(iter(str(error).strip().splitlines()), "no memory")
        if reason is not None:  # only here does no traceback hold the members' tensors any more
            self.rounds = None
            for run in group:
                run.member = None
            if len(group) > 1:
                raise TooManyMembers(reason, len(group))
            self.trainer.free_memory()
            advice = "try a smaller --set optim.batch_size or clip.size"
            group[0].failed = f"out of memory: {reason}; {advice}"
        seconds = time.perf_counter() - began
        done = [run.step - step for run, step in zip(group, before, strict=True)]
        for run, steps in zip(group, done, strict=True):
            run.seconds += seconds * steps / max(sum(done), 1)

    def _train(self, group: Sequence[MemberRun], end: int, *, alone: bool) -> None:
        with self.trainer.clock("train"):
            for run in group:
                self._load(run)
        alive = [run for run in group if run.member is not None and run.going]
        if not alive or min(run.step for run in alive) >= end:
            return
        rounds = self.rounds or self.trainer.rounds(
            _members(alive), seed=group[0].seed, bank=self.bank
        )
        if alone:
            self.rounds = rounds
        for step, views in rounds:
            at_work = [run for run in alive if run.going and run.step == step]
            outcomes = self.trainer.step_all(_members(at_work), views)
            losses = dict.fromkeys(map(id, group), float("nan"))
            for run, outcome in zip(at_work, outcomes, strict=True):
                if isinstance(outcome, MemberFailed):
                    run.failed, run.member = str(outcome), None
                else:
                    losses[id(run)], run.step = outcome, step + 1
            if self.on_step is not None:
                self.on_step(step, list(losses.values()))
            if step + 1 == end or not any(run.going for run in alive):
                return

    def _load(self, run: MemberRun) -> None:
        """Make a run's member: new, from its parent's end, or as it was left in a file."""
        if run.member is not None:
            return
        run.begun = True
        try:
            member = self.trainer.member(
                run.proposal.weights, seed=run.seed, first=run.first, bank=self.bank
            )
            if run.parked is not None:
                load_member(run.parked, member, recipe_hash="")
            elif run.proposal.start is not None:
                load_end(run.proposal.start, member.loss, seed=run.seed)
            run.member = member
        except ValueError as error:
            run.failed = str(error)

    def _park(self, group: Sequence[MemberRun], folder: Path) -> None:
        with self.trainer.clock("train"):
            for run in group:
                if run.member is not None and run.going:
                    run.parked = folder / f"{run.place}-{run.seed}.safetensors"
                    save_member(run.parked, run.member, facts={"recipe_hash": ""})
                run.member = None

    def _judge(self, group: Sequence[MemberRun], end: int) -> None:
        judged = [run for run in group if end == self.steps or end in run.rungs]
        if not judged:
            return
        members = _members(judged)
        with self.trainer.clock("fitness"):
            networks = [member.loss.rgb for member in members]
            results = self.labelled.fitness(networks, seed=judged[0].seed)
        for run, member, result in zip(judged, members, results, strict=True):
            run.learnt = member.learnt()
            if isinstance(result, str):
                run.failed = result
            elif end < self.steps:
                run.at_rungs[end] = result
            else:
                run.result, run.rgb = result, copy_of(member.loss.rgb)
                run.end = None if run.proposal.keep is None else copy_of(member.loss)
            if not run.going:
                run.member = None

    def _prune(self, end: int) -> None:
        """Prune members that were judged after ``end`` steps, each by the mean over its seeds."""
        failed = {run.place for run in self.runs if run.failed is not None}
        judged: dict[int, list[MemberRun]] = {}
        for run in self.runs:
            if end in run.at_rungs and run.place not in failed:
                judged.setdefault(run.place, []).append(run)
        reasons: dict[int, str] = {}
        for place, runs in judged.items():
            if end == runs[0].rungs[0]:
                rank = float(np.mean([run.at_rungs[end].effective_rank for run in runs]))
                if rank < self.search.collapse_rank:
                    reasons[place] = f"collapsed: effective rank {rank:.2f} at step {end}"
        if self.search.halving:
            fitness = {place: _rung_fitness(runs, end) for place, runs in judged.items()}
            ranked = [float("-inf") if place in reasons else fitness[place] for place in judged]
            for place, goes_on in zip(judged, promoted(ranked), strict=True):
                if not goes_on and place not in reasons:
                    value = f"fitness {fitness[place]:.4f} at step {end}"
                    reasons[place] = f"{value} is in the worse half of {len(judged)} members"
        for run in self.runs:
            if run.place in reasons:
                run.pruned, run.member = reasons[run.place], None
                if run.parked is not None:
                    run.parked.unlink(missing_ok=True)

    def _result(self, runs: Sequence[MemberRun]) -> MemberResult:
        """One member's outcome, of its runs under each seed."""
        failed = next((run.failed for run in runs if run.failed is not None), None)
        pruned = next((run.pruned for run in runs if run.pruned is not None), None)
        state: State = "failed" if failed else "pruned" if pruned else "complete"
        results = tuple(run.result for run in runs if run.result is not None)
        batch = self.trainer.recipe.optim.batch_size
        speeds = [run.trained * batch / run.seconds if run.trained else 0.0 for run in runs]
        compared = self.search.halving or state == "pruned"
        common = sorted(set.intersection(*(set(run.at_rungs) for run in runs))) if compared else ()
        return MemberResult(
            state=state,
            fitness=float(np.mean([r.value for r in results])) if state == "complete" else None,
            reason=failed or pruned,
            results=results,
            seeds=tuple(run.seed for run in runs),
            seconds=sum(run.seconds for run in runs),
            clips_per_second=fmean(speeds),
            learnt={} if failed else runs[-1].learnt,
            rgb=runs[-1].rgb if state == "complete" else None,
            rungs=tuple((at - runs[0].first, _rung_fitness(runs, at)) for at in common),
            steps=sum(run.trained for run in runs),
        )


def rungs(settings: Search, *, first: int, steps: int) -> tuple[int, ...]:
    """Steps, counted from the schedule's start, after which a member trained from ``first`` to ``steps`` is judged.

    Rounded up, and before the end; none where nothing is pruned.
    """
    shares = SHARES if settings.halving else SHARES[:1] if settings.collapse_rank else ()
    return tuple(sorted({first - -(steps - first) // share for share in shares} - {steps}))


def first_step(settings: Search, steps: int) -> int:
    """The step that a member with its parent's networks starts from, to be trained for the last share of the steps."""
    return steps - max(1, round(settings.warm_start_steps * steps))


def promoted(fitnesses: Sequence[float]) -> list[bool]:
    """Whether each goes on: the better half, of an odd number the smaller one, and always the best.

    All that are equal to the worst of those go on too.
    """
    if not fitnesses:
        return []
    least = sorted(fitnesses, reverse=True)[max(len(fitnesses) // 2, 1) - 1]
    return [fitness >= least for fitness in fitnesses]


def _rung_fitness(runs: Sequence[MemberRun], rung: int) -> float:
    """Mean over a member's seeds of the fitness at one of its rungs."""
    return float(np.mean([run.at_rungs[rung].value for run in runs]))


def _members(runs: Sequence[MemberRun]) -> list[Member]:
    return [run.member for run in runs if run.member is not None]
