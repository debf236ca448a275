"""The model of fitness over losses, and the sampler that follows it."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from msgspec.structs import replace
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import DotProduct, WhiteKernel

from engine.core.recipe import Search
from engine.objective.lossfile import draw_weights
from engine.objective.terms import TERM_NAMES, TERMS, present, reaching
from engine.search import surrogate
from engine.search.members import Trial
from engine.search.samplers import thompson
from engine.search.samplers.design import LAYERS_EACH, halves, neighbour
from engine.search.study import SearchStudy
from engine.search.surrogate import (
    BASES,
    DISTILLS,
    GROUPS,
    KINDS,
    SHARED,
    SIGNALS,
    TIES,
    TRAINS_RGB,
    Surrogate,
    computed,
    levels,
    shares,
    vectors,
)

J = len(TERM_NAMES)
A, B = TERM_NAMES.index("rgb/predict"), TERM_NAMES.index("rgb/shuffle")
HARM = [TERM_NAMES.index(f"distill/flow@{layer}") for layer in range(3)]
SPARSE = Search(method="surrogate", population=16, rounds=24, sparsity=0.8)


def losses(count, *, sparsity=0.8, seed=0):
    rng = np.random.default_rng(seed)
    return vectors([draw_weights(rng, sparsity=sparsity) for _ in range(count)])


def truth(w):
    """Two terms help, one of them in moderation; three harm."""
    return (
        0.2 + 0.2 * w[..., A] + 0.1 * w[..., B] * (1 - w[..., B]) * 4 - 0.05 * w[..., HARM].sum(-1)
    )


def search(settings, *, noise, seed=0):
    study = SearchStudy(settings, storage=None, name="search", seed=seed, recipe_hash="abc")
    while not study.finished:
        for proposal in study.ask():
            true = float(truth(vectors([proposal.weights])[0]))
            seen = true + noise * np.random.default_rng([seed, proposal.number]).normal()
            study.tell(proposal.number, fitness=seen, attributes={})
    return study.members()


def designed(settings, *, seed):
    sampler = thompson.SurrogateSampler(settings, seed=seed)
    numbers = range(settings.population)
    return vectors([sampler.propose(number, done=[]).weights for number in numbers])


def test_absent_terms_stand_for_nothing():
    w = losses(50)
    b = levels(w)
    assert b.shape == (50, 3, J)
    assert not b.transpose(0, 2, 1)[w == 0].any()
    assert (b[:, 0][w > 0] == 1).all() and np.array_equal(b[:, 1], w)


@pytest.mark.parametrize("basis", ["levels", "shares"])
def test_prediction_is_a_gaussian_process_of_the_same_kernel(monkeypatch, basis):
    """With the variances that were chosen, and before terms have scales of their own, the mean is scikit-learn's."""
    monkeypatch.setattr(surrogate, "ROUNDS", 1)
    monkeypatch.setattr(surrogate, "BASES", {basis: BASES[basis]})
    w, new = losses(60), losses(9, seed=5)
    y = truth(w) + 0.02 * np.random.default_rng(1).normal(size=60)
    model = Surrogate.fit(w, y)
    x, z = BASES[basis](w).reshape(60, -1), BASES[basis](new).reshape(9, -1)
    centre, scale = x.mean(0), ((x - x.mean(0)) ** 2).sum(1).mean()
    away = []
    for ratio, kinds, shared in product(SIGNALS, KINDS[basis], SHARED):
        same = [[a == b for b in GROUPS] for a in GROUPS]
        prior = np.kron(np.diag(kinds), (1 - shared) * np.eye(J) + shared * np.array(same))
        root = np.linalg.cholesky(ratio / scale * prior + 1e-12 * np.eye(len(prior)))
        kernel = DotProduct(0.0, "fixed") + WhiteKernel(1.0, "fixed")
        peer = GaussianProcessRegressor(kernel, optimizer=None)
        peer.fit((x - centre) @ root, y - y.mean())
        expected = peer.predict((z - centre) @ root) + y.mean()
        away.append(np.abs(expected - model.predict(new)).max())
        if away[-1] < 1e-7:
            cover = (x - centre) @ root @ root.T @ (x - centre).T + np.eye(60)
            left = y - y.mean()
            assert model.noise**2 == pytest.approx(left @ np.linalg.solve(cover, left) / 60)
    assert min(away) < 1e-7
    assert np.median(away) > 1e-5  # only one choice of variances gives it


