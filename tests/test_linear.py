"""The linear layer against scikit-learn's, run on the same features; whole groups held out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from engine.linear import choose_strength, deal_groups, fit


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
    if len(set(labels)) == 2:  # one weight vector there, two of half the length here
        strength *= 2
    model = LogisticRegression(C=strength, tol=1e-8, max_iter=10000)
    model.fit(scaler.transform(x), labels)
    return model.predict_proba(scaler.transform(test))


@pytest.mark.parametrize("shape", [(90, 12, 4), (40, 63, 3), (30, 5, 2)])
def test_the_optimum_is_scikit_learns(shape: tuple[int, int, int]) -> None:
    n, d, k = shape
    x, labels, _ = made(n + 20, d, k)
    strengths = [1e-3, 0.1, 10.0]
    layers = fit(torch.from_numpy(x[:n]), labels[:n], num_classes=k, strengths=strengths)
    for layer, strength in zip(layers, strengths, strict=True):
        ours = layer.logits(torch.from_numpy(x[n:])).softmax(1).numpy()
        assert layer.strength == strength
        np.testing.assert_allclose(
            ours, sklearn_proba(x[:n], labels[:n], x[n:], strength), atol=2e-3
        )


def test_a_class_without_examples_is_never_predicted() -> None:
    x, labels, _ = made()
    kept = labels != 2
    (layer,) = fit(torch.from_numpy(x[kept]), labels[kept], num_classes=4, strengths=[1.0])
    shares = layer.logits(torch.from_numpy(x)).softmax(1)
    assert (shares[:, 2] == 0).all() and torch.isfinite(shares).all()
    expected = sklearn_proba(x[kept], labels[kept], x, 1.0)
    np.testing.assert_allclose(shares[:, [0, 1, 3]].numpy(), expected, atol=2e-3)


def test_constant_features_do_no_harm() -> None:
    x, labels, _ = made()
    x[:, 0] = 1e6
    (layer,) = fit(torch.from_numpy(x), labels, num_classes=4, strengths=[1.0])
    assert torch.isfinite(layer.logits(torch.from_numpy(x))).all()


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
    settings = {"num_classes": 4, "strengths": strengths[::-1], "parts": 3, "turns": 3, "seed": 7}
    chosen = choose_strength(torch.from_numpy(x), labels, groups, **settings)  # type: ignore[arg-type]
    assert chosen == strengths[int(np.argmax(right))]


def test_one_group_leaves_nothing_to_hold_out() -> None:
    x, labels, _ = made()
    settings = {"num_classes": 4, "strengths": (0.1, 1.0, 10.0), "parts": 4, "turns": 4, "seed": 0}
    one = np.zeros(len(x), np.int64)
    assert choose_strength(torch.from_numpy(x), labels, one, **settings) == 1.0  # type: ignore[arg-type]
