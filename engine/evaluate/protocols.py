"""The protocols that judge a network on labelled videos: k-means, a linear layer, retrieval, fine-tuning.

All of them judge videos: a video's features are the mean over its views, and a layer's scores of it the mean over them,
too. ``docs/evaluation.md`` says what each computes. Labels of the test part decide nothing but the numbers that are
reported.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.metrics import confusion_matrix  # type: ignore[import-untyped]
from torch import Tensor, nn

from engine.core.provenance import provenance
from engine.core.recipe import Evaluation, Recipe
from engine.core.runtime import Runtime, one_thread
from engine.data.library import Report
from engine.evaluate import linear, scores
from engine.evaluate.datasets import Dataset, Fold
from engine.evaluate.finetune import Finetuning
from engine.evaluate.scores import Evaluated, Spread
from engine.features import kmeans
from engine.features.extract import Cuts, Extractor, check_undamaged
from engine.features.readout import NAMES, fitted
from engine.model.network_file import Card
from engine.model.resnet3d import ResNet3D

Ints = NDArray[np.int64]

FROZEN = ("kmeans", "linear", "retrieval")
PROTOCOLS = (*FROZEN, "finetune")
HEADLINES = {
    "kmeans": ("all_accuracy", "test_accuracy", "train_accuracy"),
    "linear": ("video_top1",),
    "retrieval": ("r@1",),
}
"""The metric that stands for a protocol in tables: the first of these that there is."""
MOST_BYTES = 8 * 2**30
"""Of the views that a layer may be fitted to, as float64."""
EXAMPLES = {
    "views": "standardised views, a video by its views' mean softmax,",
    "videos": "standardised video means",
}
"""What ``evaluation.examples`` fits a layer to, in words."""


def evaluate_many(
    networks: Sequence[tuple[ResNet3D, Card]],
    dataset: Dataset,
    *,
    protocols: Sequence[str],
    settings: Evaluation,
    runtime: Runtime,
    seed: int = 0,
    seeds: int = 1,
    training: Recipe | None = None,
    on_progress: Report | None = None,
) -> list[dict[str, Evaluated]]:
    """Judge networks by several protocols; frozen ones of equal input share one decode.

    Gives a dict by protocol for each network. With ``seeds``, each protocol runs with that many seeds from ``seed``
    on, and folds and seeds are spread over alike; retrieval has nothing to draw.
    """
    for protocol in protocols:
        if protocol not in PROTOCOLS:
            raise ValueError(f"unknown protocol {protocol!r}: {', '.join(PROTOCOLS)}")
    if "finetune" in protocols and training is None:
        raise ValueError("fine-tuning needs a recipe to train by")
    frozen = [protocol for protocol in protocols if protocol in FROZEN]
    if "linear" in frozen and settings.examples == "views":
        _check_room(len(used_clips(dataset)), settings, networks)
    shared: dict[str, Any] = {"runtime": runtime, "on_progress": on_progress}
    views = take_features(networks, dataset, settings=settings, **shared) if frozen else []
    every, origin, results = range(seed, seed + seeds), provenance(runtime), []
    for number, (network, card) in enumerate(networks):
        by_protocol = {}
        if frozen:
            videos = videos_of(dataset, views[number])
            _check_finite(videos, card, dataset)
            judge = Judge(dataset, videos, settings, runtime, card)
            by_protocol = {name: judge.judged(name, every, origin, on_progress) for name in frozen}
        if training is not None and "finetune" in protocols:
            work = Finetuning(network, card, dataset, training, **shared)
            by_protocol["finetune"] = work.run(every)
        results.append({protocol: by_protocol[protocol] for protocol in protocols})
        if on_progress is not None:
            on_progress("judging networks", number + 1, len(networks))
    return results


def take_features(
    networks: Sequence[tuple[nn.Module, Card]],
    dataset: Dataset,
    *,
    settings: Evaluation,
    runtime: Runtime,
    on_progress: Report | None = None,
) -> list[Tensor]:
    """Features of each network: float32 (clips that folds use, V, D), clips in their order in the data set."""
    clips = used_clips(dataset)
    features: dict[int, Tensor] = {}
    for shape in dict.fromkeys(card.input for _, card in networks):
        same = [i for i, (_, card) in enumerate(networks) if card.input == shape]
        cuts = Cuts(shape, settings.views, settings.crops, settings.batch_size)
        extractor = Extractor(
            dataset.index, clips, cuts=cuts, runtime=runtime, bank=dataset.decoded
        )
        outputs = extractor.outputs(
            *zip(*(networks[i] for i in same), strict=True),
            batch_norm=settings.batch_norm,
            on_progress=on_progress,
        )
        check_undamaged(dataset.index)
        features |= {i: output.cpu() for i, output in zip(same, outputs, strict=True)}
    return [features[i] for i in range(len(networks))]


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


def used_clips(dataset: Dataset) -> Ints:
    """Clips that a fold trains or tests on, rising."""
    return np.unique(np.concatenate([np.r_[fold.train, fold.test] for fold in dataset.folds]))


def videos_of(dataset: Dataset, views: Tensor) -> Videos:
    """Videos of ``used_clips``, from their outputs (clips, V, D)."""
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
        """Runs all folds and seeds of a protocol."""
        classes = range(len(self.dataset.classes))
        total = np.zeros((len(classes), len(classes)), np.int64)
        one: Callable[..., tuple[dict[str, Any], Ints | None]] = getattr(self, f"_{protocol}")
        seeds = seeds[:1] if protocol == "retrieval" else seeds
        turns = [(seed, fold) for seed in seeds for fold in self._folds(protocol)]
        by_views = protocol == "linear" and self.settings.examples == "views"
        width = self.features.shape[1] * (self.videos.views.shape[1] if by_views else 1)
        rows = []
        for number, (seed, fold) in enumerate(turns, start=1):
            train, test = self.videos.of(fold.train), self.videos.of(fold.test)
            with one_thread(largest_product=len(train) * width * len(classes)):
                metrics, predicted = one(train, test, seed)
            sizes = {"train": len(train), "test": len(test)}
            rows.append({"fold": fold.name, "seed": seed, **sizes, **metrics})
            if predicted is not None:
                total += confusion_matrix(self.videos.label[test], predicted, labels=classes)
            if on_progress is not None:
                on_progress(f"{protocol}, folds", number, len(turns))
        spread = scores.spreads(
            [{k: v for k, v in row.items() if isinstance(v, float) and k != "C"} for row in rows]
        )
        if "all_accuracy" in spread:  # one fold: what varies is k-means' luck
            runs = [value for row in rows for value in row.get("all_accuracy_runs", [])]
            spread["all_accuracy"] = Spread.of(runs)
        headline = next((name for name in HEADLINES[protocol] if name in spread), None)
        if headline is None:
            raise ValueError(
                f"k-means: no part of {self.dataset.name} has two videos a class or more: clusters would say nothing"
            )
        source = {"checkpoint": self.card.source, "recipe_hash": self.card.recipe_hash}
        return Evaluated(
            protocol=protocol,
            protocol_string=self._words(protocol, seeds),
            labels_used=self.card.labels_used,
            metrics=spread,
            headline=headline,
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

    def _kmeans(self, train: Ints, test: Ints, seed: int) -> tuple[dict[str, Any], None]:
        """Means over the runs, and each run's accuracy; without a test part, of all videos at once."""
        parts = {"train": train, "test": test} if len(test) else {"all": train}
        metrics: dict[str, Any] = {}
        for part, rows in parts.items():
            labels = self.videos.label[rows]
            count = len(np.unique(labels))
            if count < 2 or len(rows) < 2 * count:  # one class, or a cluster a video, says nothing
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
            metrics |= {f"{part}_{name}": fmean(run[name] for run in runs) for name in runs[0]}
            metrics[f"{part}_accuracy_runs"] = [run["accuracy"] for run in runs]
            if part == "train":
                held = scaled(self._rows(test)), self.videos.label[test]
                shares = [scores.assigned_accuracy(x, labels, run, *held) for run in clusters]
                metrics["assigned_accuracy"] = float(np.mean(shares))
        return metrics, None

    def _linear(self, train: Ints, test: Ints, seed: int) -> tuple[dict[str, Any], Ints]:
        s, on_gpu = self.settings, self.device.startswith("cuda")
        x, row = self._examples(train)
        # a clip counts the same however many views it is seen by
        weight = 1.0 if s.examples == "videos" else 1 / self.videos.views.shape[1]
        classes = len(self.dataset.classes)
        how: dict[str, Any] = {"num_classes": classes, "weight": weight, "gpu": on_gpu}
        strength = linear.choose_strength(
            linear.layers_predict(**how),
            x,
            self.videos.label[row],
            self.videos.group[row],
            strengths=sorted(s.strengths),
            parts=s.holdout_parts,
            turns=s.holdout_turns,
            seed=seed,
        )
        (layer,) = linear.fit(x, self.videos.label[row], strengths=[strength], **how)
        clips = self._clips(test)
        views = layer.scores(self.videos.views.numpy()[clips])
        view_label = np.repeat(self.videos.label[self.videos.clip_video[clips]], views.shape[1])
        of_views = torch.from_numpy(views.reshape(-1, views.shape[-1]))
        of_train, of_test = self._video_scores(layer, train), self._video_scores(layer, test)
        metrics = scores.accuracies(of_views, of_test, view_label, self.videos.label[test])
        metrics["train_video_top1"] = scores.top_k(of_train, self.videos.label[train], 1)
        return {**metrics, "C": strength}, of_test.numpy().argmax(1)

    def _clips(self, rows: Ints) -> Ints:
        """The clips of videos, by their places in ``views``."""
        return np.flatnonzero(np.isin(self.videos.clip_video, rows))

    def _examples(self, rows: Ints) -> tuple[linear.Floats, Ints]:
        """What a layer is fitted to: features (examples, D), and the video (examples,) that each is of."""
        if self.settings.examples == "videos":
            return self.videos.features.numpy()[rows], rows
        clips = self._clips(rows)
        views = self.videos.views[torch.from_numpy(clips)].double()
        of_clips = self.videos.clip_video[clips]
        return views.flatten(0, 1).numpy(), np.repeat(of_clips, views.shape[1])

    def _video_scores(self, layer: linear.Layer, rows: Ints) -> Tensor:
        """Scores (N, K) of videos: of their mean features, or the mean of their views' softmax."""
        if self.settings.examples == "videos":
            return torch.from_numpy(layer.scores(self.videos.features.numpy()[rows]))
        clips = self._clips(rows)
        each = torch.from_numpy(layer.scores(self.videos.views.numpy()[clips])).softmax(-1)
        return scores.video_means(each, self.videos.clip_video[clips])[0]

    def _retrieval(self, train: Ints, test: Ints, seed: int) -> tuple[dict[str, Any], None]:
        queries, gallery = ((self._rows(rows), self.videos.label[rows]) for rows in (test, train))
        return dict(scores.retrieval(*queries, *gallery)), None

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
                f"one layer on {EXAMPLES[s.examples]} by logistic regression, C chosen on held-out train groups"
                f" ({min(s.holdout_turns, s.holdout_parts)} of {s.holdout_parts} parts, stratified)"
            ),
            "retrieval": "cosine of video means, gallery train, queries test",
        }[protocol]
        return scores.words(
            protocol,
            how,
            dataset=self.dataset,
            cuts=Cuts(self.card.input, s.views, s.crops, s.batch_size),
            batch_norm=s.batch_norm,
            seeds=seeds,
        )


def _check_room(
    clips: int, settings: Evaluation, networks: Sequence[tuple[ResNet3D, Card]]
) -> None:
    """Raises ValueError, before anything is decoded, where a layer's examples would not fit into memory."""
    widest = max(network.feature_dim for network, _ in networks)
    size = clips * settings.views * settings.crops * widest * 8
    if size > MOST_BYTES:
        raise ValueError(
            f"linear: the views of {clips} clips are {size / 2**30:.0f} GiB of examples, and a fit takes several times"
            " as much: fit the layer to video means by --set evaluation.examples=videos"
        )


def _check_finite(videos: Videos, card: Card, dataset: Dataset) -> None:
    bad = ~torch.isfinite(videos.features).all(1)
    if bad.any():
        raise ValueError(
            f"{card.source or 'the network'}: features of {int(bad.sum())} of {len(bad)} videos of {dataset.name} are"
            " not finite: its training diverged, or it is not the network that its card says"
        )
