"""How near the sizes of clusters are to Zipf's law: a fitness without labels (Piergiovanni et al., CVPR 2020).

Shape letters: N clips, D features, K clusters.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Floats = NDArray[np.floating[Any]]
Ints = NDArray[np.integer[Any]]


def zipf_fitness(
    features: Floats | Tensor, clusters: Ints, *, num_clusters: int, exponent: float = 1.0
) -> float:
    """exp(-KL(p || q)), in (0, 1], of the clusters' shares p and Zipf's law q; 1 where p follows it.

    ``features`` (N, D) float, finite; ``clusters`` (N,) in [0, num_clusters), k-means' assignment. Shares are those
    of ``cluster_shares``. With all clips in one cluster, KL is -log q(1) and the fitness q(1), the largest share
    that the law gives.
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
        found = (soft / soft.sum(1, keepdims=True)).mean(0)
    else:
        found = np.bincount(own, minlength=len(there)) / len(own)
    shares = np.zeros(num_clusters)
    shares[there] = found
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
    found = torch.cdist(x, centroids, compute_mode="donot_use_mm_for_euclid_dist").square()
    array: NDArray[np.float64] = found.cpu().numpy()
    return array
