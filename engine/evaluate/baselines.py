"""Trivial baselines: how far the simplest features of the same videos go, on the same folds.

Mean frames and mean absolute frame differences, judged by the networks' own protocols on the networks' views. And what
others report: ridge regression on the mean 16x16 frame, on the mean absolute difference of neighbouring frames, and on
a histogram of flow's directions over time; the five nearest neighbours by facts of the files alone (frames, width,
height, sound). A representation is interesting above these.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec
import numpy as np
import torch
from sklearn.neighbors import KNeighborsClassifier  # type: ignore[import-untyped]
from sklearn.pipeline import make_pipeline  # type: ignore[import-untyped]
from sklearn.preprocessing import StandardScaler  # type: ignore[import-untyped]
from torch import Tensor

from engine.core.recipe import Clip, Evaluation, Recipe
from engine.core.runtime import Runtime, one_thread
from engine.data.flow import dis_flow
from engine.data.library import Report
from engine.data.plan import ClipPlan, central_plan
from engine.data.shards.index import ClipIndex
from engine.evaluate.datasets import Dataset
from engine.evaluate.linear import Floats, Ints, choose_strength, ridge_predict
from engine.evaluate.protocols import FROZEN, Judge, take_features, used_clips, videos_of
from engine.evaluate.scores import Spread
from engine.features.extract import decoded
from engine.features.trivial import FrameDifferences, MeanFrame, direction_histograms
from engine.model.network_file import Card, ClipInput, card_of

SIZE = 16
FLOW_SIZE = 48
"""Side in pixels of the frames that flow is computed of."""
PAIRS = 16
"""Pairs of neighbouring frames, evenly spread over a clip."""
ALPHAS = (100.0, 10.0, 1.0, 1e-1, 1e-2, 1e-3)
"""Ridge's strengths, to choose from on held-out train groups; of equals, the largest."""
HOLDOUT_PARTS = 4
NEIGHBOURS = 5
BATCH = 32


def baselines(
    dataset: Dataset,
    *,
    protocols: Sequence[str],
    recipe: Recipe,
    shape: ClipInput | None = None,
    runtime: Runtime,
    on_progress: Report | None = None,
) -> dict[str, dict[str, Spread]]:
    """What each baseline reaches over the folds, in [0, 1], by protocol and name.

    Pictures are judged as a network's features are, of the views that it is judged by: clips of ``shape``, by default
    the recipe's, or those that fine-tuning tests on. Beside the linear layer and fine-tuning there are ridge and
    neighbours, too.
    """
    found: dict[str, dict[str, Spread]] = {}
    own, tuned = card_of(recipe).input, recipe.finetune
    more: dict[str, Any] = {"runtime": runtime, "on_progress": on_progress}
    frozen = [protocol for protocol in protocols if protocol in FROZEN]
    if frozen:
        judges = _judges(dataset, shape or own, recipe.evaluation, **more)
        found |= {
            protocol: _values(judges, protocol, recipe.seed, on_progress) for protocol in frozen
        }
    if "finetune" in protocols:
        views = {"views": tuned.views, "crops": tuned.crops}
        judges = _judges(dataset, own, msgspec.structs.replace(recipe.evaluation, **views), **more)
        found["finetune"] = _values(judges, "linear", recipe.seed, on_progress)
    if with_labels := {"linear", "finetune"}.intersection(protocols):
        fitted = _by_ridge(dataset, runtime, recipe.seed, on_progress)
        for protocol in with_labels:
            found[protocol] |= fitted
    return found


def _values(
    judges: Mapping[str, Judge], protocol: str, seed: int, on_progress: Report | None
) -> dict[str, Spread]:
    return {
        name: judge.judged(protocol, [seed], {}, on_progress).value
        for name, judge in judges.items()
    }


def _judges(
    dataset: Dataset,
    shape: ClipInput,
    settings: Evaluation,
    *,
    runtime: Runtime,
    on_progress: Report | None,
) -> dict[str, Judge]:
    """What judges a network's features, with those of pictures of the views instead."""
    pictures = {
        "mean frame": MeanFrame(SIZE),
        "frame differences": FrameDifferences(SIZE, colour=True),
    }
    card = Card(input=shape)
    pairs = [(network, card) for network in pictures.values()]
    how: dict[str, Any] = {"settings": settings, "runtime": runtime, "on_progress": on_progress}
    views = take_features(pairs, dataset, **how)
    return {
        name: Judge(dataset, videos_of(dataset, each), settings, runtime, card)
        for name, each in zip(pictures, views, strict=True)
    }


