"""Results of protocols: top-k accuracy, retrieval, agreement of clusters; means and spreads over folds; their rows.

Shape letters: N videos, D features, K classes.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from io import StringIO
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.core.files import write_text_atomic
from engine.evaluate.datasets import Dataset
from engine.features.agreement import agreement, matching
from engine.features.extract import Cuts

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


@dataclass(frozen=True)
class Evaluated:
    """The result of a protocol on one network."""

    protocol: str
    protocol_string: str
    """The settings that decide the numbers, in words."""
    labels_used: bool
    """Whether labels had a part in the network's weights before."""
    metrics: dict[str, Spread]
    """Over folds (and seeds); shares in [0, 1]."""
    headline: str
    """The metric that stands for the protocol in tables."""
    folds: list[dict[str, Any]]
    """A row a fold and seed: fold, seed, train and test videos, its metrics, what was chosen."""
    classes: tuple[str, ...]
    confusion: list[list[int]] | None
    """Test videos of all folds and seeds: rows are classes, columns what they were taken for."""
    provenance: dict[str, Any]

    def row(self) -> dict[str, Any]:
        """Every field, for JSON."""
        return asdict(self)

    @property
    def value(self) -> Spread:
        """The headline metric."""
        return self.metrics[self.headline]


def words(
    protocol: str, how: str, *, dataset: Dataset, cuts: Cuts, batch_norm: str, seeds: Sequence[int]
) -> str:
    """The protocol's string: every setting that decides its numbers."""
    parts = [protocol, how, f"{dataset.name}: {dataset.folds_by}", str(cuts)]
    parts.append(f"{batch_norm} batch-norm statistics")
    parts.append(f"seed {seeds[0]}" if len(seeds) == 1 else f"seeds {seeds[0]} to {seeds[-1]}")
    return ", ".join([*parts, *([dataset.incomplete] if dataset.incomplete else [])])


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
    parts = torch.nn.functional.normalize(queries.double(), dim=1).split(QUERIES_AT_ONCE)
    most = min(max(RETRIEVED), len(unit))
    nearest = torch.cat([(part @ unit.T).topk(most, dim=1).indices for part in parts])
    right = known[nearest] == torch.from_numpy(labels).to(gallery.device)[:, None]
    return {f"r@{k}": int(right[:, :k].any(1).sum()) / len(queries) for k in RETRIEVED}


def cluster_scores(labels: Ints, clusters: Ints) -> dict[str, float]:
    """Agreement of one run's clusters (N,) with the classes (N,).

    V-measure with equal weights is the same number as NMI by the arithmetic mean (Rosenberg and Hirschberg 2007).
    """
    judged = agreement(labels, clusters)
    counts, _, _ = matching(labels, clusters)
    return {
        "accuracy": judged.hungarian,
        "nmi": judged.nmi,
        "ari": judged.ari,
        "purity": float(counts.max(0).sum() / len(labels)),
        "v_measure": judged.nmi,
    }


def assigned_accuracy(
    features: Tensor, labels: Ints, clusters: Ints, test: Tensor, test_labels: Ints
) -> float:
    """Accuracy on test of train's clusters: nearest centre, clusters matched to classes on train."""
    names = np.unique(clusters)
    rows = [torch.from_numpy(np.flatnonzero(clusters == n)).to(features.device) for n in names]
    centres = torch.stack([features[each].double().mean(0) for each in rows])
    nearest = torch.cdist(test.double(), centres).argmin(1).cpu().numpy()
    _, classes, matched = matching(labels, clusters)
    meaning = np.full(len(names), -1)
    meaning[matched] = np.unique(labels)[classes]
    return float((meaning[nearest] == test_labels).mean())


def spreads(rows: Sequence[Mapping[str, float]]) -> dict[str, Spread]:
    """Each metric over the rows that have it, nan aside."""
    names = dict.fromkeys(name for row in rows for name in row)
    values = {n: [row[n] for row in rows if n in row and math.isfinite(row[n])] for n in names}
    return {name: Spread.of(finite) for name, finite in values.items() if finite}


def append_rows(
    path: Path, results: Sequence[Evaluated], baselines: Mapping[str, Mapping[str, Spread]]
) -> None:
    """Append a row a protocol to a JSON Lines file, with its baselines, and write the confusion matrices beside it."""
    first = len(path.read_text(encoding="utf-8").splitlines()) if path.exists() else 0
    with path.open("a", encoding="utf-8") as file:
        for result in results:
            trivial = {k: asdict(v) for k, v in baselines.get(result.protocol, {}).items()}
            row = result.row() | ({"baselines": trivial} if trivial else {})
            file.write(json.dumps(row) + "\n")
    for number, result in enumerate(results, start=first):
        if result.confusion is not None:
            name = f"{path.stem}-{number}-{result.protocol}-confusion.csv"
            write_confusion(path.with_name(name), result)


def write_confusion(path: Path, result: Evaluated) -> None:
    """Write a confusion matrix as CSV: a row a class, a column for what its videos were taken for."""
    assert result.confusion is not None
    text = StringIO()
    writer = csv.writer(text)
    writer.writerow(["class", *result.classes])
    writer.writerows([n, *row] for n, row in zip(result.classes, result.confusion, strict=True))
    write_text_atomic(path, text.getvalue())
