"""Effects of terms on made-up fitness whose effects are known."""

from __future__ import annotations

import numpy as np
import pytest

from engine.objective.lossfile import draw_weights
from engine.objective.terms import BY_NAME, TERM_NAMES, TERMS
from engine.search.effects import CLAIMS, as_json, compared, effects_of
from engine.search.members import Trial
from engine.search.surrogate import FEWEST, GROUPS, computed, vectors

J = len(TERM_NAMES)
NOISE = 0.03


def by_weight(row, worth):
    return float(row @ worth)


def by_share(row, worth):
    """Roots of the terms' shares of their network, computed one by one."""
    total = {}
    for weight, term in zip(row, TERMS, strict=True):
        network = "rgb" if "rgb" in term.networks else term.networks[0]
        total[network] = total.get(network, 0.0) + weight
    value = 0.0
    for weight, term, worth_of in zip(row, TERMS, worth, strict=True):
        network = "rgb" if "rgb" in term.networks else term.networks[0]
        value += worth_of * (weight / total[network]) ** 0.5 if weight else 0.0
    return value


def members(worth, *, count, sparsity, law=by_weight, seed=0, noise=NOISE):
    rng = np.random.default_rng(seed)
    rows = []
    for number in range(count):
        row = computed(vectors([draw_weights(rng, sparsity=sparsity)])[0])
        fitness = 0.25 + law(row, worth) + noise * rng.normal()
        weights = dict(zip(TERM_NAMES, row.tolist(), strict=True))
        rows.append(Trial(number, weights, fitness=fitness))
    return rows


def true_effects(trials, worth, law):
    """What more of a term adds: it at the median of those above its mean, less at the median of the rest."""
    w = np.array([list(t.weights.values()) for t in trials])
    effects = []
    for j in range(J):
        above = w[:, j] > w[:, j].mean()
        sides = [np.where(np.arange(J) == j, np.median(w[m, j]), w) for m in (above, ~above)]
        more, less = ([law(row, worth) for row in side] for side in sides)
        effects.append(np.mean(more) - np.mean(less))
    return dict(zip(TERM_NAMES, effects, strict=True))


@pytest.mark.parametrize("law", [by_weight, by_share])
@pytest.mark.parametrize("sparsity", [0.9, 0.0])
def test_intervals_cover_the_truth_as_often_as_they_say(law, sparsity):
    """Nine in ten, over worlds of many effects and of few; most of them where few effects are large."""
    hits, groups = [], []
    for seed in range(6):
        rng = np.random.default_rng(seed)
        worth = 0.05 * rng.normal(size=J)
        if seed % 2:
            worth *= 2 * (rng.random(J) < 0.2)
        trials = members(worth, count=120, sparsity=sparsity, law=law, seed=seed)
        found, truth = effects_of(trials), true_effects(trials, worth, law)
        hits += [e.low <= truth[n] <= e.high for n, e in found.terms.items()]
        for group, effect in found.groups.items():
            true = np.mean(
                [truth[n] for n, g in zip(TERM_NAMES, GROUPS, strict=True) if g == group]
            )
            groups.append(effect.low <= true <= effect.high)
    assert 0.8 < np.mean(hits) < 0.98
    assert 0.75 < np.mean(groups)


@pytest.mark.parametrize("sparsity", [0.9, 0.0])
def test_where_nothing_matters_nothing_is_named(sparsity):
    named = 0
    for seed in range(4):
        trials = members(np.zeros(J), count=28, sparsity=sparsity, seed=seed)
        named += sum(e.sign != 0 for e in effects_of(trials).terms.values())
    assert named <= 0.03 * 4 * J


def test_one_large_effect_among_few_members_is_named_and_has_a_wide_interval():
    worth = np.zeros(J)
    worth[TERM_NAMES.index("rgb/to_flow")] = 0.3
    few, many = (
        effects_of(members(worth, count=n, sparsity=0.7, seed=3)).terms["rgb/to_flow"]
        for n in (28, 200)
    )
    assert few.sign == many.sign == 1
    assert few.high - few.low > 1.5 * (many.high - many.low)


