"""Fitness: how well k-means on the features of labelled clips finds the clips' classes.

Shape letters: N clips, D features. Nothing here trains or sees a video; the labels are those of the
train split, and all that they decide is a number per member.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from statistics import fmean, stdev
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment  # type: ignore[import-untyped]
from sklearn.cluster import KMeans  # type: ignore[import-untyped]
from sklearn.exceptions import ConvergenceWarning  # type: ignore[import-untyped]
from sklearn.metrics import (  # type: ignore[import-untyped]
    adjusted_rand_score,
    normalized_mutual_info_score,
)
from sklearn.metrics.cluster import contingency_matrix  # type: ignore[import-untyped]
from threadpoolctl import ThreadpoolController  # type: ignore[import-untyped]

from engine import recipe

Floats = NDArray[np.floating[Any]]
Ints = NDArray[np.integer[Any]]


@dataclass(frozen=True)
class Agreement:
    """How well clusters match classes; 1 is a perfect match by every measure."""

    hungarian: float
    """Accuracy in [0, 1] under the best one-to-one matching of clusters and classes."""
    nmi: float
    """Normalised mutual information in [0, 1], by the arithmetic mean of the two entropies."""
    ari: float
    """Adjusted Rand index: about 0 by chance, negative below it, at most 1."""


@dataclass(frozen=True)
class FitnessResult:
    """A member's fitness and what it was made of."""

    value: float
    """Mean of ``settings.metric`` over the k-means runs: what the search maximises."""
    metrics: Agreement
    """Means of all measures over the k-means runs."""
    sd: float
    """Sample standard deviation of ``settings.metric`` over the k-means runs; 0 for one run."""
    effective_rank: float
    """Effective rank of the features: near 1, they have collapsed."""
    backend: Literal["sklearn", "cuml"]
    """The library whose k-means was run."""


def agreement(labels: Ints, clusters: Ints) -> Agreement:
    """Compare classes with clusters, whatever the clusters are called.

    ``labels`` (N,) are class ids, 0 or more; ``clusters`` (N,) are any integers. There may be more
    classes than clusters or the reverse: clips of what is left unmatched count as wrong. Raises
    ValueError for arrays that are empty or of other shapes or types, and for labels below 0.
    """
    labels, clusters = np.asarray(labels), np.asarray(clusters)
    _check_labels(labels)
    if clusters.shape != labels.shape or clusters.dtype.kind not in "iu":
        raise ValueError(
            f"agreement: clusters must be {labels.shape[0]} integers, one a clip,"
            f" not {clusters.dtype} of shape {clusters.shape}"
        )
    counts = contingency_matrix(labels, clusters)
    rows, columns = linear_sum_assignment(counts, maximize=True)
    nmi = normalized_mutual_info_score(labels, clusters, average_method="arithmetic")
    return Agreement(
        hungarian=float(counts[rows, columns].sum() / labels.size),
        nmi=float(np.clip(nmi, 0.0, 1.0)),  # rounding can leave [0, 1] by an ulp
        ari=float(adjusted_rand_score(labels, clusters)),
    )


def kmeans_fitness(
    features: Floats,
    labels: Ints,
    *,
    settings: recipe.Fitness,
    num_classes: int,
    seed: int,
    device: str = "cpu",
) -> FitnessResult:
    """Cluster features into ``num_classes`` clusters and compare them with the classes (the paper).

    ``features`` (N, D) float are clustered as they are: the paper clusters the representation
    itself, k-means is blind to a shift and to a common scale, and no other scaling is better for
    every kind of feature. ``labels`` (N,) are class ids in [0, num_classes). Averages
    ``settings.kmeans_seeds`` runs, each the best of ``settings.kmeans_init`` starts. On a CPU equal
    arguments give equal bits, whatever the number of threads; with cuML (``device`` "cuda...")
    they need not.

    Raises ValueError for features that are not finite, labels outside the classes, lengths that
    differ, and fewer clips than classes.
    """
    features, labels = np.asarray(features), np.asarray(labels)
    _check_features(features)
    _check_labels(labels)
    if len(labels) != len(features):
        raise ValueError(f"fitness: {len(features)} clips have features, {len(labels)} have labels")
    if labels.max() >= num_classes:
        raise ValueError(f"fitness: label {labels.max()} is not one of {num_classes} classes")
    if len(features) < num_classes:
        raise ValueError(
            f"fitness: {len(features)} labelled clips are too few for {num_classes} classes:"
            " give at least one clip per class, better ten"
        )
    backend = kmeans_backend(device)
    cluster = _cluster_cuml if backend == "cuml" else _cluster_sklearn
    runs = []
    with _one_thread():
        for run in range(settings.kmeans_seeds):
            clusters = cluster(
                features, num_classes, starts=settings.kmeans_init, seed=_run_seed(seed, run)
            )
            runs.append(agreement(labels, clusters))
    values = [getattr(each, settings.metric) for each in runs]
    return FitnessResult(
        value=fmean(values),
        metrics=Agreement(
            hungarian=fmean(each.hungarian for each in runs),
            nmi=fmean(each.nmi for each in runs),
            ari=fmean(each.ari for each in runs),
        ),
        sd=stdev(values) if len(values) > 1 else 0.0,
        effective_rank=effective_rank(features),
        backend=backend,
    )