def test_shares_are_of_those_that_train_the_same_network():
    w = np.zeros(J)
    at = {name: TERM_NAMES.index(name) for name in TERM_NAMES}
    w[at["rgb/to_flow"]], w[at["distill/flow@2"]], w[at["flow/shuffle"]] = 0.9, 0.1, 0.4
    x = shares(w)[0]
    assert x[at["rgb/to_flow"]] == pytest.approx(0.9**0.5)
    assert x[at["distill/flow@2"]] == pytest.approx(0.1**0.5)
    assert x[at["flow/shuffle"]] == pytest.approx(
        0.1**0.5
    )  # a tenth of RGB's training is tied to flow
    assert np.count_nonzero(x) == 3
    w[at["distill/flow@2"]] = 0.0
    assert shares(w)[0, at["flow/shuffle"]] == 0.0
    np.testing.assert_allclose(shares(losses(20)), shares(0.3 * losses(20)))


def test_the_evidence_tells_which_basis_fits():
    w = losses(120, sparsity=0.8)
    noise = 0.01 * np.random.default_rng(0).normal(size=120)
    worth = np.random.default_rng(1).normal(size=J) * 0.1
    assert Surrogate.fit(w, shares(w)[:, 0] @ worth + noise).basis == "shares"
    assert Surrogate.fit(w, w @ worth + noise).basis == "levels"


def test_by_shares_what_helps_most_has_the_largest_and_others_by_its_square():
    most, less, other, alone = (
        TERM_NAMES.index(n)
        for n in ("rgb/to_flow", "distill/flow@2", "flow/shuffle", "grey/shuffle")
    )
    coefficients = np.full(J, -0.1)
    coefficients[[most, less, other, alone]] = 0.2, 0.1, 0.05, 0.05
    model = Surrogate("shares", coefficients, np.eye(J), np.zeros(J), 0.0, 0.1)
    best = model.best_weights(coefficients, most=6)
    # the tie to flow is worth what flow's own task then does as well
    assert best[most] == 1.0 and best[less] == pytest.approx((0.15 / 0.2) ** 2)
    assert best[other] == 1.0  # of a network to itself
    assert np.count_nonzero(best) == 3, "grey's task does not pay for a tie that harms"
    assert np.flatnonzero(model.best_weights(coefficients, most=1)).tolist() == [most]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("most", [2, 4, J])
def test_no_loss_is_better_than_the_best_by_shares(seed, most):
    """Random losses of as many terms, and small changes of the best one, promise less."""
    rng = np.random.default_rng(seed)
    coefficients = 0.1 * rng.normal(size=J)
    coefficients[int(rng.integers(J))] += 0.2
    model = Surrogate("shares", coefficients, np.eye(J), np.zeros(J), 0.0, 0.1)
    best = model.best_weights(coefficients, most=most)
    assert 0 < np.count_nonzero(best) <= most and best.max() == 1.0
    assert not surrogate.untaught(best > 0).any()
    others = []
    for _ in range(300):
        other = np.where(rng.random(J).argsort().argsort() < most, rng.random(J) ** 3, 0.0)
        near = np.clip(best + 0.2 * rng.normal(size=J) * (best > 0), 0, 1)
        for w in (other, near):
            w[surrogate.untaught(w > 0)] = 0.0
            others += [shares(w)[0] @ coefficients] * bool(w @ TRAINS_RGB)
    assert shares(best)[0] @ coefficients > max(others) - 1e-9


def test_what_no_task_trains_teaches_nothing():
    """By the rule's words: a layer is distilled of a network that has a task of its own."""
    rng = np.random.default_rng(0)
    for _ in range(200):
        among = rng.random(J) < 0.1
        used = {name for name, there in zip(TERM_NAMES, among, strict=True) if there}
        expected = {
            f"distill/{m}@{layer}"
            for m, layer in product(("grey", "flow", "audio"), range(5))
            if not any(name.startswith(f"{m}/") for name in used)
        }
        found = surrogate.untaught(among)
        assert {n for n, lost in zip(TERM_NAMES, found, strict=True) if lost} == expected & used


