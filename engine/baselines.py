"""What a number is worth: how far trivial looks at the same videos go, on the same folds.

Ridge regression on the mean 16x16 frame, and on the mean absolute difference of neighbouring frames; the five nearest
neighbours by facts of the files alone (frames, width, height, sound). A representation is interesting above these.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from engine.data.pipeline import InputPipeline
from engine.data.plan import ClipPlan
from engine.datasets import Dataset, Fold
from engine.linear import deal_groups
from engine.protocols import Videos, used_clips, videos_of
from engine.recipe import Audio, Clip
from engine.runtime import Runtime
from engine.scores import Spread

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

SIZE = 16
PAIRS = 16
"""Pairs of neighbouring frames, evenly spread over a clip."""
ALPHAS = (1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)
"""Ridge's strengths, to choose from on held-out train groups."""
HOLDOUT_PARTS = 4
NEIGHBOURS = 5
BATCH = 32


def baselines(dataset: Dataset, *, runtime: Runtime, seed: int = 0) -> dict[str, Spread]:
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
    found = {}
    for name, (values, predict) in looks.items():
        videos = videos_of(dataset, torch.from_numpy(values)[:, None])
        shares = [_accuracy(videos, fold, predict, seed) for fold in dataset.folds]
        found[name] = Spread.of(shares)
    return found


def _accuracy(videos: Videos, fold: Fold, predict: Callable[..., Ints], seed: int) -> float:
    train, test = videos.of(fold.train), videos.of(fold.test)
    x = videos.features.numpy()
    labels, groups = videos.label[train], videos.group[train]
    return float((predict(x[train], labels, groups, x[test], seed) == videos.label[test]).mean())


def _pictures(dataset: Dataset, clips: Ints, runtime: Runtime) -> tuple[Floats, Floats]:
    """Mean frame and mean absolute difference of each clip's pairs: (clips, 3 SIZE^2) each, of values in [0, 1]."""
    index = dataset.index
    pipeline = InputPipeline(
        index,
        Clip(size=SIZE),
        audio=Audio(),
        device=runtime.device,
        batch_size=min(BATCH, len(clips)),
        num_frames=2 * PAIRS,
        threads=runtime.threads,
        flow=False,
        sound=False,
    )
    parts = np.split(clips, range(BATCH, len(clips), BATCH))
    means, changes = [], []
    for batch in pipeline.batches(_plan(index, part) for part in parts):
        frames = batch.rgb.double().div_(255).unflatten(1, (PAIRS, 2))
        means.append(frames.mean((1, 2)).flatten(1).cpu().numpy())
        changes.append((frames[:, :, 1] - frames[:, :, 0]).abs().mean(1).flatten(1).cpu().numpy())
    return np.concatenate(means), np.concatenate(changes)


def _plan(index: Any, clips: Ints) -> ClipPlan:
    last = index.num_frames[clips].astype(np.int64)[:, None] - 1
    place = (np.arange(PAIRS) + 0.5) / PAIRS
    first = np.floor(np.maximum(last - 1, 0) * place).astype(np.int64)
    frames = np.stack([first, np.minimum(first + 1, last)], axis=2).reshape(len(clips), -1)
    n = len(clips)
    return ClipPlan(
        clip=clips,
        frames=frames,
        box=np.full((n, 4), np.nan, np.float32),
        flip=np.zeros(n, np.bool_),
        sound_start=np.zeros(n),
        shift=np.zeros(n),
        order=np.zeros((n, 2), np.int64),
    )


def _ridge(x: Floats, labels: Ints, groups: Ints, test: Floats, seed: int) -> Ints:
    """One-against-all ridge regression on -1 and 1, its strength chosen on held-out groups, the largest of equals."""
    part = deal_groups(groups, labels, parts=HOLDOUT_PARTS, seed=seed)
    right = np.zeros(len(ALPHAS))
    for held in range(int(part.max()) + 1):
        inside, outside = part != held, part == held
        if not inside.any():
            continue
        for i, alpha in enumerate(ALPHAS):
            guess = _ridge_scores(x[inside], labels[inside], x[outside], alpha).argmax(1)
            right[i] += (guess == labels[outside]).sum()
    best = len(ALPHAS) - 1 - int(right[::-1].argmax())
    return np.asarray(_ridge_scores(x, labels, test, ALPHAS[best]).argmax(1), np.int64)


def _ridge_scores(x: Floats, labels: Ints, test: Floats, alpha: float) -> Floats:
    """Scores (test, K), by the smaller of the two systems of equations (there are fewer videos than pixels)."""
    target = np.full((len(x), int(labels.max()) + 1), -1.0)
    target[np.arange(len(x)), labels] = 1.0
    centre, offset = x.mean(0), target.mean(0)
    z, y = x - centre, target - offset
    if len(z) < z.shape[1]:
        weight = z.T @ np.linalg.solve(z @ z.T + alpha * np.eye(len(z)), y)
    else:
        weight = np.linalg.solve(z.T @ z + alpha * np.eye(z.shape[1]), z.T @ y)
    scores: Floats = (test - centre) @ weight + offset
    return scores


def _neighbours(x: Floats, labels: Ints, groups: Ints, test: Floats, seed: int) -> Ints:
    """The commonest class of the nearest by standardised facts; of equals, the one with the nearest neighbour."""
    std = x.std(0)
    scale = np.where(std > 0, std, 1.0)
    guesses = []
    for row in test:
        away = np.square((x - row) / scale).sum(1)
        near = labels[np.argsort(away, kind="stable")[:NEIGHBOURS]]
        names, first, counts = np.unique(near, return_index=True, return_counts=True)
        guesses.append(names[np.lexsort((first, -counts))[0]])
    return np.array(guesses, np.int64)
