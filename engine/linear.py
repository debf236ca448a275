"""One fully connected layer on frozen features: multinomial logistic regression, fitted to its optimum.

L-BFGS on the whole train part, as scikit-learn's does, with products by torch: on the GPU where the features are, and
from the last strength's optimum for the next. Shape letters: N videos, D features, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize  # type: ignore[import-untyped]
from torch import Tensor

Ints = NDArray[np.int64]

MAX_ITERATIONS = 1000
TOLERANCE = 1e-5
"""Largest entry of the gradient of the mean loss at which the fit ends."""


@dataclass(frozen=True)
class Layer:
    """A fitted layer: logits = (features - mean) / std @ weight.T + bias."""

    weight: Tensor
    """float64 (K, D)."""
    bias: Tensor
    """float64 (K,); -inf for classes without a train example."""
    mean: Tensor
    std: Tensor
    """float64 (D,), of the train part; 1 where a feature is constant there."""
    strength: float
    """C."""

    def logits(self, features: Tensor) -> Tensor:
        """float64 (..., K) of features (..., D)."""
        return (features.double() - self.mean) / self.std @ self.weight.T + self.bias


def fit(
    features: Tensor, labels: Ints, *, num_classes: int, strengths: Sequence[float]
) -> list[Layer]:
    """The layers that minimise sum of cross-entropies x C + |W|^2 / 2 for each C, rising; the bias goes free.

    ``features`` (N, D) are standardised by their own mean and standard deviation; ``labels`` (N,) in [0, K).
    """
    x = features.double()
    mean, std = x.mean(0), x.std(0, correction=0)
    std = torch.where(std > 1e-12 * mean.abs().clamp(min=1.0), std, 1.0)
    x = (x - mean) / std
    present, dense = np.unique(labels, return_inverse=True)
    target = torch.from_numpy(dense).to(x.device)
    start = np.zeros(len(present) * (x.shape[1] + 1))
    layers: list[Layer] = []
    for strength in strengths:
        assert not layers or strength > layers[-1].strength
        start = _minimise(x, target, len(present), strength, start)
        found = torch.from_numpy(start).to(x.device).view(len(present), -1)
        weight = x.new_zeros(num_classes, x.shape[1])
        bias = x.new_full((num_classes,), float("-inf"))
        rows = torch.from_numpy(present).to(x.device)
        weight[rows], bias[rows] = found[:, :-1], found[:, -1]
        layers.append(Layer(weight, bias, mean, std, strength))
    return layers


def _minimise(
    x: Tensor, target: Tensor, num_classes: int, strength: float, start: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Weights and biases (K, D + 1), flat, at the optimum of the mean loss, which is the sum's over C N."""
    n = len(x)
    decay = 1.0 / (strength * n)
    rows = torch.arange(n, device=x.device)

    def loss(flat: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        both = torch.from_numpy(flat).to(x.device).view(num_classes, -1)
        weight, bias = both[:, :-1], both[:, -1]
        scores = torch.log_softmax(torch.addmm(bias, x, weight.T), dim=1)
        value = -scores[rows, target].mean() + 0.5 * decay * weight.square().sum()
        error = scores.exp_()
        error[rows, target] -= 1.0
        error /= n
        slope = torch.cat([error.T @ x + decay * weight, error.sum(0)[:, None]], dim=1)
        return float(value), slope.cpu().numpy().ravel()

    options = {
        "maxiter": MAX_ITERATIONS,
        "maxfun": 2 * MAX_ITERATIONS,
        "gtol": TOLERANCE,
        "ftol": 1e-12,
    }
    found = minimize(loss, start, jac=True, method="L-BFGS-B", options=options)
    return np.asarray(found.x, np.float64)


def choose_strength(
    features: Tensor,
    labels: Ints,
    groups: Ints,
    *,
    num_classes: int,
    strengths: Sequence[float],
    parts: int,
    turns: int,
    seed: int,
) -> float:
    """The C with the best mean accuracy on held-out parts of train, the smallest of equals.

    Groups are dealt out to ``parts`` parts (``deal_groups``); the first ``turns`` of them are held out, one after the
    other. With one group there is nothing to hold out, and the middle strength is taken.
    """
    strengths = sorted(strengths)
    part = deal_groups(groups, labels, parts=parts, seed=seed)
    right, count = np.zeros(len(strengths)), 0
    for held in range(min(turns, int(part.max()) + 1)):
        test = part == held
        if test.all() or len(np.unique(labels[~test])) < 2:
            continue
        inside, outside = (
            torch.from_numpy(np.flatnonzero(m)).to(features.device) for m in (~test, test)
        )
        layers = fit(features[inside], labels[~test], num_classes=num_classes, strengths=strengths)
        truth = torch.from_numpy(labels[test]).to(features.device)
        for i, layer in enumerate(layers):
            right[i] += int((layer.logits(features[outside]).argmax(1) == truth).sum())
        count += int(test.sum())
    return strengths[int(right.argmax())] if count else strengths[len(strengths) // 2]


def deal_groups(groups: Ints, labels: Ints, *, parts: int, seed: int) -> Ints:
    """The part (N,) that each example falls to: whole groups, classes spread evenly, in an order drawn by ``seed``.

    Each group, the largest first, goes where its classes are rarest, then where fewest examples are.
    """
    names, group = np.unique(groups, return_inverse=True)
    parts = min(parts, len(names))
    counts = np.zeros((len(names), int(labels.max()) + 1))
    np.add.at(counts, (group, labels), 1)
    rng = np.random.Generator(np.random.Philox(key=[seed, 0xDEA1]))
    luck = rng.permutation(len(names))
    order = sorted(range(len(names)), key=lambda g: (-counts[g].sum(), luck[g]))
    held = np.zeros((parts, counts.shape[1]))
    place = np.zeros(len(names), np.int64)
    for g in order:
        alike = held @ counts[g]
        part = min(range(parts), key=lambda p: (alike[p], held[p].sum(), p))
        place[g], held[part] = part, held[part] + counts[g]
    return np.asarray(place[group], np.int64)
