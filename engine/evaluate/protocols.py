"""The protocols on features of labelled videos, fold by fold: k-means, a linear layer, retrieval; and their words.

``docs/evaluation.md`` says what each computes. Labels of a test part decide nothing but the numbers that are reported.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.core.files import write_text_atomic
from engine.core.recipe import Evaluation
from engine.core.runtime import Runtime, one_thread
from engine.evaluate import linear, scores
from engine.evaluate.datasets import Dataset, Fold
from engine.evaluate.scores import Spread
from engine.features import kmeans
from engine.features.extract import Cuts, Report
from engine.features.readout import NAMES, fitted
from engine.model.network_file import Card

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Evaluated:
    """What a protocol found."""

    protocol: str
    protocol_string: str
    """All that decides the numbers, in words."""
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
        """All of it, for JSON."""
        return asdict(self)

    @property
    def value(self) -> Spread:
        """The headline metric."""
        return self.metrics[self.headline]


@dataclass(frozen=True)
class Videos:
    """Video features of all clips that folds use."""

    features: Tensor
    """float64 (N, D)."""
    views: Tensor
    """float32 (clips, V, D)."""
    clip_video: Ints
    """(clips,) row in ``features``."""
    label: Ints
    group: Ints
    """(N,)."""
    row_of: Ints
    """(all clips of the data set,) row in ``features``; -1 for clips that no fold uses."""

    def of(self, clips: Ints) -> Ints:
        """The rows of the videos that clips are from, rising."""
        return np.unique(self.row_of[clips])


def cuts_of(card: Card, settings: Evaluation) -> Cuts:
    """The views that a network's input and the settings ask for."""
    return Cuts(card.input, settings.views, settings.crops, settings.batch_size)


def used_clips(dataset: Dataset) -> Ints:
    """Clips that a fold trains or tests on, rising."""
    return np.unique(np.concatenate([np.r_[fold.train, fold.test] for fold in dataset.folds]))


def videos_of(dataset: Dataset, views: Tensor) -> Videos:
    """Videos of ``used_clips``, whose outputs (clips, V, D) are given."""
    clips = used_clips(dataset)
    features, first = scores.video_means(views, dataset.video[clips])
    _, number = np.unique(dataset.video[clips], return_inverse=True)
    row_of = np.full(len(dataset.index), -1, np.int64)
    row_of[clips] = number
    label, group = dataset.label[clips][first], dataset.group[clips][first]
    return Videos(features, views, number.astype(np.int64), label, group, row_of)


