"""How well clusters match classes: Hungarian accuracy, mutual information, Rand index."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment  # type: ignore[import-untyped]
from sklearn.metrics import (  # type: ignore[import-untyped]
    adjusted_rand_score,
    normalized_mutual_info_score,
)
from sklearn.metrics.cluster import contingency_matrix  # type: ignore[import-untyped]

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


def agreement(labels: Ints, clusters: Ints) -> Agreement:
    """Compare classes with clusters, whatever the clusters are called.

    ``labels`` (N,) are class ids, 0 or more; ``clusters`` (N,) are any integers. There may be more
    classes than clusters or the reverse: clips of what is left unmatched count as wrong. Raises
    ValueError for arrays that are empty or of other shapes or types, and for labels below 0.
    """
    labels, clusters = np.asarray(labels), np.asarray(clusters)
    check_labels(labels)
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


def check_labels(labels: Ints, num_classes: int | None = None) -> None:
    """Raise ValueError for labels that are not integers in [0, num_classes), or fewer than the classes."""
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
    if num_classes is None:
        return
    if labels.max() >= num_classes:
        raise ValueError(f"fitness: label {labels.max()} is not one of {num_classes} classes")
    if len(labels) < num_classes:
        raise ValueError(
            f"fitness: {len(labels)} labelled clips are too few for {num_classes} classes:"
            " give at least one clip per class, better ten"
        )
