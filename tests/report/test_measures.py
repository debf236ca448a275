"""Measures of a run against scipy and against sums by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import scipy.stats

from engine.report.measures import agreement, lineage, spearman, throughput
from engine.report.run import read_run
from tests.made_run import make_run


def test_rank_correlation_against_scipy() -> None:
    rng = np.random.default_rng(3)
    for ties in (False, True):
        x = rng.normal(size=63)
        y = 0.5 * x + rng.normal(size=63)
        if ties:
            x, y = x.round(), y.round()
        assert spearman(x, y) == pytest.approx(scipy.stats.spearmanr(x, y).statistic, abs=1e-12)
    assert spearman(np.ones(5), np.arange(5.0)) is None


def test_agreement_of_two_metrics(tmp_path: Path) -> None:
    rows = make_run(tmp_path, members=40, failed={3: "boom"}, pruned=(20,))["members"]
    done = [r["metrics"] for r in rows if r["state"] == "complete"]
    found = agreement(read_run(tmp_path), "zipf", "hungarian")
    assert found is not None and found.n == len(done) == 38
    pairs = np.array([(m["zipf"], m["hungarian"]) for m in done])
    assert found.rho == pytest.approx(scipy.stats.spearmanr(*pairs.T).statistic, abs=1e-12)
    assert found.low is not None and found.high is not None
    assert found.low < found.rho < found.high
    other = scipy.stats.bootstrap(
        tuple(pairs.T),
        lambda x, y: scipy.stats.spearmanr(x, y).statistic,
        paired=True,
        vectorized=False,
        n_resamples=1000,
        method="percentile",
        random_state=1,
    ).confidence_interval
    assert (found.low, found.high) == pytest.approx((other.low, other.high), abs=0.06)
    assert agreement(read_run(tmp_path), "zipf", "absent") is None


def test_throughput_and_gains(tmp_path: Path) -> None:
    rows = make_run(tmp_path, members=24)["members"]
    run = read_run(tmp_path)
    found = throughput(run)
    assert found.members_per_hour == pytest.approx(24 / (1284.0 / 3600))
    assert found.training_share == pytest.approx(905.4 / 1284.0)
    assert (found.seconds, found.slowest, found.clips_per_second) == (20.5, 20.5, 120.0)
    fitness = {r["trial"]: r["fitness"] for r in rows}
    parent = {r["trial"]: r["parent"] for r in rows}
    steps = lineage(run)
    assert steps
    for step in steps:
        assert step.gain == pytest.approx(fitness[step.trial] - fitness[parent[step.trial]])
