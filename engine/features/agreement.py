"""Agreement of clusters with classes (Hungarian accuracy, mutual information, Rand index), and with Zipf's law.

Shape letters: N clips, D features, K clusters.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment  # type: ignore[import-untyped]
from sklearn import metrics  # type: ignore[import-untyped]
from torch import Tensor

Floats = NDArray[np.floating[Any]]
Ints = NDArray[np.integer[Any]]


@dataclass(frozen=True)
class Agreement:
    """Measures of how well clusters match classes; each is 1 for a perfect match."""

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
    counts, classes, matched = matching(labels, clusters)
    nmi = metrics.normalized_mutual_info_score(labels, clusters, average_method="arithmetic")
    return Agreement(
        hungarian=float(counts[classes, matched].sum() / labels.size),
        nmi=float(np.clip(nmi, 0.0, 1.0)),  # rounding can leave [0, 1] by an ulp
        ari=float(metrics.adjusted_rand_score(labels, clusters)),
    )


def matching(labels: Ints, clusters: Ints) -> tuple[Ints, Ints, Ints]:
    """Counts (classes, clusters), rising, and the rows and columns of the best one-to-one matching."""
    counts = metrics.cluster.contingency_matrix(labels, clusters)
    return counts, *linear_sum_assignment(counts, maximize=True)


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


def zipf_fitness(
    features: Floats | Tensor, clusters: Ints, *, num_clusters: int, exponent: float = 1.0
) -> float:
    """exp(-KL(p || q)), in (0, 1], of the clusters' shares p and Zipf's law q; 1 where p follows it.

    ``features`` (N, D) float, finite; ``clusters`` (N,) in [0, num_clusters), k-means' assignment. Shares are those
    of ``cluster_shares``. With all clips in one cluster, KL is -log q(1) and the fitness q(1), the largest share
    that the law gives (Piergiovanni et al., CVPR 2020).
    """
    shares = cluster_shares(features, clusters, num_clusters=num_clusters)
    return float(np.exp(-zipf_divergence(shares, exponent=exponent)))


def zipf_divergence(shares: Floats, *, exponent: float = 1.0) -> float:
    """KL(p || q) = sum of p(i) log(p(i) / q(i)), of shares p (K,) from the largest, and q(i) = i^-s / H(K, s)."""
    p = np.sort(np.asarray(shares, np.float64))[::-1]
    p = p / p.sum()
    law = np.arange(1, len(p) + 1, dtype=np.float64) ** -exponent
    law /= law.sum()
    there = p > 0.0
    # rounding can bring what is zero below it
    return max(float((p[there] * np.log(p[there] / law[there])).sum()), 0.0)


def cluster_shares(
    features: Floats | Tensor, clusters: Ints, *, num_clusters: int
) -> NDArray[np.float64]:
    """Shares (K,) of the clips that belong to each cluster, summing to 1, by soft assignment.

    The mean over clips of p(c | x), proportional to exp(-|x - c|^2 / t) for equally likely clusters of one variance,
    whose centroids c are the means of their clips. The follow-up sets t = 1 and so ties the outcome to the features'
    scale, which k-means is blind to and a network may choose at will: large features would be assigned hard, small
    ones to all clusters alike. Here t is the mean of |x - c|^2 over the clips, c their own centroid, so that shares
    change neither with scale nor with shift, and assignment is soft where clusters overlap and hard where they do
    not. Clips that all lie on their centroids (t = 0) are assigned hard. A cluster without clips has no share, so
    features that have all become one point are one cluster.
    """
    there, own = np.unique(clusters, return_inverse=True)
    distances = _squared_distances(features, own, len(there))
    own_distances = distances[np.arange(len(own)), own]
    spread = own_distances.mean()
    if spread > np.finfo(np.float64).tiny:
        logits = (own_distances[:, None] - distances) / spread
        soft = np.exp(logits - logits.max(1, keepdims=True))
        own_shares = (soft / soft.sum(1, keepdims=True)).mean(0)
    else:
        own_shares = np.bincount(own, minlength=len(there)) / len(own)
    shares = np.zeros(num_clusters)
    shares[there] = own_shares
    return shares


def _squared_distances(
    features: Floats | Tensor, clusters: Ints, num_clusters: int
) -> NDArray[np.float64]:
    """float64 (N, K): from each clip to the mean of each cluster's clips, computed where the features are.

    From differences: an expanded product would lose what tight clusters far from the origin differ by.
    """
    x = features.detach() if isinstance(features, Tensor) else torch.tensor(features)
    x = x.double()
    x = x / x.abs().max().clamp(min=torch.finfo(torch.float64).tiny)  # no square overflows then
    names = torch.from_numpy(np.asarray(clusters, np.int64)).to(x.device)
    one_hot = torch.nn.functional.one_hot(names, num_clusters).double()
    centroids = one_hot.T @ x / one_hot.sum(0)[:, None]
    distances = torch.cdist(x, centroids, compute_mode="donot_use_mm_for_euclid_dist").square()
    array: NDArray[np.float64] = distances.cpu().numpy()
    return array
