"""CMA-ES, as in the follow-up: a normal distribution over all weights, moved by each generation's ranks."""

from __future__ import annotations

from collections.abc import Sequence

import cmaes
import numpy as np

from engine.core.recipe import Search
from engine.objective.terms import TERM_NAMES, LossWeights
from engine.search.members import Proposal, Trial
from engine.search.samplers.base import RandomSampler
from engine.search.surrogate import vectors


class CmaSampler(RandomSampler):
    """CMA-ES (Hansen 2016; library ``cmaes``) within [0, 1], from 0.5 in every weight.

    The library learns from a whole generation, so that no parallel member is thrown away; it has ``settings.
    cmaes_population`` members, whatever ``settings.generation``. Each proposal draws from a stream of its own, keyed by
    (seed, number), so the library's state follows from the fitnesses: it is built anew from the study, and no kill can
    lose it. The library wants an outcome for each proposal: members that failed or were pruned count as no better than
    the worst of their generation, so that the search leaves where losses diverge. A generation of which none completed
    ranks nothing: it is left out, and the next comes from the same distribution.

    Raises ValueError for a generation below 4, too small for the library's weights.
    """

    def __init__(self, settings: Search, *, seed: int, sound: bool = True) -> None:
        super().__init__(settings, seed=seed, sound=sound)
        if 0 < settings.cmaes_population < 4:
            raise ValueError("search.cmaes_population: 0 (for 14), or 4 and more")
        n = len(TERM_NAMES)
        self._library = cmaes.CMA(
            mean=np.full(n, 0.5),
            sigma=settings.sigma,
            bounds=np.tile([0.0, 1.0], (n, 1)),
            population_size=settings.cmaes_population or None,
        )
        self.size: int = self._library.population_size
        self._learnt = 0
        """Members of generations that the library knows."""

    def round_of(self, number: int) -> int:
        """The generation."""
        return number // self.size

    def generation(self, number: int) -> range | None:
        """Chunks of ``size``, the last one cut off at the search's end."""
        start = number - number % self.size
        return range(start, min(start + self.size, self.settings.population + self.settings.rounds))

    def propose(self, number: int, *, done: Sequence[Trial]) -> Proposal:
        """Let the library learn from all generations before this one, and ask it for a member."""
        start = number - number % self.size
        assert self._learnt <= start <= len(done), (
            "generations are asked in order, when all are done"
        )
        for first in range(self._learnt, start, self.size):
            self._learn(done[first : first + self.size])
        self._learnt = start
        return Proposal(number, self._asked(number), round=self.round_of(number))

    def first(self, number: int) -> LossWeights:
        """A member of the distribution that the search begins with, whatever its generation."""
        assert not self._learnt, "the library has learnt of other members"
        return self._asked(number)

    def _asked(self, number: int) -> LossWeights:
        self._library.reseed_rng(self.seed_of(number))
        return dict(zip(TERM_NAMES, self._library.ask().tolist(), strict=True))

    def _learn(self, generation: Sequence[Trial]) -> None:
        known = [(vectors([m.weights])[0], -m.fitness) for m in generation if m.fitness is not None]
        if not known:
            return
        worst = max(loss for _, loss in known)
        # The library sorts them, and among equals keeps this order.
        lost = [(vectors([m.weights])[0], worst) for m in generation if m.fitness is None]
        self._library.tell(known + lost)
