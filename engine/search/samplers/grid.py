"""Single terms and pairs of terms: a control that learns nothing."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations, product

from engine.core.recipe import Search
from engine.objective.terms import TERM_NAMES
from engine.search.members import Proposal, Trial
from engine.search.samplers.base import RandomSampler


class GridSampler(RandomSampler):
    """Losses of one term, then of two, all other weights 0.

    A term in use has one of ``settings.levels`` weights: 1, 1 - 1/levels, ..., 1/levels. Order: single terms at weight
    1 in the table's order, then at each lower level; then pairs of terms at (1, 1), and at each other pair of levels,
    from the highest down. Pairs of one block go by how far apart their terms are in the table, taken as a ring, with
    neighbours first: wherever the search ends inside a block, every term has come as often, give or take two.

    Raises ValueError where the search has more members than the grid.
    """

    def __init__(self, settings: Search, *, seed: int, sound: bool = True) -> None:
        super().__init__(settings, seed=seed, sound=sound)
        n, levels, total = len(TERM_NAMES), settings.levels, settings.population + settings.rounds
        size = n * levels + n * (n - 1) // 2 * levels**2
        if total > size:
            raise ValueError(
                f"search.method = grid: with search.levels = {levels} the grid has {size} members, and"
                f" search.population + search.rounds asks for {total}: lower search.rounds, or raise"
                " search.levels"
            )
        self._heights = [(levels - i) / levels for i in range(levels)]
        self._pairs = sorted(
            combinations(range(n), 2), key=lambda pair: (_apart(pair[0], pair[1], n), pair)
        )

    def propose(self, number: int, *, done: Sequence[Trial]) -> Proposal:
        """The grid's member ``number``."""
        singles = len(TERM_NAMES) * len(self._heights)
        heights: Sequence[float]
        terms: Sequence[int]
        if number < singles:
            level, term = divmod(number, len(TERM_NAMES))
            heights, terms = [self._heights[level]], [term]
        else:
            block, pair = divmod(number - singles, len(self._pairs))
            heights = list(product(self._heights, repeat=2))[block]
            terms = self._pairs[pair]
        weights = dict.fromkeys(TERM_NAMES, 0.0)
        weights.update({TERM_NAMES[t]: height for t, height in zip(terms, heights, strict=True)})
        return Proposal(number, weights, round=self.round_of(number))


def _apart(one: int, other: int, around: int) -> int:
    """Steps between two places of a ring."""
    return min(other - one, around - other + one)