@pytest.mark.parametrize("basis", ["levels", "shares"])
def test_a_layer_that_helps_comes_with_the_least_harmful_task_or_not_at_all(basis):
    """Where only layers of flow seem to help, as they do in a design that never distils them alone."""
    layers = [TERM_NAMES.index(f"distill/flow@{layer}") for layer in (2, 4)]
    task, alone = TERM_NAMES.index("flow/predict"), TERM_NAMES.index("rgb/predict")
    coefficients = np.full(J, -0.2)
    coefficients[layers], coefficients[task], coefficients[alone] = 0.3, -0.01, 0.05
    if basis == "levels":
        coefficients = np.stack([0 * coefficients, coefficients, 0 * coefficients]).ravel()
    model = Surrogate(basis, coefficients, np.eye(len(coefficients)), 0 * coefficients, 0.0, 0.1)
    best = model.best_weights(coefficients, most=3)
    expected = [alone] if basis == "levels" else sorted([*layers, task])
    assert np.flatnonzero(best).tolist() == expected


@pytest.mark.parametrize("most", [3, J])
@pytest.mark.parametrize(
    ("rest", "helps"),
    [
        (-0.5, {"rgb+flow/embed": 0.3, "rgb/predict": 0.05}),
        (-0.9, {"rgb+flow/embed": 1.0, "distill/flow@2": 0.1}),
        (-0.2, {"rgb/align_audio": 0.3, "distill/audio@1": 0.4}),
    ],
)
def test_where_no_task_of_a_teacher_helps_what_needs_none_still_does(rest, helps, most):
    coefficients = np.full(J, rest)
    for name, value in helps.items():
        coefficients[TERM_NAMES.index(name)] = value
    model = Surrogate("shares", coefficients, np.eye(J), np.zeros(J), 0.0, 0.1)
    best = model.best_weights(coefficients, most=most)
    joint = next(named(**{name: 1.0}) for name in helps if not name.startswith("distill"))
    assert shares(best)[0] @ coefficients >= shares(joint)[0] @ coefficients
    assert not surrogate.untaught(best > 0).any()


def test_a_teachers_task_and_what_ties_rgb_to_it_are_found_together():
    """Neither is worth anything without the other."""
    task = TERM_NAMES.index("flow/reconstruct")
    settings = Search(method="surrogate", population=8, rounds=32, generation=4, sparsity=0.9)
    found = []
    for seed in range(8):
        study = SearchStudy(settings, storage=None, name="search", seed=seed, recipe_hash="abc")
        while not study.finished:
            for proposal in study.ask():
                x = shares(vectors([proposal.weights])[0])[0]
                seen = 0.2 + 0.4 * x[task]
                seen += 0.02 * np.random.default_rng([seed, proposal.number]).normal()
                study.tell(proposal.number, fitness=seen, attributes={})
        last = shares(vectors([member.weights for member in study.members()[-4:]]))
        found.append(last[:, 0, task].max() > 0.6)
    assert sum(found) >= 6


@pytest.mark.parametrize("sparsity", [0.925, 0.8, 0.0])
def test_of_silent_videos_no_loss_has_a_term_that_needs_sound(sparsity):
    """All else is tried as often, and what helps is found."""
    needs = np.array(["audio" in term.networks for term in TERMS])
    settings = Search(method="surrogate", population=10, rounds=12, generation=2, sparsity=sparsity)
    for seed in range(4):
        facts = {"seed": seed, "recipe_hash": "abc", "sound": False}
        study = SearchStudy(settings, storage=None, name="search", **facts)
        while not study.finished:
            for proposal in study.ask():
                seen = float(truth(vectors([proposal.weights])[0]))
                seen += 0.01 * np.random.default_rng([seed, proposal.number]).normal()
                study.tell(proposal.number, fitness=seen, attributes={})
        weights = vectors([member.weights for member in study.members()])
        assert not weights[:, needs].any()
        assert (weights[:10, ~needs & ~DISTILLS.any(0)] > 0).any(0).all()
        assert (weights @ surrogate.TRAINS_RGB > 0).all()