class Judge:
    """One network's protocols on its features."""

    def __init__(
        self, dataset: Dataset, videos: Videos, settings: Evaluation, runtime: Runtime, card: Card
    ) -> None:
        self.dataset, self.videos, self.settings, self.card = dataset, videos, settings, card
        self.device = str(runtime.device)
        self.features = videos.features.to(runtime.device)

    def judged(
        self,
        protocol: str,
        seeds: Sequence[int],
        provenance: Mapping[str, Any],
        on_progress: Report | None = None,
    ) -> Evaluated:
        """All folds and seeds of a protocol."""
        count = len(self.dataset.classes)
        total = np.zeros((count, count), np.int64)
        one: Callable[[Fold, int], tuple[dict[str, Any], Ints | None]] = getattr(
            self, f"_{protocol}"
        )
        seeds = seeds[:1] if protocol == "retrieval" else seeds
        turns = [(seed, fold) for seed in seeds for fold in self._folds(protocol)]
        rows = []
        for number, (seed, fold) in enumerate(turns, start=1):
            train, test = self.videos.of(fold.train), self.videos.of(fold.test)
            with one_thread(largest_product=len(train) * self.features.shape[1] * count):
                metrics, predicted = one(fold, seed)
            sizes = {"train": len(train), "test": len(test)}
            rows.append({"fold": fold.name, "seed": seed, **sizes, **metrics})
            if predicted is not None:
                total += scores.confusion(predicted, self.videos.label[test], count)
            if on_progress is not None:
                on_progress(f"{protocol}, folds", number, len(turns))
        spread = scores.spreads([_metrics(row) for row in rows])
        if "all_accuracy" in spread:  # one fold: what varies is k-means' luck
            runs = [value for row in rows for value in row.get("all_accuracy_runs", [])]
            spread["all_accuracy"] = Spread.of(runs)
        source = {"checkpoint": self.card.source, "recipe_hash": self.card.recipe_hash}
        return Evaluated(
            protocol=protocol,
            protocol_string=self._words(protocol, seeds),
            labels_used=self.card.labels_used,
            metrics=spread,
            headline=self._headline(protocol, spread),
            folds=rows,
            classes=self.dataset.classes,
            confusion=total.tolist() if total.any() else None,
            provenance={**provenance, **source},
        )

    def _folds(self, protocol: str) -> list[Fold]:
        """The data set's; where its test parts are groups, k-means also sees all of it at once."""
        folds = list(self.dataset.folds)
        if protocol == "kmeans" and self.dataset.folds_by.startswith("leave one group out"):
            folds.append(Fold("all", used_clips(self.dataset), np.array([], np.int64)))
        return folds

    def _headline(self, protocol: str, metrics: Mapping[str, Spread]) -> str:
        known = {"linear": ["video_top1"], "retrieval": ["r@1"]}
        names = known.get(protocol, ["all_accuracy", "test_accuracy", "train_accuracy"])
        for name in names:
            if name in metrics:
                return name
        raise ValueError(
            f"k-means: no part of {self.dataset.name} has two videos a class or more: clusters would say nothing"
        )

    def _kmeans(self, fold: Fold, seed: int) -> tuple[dict[str, Any], None]:
        """Means over the runs, and each run's accuracy."""
        parts = {"train": self.videos.of(fold.train), "test": self.videos.of(fold.test)}
        if fold.name == "all":
            parts = {"all": parts["train"]}
        metrics: dict[str, Any] = {}
        for part, rows in parts.items():
            labels = self.videos.label[rows]
            count = len(np.unique(labels))
            if len(rows) < 2 * count:  # a cluster a video says nothing
                continue
            scaled = fitted(self._rows(rows), self.settings.readout)
            x = scaled(self._rows(rows))
            (clusters,) = kmeans.cluster(
                [x],
                count,
                backend=kmeans.kmeans_backend(self.device),
                device=self.device,
                runs=self.settings.kmeans_seeds,
                restarts=self.settings.kmeans_init,
                seed=seed,
            )
            runs = [scores.cluster_scores(labels, run) for run in clusters]
            metrics |= {f"{part}_{name}": value for name, value in scores.mean_of(runs).items()}
            metrics[f"{part}_accuracy_runs"] = [run["accuracy"] for run in runs]
            if part == "train":
                test = scaled(self._rows(parts["test"])), self.videos.label[parts["test"]]
                shares = [scores.assigned_accuracy(x, labels, run, *test) for run in clusters]
                metrics["assigned_accuracy"] = float(np.mean(shares))
        return metrics, None

    def _linear(self, fold: Fold, seed: int) -> tuple[dict[str, Any], Ints]:
        train, test = self.videos.of(fold.train), self.videos.of(fold.test)
        labels, s = self.videos.label[train], self.settings
        every = self.videos.features.numpy()
        how: dict[str, Any] = {
            "num_classes": len(self.dataset.classes),
            "gpu": self.device.startswith("cuda"),
        }
        strength = linear.choose_strength(
            linear.layers_predict(**how),
            every[train],
            labels,
            self.videos.group[train],
            strengths=sorted(s.strengths),
            parts=s.holdout_parts,
            turns=s.holdout_turns,
            seed=seed,
        )
        (layer,) = linear.fit(every[train], labels, strengths=[strength], **how)
        clips = np.flatnonzero(np.isin(self.videos.clip_video, test))
        views = self.videos.views.numpy()[clips]
        each = layer.scores(views.reshape(-1, views.shape[-1]))
        each_label = np.repeat(self.videos.label[self.videos.clip_video[clips]], views.shape[1])
        of_videos, of_train = layer.scores(every[test]), layer.scores(every[train])
        metrics = scores.accuracies(
            torch.from_numpy(each),
            torch.from_numpy(of_videos),
            each_label,
            self.videos.label[test],
        )
        metrics["train_video_top1"] = scores.top_k(torch.from_numpy(of_train), labels, 1)
        return {**metrics, "C": strength}, of_videos.argmax(1)

    def _retrieval(self, fold: Fold, seed: int) -> tuple[dict[str, Any], None]:
        train, test = self.videos.of(fold.train), self.videos.of(fold.test)
        pairs = ((self._rows(rows), self.videos.label[rows]) for rows in (test, train))
        (queries, labels), (gallery, known) = pairs
        return dict(scores.retrieval(queries, labels, gallery, known)), None

    def _rows(self, rows: Ints) -> Tensor:
        return self.features[torch.from_numpy(rows).to(self.features.device)]

    def _words(self, protocol: str, seeds: Sequence[int]) -> str:
        s = self.settings
        how = {
            "kmeans": (
                f"{kmeans.NAMES[kmeans.kmeans_backend(self.device)]}, k = classes, best of {s.kmeans_init} starts,"
                f" mean of {s.kmeans_seeds} runs, on video means, {NAMES[s.readout]}"
            ),
            "linear": (
                "one layer on standardised video means by logistic regression, C chosen on held-out train groups"
                f" ({min(s.holdout_turns, s.holdout_parts)} of {s.holdout_parts} parts, stratified)"
            ),
            "retrieval": "cosine of video means, gallery train, queries test",
        }[protocol]
        return words(
            protocol,
            how,
            dataset=self.dataset,
            cuts=cuts_of(self.card, s),
            batch_norm=s.batch_norm,
            seeds=seeds,
        )


