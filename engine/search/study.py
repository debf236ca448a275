"""The study: proposes loss weights and takes their fitness, without knowing of videos or training.

Samplers propose weights, and the storage keeps finished members; the study knows who is at work, who is done, and who
may be proposed next.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from engine.core.recipe import Search
from engine.search.members import Proposal, State, Trial
from engine.search.samplers import SAMPLERS
from engine.search.samplers.base import generation_of
from engine.search.samplers.evolution import EvolutionSampler
from engine.search.storage import LINEAGE, StudyStorage


def read_trials(place: str | Path, *, name: str, patience: float = 5.0) -> list[Trial]:
    """The finished members of a study, by number; nothing is written.

    Raises ValueError where there is no such study, OSError where its file or database can't be read.
    """
    return StudyStorage(place, name=name, patience=patience, create=False).load()


class SearchStudy:
    """A study of loss weights, behind ask and tell; fitness is maximised.

    Creates the Optuna study ``name`` in ``storage``, or opens it if it exists: a Path is a journal file, a string any
    database URL of Optuna's, None keeps it in memory alone. Finished members are stored, those at work are not: they
    follow from the seed and the members done, so whoever opens the study after a kill proposes them again (but where
    ``settings.synchronous`` is false, from all that is done by then). Only one process at a time may ask and tell; a
    second one gets an error when it writes. While the database is away, every call waits up to ``patience`` seconds
    for it, and calls ``on_wait`` with the reason once. ``sound``: whether the videos have any.

    Raises ValueError for settings that the method can't work with, a URL that can't be used, and a study that belongs
    to another recipe; and, as every method that writes, OSError where the storage can't be read or written.
    """

    def __init__(
        self,
        settings: Search,
        *,
        storage: str | Path | None,
        name: str,
        seed: int,
        recipe_hash: str,
        sound: bool = True,
        patience: float = 120.0,
        on_wait: Callable[[str], None] | None = None,
    ) -> None:
        self.settings = settings
        self._sampler = SAMPLERS[settings.method](settings, seed=seed, sound=sound)
        self._storage: StudyStorage | None = None
        self._where = "memory"
        self._done: dict[int, Trial] = {}
        self._best: tuple[int, Trial] | None = None
        if storage is not None:
            self._storage = StudyStorage(storage, name=name, patience=patience, on_wait=on_wait)
            self._where = self._storage.where
            self._storage.claim(recipe_hash)
            self._done = {trial.number: trial for trial in self._storage.load()}
        self._open: dict[int, Proposal] = {}
        """Members proposed and not done, by number."""
        self._out: set[int] = set()
        """Those of them that were handed out."""

    @property
    def total(self) -> int:
        """Members of the whole search: the initial population and one a round."""
        return self.settings.population + self.settings.rounds

    @property
    def finished(self) -> bool:
        """Whether all ``total`` members are done."""
        return self._all_done_below(self.total)

    def ask(self, limit: int | None = None) -> list[Proposal]:
        """Members to train next that were not handed out yet, at most ``limit``.

        Methods that learn by generations (cmaes; evolution and surrogate, if ``settings.synchronous``) propose a
        generation when all members of earlier ones are done. The others propose as many as are asked for, of what
        is done by now; with no limit, ``settings.generation``. An empty list means that members at work must end
        first, or that the search is ``finished``.
        """
        count = self.settings.generation if limit is None else limit
        waiting = sorted(self._open.keys() - self._out)
        if len(waiting) < count:
            self._propose(count - len(waiting))
            waiting = sorted(self._open.keys() - self._out)
        taken = waiting[:limit]
        self._out.update(taken)
        return [self._open[number] for number in taken]

    def tell(self, number: int, *, fitness: float, attributes: Mapping[str, Any]) -> Trial:
        """Complete a member: its fitness, to be maximised, and facts to keep that JSON can hold.

        Raises ValueError for a fitness that is not finite, and for a member that is unknown or done.
        """
        if not math.isfinite(fitness):
            raise ValueError(f"search: trial {number}'s fitness is {fitness}: fail it instead")
        return self._finish(number, "complete", fitness=float(fitness), attributes=attributes)

    def fail(
        self, number: int, *, reason: str, attributes: Mapping[str, Any] | None = None
    ) -> Trial:
        """End a member without fitness: it counts as done, is never a parent, and keeps the reason.

        Raises ValueError for a member that is unknown or done.
        """
        return self._finish(number, "failed", attributes={**(attributes or {}), "reason": reason})

    def prune(
        self, number: int, *, rungs: Sequence[tuple[int, float]], attributes: Mapping[str, Any]
    ) -> Trial:
        """End a member whose training was stopped early: it counts as done, and is never a parent.

        ``rungs``: (step, fitness there) of each time that it was judged, the last one where it ended; Optuna's pruners
        leave a trial of state PRUNED with such intermediate values.

        Raises ValueError for no rung, a fitness that is not finite, and a member that is unknown or done.
        """
        if not rungs or not all(math.isfinite(fitness) for _, fitness in rungs):
            raise ValueError(f"search: trial {number} is pruned with rungs {list(rungs)}")
        reached = tuple(sorted((int(step), float(fitness)) for step, fitness in rungs))
        return self._finish(number, "pruned", rungs=reached, attributes=attributes)

    def members(self) -> list[Trial]:
        """All members that are done, by number."""
        return [self._done[number] for number in sorted(self._done)]

    def is_done(self, number: int) -> bool:
        """Whether a member is done."""
        return number in self._done

    def is_raced(self, number: int) -> bool:
        """Whether a member is one of the last, of which one is to be the outcome, the fittest of all or not."""
        return number >= self._sampler.race

    def best(self) -> Trial:
        """The outcome so far: the fittest member or, of a surrogate's search, the one that its model speaks for.

        Raises ValueError where none completed.
        """
        if self.best_fitness() is None:
            raise ValueError(f"{self._where}: no member of this study completed")
        if self._best is None or self._best[0] != len(self._done):
            self._best = len(self._done), self._sampler.fittest(self.members())
        return self._best[1]

    def best_fitness(self) -> float | None:
        """The fittest member's; None where none completed."""
        return max((t.fitness for t in self._done.values() if t.fitness is not None), default=None)

    @property
    def waits(self) -> bool:
        """Whether a generation is proposed only when all members of earlier ones are done."""
        return self._sampler.generation(0) is not None

    def open_members(self) -> list[Proposal]:
        """All members that were proposed here and are not done, by number."""
        return [self._open[number] for number in sorted(self._open)]

    def next_number(self) -> int | None:
        """The member that ``ask`` gives next, if it gives any; None where all are done or handed out."""
        taken = self._done.keys() | self._out
        return next((number for number in range(self.total) if number not in taken), None)

    def parents(self) -> list[Trial]:
        """The members done that later members may be copied from; none where none is copied."""
        sampler = self._sampler
        return sampler.population(self.members()) if isinstance(sampler, EvolutionSampler) else []

    def generation(self, number: int) -> range:
        """The numbers of the members that are proposed, or may be compared, with member ``number``."""
        numbers = self._sampler.generation(number) or generation_of(number, settings=self.settings)
        return range(numbers.start, min(numbers.stop, self.total))

    def _propose(self, count: int) -> None:
        """Propose ``count`` members, or what is left of a generation; none where it waits for members at work."""
        absent = [n for n in range(self.total) if n not in self._done and n not in self._open]
        if not absent:
            return
        known, generation = self.members(), self._sampler.generation(absent[0])
        if generation is None:
            numbers = absent[:count]
        elif self._all_done_below(generation.start):
            numbers = [number for number in absent if number in generation]
            # outcomes within the generation would depend on which of its members were first
            known = known[: generation.start]
        else:
            return
        for number in numbers:
            self._open[number] = self._sampler.propose(number, done=known)

    def _all_done_below(self, stop: int) -> bool:
        return all(number in self._done for number in range(stop))

    def _finish(
        self,
        number: int,
        state: State,
        *,
        attributes: Mapping[str, Any],
        fitness: float | None = None,
        rungs: tuple[tuple[int, float], ...] = (),
    ) -> Trial:
        if number in self._done:
            raise ValueError(f"{self._where}: trial {number} is done already")
        if number not in self._open:
            raise ValueError(f"{self._where}: no trial {number} was asked for")
        if taken := set(attributes) & set(LINEAGE):
            raise ValueError(f"search: attributes {sorted(taken)} are the study's own")
        member = self._open[number]
        trial = Trial(
            **{name: getattr(member, name) for name in ("weights", *LINEAGE)},
            state=state,
            fitness=fitness,
            rungs=rungs,
            attributes=json.loads(json.dumps(dict(attributes))),  # as it will be read
        )
        if self._storage is not None:
            self._storage.add(trial)
        self._done[number] = trial
        del self._open[number]
        self._out.discard(number)
        return trial
