"""Importance of weights on fitness functions whose variance is known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from engine.objective.terms import TERM_NAMES
from engine.report.importance import FEWEST, importance
from engine.report.run import Run
from engine.search.samplers import Trial


def made(members: int, *, slope: dict[str, float], noise: float) -> Run:
    """Random losses whose fitness is linear in some weights."""
    rng = np.random.default_rng(7)
    trials = []
    for k in range(members):
        weights = dict(zip(TERM_NAMES, rng.random(len(TERM_NAMES)).tolist(), strict=True))
        value = sum(s * weights[n] for n, s in slope.items()) + rng.normal(0, noise)
        trials.append(Trial(number=k, fitness=float(value), weights=weights))
    return Run(Path("made"), {}, {}, {}, tuple(trials))


def test_shares_follow_the_squares_of_the_slopes() -> None:
    """A linear function of independent uniform weights has variance slope^2 / 12 from each."""
    slope = {"rgb/predict": 0.3, "flow/shuffle": -0.2, "distill/audio@4": 0.1}
    found = importance(made(400, slope=slope, noise=0.01))
    assert found is not None
    order = sorted(TERM_NAMES, key=lambda n: -found.share[n])
    assert order[:3] == list(slope)
    true = 0.3**2 / (0.3**2 + 0.2**2)
    ratio = found.share["rgb/predict"] / (found.share["rgb/predict"] + found.share["flow/shuffle"])
    assert ratio == pytest.approx(true, abs=0.1)
    assert sum(found.share.values()) <= 1 + 1e-9
    assert found.direction["rgb/predict"] > 0.5 > -0.3 > found.direction["flow/shuffle"]
    assert found.share["flow/shuffle"] > found.chance > found.share[order[10]]


def test_noise_alone_stays_about_chance() -> None:
    found = importance(made(60, slope={}, noise=0.1))
    assert found is not None
    assert sum(share > found.chance for share in found.share.values()) <= 1


def test_too_little_to_say() -> None:
    assert importance(made(FEWEST - 1, slope={"rgb/predict": 1.0}, noise=0.1)) is None
    assert importance(made(20, slope={}, noise=0.0)) is None
    assert importance(made(FEWEST, slope={"rgb/predict": 1.0}, noise=0.1)) is not None
