"""Features of the clips that judge a loss: what fitness clusters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from engine.data.pipeline import InputPipeline
from engine.data.plan import plan_views
from engine.data.shards import ClipIndex
from engine.data.views import ViewMaker
from engine.model.resnet3d import ResNet3D
from engine.recipe import Recipe
from engine.runtime import Runtime

BANK_BYTES = 256 * 2**20
"""Judged frames up to this size stay decoded between members."""
UNLABELLED_CLIPS = 2000
"""Most clips that judge where none has a label and ``fitness.max_clips`` does not say so."""
CHOICE_STREAM = 0xC405
"""Keeps the draw of judged clips apart from other draws of the same seed."""


class LabelledClips:
    """The clips of a data set that judge, decoded for evaluation: central crops, views spread over time.

    Those with labels; where no label decides (``fitness.metric = "zipf"``) and there are not two classes, all clips.
    Of more than ``fitness.max_clips`` a subset, which depends on the recipe's seed and the number of clips alone.
    """

    labels: NDArray[np.int64] | None
    """(clips,) classes numbered from 0; None without labels."""
    num_classes: int
    """0 without labels."""

    def __init__(self, index: ClipIndex, recipe: Recipe, *, runtime: Runtime) -> None:
        """Raises ValueError where classes or labels are missing, or there are not more clips than clusters."""
        self.clips, self.labels = _choose(index, recipe)
        self.num_classes = 0 if self.labels is None else int(self.labels.max()) + 1
        clusters = recipe.fitness.clusters_for(self.num_classes)
        if len(self.clips) <= max(clusters, self.num_classes):
            kind, what = (
                ("labelled clips", "classes") if self.num_classes else ("clips", "clusters")
            )
            raise ValueError(
                f"{len(self.clips)} {kind} for {max(clusters, self.num_classes)} {what}: "
                f"fitness needs more clips than {what}"
            )
        # Batch statistics must not tell classes apart by the order in which folders were read.
        self._order = np.random.Generator(np.random.Philox(key=[0, 0xFEA7])).permutation(
            len(self.clips)
        )
        self.index, self.recipe, self.runtime = index, recipe, runtime
        self._views = ViewMaker(recipe.clip, recipe.audio).to(runtime.device)
        clip, views = recipe.clip, recipe.fitness.views_per_clip
        size = len(self.clips) * views * clip.num_frames * clip.size**2 * 3
        self._bank: list[Tensor] | None = [] if size <= BANK_BYTES else None

    @torch.no_grad()
    def features(self, networks: Sequence[ResNet3D]) -> list[Tensor]:
        """Pooled features of each network, float32 (clips, D) in the order of ``clips``, from one decode.

        They stay on the device.

        A clip's features are the mean over its views. Batch norm uses each batch's own statistics or the
        running ones, as the recipe says; either way nothing in the networks changes.
        """
        num_views = self.recipe.fitness.views_per_clip
        device = self.runtime.device
        sums = [
            torch.zeros(len(self.clips), network.feature_dim, device=device) for network in networks
        ]
        done = 0
        with _evaluating(networks, batch_norm=self.recipe.fitness.batch_norm):
            for frames in self._batches():
                rgb = self._views.rgb_only(frames)
                here = self._order[np.arange(done, done + len(frames)) % len(self.clips)]
                rows = torch.from_numpy(here).to(device)
                pooled = self.runtime.map(partial(self._pooled, rgb=rgb), networks)
                for total, features in zip(sums, pooled, strict=True):
                    total[rows] += features / num_views
                done += len(frames)
        return sums

    @torch.no_grad()
    def _pooled(self, network: ResNet3D, *, rgb: Tensor) -> Tensor:
        with torch.autocast(self.runtime.device.type, torch.bfloat16, self.runtime.amp):
            features: Tensor = network(rgb)
        return features.float()

    def _batches(self) -> Iterator[Tensor]:
        """uint8 (n, T, H, W, 3): all clips at view 0, then all at view 1, and so on; no batch spans views."""
        if self._bank:
            yield from self._bank
            return
        clip, fitness = self.recipe.clip, self.recipe.fitness
        size = balanced(len(self.clips), fitness.batch_size)
        pipeline = InputPipeline(
            self.index,
            clip,
            audio=self.recipe.audio,
            device=self.runtime.device,
            batch_size=max(size),
            num_frames=clip.num_frames,
            threads=self.runtime.threads,
            flow=False,
            sound=False,
        )
        ordered = self.clips[self._order]
        parts = np.split(ordered, np.cumsum(size)[:-1])
        plans = (
            plan_views(self.index, clip, clips=part, view=view, num_views=fitness.views_per_clip)
            for view in range(fitness.views_per_clip)
            for part in parts
        )
        kept: list[Tensor] = []
        for batch in pipeline.batches(plans):
            if self._bank is not None:
                kept.append(batch.rgb)
            yield batch.rgb
        if self._bank is not None:
            self._bank = kept


def _choose(index: ClipIndex, recipe: Recipe) -> tuple[NDArray[np.int64], NDArray[np.int64] | None]:
    """Which clips judge, rising, and their classes numbered from 0."""
    (clips,) = np.nonzero(index.label >= 0)
    known = len(np.unique(index.label[clips]))
    blind = not recipe.fitness.uses_labels and known < 2
    if not blind and known == 0:
        raise ValueError(
            "no labelled clips: labels come from class folders, VIDEOS/CLASS/clip.mp4; "
            "put each class's videos into a folder of its own"
        )
    if not blind and known < 2:
        raise ValueError(
            "the labelled clips are all of one class; fitness needs two classes or more"
        )
    if blind:
        clips = np.arange(len(index.label))
    most = recipe.fitness.max_clips or (UNLABELLED_CLIPS if blind else len(clips))
    if len(clips) > most:
        rng = np.random.Generator(np.random.Philox(key=[recipe.seed, CHOICE_STREAM]))
        clips = np.sort(rng.permutation(clips)[:most])
    if blind:
        return clips, None
    labels = np.unique(index.label[clips], return_inverse=True)[1]
    if labels.max() < 1:
        raise ValueError(f"the {most} clips of fitness.max_clips are all of one class: raise it")
    return clips, labels


def balanced(count: int, largest: int) -> list[int]:
    """Split ``count`` into the fewest batches of at most ``largest``, sizes equal within one.

    A small last batch would have unlike batch statistics.
    """
    batches = -(-count // largest)
    return [count // batches + (i < count % batches) for i in range(batches)]


@contextmanager
def _evaluating(networks: Sequence[nn.Module], *, batch_norm: str) -> Iterator[None]:
    """Put networks into evaluation, batch norm on batch or running statistics, and back."""
    before = [(module, module.training) for network in networks for module in network.modules()]
    tracked = []
    for module, _ in before:
        module.training = False
        if batch_norm == "batch" and isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.training = True
            tracked.append(
                (module, module.track_running_stats, module.running_mean, module.running_var)
            )
            module.track_running_stats, module.running_mean, module.running_var = False, None, None
    try:
        yield
    finally:
        for module, tracks, mean, var in tracked:
            module.track_running_stats, module.running_mean, module.running_var = tracks, mean, var
        for module, training in before:
            module.training = training
