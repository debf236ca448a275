"""Layers, ridge and neighbours against scikit-learn's models run by hand; whole groups held out."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from scipy.special import softmax
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

from engine.evaluate import linear
from engine.evaluate.linear import (
    Layer,
    choose_strength,
    deal_groups,
    fit,
    layers_predict,
    neighbours_predict,
    ridge_predict,
)


def made(
    n: int = 90, d: int = 12, k: int = 4, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features with a scale and a shift of their own, labels with some overlap, groups."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, k, n)
    centres = rng.normal(0, 1.0, (k, d))
    x = (centres[labels] + rng.normal(0, 1.2, (n, d))) * rng.uniform(0.1, 30, d) + rng.normal(
        0, 50, d
    )
    return x, labels, rng.integers(0, 9, n)


def sklearn_proba(
    x: np.ndarray, labels: np.ndarray, test: np.ndarray, strength: float
) -> np.ndarray:
    scaler = StandardScaler().fit(x)
    model = LogisticRegression(C=strength, tol=1e-8, max_iter=10000)
    model.fit(scaler.transform(x), labels)
    return model.predict_proba(scaler.transform(test))


@pytest.mark.parametrize("shape", [(90, 12, 4), (40, 63, 3), (30, 5, 2)])
def test_the_optimum_is_scikit_learns(shape: tuple[int, int, int]) -> None:
    n, d, k = shape
    x, labels, _ = made(n + 20, d, k)
    strengths = [1e-3, 0.1, 10.0]
    layers = fit(x[:n], labels[:n], num_classes=k, strengths=strengths)
    for layer, strength in zip(layers, strengths, strict=True):
        ours = softmax(layer.scores(x[n:]), axis=1)
        assert layer.strength == strength
        np.testing.assert_allclose(
            ours, sklearn_proba(x[:n], labels[:n], x[n:], strength), atol=2e-3
        )


def test_a_class_without_examples_is_never_predicted() -> None:
    x, labels, _ = made()
    kept = labels != 2
    (layer,) = fit(x[kept], labels[kept], num_classes=4, strengths=[1.0])
    shares = softmax(layer.scores(x), axis=1)
    assert (shares[:, 2] == 0).all() and np.isfinite(shares).all()
    expected = sklearn_proba(x[kept], labels[kept], x, 1.0)
    np.testing.assert_allclose(shares[:, [0, 1, 3]], expected, atol=2e-3)


def test_constant_features_do_no_harm() -> None:
    x, labels, _ = made()
    x[:, 0] = 1e6
    (layer,) = fit(x, labels, num_classes=4, strengths=[1.0])
    assert np.isfinite(layer.scores(x)).all()


def test_groups_are_dealt_whole_and_classes_evenly() -> None:
    rng = np.random.default_rng(3)
    labels = np.repeat(np.arange(10), 25)
    groups = np.tile(np.arange(25), 10)
    part = deal_groups(groups, labels, parts=5, seed=1)
    for group in range(25):
        assert len(set(part[groups == group])) == 1
    for one in range(5):
        assert (np.bincount(labels[part == one], minlength=10) == 5).all()
    assert (part != deal_groups(groups, labels, parts=5, seed=2)).any()
    # groups of one class each, as films are: every part gets of every class
    own = labels * 100 + rng.integers(0, 8, len(labels))
    part = deal_groups(own, labels, parts=4, seed=0)
    assert all(set(part[labels == c]) == {0, 1, 2, 3} for c in range(10))
    assert max(len(set(part[own == g])) for g in set(own)) == 1


def test_the_strength_is_that_of_the_best_held_out_accuracy() -> None:
    x, labels, groups = made(n=120, d=40, k=4, seed=5)
    strengths = [1e-4, 1e-3, 1e-2, 1.0, 100.0]
    part = deal_groups(groups, labels, parts=3, seed=7)
    right = [
        sum(
            (
                sklearn_proba(x[part != p], labels[part != p], x[part == p], c).argmax(1)
                == labels[part == p]
            ).sum()
            for p in range(3)
        )
        for c in strengths
    ]
    assert len(set(right)) > 2
    settings: dict[str, Any] = {"strengths": strengths, "parts": 3, "turns": 3, "seed": 7}
    chosen = choose_strength(layers_predict(num_classes=4), x, labels, groups, **settings)
    assert chosen == strengths[int(np.argmax(right))]


def test_one_group_leaves_nothing_to_hold_out() -> None:
    x, labels, _ = made()
    settings: dict[str, Any] = {"strengths": (0.1, 1.0, 10.0), "parts": 4, "turns": 4, "seed": 0}
    one = np.zeros(len(x), np.int64)
    predict = layers_predict(num_classes=4)
    assert choose_strength(predict, x, labels, one, **settings) == 1.0


def test_rare_classes_are_dealt_without_a_word(recwarn: pytest.WarningsRecorder) -> None:
    part = deal_groups(np.arange(7), np.array([0, 0, 0, 1, 1, 2, 3]), parts=4, seed=0)
    assert set(part) == {0, 1, 2} and not recwarn.list


@pytest.mark.parametrize("shape", [(60, 7), (30, 80)])
def test_ridge_is_one_against_all(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, shape[0])
    x = rng.normal(size=shape) + rng.normal(size=(4, shape[1]))[labels]
    test = rng.normal(size=(40, shape[1]))
    alphas = (0.01, 1.0, 100.0)
    found = ridge_predict(x, labels, test, alphas)
    for alpha, classes in zip(alphas, found, strict=True):
        targets = 2.0 * (labels[:, None] == np.arange(4)) - 1
        assert (classes == Ridge(alpha).fit(x, targets).predict(test).argmax(1)).all()


def test_neighbours_are_those_by_standardised_features() -> None:
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 2, 50)  # two classes and five neighbours: no ties
    x = rng.normal(size=(50, 3)) * [1, 100, 0.01]
    test = rng.normal(size=(30, 3)) * [1, 100, 0.01]
    scaler = StandardScaler().fit(x)
    model = KNeighborsClassifier(5).fit(scaler.transform(x), labels)
    found = neighbours_predict(x, labels, test, neighbours=5)
    assert (found == model.predict(scaler.transform(test))).all()
    assert len(neighbours_predict(x[:3], labels[:3], test, neighbours=5)) == 30  # fewer than five


def test_cuml_fits_the_same_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in with cuML's arguments, which have no warm start; scikit-learn's fit does the rest."""

    class OnGpu(LogisticRegression):  # type: ignore[misc]
        def __init__(
            self, *, tol: float = 1e-4, C: float = 1.0, max_iter: int = 1000, output_type: str = ""
        ) -> None:
            super().__init__(C=C, tol=tol, max_iter=max_iter)
            self.output_type = output_type

    module = ModuleType("cuml.linear_model")
    module.LogisticRegression = OnGpu  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cuml", ModuleType("cuml"))
    monkeypatch.setitem(sys.modules, "cuml.linear_model", module)
    monkeypatch.setattr(linear, "find_spec", lambda name: object())
    x, labels, _ = made()
    both: list[list[Layer]] = [
        fit(x, labels, num_classes=4, strengths=(0.1, 1.0), gpu=gpu) for gpu in (True, False)
    ]
    for one, other in zip(*both, strict=True):
        np.testing.assert_allclose(one.scores(x), other.scores(x), atol=2e-2)
