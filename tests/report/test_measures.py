"""Measures of a run against scipy and against sums by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import scipy.stats

from engine.data.demo.levels import WITH_LABELS
from engine.report.measures import (
    Stat,
    agreement,
    lineage,
    pooled_sds,
    ranking,
    spearman,
    throughput,
)
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


def test_networks_trained_with_labels_say_nothing_of_members_seeds(tmp_path: Path) -> None:
    make_run(tmp_path, members=24)
    path = tmp_path / "summary.json"
    summary, before = json.loads(path.read_text()), ranking(read_run(tmp_path))
    levels = {"mean": 0.857, "sd": 0.057, "n": 3, "values": [0.918, 0.806, 0.846]}
    path.write_text(json.dumps({**summary, "compared": {WITH_LABELS: levels}}))
    assert before is not None and ranking(read_run(tmp_path)) == before


def test_standard_deviations_apart() -> None:
    """By hand: variances 4 and 1 with two and one degrees of freedom make 3."""
    one, other = Stat(10.0, 2.0, 3, ()), Stat(4.0, 1.0, 2, ())
    assert pooled_sds(one, other) == pytest.approx(6 / math.sqrt(3))
    assert (
        pooled_sds(one, Stat(4.0, None, 1, ())) is None is pooled_sds(Stat(4.0, None, 1, ()), one)
    )


def test_throughput_and_gains(tmp_path: Path) -> None:
    rows = make_run(tmp_path, members=24)["members"]
    run = read_run(tmp_path)
    speed = throughput(run)
    assert speed["members an hour"] == pytest.approx(24 / (1284.0 / 3600))
    assert speed["training's share of the time, %"] == pytest.approx(100 * 905.4 / 1284.0)
    seconds = (speed["seconds a member, median"], speed["seconds of the slowest member"])
    assert (*seconds, speed["training clips a second, median member"]) == (20.5, 20.5, 120.0)
    fitness = {r["trial"]: r["fitness"] for r in rows}
    parent = {r["trial"]: r["parent"] for r in rows}
    steps = lineage(run)
    assert steps
    for step in steps:
        assert step.gain == pytest.approx(fitness[step.trial] - fitness[parent[step.trial]])