def effective_rank(features: Floats) -> float:
    """Exponential of the entropy of the singular values scaled to sum 1 (Roy & Vetterli 2007).

    ``features`` (N, D), not centred. Between 1 (all clips have the same features, up to scale) and
    min(N, D) (all directions equally strong); 0 for features that are all zero. Raises ValueError
    for features that are not finite.
    """
    features = np.asarray(features)
    _check_features(features)
    with _one_thread():
        values = np.linalg.svd(features.astype(np.float64), compute_uv=False)
    total = values.sum()
    if total == 0.0:
        return 0.0
    shares = values[values > 0.0] / total
    shares = shares[shares > 0.0]  # a share can underflow where its singular value does not
    return float(np.exp(-(shares * np.log(shares)).sum()))


def kmeans_backend(device: str) -> Literal["sklearn", "cuml"]:
    """The library that clusters for a device: cuML on a GPU where installed, else scikit-learn."""
    return "cuml" if device.startswith("cuda") and find_spec("cuml") is not None else "sklearn"


def _cluster_sklearn(features: Floats, num_clusters: int, *, starts: int, seed: int) -> Ints:
    # float64: faster than float32 at these sizes, and no square of a finite float32 overflows.
    model = KMeans(num_clusters, n_init=starts, random_state=seed)
    with warnings.catch_warnings():
        # Collapsed features have fewer distinct points than clusters: a low fitness, not a warning.
        warnings.simplefilter("ignore", ConvergenceWarning)
        clusters: Ints = model.fit_predict(features.astype(np.float64))
    return clusters


def _cluster_cuml(features: Floats, num_clusters: int, *, starts: int, seed: int) -> Ints:
    from cuml.cluster import KMeans as GpuKMeans

    model = GpuKMeans(
        n_clusters=num_clusters, n_init=starts, random_state=seed, output_type="numpy"
    )
    return np.asarray(model.fit_predict(features.astype(np.float32))).astype(np.int64)


def _run_seed(seed: int, run: int) -> int:
    """A seed in [0, 2^31) for one k-means run, unrelated to its neighbours'."""
    return int(np.random.SeedSequence(seed, spawn_key=(run,)).generate_state(1)[0] >> 1)


@cache
def _thread_pools() -> ThreadpoolController:
    return ThreadpoolController()  # cached: finding the loaded libraries takes milliseconds


def _one_thread() -> Any:
    """Limit BLAS and OpenMP to one thread: with more, sums depend on which thread ends first."""
    return _thread_pools().limit(limits=1)


def _check_features(features: Floats) -> None:
    if features.ndim != 2 or features.size == 0 or features.dtype.kind != "f":
        raise ValueError(
            "fitness: features must be floats of shape (clips, features),"
            f" not {features.dtype} of shape {features.shape}"
        )
    bad = ~np.isfinite(features).all(axis=1)
    if bad.any():
        raise ValueError(
            f"fitness: features of {bad.sum()} of {len(features)} clips are not finite"
            f" (the first is clip {int(bad.argmax())})"
        )


def _check_labels(labels: Ints) -> None:
    if labels.ndim != 1 or labels.size == 0 or labels.dtype.kind not in "iu":
        raise ValueError(
            "fitness: labels must be integers, one a clip,"
            f" not {labels.dtype} of shape {labels.shape}"
        )
    if labels.min() < 0:
        raise ValueError(
            f"fitness: {int((labels < 0).sum())} of {labels.size} clips have no label (-1):"
            " leave clips without a class out"
        )
