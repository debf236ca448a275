"""A cohort in training: its members are brought in lockstep from rung to rung, judged and pruned there, and ended.

A member is judged once it has been trained for 1/4, and for 1/2, of its own steps (``rungs``). At 1/4 one whose
features have collapsed is pruned. Under successive halving (Jamieson & Talwalkar 2016), by the rule of Optuna's
``SuccessiveHalvingPruner`` with a reduction factor of 2, the worse half is pruned at both (``promoted``).

Where memory does not hold all members, groups of them take turns between two rungs, and wait in files on disk; they
are compared as one. With files or without, in any company, a member's numbers are the same.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from torch import Tensor

from engine.core.recipe import Search
from engine.core.runtime import is_out_of_memory
from engine.data.clip_bank import ClipBank
from engine.data.views import Views
from engine.features.extract import LabelledClips
from engine.features.fitness import FitnessResult, cohort_fitness, effective_rank
from engine.objective.terms import LossWeights
from engine.train.checkpoint import copy_of, load_end, load_member, save_member
from engine.train.member import Member
from engine.train.trainer import MemberFailed, Trainer

SHARES = (4, 2)
"""Rungs, as what a member's steps are divided by."""
OnStep = Callable[[int, Sequence[float]], None]
"""Called after each step with the step and the losses of the members at work (nan for those that left)."""


class TooManyMembers(RuntimeError):
    """Memory does not hold a group of members; the message is the system's."""

    def __init__(self, reason: str, size: int) -> None:
        super().__init__(reason)
        self.size = size
        """Members of the group."""


@dataclass
class MemberRun:
    """One loss trained under one seed."""

    job: int
    """Its job's place in the cohort."""
    weights: LossWeights
    seed: int
    first: int
    """The step that it starts from."""
    step: int
    """Steps of the schedule that are behind it."""
    rungs: tuple[int, ...]
    """Steps after which it is judged on the way."""
    start: Path | None
    keeps_end: bool
    member: Member | None = None
    """While it is in memory."""
    parked: Path | None = None
    """Where it waits."""
    seconds: float = 0.0
    """Its share of its groups' time, by steps."""
    begun: bool = False
    failed: str | None = None
    pruned: str | None = None
    looks: dict[int, FitnessResult | float] = field(default_factory=dict)
    """Fitness at its rungs, or where only collapse is looked for, the effective rank."""
    result: FitnessResult | None = None
    learnt: dict[str, Any] = field(default_factory=dict)
    """``Member.learnt``."""
    rgb: dict[str, Tensor] | None = None
    end: dict[str, Tensor] | None = None
    """Its end state, where its job keeps it."""

    @property
    def going(self) -> bool:
        """Whether it is still being trained."""
        return self.failed is None and self.pruned is None and self.result is None


