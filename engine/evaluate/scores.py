"""What protocols report: top-k accuracy, confusion, retrieval, agreement of clusters; means and spreads over folds.

Shape letters: N videos, D features, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.features.agreement import agreement, matching

Ints = NDArray[np.int64]

RETRIEVED = (1, 5, 10, 20, 50)
QUERIES_AT_ONCE = 1024


@dataclass(frozen=True)
class Spread:
    """A metric over folds and seeds."""

    mean: float
    sd: float
    """Sample standard deviation; 0 for one value."""
    n: int

    @staticmethod
    def of(values: Sequence[float]) -> Spread:
        """Raises ValueError for no values."""
        return Spread(fmean(values), stdev(values) if len(values) > 1 else 0.0, len(values))


def top_k(scores: Tensor, labels: Ints, k: int) -> float:
    """Share of rows whose class is among the k highest scores (N, K); of equals, the first class is the higher."""
    truth = torch.from_numpy(labels).to(scores.device)[:, None]
    own = scores.gather(1, truth)
    before = torch.arange(scores.shape[1], device=scores.device) < truth
    rank = ((scores > own) | ((scores == own) & before)).sum(1)
    return float((rank < k).double().mean())


def accuracies(
    clip_scores: Tensor, video_scores: Tensor, clip_labels: Ints, labels: Ints
) -> dict[str, float]:
    """Top-1 and top-5 of clips and of videos."""
    pairs = {"video": (video_scores, labels), "clip": (clip_scores, clip_labels)}
    return {f"{what}_top{k}": top_k(*pair, k) for what, pair in pairs.items() for k in (1, 5)}


def confusion(predicted: Ints, labels: Ints, num_classes: int) -> Ints:
    """Counts (K, K): rows are classes, columns what they were taken for."""
    counts = np.zeros((num_classes, num_classes), np.int64)
    np.add.at(counts, (labels, predicted), 1)
    return counts


def video_means(values: Tensor, video: Ints) -> tuple[Tensor, Ints]:
    """Means over each video's rows (N, V, D) and views: (videos, D), and which row comes first of each video.

    Videos are in the order of their numbers.
    """
    _, first, number = np.unique(video, return_index=True, return_inverse=True)
    counts = np.bincount(number) * values.shape[1]
    total = values.new_zeros(len(first), values.shape[2], dtype=torch.float64)
    total.index_add_(0, torch.from_numpy(number).to(values.device), values.double().sum(1))
    return total / torch.from_numpy(counts).to(values.device)[:, None], first


def retrieval(
    queries: Tensor, labels: Ints, gallery: Tensor, gallery_labels: Ints
) -> dict[str, float]:
    """R@k: share of queries with their class among the k nearest of the gallery by cosine; k in RETRIEVED."""
    known = torch.from_numpy(gallery_labels).to(gallery.device)
    unit = torch.nn.functional.normalize(gallery.double(), dim=1)
    hits = dict.fromkeys(RETRIEVED, 0)
    for begin in range(0, len(queries), QUERIES_AT_ONCE):
        part = torch.nn.functional.normalize(
            queries[begin : begin + QUERIES_AT_ONCE].double(), dim=1
        )
        truth = torch.from_numpy(labels[begin : begin + QUERIES_AT_ONCE]).to(gallery.device)
        nearest = (part @ unit.T).topk(min(max(RETRIEVED), len(unit)), dim=1).indices
        right = known[nearest] == truth[:, None]
        for k in RETRIEVED:
            hits[k] += int(right[:, :k].any(1).sum())
    return {f"r@{k}": hits[k] / len(queries) for k in RETRIEVED}


def cluster_scores(labels: Ints, found: Ints) -> dict[str, float]:
    """How well one run's clusters (N,) match the classes (N,).

    V-measure with equal weights is the same number as NMI by the arithmetic mean (Rosenberg and Hirschberg 2007).
    """
    judged = agreement(labels, found)
    counts, _, _ = matching(labels, found)
    return {
        "accuracy": judged.hungarian,
        "nmi": judged.nmi,
        "ari": judged.ari,
        "purity": float(counts.max(0).sum() / len(labels)),
        "v_measure": judged.nmi,
    }


def assigned_accuracy(
    features: Tensor, labels: Ints, found: Ints, test: Tensor, test_labels: Ints
) -> float:
    """Accuracy on test of clusters found in train: nearest centre, clusters matched to classes on train."""
    names = np.unique(found)
    rows = [torch.from_numpy(np.flatnonzero(found == name)).to(features.device) for name in names]
    centres = torch.stack([features[each].double().mean(0) for each in rows])
    nearest = torch.cdist(test.double(), centres).argmin(1).cpu().numpy()
    _, classes, matched = matching(labels, found)
    meaning = np.full(len(names), -1)
    meaning[matched] = np.unique(labels)[classes]
    return float((meaning[nearest] == test_labels).mean())


def mean_of(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean of each metric that all rows have."""
    names = [name for name in rows[0] if all(name in row for row in rows)]
    return {name: fmean(row[name] for row in rows) for name in names}


def spreads(rows: Sequence[Mapping[str, float]]) -> dict[str, Spread]:
    """Each metric over the rows that have it, nan aside."""
    names = dict.fromkeys(name for row in rows for name in row)
    values = {n: [row[n] for row in rows if n in row and math.isfinite(row[n])] for n in names}
    return {name: Spread.of(found) for name, found in values.items() if found}
