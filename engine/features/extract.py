"""What networks make of a data set's clips: decoded once for all of them, ahead of them, view by view.

Shape letters: N clips, V views (in time x crops), D outputs of a network.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial, reduce
from typing import Any

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import kernels
from engine.core.recipe import Audio, Clip, Recipe
from engine.core.runtime import Runtime
from engine.data.pipeline import InputPipeline
from engine.data.plan import ClipPlan, plan_views
from engine.data.shards.index import ClipIndex
from engine.model.network_file import Card, ClipInput, card_of

BANK_BYTES = 256 * 2**20
"""Decoded views up to this size stay in memory between networks."""
CROPS = {1: (float("nan"),), 3: (float("nan"), 0.0, 1.0)}
"""Where the squares of a view lie along the frame's longer side; nan: in the middle."""
UNLABELLED_CLIPS = 2000
"""Most clips that judge where none has a label and ``fitness.max_clips`` does not say so."""
CHOICE_STREAM, ORDER_STREAM = 0xC405, 0xFEA7
"""Keep the draw of judged clips, and the order that they are taken in, apart from other draws of the same seed."""
Report = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Cuts:
    """Which views of clips are taken, and how many at a time."""

    clip: ClipInput
    views: int
    """In time, evenly spread over a clip."""
    crops: int = 1
    batch_size: int = 32

    @property
    def count(self) -> int:
        """V."""
        return self.views * self.crops

    def __str__(self) -> str:
        squares = "" if self.crops == 1 else f" x {self.crops} crops"
        c = self.clip
        one = f"{c.num_frames}x{c.size}x{c.size} stride {c.frame_stride}"
        return f"{self.views} view{'s'[: self.views > 1]}{squares} of {one}"


class Extractor:
    """Decodes the chosen views of some clips of a data set, and runs networks on them.

    ``bank`` keeps decoded views between calls, for extractors of the same clips and cuts; None keeps nothing. Where a
    damaged clip's place was taken by another, a ``strict`` one raises ValueError.
    """

    def __init__(
        self,
        index: ClipIndex,
        clips: NDArray[np.int64],
        *,
        cuts: Cuts,
        runtime: Runtime,
        bank: dict[Any, Any] | None = None,
        strict: bool = True,
    ) -> None:
        self.index, self.clips, self.cuts, self.runtime = index, clips, cuts, runtime
        self._strict = strict
        size = len(clips) * cuts.count * cuts.clip.num_frames * cuts.clip.size**2 * 3
        self._bank = bank if size <= BANK_BYTES else None
        self._key = (cuts, clips.tobytes(), str(runtime.device))
        # Batch statistics must not tell classes apart by the order in which folders were read.
        rng = np.random.Generator(np.random.Philox(key=[0, ORDER_STREAM]))
        self._order = rng.permutation(len(clips))
        self._sizes = balanced(len(clips), cuts.batch_size)

    def outputs(
        self,
        networks: Sequence[nn.Module],
        cards: Sequence[Card],
        *,
        batch_norm: str = "running",
        on_progress: Report | None = None,
        to_host: bool = True,
    ) -> list[Tensor]:
        """Each network's output for every view of every clip: float32 (N, V, D), in the clips' order.

        On the CPU, or unless ``to_host`` on the device. Clips are normalised by each card's mean and std. Batch norm
        uses the ``running`` statistics, or each ``batch``'s own; nothing in the networks changes. Networks run side
        by side on a CPU.
        """
        device, wholes, done = self.runtime.device, list[Tensor](), 0
        total = len(self.clips) * self.cuts.count
        # Sums over a batch depend on how many threads share them: then each network has one.
        alone = len(networks) == 1 and batch_norm == "running"
        with _evaluating(networks, batch_norm=batch_norm):
            for view, part, frames in self._batches():
                made = forward(networks, cards, frames, runtime=self.runtime, all_cores=alone)
                if not wholes:
                    shape = (len(self.clips), self.cuts.count)
                    wholes = [torch.empty(*shape, out.shape[1], device=device) for out in made]
                rows = torch.from_numpy(self._order[part]).to(device)
                for whole, out in zip(wholes, made, strict=True):
                    whole[rows, view] = out
                done += len(part)
                if on_progress is not None:
                    on_progress("taking features", done, total)
        if self._strict:
            check_undamaged(self.index)
        return [whole.cpu() for whole in wholes] if to_host else wholes

    def _batches(self) -> Iterator[tuple[int, NDArray[np.int64], Tensor]]:
        """(view, places in the shuffled order, uint8 (n, T, H, W, 3)): all clips at one view, then at the next."""
        ends = np.cumsum(self._sizes)
        parts = [np.arange(end - size, end) for end, size in zip(ends, self._sizes, strict=True)]
        places = [(view, part) for view in range(self.cuts.count) for part in parts]
        kept = None if self._bank is None else self._bank.get(self._key)
        if kept is None:
            plans = (self._plan(view, self.clips[self._order[part]]) for view, part in places)
            decode = partial(decoded, batch_size=max(self._sizes), runtime=self.runtime)
            batches: Iterable[Tensor] = decode(self.index, plans, clip=clip_of(self.cuts.clip))
        else:
            batches = kept
        keeping: list[Tensor] = []
        for (view, part), frames in zip(places, batches, strict=True):
            if self._bank is not None:
                keeping.append(frames)
            yield view, part, frames
        if self._bank is not None and kept is None:
            self._bank.clear()  # one set of clips at a time
            self._bank[self._key] = keeping

    def _plan(self, number: int, clips: NDArray[np.int64]) -> ClipPlan:
        view, crop = divmod(number, self.cuts.crops)
        plan = plan_views(
            self.index, clip_of(self.cuts.clip), clips=clips, view=view, num_views=self.cuts.views
        )
        place = CROPS[self.cuts.crops][crop]
        # the largest square has room along the longer side alone
        box = [np.nan] * 4 if np.isnan(place) else [place, place, 1.0, 1.0]
        return replace(plan, box=np.tile(np.array(box, np.float32), (len(clips), 1)))


