"""Trivial baselines against scikit-learn's models, and against what was measured for the real set."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from sklearn.linear_model import RidgeClassifier
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

from engine import baselines as module
from engine.baselines import baselines
from engine.datasets import Dataset, open_dataset
from engine.runtime import choose_runtime

RUNTIME = choose_runtime("cpu")


@pytest.mark.parametrize("shape", [(60, 7), (30, 80)])
def test_ridge_is_scikit_learns(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, shape[0])
    x = rng.normal(size=shape) + rng.normal(size=(4, shape[1]))[labels]
    test = rng.normal(size=(40, shape[1]))
    for alpha in (0.01, 1.0, 100.0):
        model = RidgeClassifier(alpha=alpha).fit(x, labels)
        expected = model.decision_function(test)
        np.testing.assert_allclose(
            module._ridge_scores(x, labels, test, alpha), expected, atol=1e-8
        )


def test_neighbours_are_scikit_learns() -> None:
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 2, 50)  # two classes and five neighbours: no ties
    x = rng.normal(size=(50, 3)) * [1, 100, 0.01]
    test = rng.normal(size=(30, 3)) * [1, 100, 0.01]
    scaler = StandardScaler().fit(x)
    model = KNeighborsClassifier(5).fit(scaler.transform(x), labels)
    found = module._neighbours(x, labels, labels, test, 0)
    assert (found == model.predict(scaler.transform(test))).all()


def test_colours_are_found_by_the_mean_frame_alone(colour_set: Dataset) -> None:
    found = baselines(colour_set, runtime=RUNTIME)
    assert found["ridge on the mean 16x16 frame"].mean == 1.0
    assert found["5 nearest neighbours by file facts"].mean < 0.5  # all files are alike
    assert all(spread.n == 3 for spread in found.values())


@pytest.mark.data
@pytest.mark.slow
def test_on_weizmann_they_are_where_they_were_measured(real_data: Path, tmp_path: Path) -> None:
    """43.3, 55.6 and 13.3 % by another program, on whole frames at one strength, and with the files' sizes."""
    dataset = open_dataset(
        real_data / "weizmann",
        name="folders",
        group_pattern="^[^_]+",
        cache=tmp_path,
        report=lambda *_: None,
    )
    assert len(dataset.folds) == 9 and len(dataset.classes) == 10
    mean, change, facts = (s.mean for s in baselines(dataset, runtime=RUNTIME).values())
    assert abs(mean - 0.433) < 0.08 and abs(change - 0.556) < 0.08 and facts < 0.3