class CohortRun:
    """The runs of some jobs, one a seed, brought to their ends together by ``finish``."""

    def __init__(
        self,
        trainer: Trainer,
        labelled: LabelledClips,
        runs: Sequence[MemberRun],
        *,
        search: Search,
        at_once: int,
        bank: ClipBank | None,
        on_step: OnStep | None,
    ) -> None:
        """``at_once``: most members in memory; ``bank``: the clips to train on, None for all."""
        self.trainer, self.labelled, self.runs, self.on_step = trainer, labelled, runs, on_step
        self.search, self.bank = search, bank
        self.at_once, self.steps = at_once, trainer.recipe.optim.steps
        self._rounds: Iterator[tuple[int, Views]] | None = None
        """Of the only group, which stays in memory."""

    def finish(self) -> None:
        """Train and judge all runs. Raises TooManyMembers, whereupon nothing is left of any run."""
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
        self._rounds = None  # lets go of the decoders

    def _groups(self) -> list[list[MemberRun]]:
        """Runs of one seed that are in memory together; a loss that failed under one seed is not tried again."""
        lost = {run.job for run in self.runs if run.failed is not None}
        groups = []
        for seed in dict.fromkeys(run.seed for run in self.runs):
            left = [r for r in self.runs if r.seed == seed and r.going and r.job not in lost]
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
            text = str(error).strip()
            reason = text.splitlines()[0] if text else "no memory"
        if reason is not None:  # only here does no traceback hold the members' tensors any more
            self._rounds = None
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
        rounds = self._rounds or self.trainer.rounds(
            _members(alive), seed=group[0].seed, bank=self.bank
        )
        if alone:
            self._rounds = rounds
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
            member = self.trainer.member(run.weights, seed=run.seed, first=run.first)
            if run.parked is not None:
                load_member(run.parked, member, recipe_hash="")
            elif run.start is not None:
                load_end(run.start, member.loss, seed=run.seed)
            run.member = member
        except ValueError as error:
            run.failed = str(error)

    def _park(self, group: Sequence[MemberRun], folder: Path) -> None:
        with self.trainer.clock("train"):
            for run in group:
                if run.member is not None and run.going:
                    run.parked = folder / f"{run.job}-{run.seed}.safetensors"
                    save_member(run.parked, run.member, facts={"recipe_hash": ""})
                run.member = None

    def _judge(self, group: Sequence[MemberRun], end: int) -> None:
        judged = [run for run in group if end == self.steps or end in run.rungs]
        if not judged:
            return
        members = _members(judged)
        ranks_only = end < self.steps and not self.search.halving
        judgements: Sequence[FitnessResult | float | str]
        with self.trainer.clock("fitness"):
            features = self.labelled.features([member.loss.rgb for member in members])
            if ranks_only:
                judgements = [_rank(each) for each in features]
            else:
                how = how_judged(self.trainer, self.labelled, judged[0].seed)
                judgements = cohort_fitness(features, self.labelled.labels, **how)
        for run, member, each in zip(judged, members, judgements, strict=True):
            run.learnt = member.learnt()
            if isinstance(each, str):
                run.failed = each
            elif end < self.steps:
                run.looks[end] = each
            else:
                assert isinstance(each, FitnessResult)
                run.result, run.rgb = each, copy_of(member.loss.rgb)
                run.end = copy_of(member.loss) if run.keeps_end else None
            if not run.going:
                run.member = None

    def _prune(self, end: int) -> None:
        """Prune the worse of the jobs that were judged after ``end`` steps, each by the mean over its seeds."""
        search, lost = self.search, {run.job for run in self.runs if run.failed is not None}
        looked = [run for run in self.runs if end in run.looks and run.job not in lost]
        jobs = {run.job: [r for r in looked if r.job == run.job] for run in looked}
        reasons: dict[int, str] = {}
        for job, runs in jobs.items():
            if end == runs[0].rungs[0]:
                rank = float(np.mean([_rank_of(run.looks[end]) for run in runs]))
                if rank < search.collapse_rank:
                    reasons[job] = f"collapsed: effective rank {rank:.2f} at step {end}"
        if search.halving:
            fitness = {job: rung_fitness(runs, end) for job, runs in jobs.items()}
            ranked = [float("-inf") if job in reasons else fitness[job] for job in jobs]
            for job, goes_on in zip(jobs, promoted(ranked), strict=True):
                if not goes_on and job not in reasons:
                    value = f"fitness {fitness[job]:.4f} at step {end}"
                    reasons[job] = f"{value} is in the worse half of {len(jobs)} members"
        for run in self.runs:
            if run.job in reasons:
                run.pruned, run.member = reasons[run.job], None
                if run.parked is not None:
                    run.parked.unlink(missing_ok=True)


def rungs(settings: Search, *, first: int, steps: int) -> tuple[int, ...]:
    """Steps, counted from the schedule's start, after which a member trained from ``first`` to ``steps`` is judged.

    Rounded up, and before the end; none where nothing is pruned.
    """
    looks = SHARES if settings.halving else SHARES[:1] if settings.collapse_rank else ()
    return tuple(sorted({first - -(steps - first) // share for share in looks} - {steps}))


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


def how_judged(trainer: Trainer, labelled: LabelledClips, seed: int) -> dict[str, Any]:
    """What fitness needs to know beside features and labels."""
    return {
        "settings": trainer.recipe.fitness,
        "num_classes": labelled.num_classes,
        "seed": seed,
        "device": trainer.runtime.device.type,
    }


def rung_fitness(runs: Sequence[MemberRun], rung: int) -> float:
    """Mean over a job's seeds of the fitness at one of its rungs."""
    looks = [run.looks[rung] for run in runs]
    return float(np.mean([look.value for look in looks if isinstance(look, FitnessResult)]))


def _members(runs: Sequence[MemberRun]) -> list[Member]:
    members = [run.member for run in runs]
    assert all(member is not None for member in members)
    return [member for member in members if member is not None]


def _rank(features: Tensor) -> float | str:
    try:
        return effective_rank(features)
    except ValueError as error:
        return str(error)


def _rank_of(look: FitnessResult | float) -> float:
    return look.effective_rank if isinstance(look, FitnessResult) else look
