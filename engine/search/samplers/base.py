"""What all samplers share: random numbers of each member, generations, and uniform weights (``random``)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from engine.core.recipe import Search
from engine.objective.lossfile import draw_weights
from engine.objective.terms import LossWeights
from engine.search.members import Proposal, Trial


def generation_of(number: int, *, settings: Search) -> range:
    """The numbers of the members proposed together with member ``number``.

    Chunks of ``settings.generation``, first of the initial population and then of its descendants;
    the last chunk of either may be shorter.
    """
    first, stop = 0, settings.population
    if number >= settings.population:
        first, stop = settings.population, settings.population + settings.rounds
    start = number - (number - first) % settings.generation
    return range(start, min(start + settings.generation, stop))


def by_fitness(member: Trial) -> tuple[float, int]:
    """The key that sorts complete members, the fittest last; of equals, the later one."""
    assert member.fitness is not None
    return member.fitness, member.number


class RandomSampler:
    """Weights by ``draw_weights``, from a random stream keyed by (seed, number).

    ``sound``: whether the videos have any. Only the surrogate cares: of the weights that others propose, those of terms
    which need sound then count for nothing.
    """

    def __init__(self, settings: Search, *, seed: int, sound: bool = True) -> None:
        self.settings = settings
        self.seed = seed
        self.sound = sound

    def stream(self, number: int) -> np.random.Generator:
        """The random numbers of one member: the same in any process, whatever was drawn before."""
        key = np.random.SeedSequence(self.seed, spawn_key=(number,))
        return np.random.Generator(np.random.Philox(key))

    def seed_of(self, number: int) -> int:
        """A seed below 2**32 for a library's own random numbers of one member."""
        return int(np.random.SeedSequence(self.seed, spawn_key=(number,)).generate_state(1)[0])

    def round_of(self, number: int) -> int:
        """0 for the first ``settings.population`` members, then one a round."""
        return max(0, number + 1 - self.settings.population)

    @property
    def race(self) -> int:
        """The number of the first of the last members, one of which is to be the outcome; that after the last: none."""
        return self.settings.population + self.settings.rounds

    def generation(self, number: int) -> range | None:
        """The numbers proposed together with ``number``, once all before them are done; None: no need to wait."""
        return None

    def propose(self, number: int, *, done: Sequence[Trial]) -> Proposal:
        """Draw member ``number``'s weights; other samplers look at ``done``, those that it may know of, by number."""
        weights = draw_weights(self.stream(number), sparsity=self.settings.sparsity)
        return Proposal(number, weights, round=self.round_of(number))

    def first(self, number: int) -> LossWeights:
        """The loss of a member ``number`` that is proposed before any is done."""
        return self.propose(number, done=()).weights

    def fittest(self, done: Sequence[Trial]) -> Trial:
        """The search's outcome: the member of highest fitness, the earliest among equals; one at least is complete."""
        complete = [member for member in done if member.fitness is not None]
        return max(complete, key=lambda member: (by_fitness(member)[0], -member.number))
