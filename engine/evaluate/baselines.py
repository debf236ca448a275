"""What a number is worth: how far trivial looks at the same videos go, on the same folds.

Ridge regression on the mean 16x16 frame, and on the mean absolute difference of neighbouring frames; the five nearest
neighbours by facts of the files alone (frames, width, height, sound). A representation is interesting above these.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from engine.core.recipe import Clip
from engine.core.runtime import Runtime, one_thread
from engine.data.plan import ClipPlan, central_plan
from engine.data.shards.index import ClipIndex
from engine.evaluate.datasets import Dataset
from engine.evaluate.linear import (
    Floats,
    Ints,
    choose_strength,
    neighbours_predict,
    ridge_predict,
)
from engine.evaluate.protocols import used_clips, videos_of
from engine.evaluate.scores import Spread
from engine.features.extract import Report, decoded

SIZE = 16
PAIRS = 16
"""Pairs of neighbouring frames, evenly spread over a clip."""
ALPHAS = (100.0, 10.0, 1.0, 1e-1, 1e-2, 1e-3)
"""Ridge's strengths, to choose from on held-out train groups; of equals, the largest."""
HOLDOUT_PARTS = 4
NEIGHBOURS = 5
BATCH = 32


def baselines(
    dataset: Dataset, *, runtime: Runtime, seed: int = 0, on_progress: Report | None = None
) -> dict[str, Spread]:
    """Accuracy of each baseline over the folds, in [0, 1]."""
    clips = used_clips(dataset)
    mean, change = _pictures(dataset, clips, runtime)
    index = dataset.index
    facts = np.stack([index.num_frames, index.width, index.height, index.has_audio], axis=1)[clips]
    looks: dict[str, tuple[Floats, Callable[..., Ints]]] = {
        "ridge on the mean 16x16 frame": (mean, _ridge),
        "ridge on mean absolute frame differences": (change, _ridge),
        "5 nearest neighbours by file facts": (facts.astype(np.float64), _neighbours),
    }
    found, done, total = {}, 0, len(looks) * len(dataset.folds)
    for name, (values, predict) in looks.items():
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
        found[name] = Spread.of(shares)
    return found


def _pictures(dataset: Dataset, clips: Ints, runtime: Runtime) -> tuple[Floats, Floats]:
    """Mean frame and mean absolute difference of each clip's pairs: (clips, 3 SIZE^2) each, of values in [0, 1]."""
    parts = np.split(clips, range(BATCH, len(clips), BATCH))
    batches = decoded(
        dataset.index,
        (_plan(dataset.index, part) for part in parts),
        clip=Clip(size=SIZE),
        batch_size=min(BATCH, len(clips)),
        runtime=runtime,
        num_frames=2 * PAIRS,
    )
    means, changes = [], []
    for batch in batches:
        frames = batch.double().div_(255).unflatten(1, (PAIRS, 2))
        means.append(frames.mean((1, 2)).flatten(1).cpu().numpy())
        changes.append((frames[:, :, 1] - frames[:, :, 0]).abs().mean(1).flatten(1).cpu().numpy())
    return np.concatenate(means), np.concatenate(changes)


def _plan(index: ClipIndex, clips: Ints) -> ClipPlan:
    last = index.num_frames[clips].astype(np.int64)[:, None] - 1
    place = (np.arange(PAIRS) + 0.5) / PAIRS
    first = np.floor(np.maximum(last - 1, 0) * place).astype(np.int64)
    frames = np.stack([first, np.minimum(first + 1, last)], axis=2).reshape(len(clips), -1)
    return central_plan(clips, frames)


def _ridge(x: Floats, labels: Ints, groups: Ints, test: Floats, seed: int) -> Ints:
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


def _neighbours(x: Floats, labels: Ints, groups: Ints, test: Floats, seed: int) -> Ints:
    return neighbours_predict(x, labels, test, neighbours=NEIGHBOURS)
