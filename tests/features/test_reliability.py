"""Reliability of fitness against made-up losses and seeds of known spread."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import norm, spearmanr

from engine.features.reliability import expected_largest, reliability


def made(losses: int, seeds: int, *, spread: float, noise: float) -> np.ndarray:
    rng = np.random.default_rng(1)
    between, within = rng.normal(size=(losses, 1)), rng.normal(size=(losses, seeds))
    seed = rng.normal(size=(1, seeds))
    return 0.3 + spread * between + noise * within + 0.1 * seed


def test_spreads_are_found_whatever_a_seed_does_to_all() -> None:
    found = reliability(made(400, 6, spread=0.03, noise=0.02))
    assert found.loss_spread == pytest.approx(0.03, rel=0.1)
    assert found.seed_spread == pytest.approx(0.02, rel=0.05)
    assert found.one() == pytest.approx(9 / 13, abs=0.05)
    assert found.one(4) == pytest.approx(9 / 10, abs=0.03)


def test_spearman_is_that_of_the_halves_and_inside_its_interval() -> None:
    scores = made(24, 4, spread=0.03, noise=0.02)
    found = reliability(scores)
    expected = spearmanr(scores[:, :2].mean(1), scores[:, 2:].mean(1)).statistic
    assert found.spearman == pytest.approx(expected)
    assert found.interval is not None and found.interval[0] < expected < found.interval[1]
    narrow = reliability(made(200, 4, spread=0.03, noise=0.02)).interval
    assert narrow is not None
    assert narrow[1] - narrow[0] < found.interval[1] - found.interval[0]


def test_rounding_is_no_spread() -> None:
    found = reliability([[0.4000, 0.5375], [0.4250, 0.5625]])  # each seed does the same to both
    assert found.seed_spread == 0 and found.ratio == math.inf and found.repeats == 1
    alike = reliability([[0.1 + 0.2, 0.4], [0.3, 0.4]])
    assert alike.loss_spread == 0 and alike.ratio == 0


def test_noise_alone_ranks_nothing() -> None:
    found = reliability(made(300, 2, spread=0.0, noise=0.02))
    assert found.spearman is not None and abs(found.spearman) < 0.15
    assert found.ratio < 0.4
    equal = reliability(np.full((5, 2), 0.25))
    assert equal.spearman is None and equal.ratio == 0.0
    assert equal.repeats == math.inf and equal.members() == math.inf


def test_repeats_have_the_power_that_they_promise() -> None:
    found = reliability(made(400, 6, spread=0.03, noise=0.03))
    n, rng = int(found.repeats), np.random.default_rng(2)
    gaps = rng.normal(found.loss_spread, found.seed_spread * math.sqrt(2 / n), size=20_000)
    limit = norm.ppf(0.975) * found.seed_spread * math.sqrt(2 / n)
    assert 0.79 < (gaps > limit).mean() < 0.9


def test_as_many_members_as_it_takes_to_find_one_a_spread_better() -> None:
    found = reliability(made(400, 6, spread=0.03, noise=0.03))
    rng = np.random.default_rng(3)
    for repeats in (1, 4):
        gains = []
        for count in (found.members(repeats), found.members(repeats) - 1):
            truth = rng.normal(size=(20_000, int(count)))
            seen = truth + rng.normal(size=truth.shape) / found.ratio / math.sqrt(repeats)
            gains.append(truth[np.arange(len(truth)), seen.argmax(1)].mean())
        assert gains[0] > 0.98 and gains[1] < 1.02
    assert expected_largest(2) == pytest.approx(1 / math.sqrt(math.pi))


def test_a_search_with_one_training_a_member_borrows_the_confirmations() -> None:
    scores = made(400, 1, spread=0.03, noise=0.02)
    best = 0.4 + 0.02 * np.random.default_rng(4).normal(size=(1, 300))
    found = reliability(scores, best)
    assert found.spearman is None and found.seeds == 1
    assert found.loss_spread == pytest.approx(0.03, rel=0.15)
    with pytest.raises(ValueError, match="two seeds"):
        reliability(scores)
    with pytest.raises(ValueError, match="1 losses"):
        reliability(scores[:1], best)


def test_a_loss_that_failed_is_left_out() -> None:
    scores = made(6, 2, spread=0.03, noise=0.02)
    broken = np.vstack([scores, [[np.nan, 0.9]]])
    assert reliability(broken) == reliability(scores)
