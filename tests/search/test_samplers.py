"""How weights are proposed: CMA-ES as its library has it, and the grid."""

from __future__ import annotations

from itertools import combinations

import cmaes
import numpy as np
import pytest

from engine.core.recipe import Search
from engine.objective.terms import TERM_NAMES, check_weights
from engine.search.samplers.cma import CmaSampler
from engine.search.samplers.grid import GridSampler
from engine.search.study import SearchStudy

TARGET = np.random.default_rng(5).random(len(TERM_NAMES))


def vector(member):
    return np.array([member.weights[name] for name in TERM_NAMES])


def score(member):
    return 0.45 - float(np.mean((vector(member) - TARGET) ** 2))


def open_study(settings, *, seed=0):
    return SearchStudy(settings, storage=None, name="search", seed=seed, recipe_hash="abc")


def run(study, *, lost=()):
    while not study.finished:
        for member in study.ask():
            if member.number in lost:
                study.fail(member.number, reason="loss is nan")
            else:
                study.tell(member.number, fitness=score(member), attributes={})
    return study.members()


def directly(settings, *, seed, generations, lost=()):
    """The library's own loop; failed members are told after the others, with the worst fitness of those."""
    n = len(TERM_NAMES)
    bounds = np.array([[0.0, 1.0]] * n)
    size = settings.cmaes_population or None
    library = cmaes.CMA(np.full(n, 0.5), settings.sigma, bounds=bounds, population_size=size)
    weights = []
    for _ in range(generations):
        asked = []
        for _ in range(library.population_size):
            key = np.random.SeedSequence(seed, spawn_key=(len(weights) + len(asked),))
            library.reseed_rng(int(key.generate_state(1)[0]))
            asked.append(library.ask())
        losses = [float(np.mean((x - TARGET) ** 2)) - 0.45 for x in asked]
        numbers = range(len(weights), len(weights) + len(asked))
        good = [(x, y) for i, x, y in zip(numbers, asked, losses, strict=True) if i not in lost]
        bad = [x for i, x in zip(numbers, asked, strict=True) if i in lost]
        weights += asked
        if good:
            worst = max(y for _, y in good)
            library.tell(good + [(x, worst) for x in bad])
    return np.array(weights)


@pytest.mark.parametrize(
    ("more", "size"),
    [({}, 14), ({"sigma": 0.1}, 14), ({"cmaes_population": 6, "generation": 3}, 6)],
)
def test_cmaes_is_the_library_driven_directly(more, size):
    settings = Search(method="cmaes", population=12, rounds=80, **more)
    members = run(open_study(settings, seed=3))
    expected = directly(settings, seed=3, generations=-(-92 // size))
    assert np.array_equal([vector(m) for m in members], expected[:92])
    assert [m.round for m in members] == [n // size for n in range(92)]
    assert all(check_weights(m.weights) == m.weights for m in members)
    assert [m.parent for m in members] == [m.mutated for m in members] == [None] * 92
    assert np.mean([score(m) for m in members[-28:]]) > np.mean([score(m) for m in members[:28]])


def test_members_without_fitness_count_as_the_worst_of_their_generation():
    lost = {0, 3, 17, 20, *range(28, 42), 55}
    settings = Search(method="cmaes", population=12, rounds=72)
    members = run(open_study(settings), lost=lost)
    expected = directly(settings, seed=0, generations=6, lost=lost)
    assert np.array_equal([vector(m) for m in members], expected)
    # A generation that was lost whole teaches nothing: the next is as it would have been in its place.
    assert not np.array_equal(expected[28:42], expected[42:56])


def test_cmaes_never_hands_out_a_generation_before_the_last_is_told():
    study = open_study(Search(method="cmaes", population=12, rounds=30, generation=4))
    first = study.ask(5) + study.ask(20)
    assert [p.number for p in first] == list(range(14))
    for proposal in first[1:]:
        study.tell(proposal.number, fitness=score(proposal), attributes={})
    assert study.ask() == []
    study.tell(0, fitness=0.1, attributes={})
    assert [p.number for p in study.ask()] == list(range(14, 28))
    with pytest.raises(ValueError, match=r"search\.cmaes_population: 0"):
        CmaSampler(Search(method="cmaes", cmaes_population=3), seed=0)


def test_the_grid_has_every_single_weight_and_every_pair_once():
    levels, n = 2, len(TERM_NAMES)
    size = n * levels + n * (n - 1) // 2 * levels**2
    grid = GridSampler(Search(method="grid", population=2, rounds=size - 2, levels=levels), seed=0)
    members = [grid.propose(i, done=[]) for i in range(size)]
    used = [{name: w for name, w in m.weights.items() if w} for m in members]
    assert len({tuple(u.items()) for u in used}) == size
    expected = {((name, w),) for name in TERM_NAMES for w in (0.5, 1.0)}
    for a, b in combinations(TERM_NAMES, 2):
        expected |= {((a, v), (b, w)) for v in (0.5, 1.0) for w in (0.5, 1.0)}
    assert {tuple(u.items()) for u in used} == expected
    assert used[:n] == [{name: 1.0} for name in TERM_NAMES]
    assert used[n : 2 * n] == [{name: 0.5} for name in TERM_NAMES]
    assert used[2 * n] == dict.fromkeys(TERM_NAMES[:2], 1.0)
    # Cut off anywhere in a block of pairs, terms have come about as often.
    for stop in (100, 300, 741):
        counts = {name: sum(name in u for u in used[2 * n : 2 * n + stop]) for name in TERM_NAMES}
        assert max(counts.values()) - min(counts.values()) <= 2, stop
    with pytest.raises(ValueError, match=r"levels = 2 the grid has 3042 members.* asks for 3043"):
        open_study(Search(method="grid", population=3, rounds=3040))
