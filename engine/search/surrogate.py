"""A model of fitness over losses, learnt from all members seen: what each term adds, and how sure that is.

Additive Bayesian regression: f(w) = f0 + sum over terms j with w_j > 0 of a_j + b_j w_j + c_j (2 w_j - 1)^2, with
independent normal noise. The coefficients are normal a priori, those of terms of one group (a task over modalities, a
modality's distillation) correlated, with a scale for each term, so that a few may stand out; how large they, their
groups and the noise are is chosen by the evidence (MacKay 1992, "Bayesian Interpolation"). One evaluation says little;
40 of them, half of them with a term, give its effect with a variance near 4 s^2 / 40, s^2 the noise of one.

Shape letters: N members, J terms, B = 3 J coefficients.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from engine.objective.terms import TERM_NAMES, TERMS

Array = NDArray[np.float64]
LEVELS = np.linspace(0.0, 1.0, 9)
"""Weights among which a term's best is looked for."""
SIGNALS = (0.02, 0.1, 0.3, 1.0, 3.0, 10.0)
"""Variance of fitness over losses, as a multiple of the noise's, to choose from."""
SHARED = (0.0, 0.5)
"""Share of a coefficient's variance that its group's terms have in common, to choose from."""
DEGREES = 2.0
"""Degrees of freedom of the t prior of effects: the fewer, the more a few terms may stand out."""
ROUNDS = 8
"""Of expectation maximisation."""
KINDS = ((0.05, 1.0, 0.05), (1.0, 0.05, 0.05), (0.3, 1.0, 1.0))
"""Variances of presence, weight and curvature relative to one another, to choose from."""


def group_of(term: int) -> str:
    """A task over modalities, or what is distilled from one modality."""
    row = TERMS[term]
    return f"{row.task} {row.modality}" if row.task == "distill" else row.task


GROUPS: tuple[str, ...] = tuple(group_of(j) for j in range(len(TERMS)))
_OWN = np.eye(len(TERMS))
_SAME = np.array([[a == b for b in GROUPS] for a in GROUPS], np.float64)


def basis(weights: Array) -> Array:
    """(..., J) to (..., 3, J): presence, weight and curvature, each 0 for an absent term."""
    present = (weights > 0).astype(np.float64)
    return np.stack([present, weights, present * (2 * weights - 1) ** 2], axis=-2)


def vectors(losses: Sequence[Mapping[str, float]]) -> Array:
    """(N, J) weights in TERM_NAMES' order."""
    return np.array([[loss[name] for name in TERM_NAMES] for loss in losses], np.float64)


@dataclass(frozen=True)
class Surrogate:
    """What members have taught about fitness."""

    mean: Array
    """(B,) coefficients' posterior mean, in the order of ``basis``."""
    root: Array
    """(B, B): the posterior covariance is root @ root.T."""
    centre: Array
    """(B,) the members' mean basis, where the model gives ``offset``."""
    offset: float
    noise: float
    """Standard deviation of one evaluation around the model."""

    @classmethod
    def fit(cls, weights: Array, fitness: Array) -> Surrogate:
        """Learn from N >= 2 members' weights (N, J) and fitness (N,)."""
        x = basis(weights).reshape(len(weights), -1)
        centre, offset = x.mean(0), float(fitness.mean())
        y: Array = fitness - offset
        x = x - centre
        scale = max(float((x**2).sum(1).mean()), 1e-9)
        fits = [
            _fit(
                x,
                y,
                np.asarray(signal / scale * np.kron(np.diag(kinds), _related(shared)), np.float64),
            )
            for signal, shared, kinds in product(SIGNALS, SHARED, KINDS)
        ]
        best = max(fits, key=lambda fit: fit.evidence)
        values, axes = np.linalg.eigh((best.covariance + best.covariance.T) / 2)
        root = axes * np.sqrt(np.maximum(values, 0))
        return cls(best.mean, root, centre, offset, best.noise)

    def predict(self, weights: Array) -> Array:
        """(N,) expected fitness."""
        x = basis(weights).reshape(len(weights), -1) - self.centre
        return np.asarray(self.offset + x @ self.mean, np.float64)

    def draw(self, rng: np.random.Generator) -> Array:
        """(B,) coefficients from the posterior."""
        return np.asarray(self.mean + self.root @ rng.standard_normal(len(self.mean)), np.float64)

    def effect(self, term: int, weight: float = 1.0) -> tuple[float, float]:
        """Mean and standard deviation of what ``term`` at ``weight`` adds to fitness, against its absence."""
        one = np.zeros(len(TERMS))
        one[term] = weight
        x = basis(one).reshape(-1)
        return float(x @ self.mean), float(np.linalg.norm(x @ self.root))


def _related(shared: float) -> Array:
    """(J, J): prior correlation of the terms, given the share of their variance that a group has in common."""
    return np.asarray((1 - shared) * _OWN + shared * _SAME, np.float64)


class _Fit(NamedTuple):
    evidence: float
    mean: Array
    covariance: Array
    noise: float


def _fit(x: Array, y: Array, prior: Array) -> _Fit:
    """Posterior under a prior covariance (B, B) in units of the noise's variance, which is the likeliest one.

    Each term's own scale then follows its effect (expectation maximisation of a t prior of DEGREES degrees of freedom):
    few terms may matter much, and most little.
    """
    own = np.ones(len(TERMS))
    for _ in range(ROUNDS):
        stretch = np.tile(np.sqrt(own), 3)
        scaled = prior * np.outer(stretch, stretch)
        cover = x @ scaled @ x.T + np.eye(len(y))
        half = np.linalg.cholesky(cover)
        white = np.linalg.solve(half, y)
        variance = max(float(white @ white) / len(y), 1e-12)
        evidence = -0.5 * len(y) * math.log(variance) - float(np.log(np.diag(half)).sum())
        evidence -= float((0.5 * DEGREES * (np.log(own) + 1 / own - 1)).sum())
        pull = np.linalg.solve(half, x @ scaled)
        mean, covariance = pull.T @ white, variance * (scaled - pull.T @ pull)
        size = (mean**2 + np.diag(covariance)) / (variance * np.maximum(np.diag(prior), 1e-12))
        kind = size.reshape(3, -1)
        own = (3 * kind.mean(0) + DEGREES) / (3 + DEGREES)
    return _Fit(evidence, mean, covariance, math.sqrt(variance))


def best_weights(coefficients: Array, *, most: int) -> Array:
    """(J,) the weights of highest f under given coefficients, with at most ``most`` terms above 0."""
    grid = np.broadcast_to(LEVELS[:, None], (len(LEVELS), len(TERMS)))
    value = (basis(grid) * coefficients.reshape(3, -1)).sum(1)  # levels x terms
    weights: Array = LEVELS[value.argmax(0)]
    gains = value.max(0)
    weights[np.argsort(-gains, kind="stable")[most:]] = 0.0
    if not weights.any():  # a loss needs a term
        weights[int(value[-1].argmax())] = 1.0
    return weights
