"""The protocols that judge a network on labelled videos: k-means, a linear layer, fine-tuning, retrieval.

All of them judge videos: a video's features are the mean over its views. ``docs/evaluation.md`` says what each
computes. Labels of the test part decide nothing but the numbers that are reported.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from engine.core.provenance import provenance
from engine.core.recipe import Evaluation, Recipe
from engine.core.runtime import Runtime
from engine.evaluate.datasets import Dataset
from engine.evaluate.finetune import finetune
from engine.evaluate.protocols import Evaluated, Judge, Videos, cuts_of, used_clips, videos_of
from engine.features.extract import Extractor, Report
from engine.model.network_file import Card
from engine.model.resnet3d import ResNet3D

FROZEN = ("kmeans", "linear", "retrieval")
PROTOCOLS = (*FROZEN, "finetune")


def evaluate(
    network: ResNet3D, card: Card, dataset: Dataset, *, protocol: str, **how: Any
) -> Evaluated:
    """Judge a network by one protocol of PROTOCOLS; ``how`` is as ``evaluate_many`` takes it.

    Raises ValueError for another protocol, and for features that are not finite.
    """
    (found,) = evaluate_many([(network, card)], dataset, protocols=[protocol], **how)
    return found[protocol]


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
    shared: dict[str, Any] = {"runtime": runtime, "on_progress": on_progress}
    views = take_features(networks, dataset, settings=settings, **shared) if frozen else []
    every, origin, results = range(seed, seed + seeds), provenance(runtime), []
    for number, (network, card) in enumerate(networks):
        found = {}
        if frozen:
            videos = videos_of(dataset, views[number])
            _check_finite(videos, card, dataset)
            judge = Judge(dataset, videos, settings, runtime, card)
            found = {name: judge.judged(name, every, origin, on_progress) for name in frozen}
        if training is not None and "finetune" in protocols:
            found["finetune"] = finetune(
                network, card, dataset, recipe=training, seeds=every, **shared
            )
        results.append({protocol: found[protocol] for protocol in protocols})
        if on_progress is not None:
            on_progress("judging networks", number + 1, len(networks))
    return results


def take_features(
    networks: Sequence[tuple[ResNet3D, Card]],
    dataset: Dataset,
    *,
    settings: Evaluation,
    runtime: Runtime,
    on_progress: Report | None = None,
) -> list[Tensor]:
    """Features of each network: float32 (clips that folds use, V, D), clips in their order in the data set."""
    clips = used_clips(dataset)
    found: dict[int, Tensor] = {}
    for shape in dict.fromkeys(card.input for _, card in networks):
        same = [i for i, (_, card) in enumerate(networks) if card.input == shape]
        cuts = cuts_of(networks[same[0]][1], settings)
        extractor = Extractor(
            dataset.index, clips, cuts=cuts, runtime=runtime, bank=dataset.decoded
        )
        outputs = extractor.outputs(
            *zip(*(networks[i] for i in same), strict=True),
            batch_norm=settings.batch_norm,
            on_progress=on_progress,
        )
        found |= dict(zip(same, outputs, strict=True))
    return [found[i] for i in range(len(networks))]


def _check_finite(videos: Videos, card: Card, dataset: Dataset) -> None:
    bad = ~torch.isfinite(videos.features).all(1)
    if bad.any():
        raise ValueError(
            f"{card.source or 'the network'}: features of {int(bad.sum())} of {len(bad)} videos of {dataset.name} are"
            " not finite: its training diverged, or it is not the network that its card says"
        )
