"""Which members make a job: the study's proposals, packed into cohorts for the workers that are idle."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from engine.core.recipe import Recipe, Search
from engine.core.runtime import Clock
from engine.search.study import Proposal, SearchStudy, Trial
from engine.search.worker import Cohort


class Planner:
    """Asks the study for members and packs them; members of a cohort share their decoded batches.

    With successive halving a cohort is a whole generation, whatever the number of workers, since its members are
    compared with each other: one of which some were done before a kill is trained again as a whole.
    """

    def __init__(
        self,
        recipe: Recipe,
        study: SearchStudy,
        *,
        workers: int,
        members_at_once: int | None,
        checkpoints: Path,
        clock: Clock,
    ) -> None:
        """``members_at_once``: most members of a job; None: a generation is shared out among the workers."""
        self._recipe, self._study, self._checkpoints = recipe, study, checkpoints
        self._clock = clock
        self._workers, self._members_at_once = workers, members_at_once
        search = recipe.search
        self._warm = search.warm_start and search.method == "evolution"

    def cohorts(self, count: int) -> list[Cohort]:
        """New jobs, at most ``count``; none where members must be told first, or all are done."""
        with self._clock("search"):
            whole = self._recipe.search.halving
            groups = self._generations(count) if whole else self._shares(count)
        best = self._study.best_fitness()
        best = float("-inf") if best is None else best
        return [self._cohort(group, best) for group in groups]

    def _shares(self, count: int) -> list[list[Proposal]]:
        coming = len(self._study.members())
        generation = self._study.generation(min(coming, self._study.total - 1))
        share = self._members_at_once or -(-len(generation) // self._workers)
        members = self._study.ask(count * share)
        jobs = min(count, len(members))
        return [members[i::jobs] for i in range(jobs)]

    def _generations(self, count: int) -> list[list[Proposal]]:
        groups: list[list[Proposal]] = []
        while len(groups) < count and (first := self._study.ask(1)):
            generation = self._study.generation(first[0].number)
            done = [_again(m) for m in self._study.members() if m.number in generation]
            more = len(generation) - len(done) - 1
            asked = self._study.ask(more) if more else []
            groups.append(sorted([*first, *asked, *done], key=lambda member: member.number))
        return groups

    def _cohort(self, members: Sequence[Proposal], best: float) -> Cohort:
        return Cohort(tuple(map(self._with_states, members)), self.seeds(), keep_from=best)

    def _with_states(self, member: Proposal) -> Proposal:
        if not self._warm:
            return member
        start = None if member.parent is None else self.state(member.parent)
        return replace(member, start=start, keep=self.state(member.number))

    def seeds(self) -> tuple[int, ...]:
        """The seeds of a member's trainings: the same for all members."""
        return tuple(self._recipe.seed + i for i in range(self._recipe.search.repeats))

    def state(self, number: int) -> Path:
        """Where a member's end state is kept for its children."""
        return self._checkpoints / f"member-{number:05d}.safetensors"

    def drop_states(self) -> None:
        """Delete end states that no member to come starts from."""
        if not self._warm:
            return
        members = self._study.members()
        open_members = self._study.open_members()
        needed = {m.number for m in self._study.parents()} | {m.parent for m in open_members}
        # With halving, a generation of which some are done is trained again.
        generations = [self._study.generation(m.number) for m in open_members]
        needed |= {m.parent for m in members if any(m.number in g for g in generations)}
        for member in members:
            if member.number not in needed:
                self.state(member.number).unlink(missing_ok=True)


def job_sizes(
    search: Search, generation: int, *, workers: int, members_at_once: int | None
) -> list[int]:
    """How many members each job of a generation has, where all workers are idle when it begins."""
    if search.halving:
        return [generation]
    jobs = min(workers, generation)
    most = members_at_once or generation
    if most * jobs < generation:
        jobs = -(-generation // most)
    return [generation // jobs + (i < generation % jobs) for i in range(jobs)]


def split(cohort: Cohort) -> list[Cohort]:
    """The cohort's members one by one."""
    return [replace(cohort, members=(member,)) for member in cohort.members]


def _again(trial: Trial) -> Proposal:
    """A member that is done, as it was proposed."""
    return Proposal(trial.number, trial.weights, trial.parent, trial.mutated, trial.round)
