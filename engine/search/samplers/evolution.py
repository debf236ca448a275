"""Evolution, as in the paper: a tournament's winner is copied, and one of its weights is drawn anew."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from engine.objective.terms import TERM_NAMES, present, reaching
from engine.search.members import Proposal, Trial
from engine.search.samplers.base import RandomSampler, by_fitness, generation_of


class EvolutionSampler(RandomSampler):
    """Tournament selection, then a mutation of one weight (the paper).

    Parents come from the population that replacement has left of the members known to be complete: the
    ``settings.population`` fittest ("worst" leaves; of equals, the older one) or latest ("oldest" leaves; regularised
    evolution, Real et al. 2019). Where none is complete, a child is drawn uniformly.

    ``settings.synchronous`` (the default) waits for a generation's last member before the next is proposed. A child
    then depends on (seed, number, earlier generations) alone: on 1 worker or 64, killed or not, a search proposes the
    same members. Otherwise no worker waits, and a search can't be repeated where members overtake one another.
    """

    def generation(self, number: int) -> range | None:
        """``generation_of``; None in the asynchronous mode."""
        return generation_of(number, settings=self.settings) if self.settings.synchronous else None

    def propose(self, number: int, *, done: Sequence[Trial]) -> Proposal:
        """Draw an initial member, or copy a tournament's winner and draw one weight anew."""
        population = self.population(done)
        if number < self.settings.population or not population:
            return super().propose(number, done=done)
        rng = self.stream(number)
        order = np.argsort(rng.random(len(population)))
        parent = max((population[i] for i in order[: self.settings.tournament]), key=by_fitness)
        weights = dict(parent.weights)
        mutated = TERM_NAMES[int(rng.random() * len(TERM_NAMES))]
        sparsity = self.settings.sparsity
        while weights[mutated] == parent.weights[mutated] or not reaching(present(weights)):
            weights[mutated] = float(rng.random())
            if sparsity and rng.random() < sparsity:
                weights[mutated] = 0.0
        return Proposal(number, weights, parent.number, mutated, self.round_of(number))

    def population(self, done: Sequence[Trial]) -> list[Trial]:
        """The members that may be parents, the fittest or the latest first; ``done`` goes by number."""
        complete = [member for member in reversed(done) if member.fitness is not None]
        if self.settings.replace == "worst":
            complete.sort(key=by_fitness, reverse=True)
        return complete[: self.settings.population]