class LabelledClips:
    """The clips of a data set that judge a loss, decoded for evaluation: central crops, views spread over time.

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
        self._card, self._fitness = card_of(recipe), recipe.fitness
        cuts = Cuts(
            self._card.input,
            recipe.fitness.views_per_clip,
            batch_size=recipe.fitness.batch_size,
        )
        self._extractor = Extractor(
            index, self.clips, cuts=cuts, runtime=runtime, bank={}, strict=False
        )

    def features(self, networks: Sequence[nn.Module]) -> list[Tensor]:
        """Pooled features of each network, float32 (clips, D) in the order of ``clips``, from one decode.

        They stay on the device. A clip's features are the mean over its views. Batch norm uses each batch's own
        statistics or the running ones, as the recipe says; either way nothing in the networks changes.
        """
        views = self._extractor.outputs(
            networks,
            [self._card] * len(networks),
            batch_norm=self._fitness.batch_norm,
            to_host=False,
        )
        return [reduce(torch.add, (each / each.shape[1]).unbind(1)) for each in views]


def decoded(
    index: ClipIndex,
    plans: Iterable[ClipPlan],
    *,
    clip: Clip,
    batch_size: int,
    runtime: Runtime,
    num_frames: int | None = None,
    warn: Callable[[str], object] = warnings.warn,
) -> Iterator[Tensor]:
    """Frames of planned batches, uint8 (n, T, H, W, 3), decoded ahead; ``num_frames``: T, the clip's unless given."""
    pipeline = InputPipeline(
        index,
        clip,
        audio=Audio(),
        device=runtime.device,
        batch_size=batch_size,
        num_frames=num_frames or clip.num_frames,
        threads=runtime.threads,
        flow=False,
        sound=False,
        warn=warn,
    )
    for batch in pipeline.batches(plans):
        yield batch.rgb


@torch.no_grad()
def forward(
    networks: Sequence[nn.Module],
    cards: Sequence[Card],
    frames: Tensor,
    *,
    runtime: Runtime,
    all_cores: bool = False,
) -> list[Tensor]:
    """What each network makes of uint8 (n, T, H, W, 3), by its card's statistics: float32 (n, D) on the device.

    On a CPU each network has a core of its own, unless ``all_cores``, which takes them in turn, on all of them.
    """
    clips = {(card.mean, card.std): normalised(frames, card, runtime.device) for card in cards}

    @torch.no_grad()
    def one(pair: tuple[nn.Module, Card]) -> Tensor:
        network, card = pair
        with torch.autocast(runtime.device.type, torch.bfloat16, runtime.amp):
            out: Tensor = network(clips[card.mean, card.std])
        return out.float()

    pairs = list(zip(networks, cards, strict=True))
    return [one(pair) for pair in pairs] if all_cores else runtime.map(one, pairs)


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


def check_undamaged(index: ClipIndex) -> None:
    """Raise ValueError where a damaged clip's place was taken by another, which might be of another part."""
    if index.substituted:
        raise ValueError(
            f"{len(index.substituted)} labelled clips were found damaged while reading, such as"
            f" {index.facts(min(index.substituted))['source']}: delete {index.folders[0]}, which is made again"
        )


def normalised(frames: Tensor, card: Card, device: torch.device) -> Tensor:
    """uint8 (n, T, H, W, 3) to (n, 3, T, H, W) by the card's statistics, channels-last."""
    mean, std = (torch.tensor(values, device=device) for values in (card.mean, card.std))
    return kernels.clip_views(frames.to(device), mean, std)[0]


def clip_of(shape: ClipInput) -> Clip:
    """The recipe's section for a network's input, of T frames alone."""
    return without_future(
        Clip(num_frames=shape.num_frames, frame_stride=shape.frame_stride, size=shape.size)
    )


def without_future(clip: Clip) -> Clip:
    """The same clip of T frames alone; recipes can't ask for it, since a loss needs what comes next."""
    return msgspec.structs.replace(clip, num_future_frames=0)
