"""Classifiers on frozen features, by scikit-learn or cuML, their strength chosen on held-out groups.

Shape letters: N videos, D features, K classes, S strengths.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn import linear_model  # type: ignore[import-untyped]
from sklearn.model_selection import StratifiedGroupKFold  # type: ignore[import-untyped]
from sklearn.preprocessing import StandardScaler  # type: ignore[import-untyped]

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Predictor = Callable[[Floats, Ints, Floats, Sequence[float]], Ints]
"""Takes train features, their labels, test features and strengths; gives classes (S, test)."""

MAX_ITERATIONS = 1000
TOLERANCE = 1e-5
"""Largest entry of the gradient of the mean loss at which the fit ends."""


@dataclass(frozen=True)
class Layer:
    """A fitted layer: scores = (features - mean) / std @ weight.T + bias."""

    weight: Floats
    """(K, D)."""
    bias: Floats
    """(K,); -inf for classes without a train example."""
    mean: Floats
    std: Floats
    """(D,), of the train part; 1 where a feature is constant there."""
    strength: float
    """C."""

    def scores(self, features: NDArray[np.floating[Any]]) -> Floats:
        """float64 (..., K) of features (..., D)."""
        scores: Floats = (features - self.mean) / self.std @ self.weight.T + self.bias
        return scores


def fit(
    features: Floats,
    labels: Ints,
    *,
    num_classes: int,
    strengths: Sequence[float],
    weight: float = 1.0,
    gpu: bool = False,
) -> list[Layer]:
    """The layers that minimise sum of cross-entropies x C x weight + |W|^2 / 2 for each C; the bias goes free.

    ``features`` (N, D) are standardised by their own mean and standard deviation; ``labels`` (N,) in [0, K). Each C
    begins at the optimum of the one before. Of two classes there is one weight vector, as in scikit-learn. On a
    ``gpu`` cuML fits, where it is installed.
    """
    scaler = StandardScaler().fit(features)
    x = scaler.transform(features)
    model = _logistic(gpu)
    layers = []
    for strength in strengths:
        model.set_params(C=strength * weight).fit(x, labels)
        coef, intercept = np.asarray(model.coef_), np.asarray(model.intercept_)
        if len(coef) == 1:
            coef, intercept = np.concatenate([-coef, coef]) / 2, np.array([-1, 1]) * intercept / 2
        present = np.asarray(model.classes_, np.int64)
        matrix = np.zeros((num_classes, x.shape[1]))
        bias = np.full(num_classes, -np.inf)
        matrix[present], bias[present] = coef, intercept
        layers.append(Layer(matrix, bias, scaler.mean_, scaler.scale_, strength))
    return layers


def _logistic(gpu: bool) -> Any:
    settings: dict[str, Any] = {"tol": TOLERANCE, "max_iter": MAX_ITERATIONS}
    if gpu and find_spec("cuml") is not None:
        from cuml.linear_model import LogisticRegression as OnGpu

        return OnGpu(**settings, output_type="numpy")
    # Where features outnumber videos, lbfgs takes hundreds of steps, and ends further from the optimum.
    return linear_model.LogisticRegression(**settings, solver="newton-cg", warm_start=True)


def layers_predict(*, num_classes: int, weight: float = 1.0, gpu: bool = False) -> Predictor:
    """A predictor by layers of several strengths."""

    def predict(x: Floats, labels: Ints, test: Floats, strengths: Sequence[float]) -> Ints:
        how: dict[str, Any] = {"num_classes": num_classes, "weight": weight, "gpu": gpu}
        layers = fit(x, labels, strengths=strengths, **how)
        return np.stack([layer.scores(test).argmax(1) for layer in layers])

    return predict


def ridge_predict(x: Floats, labels: Ints, test: Floats, strengths: Sequence[float]) -> Ints:
    """Predict by one-against-all ridge regressions on -1 and 1; strengths are their alphas."""
    ridges = [linear_model.RidgeClassifier(alpha=a).fit(x, labels) for a in strengths]
    return np.stack([ridge.predict(test) for ridge in ridges])


def choose_strength(
    predict: Predictor,
    features: Floats,
    labels: Ints,
    groups: Ints,
    *,
    strengths: Sequence[float],
    parts: int,
    turns: int,
    seed: int,
) -> float:
    """The strength with the best accuracy on held-out parts of train, the first of equals.

    Groups are dealt out to ``parts`` parts (``deal_groups``); the first ``turns`` of them are held out, one after the
    other. Where nothing can be held out, or nothing held out is right, the middle strength is taken.
    """
    part = deal_groups(groups, labels, parts=parts, seed=seed)
    right = np.zeros(len(strengths))
    for held in range(min(turns, int(part.max()) + 1)):
        test = part == held
        if test.all() or len(np.unique(labels[~test])) < 2:
            continue
        classes = predict(features[~test], labels[~test], features[test], strengths)
        right += (classes == labels[test]).sum(1)
    return strengths[int(right.argmax())] if right.any() else strengths[len(strengths) // 2]


def deal_groups(groups: Ints, labels: Ints, *, parts: int, seed: int) -> Ints:
    """The part (N,) that each example falls to: whole groups, classes spread evenly, in an order drawn by ``seed``.

    No more parts than groups, or than the commonest class has examples.
    """
    part = np.zeros(len(groups), np.int64)
    parts = min(parts, len(np.unique(groups)), int(np.bincount(labels).max()))
    if parts < 2:
        return part
    dealer = StratifiedGroupKFold(parts, shuffle=True, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of classes with fewer examples than parts
        for number, (_, held) in enumerate(dealer.split(labels, labels, groups)):
            part[held] = number
    return part
