"""The seeds that confirm a search's outcome."""

from __future__ import annotations

import itertools

from engine.core.recipe import load_recipe, override
from engine.search.records import fresh_seeds
from tests.runs import TINY


def test_searches_of_neighbouring_seeds_are_confirmed_by_seeds_of_their_own() -> None:
    seeds = [
        set(fresh_seeds(override(load_recipe(TINY), [f"seed={seed}", "search.confirm_seeds=50"])))
        for seed in (0, 1, 2, 3, 10, 11, 99)
    ]
    assert all(one.isdisjoint(other) for one, other in itertools.combinations(seeds, 2))
    assert seeds[0] == set(range(10_000, 10_050))


def test_seeds_stay_within_what_k_means_takes() -> None:
    dated = override(load_recipe(TINY), ["seed=20261129", "search.confirm_seeds=3"])
    assert 0 <= max(fresh_seeds(dated)) < 2**32
