"""Samplers, which propose weights from the seed, a member's number and the members done before it.

evolution (the paper): an initial population is drawn uniformly; then, round by round, a top performer (the winner of
a tournament) is copied and one of its weights is drawn anew. cmaes (the follow-up): a normal distribution over all
weights, moved and reshaped by each generation's ranks. surrogate: a balanced design first, then what a model of all
members so far promises (Thompson sampling). random and grid are controls that learn nothing.
"""

from __future__ import annotations

from engine.core.recipe import Search
from engine.objective.terms import LossWeights
from engine.search.samplers.base import RandomSampler
from engine.search.samplers.cma import CmaSampler
from engine.search.samplers.evolution import EvolutionSampler
from engine.search.samplers.grid import GridSampler
from engine.search.samplers.thompson import SurrogateSampler

SAMPLERS: dict[str, type[RandomSampler]] = {
    "evolution": EvolutionSampler,
    "cmaes": CmaSampler,
    "surrogate": SurrogateSampler,
    "random": RandomSampler,
    "grid": GridSampler,
}
"""By ``search.method``."""


def first_losses(
    settings: Search, *, seed: int, count: int, sound: bool = True
) -> list[LossWeights]:
    """The losses that a search begins with; where they are more than its population, those of further populations.

    ``sound``: whether the videos have any.
    """
    sampler = SAMPLERS[settings.method](settings, seed=seed, sound=sound)
    return [sampler.first(number) for number in range(count)]