def _by_ridge(
    dataset: Dataset, runtime: Runtime, seed: int, on_progress: Report | None
) -> dict[str, Spread]:
    """Ridge on pictures and flow of pairs of frames all over a clip, and neighbours by the files' facts."""
    clips = used_clips(dataset)
    mean, change = _pictures(dataset, clips, runtime)
    ways = _directions(dataset, clips, runtime)
    index = dataset.index
    facts = np.stack([index.num_frames, index.width, index.height, index.has_audio], axis=1)[clips]
    trivial: dict[str, tuple[Floats, Callable[..., Ints]]] = {
        "ridge on the mean 16x16 frame": (mean, ridge),
        "ridge on mean absolute frame differences": (change, ridge),
        "ridge on flow's directions over time": (ways, ridge),
        "5 nearest neighbours by file facts": (facts.astype(np.float64), neighbours),
    }
    spreads, done, total = {}, 0, len(trivial) * len(dataset.folds)
    for name, (values, predict) in trivial.items():
        videos = videos_of(dataset, torch.from_numpy(values)[:, None])
        x, shares = videos.features.numpy(), []
        for fold in dataset.folds:
            train, test = videos.of(fold.train), videos.of(fold.test)
            with one_thread(largest_product=len(train) ** 2 * x.shape[1]):
                guess = predict(x[train], videos.label[train], videos.group[train], x[test], seed)
            shares.append(float((guess == videos.label[test]).mean()))
            done += 1
            if on_progress is not None:
                on_progress("trivial baselines, folds", done, total)
        spreads[name] = Spread.of(shares)
    return spreads


def _pictures(dataset: Dataset, clips: Ints, runtime: Runtime) -> tuple[Floats, Floats]:
    """Mean frame and mean absolute difference of each clip's pairs: (clips, 3 SIZE^2) each, of values in [0, 1]."""
    means, changes = [], []
    for pairs in _pairs(dataset, clips, SIZE, runtime):
        frames = pairs.double().div_(255)
        means.append(frames.mean((1, 2)).flatten(1).cpu().numpy())
        changes.append((frames[:, :, 1] - frames[:, :, 0]).abs().mean(1).flatten(1).cpu().numpy())
    return np.concatenate(means), np.concatenate(changes)


def _directions(dataset: Dataset, clips: Ints, runtime: Runtime) -> Floats:
    """Histograms of the directions of the flow of each clip's pairs: (clips, bins), ``direction_histograms``'."""
    found = []
    with ThreadPoolExecutor(runtime.threads, "flow") as pool:
        for pairs in _pairs(dataset, clips, FLOW_SIZE, runtime):
            flow = dis_flow(pairs.flatten(0, 1).cpu().numpy(), pool=pool)
            maps = torch.from_numpy(flow[:, 0]).unflatten(0, pairs.shape[:2])
            found.append(direction_histograms(maps).numpy())
    return np.concatenate(found)


def _pairs(dataset: Dataset, clips: Ints, size: int, runtime: Runtime) -> Iterator[Tensor]:
    """Each clip's pairs of frames, in batches of clips: uint8 (n, PAIRS, 2, size, size, 3)."""
    parts = np.split(clips, range(BATCH, len(clips), BATCH))
    batches = decoded(
        dataset.index,
        (_plan(dataset.index, part) for part in parts),
        clip=Clip(size=size),
        batch_size=min(BATCH, len(clips)),
        runtime=runtime,
        num_frames=2 * PAIRS,
    )
    for batch in batches:
        yield batch.rgb.unflatten(1, (PAIRS, 2))


def _plan(index: ClipIndex, clips: Ints) -> ClipPlan:
    last = index.num_frames[clips].astype(np.int64)[:, None] - 1
    place = (np.arange(PAIRS) + 0.5) / PAIRS
    first = np.floor(np.maximum(last - 1, 0) * place).astype(np.int64)
    frames = np.stack([first, np.minimum(first + 1, last)], axis=2).reshape(len(clips), -1)
    return central_plan(clips, frames)


def ridge(x: Floats, labels: Ints, groups: Ints, test: Floats, seed: int) -> Ints:
    """Ridge regression, its strength chosen on held-out groups."""
    alpha = choose_strength(
        ridge_predict,
        x,
        labels,
        groups,
        strengths=ALPHAS,
        parts=HOLDOUT_PARTS,
        turns=HOLDOUT_PARTS,
        seed=seed,
    )
    return np.asarray(ridge_predict(x, labels, test, [alpha])[0], np.int64)


def neighbours(x: Floats, labels: Ints, groups: Ints, test: Floats, seed: int) -> Ints:
    """The commonest class of the nearest by standardised features; of equals, the first class."""
    nearest = KNeighborsClassifier(min(NEIGHBOURS, len(x)), algorithm="brute")
    classes: Ints = make_pipeline(StandardScaler(), nearest).fit(x, labels).predict(test)
    return classes
