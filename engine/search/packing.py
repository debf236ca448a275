"""Packs the study's proposals into cohorts for the workers that are idle."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from engine.core.recipe import Recipe, Search
from engine.core.runtime import Clock
from engine.search.members import Proposal
from engine.search.study import SearchStudy
from engine.search.worker import Cohort

LARGE = 2**30
"""Later generations' own seeds are between this and twice this, where other seeds are not."""


def search_seeds(recipe: Recipe, start: int) -> tuple[int, ...]:
    """The seeds of a generation's trainings, by the number of its first member."""
    repeats, base = recipe.search.repeats, recipe.seed
    if recipe.search.seeds == "generation" and start:
        base = LARGE + (1_000_003 * recipe.seed + repeats * start) % LARGE
    return tuple(base + i for i in range(repeats))


@dataclass(frozen=True)
class Planner:
    """Asks the study for members and packs them; members of a cohort share their decoded batches.

    With successive halving a cohort is a whole generation, whatever the number of workers, since its members are
    compared with each other: one of which some were done before a kill is trained again as a whole.
    """

    recipe: Recipe
    study: SearchStudy
    workers: int
    members_at_once: int | None
    """Most members of a cohort; None: a generation is shared out among the workers."""
    checkpoints: Path
    clock: Clock

    def __post_init__(self) -> None:
        if self.warm and self.recipe.search.seeds != "same":
            raise ValueError(
                "search.warm_start trains children on from their parents' networks, whose seeds they have:"
                " set search.seeds = same"
            )

    @property
    def warm(self) -> bool:
        """Whether children start from their parents' networks."""
        return self.recipe.search.warm_start and self.recipe.search.method == "evolution"

    def cohorts(self, count: int) -> list[Cohort]:
        """New cohorts, at most ``count``; none where the study waits for members at work, or all are done."""
        with self.clock("search"):
            whole = self.recipe.search.halving
            groups = self._generations(count) if whole else self._shares(count)
        best = self.study.best_fitness()
        keep_from = float("-inf") if best is None else best

        def seeds_of(member: Proposal) -> tuple[int, ...]:
            return search_seeds(self.recipe, self.study.generation(member.number).start)

        return [
            Cohort(
                tuple(map(self._with_states, group)),
                seeds_of(group[0]),
                keep_from=keep_from,
                keep_all=self.study.is_raced(group[-1].number),
            )
            for group in groups
        ]

    def _shares(self, count: int) -> list[list[Proposal]]:
        done = len(self.study.members())
        generation = self.study.generation(min(done, self.study.total - 1))
        share = self.members_at_once or -(-len(generation) // self.workers)
        if self.recipe.search.seeds == "generation":
            return [group for _ in range(count) if (group := self._of_one_generation(share))]
        members = self.study.ask(count * share)
        cohorts = min(count, len(members))
        return [members[i::cohorts] for i in range(cohorts)]

    def _of_one_generation(self, most: int) -> list[Proposal]:
        """At most so many, whose seeds are equal, whichever of their generation are done or at work."""
        members: list[Proposal] = []
        while len(members) < most and (nearest := self.study.next_number()) is not None:
            if members and nearest not in self.study.generation(members[0].number):
                break
            if not (asked := self.study.ask(1)):
                break
            members += asked
        return members

    def _generations(self, count: int) -> list[list[Proposal]]:
        groups: list[list[Proposal]] = []
        while len(groups) < count and (first := self.study.ask(1)):
            generation = self.study.generation(first[0].number)
            done = [m.proposal for m in self.study.members() if m.number in generation]
            more = len(generation) - len(done) - 1
            asked = self.study.ask(more) if more else []
            groups.append(sorted([*first, *asked, *done], key=lambda member: member.number))
        return groups

    def _with_states(self, member: Proposal) -> Proposal:
        if not self.warm:
            return member
        start = None if member.parent is None else self.state(member.parent)
        return replace(member, start=start, keep=self.state(member.number))

    def idle(self) -> str:
        """``idle_workers`` of the largest generation to come."""
        numbers = range(len(self.study.members()), self.study.total)
        largest = max((len(self.study.generation(n)) for n in numbers), default=0)
        if not largest:
            return ""
        jobs = job_sizes(self.recipe.search, largest, self.workers, self.members_at_once)
        return idle_workers(self.study, len(jobs), self.workers)

    def state(self, number: int) -> Path:
        """The file that keeps a member's end state for its children."""
        return self.checkpoints / f"member-{number:05d}.safetensors"

    def drop_states(self) -> None:
        """Delete end states that no member to come starts from."""
        if not self.warm:
            return
        members, open_members = self.study.members(), self.study.open_members()
        needed = {m.number for m in self.study.parents()} | {m.parent for m in open_members}
        # With halving, a generation of which some are done is trained again.
        generations = [self.study.generation(m.number) for m in open_members]
        needed |= {m.parent for m in members if any(m.number in g for g in generations)}
        for member in members:
            if member.number not in needed:
                self.state(member.number).unlink(missing_ok=True)


def job_sizes(
    search: Search, generation: int, workers: int, members_at_once: int | None
) -> list[int]:
    """Sizes of a generation's cohorts, where all workers are idle when it begins."""
    if search.halving:
        return [generation]
    jobs = max(min(workers, generation), -(-generation // (members_at_once or generation)))
    return [generation // jobs + (i < generation % jobs) for i in range(jobs)]


def idle_workers(study: SearchStudy, jobs: int, workers: int, *, kind: str = "worker") -> str:
    """A line on workers that a generation of so many ``jobs`` leaves idle, and on what gives them work; else ""."""
    search, idle = study.settings, workers - jobs
    if idle <= 0 or not study.waits:
        return ""
    size = "cmaes_population" if search.method == "cmaes" else "generation"
    advice = f"set search.{size} to {workers} or more, or search.synchronous=false"
    if search.halving:
        advice = "set search.halving=false"
    return f"{idle} of {workers} {kind}s would have nothing to do: {advice}"


def split(cohort: Cohort) -> list[Cohort]:
    """The cohort's members one by one."""
    return [replace(cohort, members=(member,)) for member in cohort.members]