def _metrics(row: Mapping[str, Any]) -> dict[str, float]:
    return {key: value for key, value in row.items() if isinstance(value, float) and key != "C"}


def words(
    protocol: str, how: str, *, dataset: Dataset, cuts: Cuts, batch_norm: str, seeds: Sequence[int]
) -> str:
    """The protocol's string: all that decides its numbers."""
    parts = [protocol, how, f"{dataset.name}: {dataset.folds_by}", str(cuts)]
    parts.append(f"{batch_norm} batch-norm statistics")
    parts.append(f"seed {seeds[0]}" if len(seeds) == 1 else f"seeds {seeds[0]} to {seeds[-1]}")
    return ", ".join([*parts, *([dataset.incomplete] if dataset.incomplete else [])])


def append_rows(path: Path, found: Sequence[Evaluated], baselines: Mapping[str, Spread]) -> None:
    """Append a row a protocol to a JSON Lines file, and write the confusion matrices beside it."""
    trivial = {name: asdict(spread) for name, spread in baselines.items()}
    with path.open("a", encoding="utf-8") as file:
        for each in found:
            row = each.row() | ({"baselines": trivial} if trivial else {})
            file.write(json.dumps(row) + "\n")
    for number, each in enumerate(found):
        if each.confusion is not None:
            write_confusion(
                path.with_name(f"{path.stem}-{number}-{each.protocol}-confusion.csv"), each
            )


def write_confusion(path: Path, found: Evaluated) -> None:
    """Write a confusion matrix as CSV: a row a class, a column for what its videos were taken for."""
    text = StringIO()
    writer = csv.writer(text)
    writer.writerow(["class", *found.classes])
    assert found.confusion is not None
    for name, row in zip(found.classes, found.confusion, strict=True):
        writer.writerow([name, *row])
    write_text_atomic(path, text.getvalue())
