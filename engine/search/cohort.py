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
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from engine.features.trivial import trivial_networks
from engine.search.members import Proposal, State
from engine.train.checkpoint import copy_of, load_end, load_member, save_ends, save_member
from engine.train.member import Member
from engine.train.memory import CohortMemory
from engine.train.trainer import DeviceFailed, MemberFailed, Trainer, device_failed

SHARES = (4, 2)
"""Divisors of a member's steps that give its rungs."""
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
    """``Member.learnt`` at the end of training; of the last repeat, empty where one failed."""
    rgb: dict[str, Tensor] | None
    """The RGB network's weights; of the last repeat."""
    rungs: tuple[tuple[int, float], ...] = ()
    """Steps trained and fitness measured then, on the way to the end."""
    steps: int = 0
    """Steps trained, of all repeats."""


@dataclass
class Training:
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

    As many members as fit into memory are trained at once; where memory trainings out all the same, half as many, from
    their start. Neither changes a result. ``search.halving`` compares the whole cohort, and within it those that
    train from the same step. With ``full`` all members are trained to the end and on all clips, whatever ``search``
    says. ``memory`` is what one cohort leaves for the next.

    Raises DeviceFailed where the GPU itself does, and OSError where an end state can't be written.
    """
    search = trainer.recipe.search
    memory = memory or CohortMemory()
    bank = memory.clips(trainer, search.clip_bank)
    if full:
        search = replace(search, halving=False, collapse_rank=0.0)
        if bank is not None and len(bank) < len(trainer.index):
            bank = None
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


def trivial_features(trainer: Trainer, labelled: LabelledClips) -> dict[str, Tensor]:
    """Take the features of the labelled clips that take no learning, by name: (clips, D) each."""
    preset, threads = trainer.recipe.clip.flow, trainer.runtime.threads
    networks = trivial_networks(preset, threads=threads)
    with trainer.clock("fitness"):
        features = labelled.features(list(networks.values()))
    return dict(zip(networks, features, strict=True))


def trivial_fitness(
    trainer: Trainer, labelled: LabelledClips, features: Mapping[str, Tensor], *, seed: int
) -> dict[str, float]:
    """Measure the fitness of such features, by name; without those that have none."""
    with trainer.clock("fitness"):
        results = labelled.judged(list(features.values()), seed=seed)
    known = zip(features, results, strict=True)
    return {name: r.value for name, r in known if not isinstance(r, str)}


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
    trainings: list[Training] = field(default_factory=list)
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
                self.trainings.append(Training(place, member, seed, first, first, at))
        self._train_all()
        results = []
        for place, member in enumerate(members):
            trainings = [one for one in self.trainings if one.place == place and one.begun]
            results.append(self._result(trainings))
            if member.keep is not None and results[-1].state == "complete":
                ends = {one.seed: one.end for one in trainings if one.end is not None}
                save_ends(member.keep, ends, recipe_hash=recipe_hash(self.trainer.recipe))
        return results

    def _train_all(self) -> None:
        ends = sorted({*(rung for one in self.trainings for rung in one.rungs), self.steps})
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

    def _groups(self) -> list[list[Training]]:
        """Trainings of one seed that are in memory together; a loss that failed under one seed is not tried again."""
        failed = {one.place for one in self.trainings if one.failed is not None}
        groups = []
        for seed in dict.fromkeys(one.seed for one in self.trainings):
            same = [one for one in self.trainings if one.seed == seed and one.going]
            left = [one for one in same if one.place not in failed]
            groups += [left[i : i + self.at_once] for i in range(0, len(left), self.at_once)]
        return groups

    def _advance(self, group: Sequence[Training], end: int, *, alone: bool) -> None:
        """Train a group up to step ``end`` and judge those that have a rung there."""
        began, before = time.perf_counter(), [one.step for one in group]
        reason: str | None = None
        try:
            self._train(group, end, alone=alone)
            self._judge([one for one in group if one.going], end)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            reason = next(iter(str(error).strip().splitlines()), "no memory")
        if reason is not None:  # only here does no traceback hold the members' tensors any more
            self.rounds = None
            for one in group:
                one.member = None
            if len(group) > 1:
                raise TooManyMembers(reason, len(group))
            self.trainer.free_memory()
            advice = "try a smaller --set optim.batch_size or clip.size"
            group[0].failed = f"out of memory: {reason}; {advice}"
        seconds = time.perf_counter() - began
        done = [one.step - step for one, step in zip(group, before, strict=True)]
        for one, steps in zip(group, done, strict=True):
            one.seconds += seconds * steps / max(sum(done), 1)

    def _train(self, group: Sequence[Training], end: int, *, alone: bool) -> None:
        with self.trainer.clock("train"):
            for one in group:
                self._load(one)
        alive = [one for one in group if one.member is not None and one.going]
        if not alive or min(one.step for one in alive) >= end:
            return
        rounds = self.rounds or self.trainer.rounds(
            _members(alive), seed=group[0].seed, bank=self.bank
        )
        if alone:
            self.rounds = rounds
        for step, views in rounds:
            at_work = [one for one in alive if one.going and one.step == step]
            outcomes = self.trainer.step_all(_members(at_work), views)
            losses = dict.fromkeys(map(id, group), float("nan"))
            for one, outcome in zip(at_work, outcomes, strict=True):
                if isinstance(outcome, MemberFailed):
                    one.failed, one.member = str(outcome), None
                else:
                    losses[id(one)], one.step = outcome, step + 1
            if self.on_step is not None:
                self.on_step(step, list(losses.values()))
            if step + 1 == end or not any(one.going for one in alive):
                return

    def _load(self, one: Training) -> None:
        """Make a training's member: new, from its parent's end, or as it was left in a file."""
        if one.member is not None:
            return
        one.begun = True
        try:
            member = self.trainer.member(
                one.proposal.weights, seed=one.seed, first=one.first, bank=self.bank
            )
            if one.parked is not None:
                load_member(one.parked, member, recipe_hash="")
            elif one.proposal.start is not None:
                load_end(one.proposal.start, member.loss, seed=one.seed)
            one.member = member
        except ValueError as error:
            one.failed = str(error)

    def _park(self, group: Sequence[Training], folder: Path) -> None:
        with self.trainer.clock("train"):
            for one in group:
                if one.member is not None and one.going:
                    one.parked = folder / f"{one.place}-{one.seed}.safetensors"
                    save_member(one.parked, one.member, facts={"recipe_hash": ""})
                one.member = None

    def _judge(self, group: Sequence[Training], end: int) -> None:
        judged = [one for one in group if end == self.steps or end in one.rungs]
        if not judged:
            return
        members = _members(judged)
        with self.trainer.clock("fitness"):
            networks = [member.loss.rgb for member in members]
            results = self.labelled.fitness(networks, seed=judged[0].seed)
        for one, member, result in zip(judged, members, results, strict=True):
            one.learnt = member.learnt()
            if isinstance(result, str):
                one.failed = result
            elif end < self.steps:
                one.at_rungs[end] = result
            else:
                one.result, one.rgb = result, copy_of(member.loss.rgb)
                one.end = None if one.proposal.keep is None else copy_of(member.loss)
            if not one.going:
                one.member = None

    def _prune(self, end: int) -> None:
        """Prune members that were judged after ``end`` steps, each by the mean over its seeds."""
        failed = {one.place for one in self.trainings if one.failed is not None}
        judged: dict[int, list[Training]] = {}
        for one in self.trainings:
            if end in one.at_rungs and one.place not in failed:
                judged.setdefault(one.place, []).append(one)
        reasons: dict[int, str] = {}
        for place, trainings in judged.items():
            if end == trainings[0].rungs[0]:
                rank = float(np.mean([one.at_rungs[end].effective_rank for one in trainings]))
                if rank < self.search.collapse_rank:
                    reasons[place] = f"collapsed: effective rank {rank:.2f} at step {end}"
        if self.search.halving:
            fitness = {place: _rung_fitness(trainings, end) for place, trainings in judged.items()}
            ranked = [float("-inf") if place in reasons else fitness[place] for place in judged]
            for place, goes_on in zip(judged, promoted(ranked), strict=True):
                if not goes_on and place not in reasons:
                    value = f"fitness {fitness[place]:.4f} at step {end}"
                    reasons[place] = f"{value} is in the worse half of {len(judged)} members"
        for one in self.trainings:
            if one.place in reasons:
                one.pruned, one.member = reasons[one.place], None
                if one.parked is not None:
                    one.parked.unlink(missing_ok=True)

    def _result(self, trainings: Sequence[Training]) -> MemberResult:
        """One member's outcome, of its trainings under each seed."""
        failed = next((one.failed for one in trainings if one.failed is not None), None)
        pruned = next((one.pruned for one in trainings if one.pruned is not None), None)
        state: State = "failed" if failed else "pruned" if pruned else "complete"
        results = tuple(one.result for one in trainings if one.result is not None)
        batch = self.trainer.recipe.optim.batch_size
        speeds = [one.trained * batch / one.seconds if one.trained else 0.0 for one in trainings]
        compared, first = self.search.halving or state == "pruned", trainings[0].first
        common = set.intersection(*(set(one.at_rungs) for one in trainings)) if compared else ()
        return MemberResult(
            state=state,
            fitness=float(np.mean([r.value for r in results])) if state == "complete" else None,
            reason=failed or pruned,
            results=results,
            seeds=tuple(one.seed for one in trainings),
            seconds=sum(one.seconds for one in trainings),
            clips_per_second=fmean(speeds),
            learnt={} if failed else trainings[-1].learnt,
            rgb=trainings[-1].rgb if state == "complete" else None,
            rungs=tuple((at - first, _rung_fitness(trainings, at)) for at in sorted(common)),
            steps=sum(one.trained for one in trainings),
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


def _rung_fitness(trainings: Sequence[Training], rung: int) -> float:
    """Mean over a member's seeds of the fitness at one of its rungs."""
    return float(np.mean([one.at_rungs[rung].value for one in trainings]))


def _members(trainings: Sequence[Training]) -> list[Member]:
    return [one.member for one in trainings if one.member is not None]