def test_many_members_say_what_least_squares_does():
    """An independent estimate, with its standard errors, of a function that is linear in the weights."""
    worth = 0.1 * np.random.default_rng(0).normal(size=J)
    trials = members(worth, count=1000, sparsity=0.0, noise=0.05)
    w = np.array([list(t.weights.values()) for t in trials])
    x, y = np.c_[np.ones(len(w)), w], np.array([t.fitness for t in trials])
    slopes, (squares,), *_ = np.linalg.lstsq(x, y, rcond=None)
    errors = np.sqrt(np.diag(np.linalg.inv(x.T @ x)) * squares / (len(y) - J - 1))
    found = effects_of(trials)
    for j, effect in enumerate(found.terms.values()):
        above = w[:, j] > w[:, j].mean()
        by = np.median(w[above, j]) - np.median(w[~above, j])
        assert effect.mean == pytest.approx(slopes[j + 1] * by, abs=1.5 * errors[j + 1] * by)
        assert 0.8 < (effect.high - effect.low) / (2 * 1.645 * errors[j + 1] * by) < 1.6


def test_a_groups_effect_is_its_terms_mean_and_surer_than_they_are():
    worth = np.array([0.06 if t.task == "align_audio" else 0.0 for t in TERMS])
    found = effects_of(members(worth, count=100, sparsity=0.5))
    own = [found.terms[t.name] for t in TERMS if t.task == "align_audio"]
    group = found.groups["align_audio"]
    assert group.mean == pytest.approx(np.mean([e.mean for e in own]))
    assert group.sign == 1
    assert group.high - group.low < min(e.high - e.low for e in own)


def test_too_little_to_say():
    worth = np.ones(J)
    few = members(worth, count=FEWEST - 1, sparsity=0.0)
    assert effects_of(few) is None and as_json(None) == {"effects": {}, "claims": []}
    failed = Trial(99, few[0].weights, state="failed")
    assert effects_of([*few, failed]) is None
    assert effects_of(members(np.zeros(J), count=20, sparsity=0.0, noise=0.0)) is None


def test_a_term_that_was_not_tried_has_no_effect():
    trials = members(np.full(J, 0.1), count=30, sparsity=0.5)
    trials = [Trial(t.number, t.weights | {"rgb/to_flow": 0.0}, fitness=t.fitness) for t in trials]
    found = effects_of(trials)
    assert "rgb/to_flow" not in found.terms and len(found.terms) == J - 1
    assert found.groups["cross"].mean == pytest.approx(
        np.mean([found.terms[n].mean for n in ("grey/to_flow", "flow/to_rgb")])
    )
    verdicts = {text: verdict for text, _, verdict in compared(found)}
    assert verdicts["RGB to flow weighs much"] == "not tried"


def papers(sign):
    """What terms would be worth if the paper were right, or wrong."""
    much = ("align_audio", "predict")
    worth = [0.1 * (t.task in much or t.name == "rgb/to_flow") for t in TERMS]
    for j, term in enumerate(TERMS):
        if term.layer is not None:
            worth[j] = 0.03 * (term.layer - 2) * (-1 if term.modality == "grey" else 1)
    return sign * np.array(worth)


@pytest.mark.parametrize(("sign", "verdict"), [(1, "agrees"), (-1, "disagrees"), (0, "can't tell")])
def test_claims_of_the_paper_by_worlds_where_they_hold_and_where_they_do_not(sign, verdict):
    found = effects_of(members(papers(sign), count=200, sparsity=0.5))
    rows = compared(found)
    assert len(rows) == 9
    assert sum(row[-1] == verdict for row in rows) >= 8
    told = as_json(found)["claims"]
    assert [(c["claim"], c["verdict"]) for c in told] == [(r[0], r[2]) for r in rows]


def test_claims_are_of_terms_that_exist():
    assert all({*claim.more, *claim.than} <= set(BY_NAME) for claim in CLAIMS)
    much, little = CLAIMS[0], CLAIMS[3]
    assert {BY_NAME[n].task for n in much.more} == {"align_audio"} and len(much.more) == 3
    assert len(little.more) == 8 and little.than == ("rgb/shuffle",)