@pytest.mark.parametrize(
    ("population", "sparsity"),
    [(8, 0.9), (10, 0.925), (20, 0.9), (5, 0.8), (12, 0.5), (9, 0.0), (50, 0.99)],
)
def test_in_a_design_every_task_can_show_its_worth(population, sparsity):
    """Each is in some member, about as often as others, and a teacher's with distillation of different layers."""
    settings = Search(method="surrogate", population=population, sparsity=sparsity)
    tasks = np.flatnonzero(~DISTILLS.any(0))
    copies = max(round((1 - sparsity) * population), -(-population // len(tasks)))
    for seed in range(10):
        design = designed(settings, seed=seed)
        counts = (design > 0).sum(0)[tasks]
        assert copies - 1 <= counts.min() and counts.min() >= 1 and counts.max() <= copies
        assert counts.mean() > 0.9 * copies
        for member in design:
            drawn = tuple(name for name, w in zip(TERM_NAMES, member, strict=True) if w)
            assert reaching(drawn) == drawn
            for ties, own in zip(DISTILLS, surrogate.TASKS, strict=True):
                places = np.flatnonzero((member > 0) & ties)
                if member[own].any():
                    assert len(places) >= LAYERS_EACH and np.ptp(places) >= 2
                else:
                    assert not len(places)


def named(**weights):
    return vectors([dict.fromkeys(TERM_NAMES, 0.0) | weights])[0]


def test_halves_part_the_tasks_of_rgb_from_a_teachers_and_else_any():
    rng = np.random.default_rng(0)
    own = {"rgb/to_flow": 0.7, "rgb/predict": 0.6}
    taught = {
        "flow/predict": 0.8,
        "rgb+flow/embed": 0.5,
        "distill/flow@2": 0.9,
        "distill/flow@4": 0.6,
    }
    first, second = halves(named(**own, **taught), rng)
    assert (first == named(**own)).all() and (second == named(**taught)).all()
    layers = {"distill/grey@1": 0.9, "distill/grey@3": 0.6}
    tasks = {"grey/shuffle": 0.7, "grey/to_flow": 0.6, "grey/predict": 0.5}
    splits = [halves(named(**tasks, **layers), rng) for _ in range(20)]
    for each in splits:
        names = [{n for n, w in zip(TERM_NAMES, half, strict=True) if w} for half in each]
        assert names[0] & names[1] == {*layers} and names[0] | names[1] == {*tasks, *layers}
    assert len({half.tobytes() for half, _ in splits}) == 3
    none, whole = halves(named(**{"rgb/predict": 1.0}), rng)
    assert not none.any() and (whole == named(**{"rgb/predict": 1.0})).all()


@pytest.mark.parametrize("generation", [1, 2, 4])
def test_after_a_sparse_design_the_fittests_tasks_are_told_apart(generation):
    """Whatever the number of members that are proposed at once."""
    settings = Search(method="surrogate", population=10, rounds=8, sparsity=0.925)
    settings = replace(settings, generation=generation)
    for seed in range(3):
        members = search(settings, noise=0.02, seed=seed)
        weights = vectors([member.weights for member in members])
        fittest = weights[int(np.argmax([member.fitness for member in members[:10]]))]
        both = weights[10:12]
        tasks = ~DISTILLS.any(0)
        assert (both.max(0)[tasks] == fittest[tasks]).all() and not (both[:, tasks] > 0).all(
            0
        ).any()


@pytest.mark.parametrize("population", [8, 10, 20])
def test_a_sparse_designs_members_have_one_teacher_at_most(population):
    """Whichever the seed; and each of its terms pulls."""
    settings = Search(method="surrogate", population=population, sparsity=0.9)
    for seed in range(20):
        design = designed(settings, seed=seed)
        assert (design @ (TIES | surrogate.TASKS).T > 0).sum(1).max() == 1
        assert design[design > 0].min() >= 0.5


@pytest.mark.parametrize("seed", range(5))
def test_effects_are_found_of_either_sign(seed):
    """Of two terms that help, one in moderation, and three that harm, 80 noisy members tell."""
    w = losses(80, seed=seed)
    y = truth(w) + 0.02 * np.random.default_rng(seed).normal(size=80)
    model = Surrogate.fit(w, y)
    effects = np.array([model.effect(j) for j in range(J)])
    assert effects[:, 0].argmax() == A
    assert 0.07 < effects[A, 0] < 0.29  # in truth 0.2
    assert 0.04 < model.effect(B, 0.5)[0] < 0.16  # 0.1
    assert effects[HARM, 0].mean() < -0.02  # -0.05
    none = np.setdiff1d(np.arange(J), [A, B, *HARM])
    assert np.mean(np.abs(effects[none, 0]) < 3 * effects[none, 1]) > 0.9


def test_the_best_weights_of_known_coefficients():
    coefficients = np.zeros((3, J))
    coefficients[1, 4] = 0.2  # the more the better
    coefficients[2, 7] = -0.1  # the best is a half
    coefficients[0, 7] = 0.05
    coefficients[0, 20] = -0.3
    model = Surrogate("levels", np.zeros(3 * J), np.eye(3 * J), np.zeros(3 * J), 0.0, 0.1)
    best = model.best_weights(coefficients.ravel(), most=J)
    assert best[4] == 1.0 and best[7] == 0.5 and best.sum() == 1.5
    assert np.flatnonzero(model.best_weights(coefficients.ravel(), most=1)).tolist() == [4]
    harm = np.zeros((3, J))
    harm[0] = -1.0
    assert (model.best_weights(harm.ravel(), most=5) > 0).sum() == 1


def test_the_best_of_given_losses_is_told_by_what_can_act_in_them():
    model = Surrogate("levels", np.zeros(3 * J), np.eye(3 * J), np.zeros(3 * J), 0.0, 0.1)
    own, tie, task = (
        TERM_NAMES.index(n) for n in ("rgb/predict", "distill/flow@4", "flow/predict")
    )
    coefficients = np.zeros((3, J))
    coefficients[1, [own, tie, task]] = 0.1, 0.05, 0.5
    alone, untied, tied = np.zeros((3, J))
    alone[own] = untied[[own, task]] = tied[[tie, task]] = 1.0
    best = model.best_of([alone, untied, tied], coefficients.ravel())
    assert best is tied
    assert model.best_of([alone, untied], coefficients.ravel()) is alone, "no tie to that teacher"


def test_where_fitness_bends_the_bet_is_what_draws_agree_on():
    """One weight is best at .4, as many noisy members say: the bet is near it; on a slope, at the end."""
    rng = np.random.default_rng(0)
    weights = losses(120)
    for bends, expected in ((True, 0.4), (False, 1.0)):
        away = ((weights[:, 5] - 0.4) / 0.6) ** 2 if bends else 1 - weights[:, 5]
        model = Surrogate.fit(weights, 0.4 - 0.2 * away + 0.02 * rng.normal(size=120))
        assert (model.bent is not None) == bends
        assert model.surest(rng, most=J)[5] == pytest.approx(expected, abs=0.12)
        few = model.surest(rng, most=3)
        assert np.count_nonzero(few) <= 3, "no mean of many where a loss has few"


def test_every_member_can_change_the_representation():
    """Random fitness with weights mostly 0: a term that has no way to the RGB network is not proposed alone."""
    for method in ("surrogate", "random", "evolution"):
        settings = Search(method=method, population=16, rounds=8, sparsity=0.95)
        for member in search(settings, noise=1.0):
            terms = present(member.weights)
            assert reaching(terms)
            if method == "surrogate" and member.number >= 16:
                assert set(reaching(terms)) == set(terms)
                (weights,) = vectors([member.weights])
                assert not surrogate.untaught(weights > 0).any()


@pytest.mark.parametrize("seeds", ["same", "generation"])
def test_no_loss_is_proposed_twice_but_in_the_race(seeds):
    """Where one term decides, the model is sure of it at once, and draws are all the same."""

    def fitness(number, weights):
        noise = 0.01 * np.random.default_rng(number).normal()
        return float(weights["rgb/predict"] > 0) + noise

    settings = Search(
        method="surrogate", population=16, rounds=16, sparsity=0.95, generation=2, seeds=seeds
    )
    study = SearchStudy(settings, storage=None, name="search", seed=0, recipe_hash="abc")
    while not study.finished:
        for proposal in study.ask():
            value = fitness(proposal.number, proposal.weights)
            study.tell(proposal.number, fitness=value, attributes={})
    members = study.members()
    kept = [computed(row) for row in vectors([m.weights for m in members])]
    roots = shares(np.array(kept))[:, 0]
    apart = np.abs(roots[:, None] - roots[None]).max(-1) + np.eye(len(roots))
    raced = thompson.RACE if seeds == "generation" else 0
    assert apart[16 : 32 - raced, : 32 - raced].min() > thompson.ALIKE
    if not raced:
        return
    fittest = max(range(28), key=lambda n: members[n].fitness)
    assert apart[28:30, fittest].min() < 1e-6 and apart[28, 29] > 1e-6, (
        "the fittest and the model's best"
    )
    assert apart[30:, :30].min(1).max() < 1e-6 and apart[30, 31] > 1e-6, "the two fittest again"


@pytest.mark.parametrize(
    ("rounds", "generation", "raced"),
    [(12, 2, 4), (13, 2, 3), (10, 2, 2), (10, 4, 2), (8, 4, 0), (40, 8, 8), (16, 8, 0)]
    + [(12, 3, 3), (6, 2, 2), (5, 2, 0), (3, 1, 0), (9, 1, 3), (0, 4, 0)],
)
def test_a_race_is_a_third_of_what_follows_the_design_at_most(rounds, generation, raced):
    """And begins with a generation, whose seeds are not those of the bet's first training."""
    settings = Search(
        method="surrogate", population=10, rounds=rounds, generation=generation, seeds="generation"
    )
    assert thompson.SurrogateSampler(settings, seed=0).race == 10 + rounds - raced
    assert (3 * raced <= rounds and (rounds - raced) % generation == 0) or not raced


def test_the_outcome_is_the_loss_that_stays_fit_in_the_race():
    """One was lucky when it was chosen, the other is good each time; the model knows neither."""
    settings = Search(
        method="surrogate", population=12, rounds=16, sparsity=0.8, seeds="generation"
    )
    sampler = thompson.SurrogateSampler(settings, seed=0)
    fitness = 0.3 + 0.02 * np.random.default_rng(0).normal(size=24)
    fitness[[3, 7]] = 0.6, 0.52
    rows = [dict(zip(TERM_NAMES, row.tolist(), strict=True)) for row in losses(24)]
    done = [Trial(i, rows[i], fitness=float(f)) for i, f in enumerate(fitness)]
    assert sampler.fittest(done).number == 3
    race = [(3, 0.33), (7, 0.48), (3, 0.35), (7, 0.5)]
    done += [Trial(24 + i, rows[of], fitness=f) for i, (of, f) in enumerate(race)]
    assert sampler.fittest(done).number == 27, "the fittest of its trainings in the race"


def test_what_the_model_misses_is_the_losses_own_as_far_as_their_trainings_agree():
    rng = np.random.default_rng(0)
    weights = losses(24, sparsity=0.8)
    missed = 0.05 * rng.normal(size=24)
    for noise, expected in ((0.005, (0.5, 0.9)), (0.2, (0.0, 0.3))):
        found = []
        for seed in range(20):
            rng = np.random.default_rng(seed)
            rows, of = np.concatenate([weights, weights[:4]]), [*range(24), *range(4)]
            fitness = 0.3 + missed[of] + noise * rng.normal(size=28)
            model = Surrogate.fit(rows, fitness)
            same = (rows[:, None] == rows).all(-1).astype(float)
            found.append(model.own(same, fitness))
            assert model.own(np.eye(28), fitness) == surrogate.OWN, "nothing is known"
        assert expected[0] < np.mean(found) < expected[1], (noise, np.mean(found))


def test_a_neighbour_differs_in_one_term_or_in_an_exchange_of_one_role():
    rng, moves = np.random.default_rng(0), set()
    for row in losses(200, sparsity=0.9):
        near = neighbour(row, most=4, rng=rng)
        away = np.flatnonzero(near != row)
        assert 1 <= len(away) <= 2 and 0 <= near.min() and near.max() <= 1
        assert 1 <= np.count_nonzero(near) <= max(4, np.count_nonzero(row))
        if len(away) == 2:
            assert surrogate.ROLES[away[0]] == surrogate.ROLES[away[1]]
            assert sorted(near[away]) == sorted(row[away])
        moves.add((len(away), np.count_nonzero(near) - np.count_nonzero(row)))
    assert moves == {(1, -1), (1, 0), (1, 1), (2, 0)}


def test_finds_what_evolution_does_not():
    found = {"surrogate": [], "evolution": []}
    for method, seed in product(found, range(3)):
        settings = Search(method=method, population=16, rounds=24, sparsity=0.8)
        last = search(settings, noise=0.03, seed=seed)[-8:]
        found[method].append(truth(vectors([m.weights for m in last])).mean())
    assert min(found["surrogate"]) > 0.36
    assert np.mean(found["surrogate"]) > np.mean(found["evolution"]) + 0.05


def test_proposals_follow_from_the_seed_and_what_is_done_alone():
    one, two = search(SPARSE, noise=0.02), search(SPARSE, noise=0.02)
    assert [m.weights for m in one] == [m.weights for m in two]
    other = search(SPARSE, noise=0.02, seed=1)
    assert [m.weights for m in one] != [m.weights for m in other]


def test_fewer_terms_are_drawn_where_asked_and_never_none():
    w = losses(400, sparsity=0.9)
    assert (w > 0).sum(1).min() >= 1
    assert (w > 0).mean() == pytest.approx(0.1, abs=0.01)
    plain = np.random.default_rng(3).random(J)
    assert list(draw_weights(np.random.default_rng(3), sparsity=0.0).values()) == plain.tolist()


def test_groups_are_tasks_and_what_is_distilled():
    assert len(set(GROUPS)) == 11
    assert (
        len({g for g, n in zip(GROUPS, TERM_NAMES, strict=True) if n.startswith("distill/")}) == 3
    )
