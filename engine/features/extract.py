"""Outputs of networks for a data set's clips, which are decoded once for all of them, view by view.

Shape letters: N clips, V views (in time x crops), D outputs of a network.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, reduce
from typing import Any

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import kernels
from engine.core.recipe import Audio, Clip, Recipe
from engine.core.runtime import Runtime
from engine.data.library import Report
from engine.data.pipeline import ClipBatch, InputPipeline
from engine.data.plan import ClipPlan, plan_views
from engine.data.shards.index import ClipIndex
from engine.features.fitness import FitnessResult, cohort_fitness
from engine.model.network_file import Card, ClipInput, card_of
from engine.model.resnet3d import video_network

BANK_BYTES = 256 * 2**20
"""Decoded views up to this size stay in memory between networks."""
CROPS = {1: (float("nan"),), 3: (float("nan"), 0.0, 1.0)}
"""Places of a view's squares along the frame's longer side; nan: in the middle."""
STATISTICS_CLIPS = 256
"""Most training clips that the mean and scale of a network's features are taken over, evenly spread."""
UNLABELLED_CLIPS = 2000
"""Most clips that judge where none has a label and ``fitness.max_clips`` does not say so."""
CHOICE_STREAM, ORDER_STREAM = 0xC405, 0xFEA7
"""Keep the draw of judged clips, and the order that they are taken in, apart from other draws of the same seed."""


@dataclass(frozen=True)
class Cuts:
    """The views to take of each clip, and the clips of a batch."""

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

    ``bank`` keeps decoded views between calls, for extractors of the same clips and cuts; None keeps nothing.
    """

    def __init__(
        self,
        index: ClipIndex,
        clips: NDArray[np.int64],
        *,
        cuts: Cuts,
        runtime: Runtime,
        bank: dict[Any, Any] | None = None,
    ) -> None:
        self.index, self.clips, self.cuts, self.runtime = index, clips, cuts, runtime
        size = len(clips) * cuts.count * cuts.clip.num_frames * cuts.clip.size**2 * 3
        self._bank = bank if size <= BANK_BYTES else None
        self._key = (cuts, clips.tobytes(), str(runtime.device))
        # Batch statistics must not tell classes apart by the order in which folders were read.
        rng = np.random.Generator(np.random.Philox(key=[0, ORDER_STREAM]))
        self._order = rng.permutation(len(clips))

    def outputs(
        self,
        networks: Sequence[nn.Module],
        cards: Sequence[Card],
        *,
        batch_norm: str = "running",
        on_progress: Report | None = None,
    ) -> list[Tensor]:
        """Each network's output for every view of every clip: float32 (N, V, D) on the device, in the clips' order.

        Clips are normalised by each card's mean and std. Batch norm
        uses the ``running`` statistics, or each ``batch``'s own; nothing in the networks changes. Networks run side
        by side on a CPU.
        """
        outputs: list[list[Tensor]] = [[] for _ in networks]
        done, total = 0, len(self.clips) * self.cuts.count
        # Sums over a batch depend on how many threads share them: then each network has one.
        alone = len(networks) == 1 and batch_norm == "running"
        with _evaluating(networks, batch_norm=batch_norm):
            for frames in self._batches():
                rows = forward(networks, cards, frames, runtime=self.runtime, all_cores=alone)
                for batches_of, output in zip(outputs, rows, strict=True):
                    batches_of.append(output)
                done += len(frames)
                if on_progress is not None:
                    on_progress("taking features", done, total)
        shape = (self.cuts.count, len(self.clips), -1)
        back = torch.from_numpy(np.argsort(self._order)).to(self.runtime.device)
        wholes = []
        for batches_of in outputs:
            whole = torch.cat(batches_of).view(shape)[:, back]
            batches_of.clear()  # a data set's outputs may be large
            wholes.append(whole.transpose(0, 1).contiguous())
        return wholes

    def _batches(self) -> Iterator[Tensor]:
        """uint8 (n, T, H, W, 3): all clips in the shuffled order at one view, then at the next."""
        if self._bank is not None and self._key in self._bank:
            yield from self._bank[self._key]
            return
        parts = batches(len(self.clips), self.cuts.batch_size)
        plans = (
            self._plan(view, self.clips[self._order[part]])
            for view in range(self.cuts.count)
            for part in parts
        )
        kept: list[Tensor] = []
        how: dict[str, Any] = {"clip": clip_of(self.cuts.clip), "runtime": self.runtime}
        for batch in decoded(self.index, plans, batch_size=max(map(len, parts)), **how):
            if self._bank is not None:
                kept.append(batch.rgb)
            yield batch.rgb
        if self._bank is not None:
            self._bank.clear()  # one set of clips at a time
            self._bank[self._key] = kept

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
        most = max(clusters, self.num_classes)
        if len(self.clips) <= most:
            kind, what = ("labelled ", "classes") if self.num_classes else ("", "clusters")
            raise ValueError(
                f"{len(self.clips)} {kind}clips for {most} {what}: fitness needs more clips than {what}"
            )
        self._card, self._fitness, self._runtime = card_of(recipe), recipe.fitness, runtime
        f = recipe.fitness
        cuts = Cuts(self._card.input, f.views_per_clip, batch_size=f.batch_size)
        self._extractor = Extractor(index, self.clips, cuts=cuts, runtime=runtime, bank={})

    def features(self, networks: Sequence[nn.Module]) -> list[Tensor]:
        """Pooled features of each network, float32 (clips, D) in the order of ``clips``, from one decode.

        They stay on the device. A clip's features are the mean over its views. Batch norm uses each batch's own
        statistics or the running ones, as the recipe says; either way nothing in the networks changes.
        """
        cards = [self._card] * len(networks)
        views = self._extractor.outputs(networks, cards, batch_norm=self._fitness.batch_norm)
        return [reduce(torch.add, (each / each.shape[1]).unbind(1)) for each in views]

    def fitness(self, networks: Sequence[nn.Module], *, seed: int) -> list[FitnessResult | str]:
        """Each network's fitness, or why it has none, as ``cohort_fitness``."""
        return self.judged(self.features(networks), seed=seed)

    def judged(self, features: Sequence[Tensor], *, seed: int) -> list[FitnessResult | str]:
        """The fitness of features (clips, D) in the order of ``clips``, or why there is none."""
        return cohort_fitness(
            features,
            self.labels,
            settings=self._fitness,
            num_classes=self.num_classes,
            seed=seed,
            device=self._runtime.device.type,
        )


def with_statistics(
    card: Card, state: Mapping[str, Tensor], index: ClipIndex, *, runtime: Runtime
) -> Card:
    """A network's card with the mean and scale of its features over clips of ``index``, its training clips.

    ``state`` has the network's weights. The card is unchanged where features are not finite.
    """
    with torch.device("meta"):  # no weights are drawn
        network = video_network(card)
    network.load_state_dict(state, assign=True)
    network.to(device=runtime.device, memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    count = min(STATISTICS_CLIPS, len(index))
    clips = np.linspace(0, len(index) - 1, count).round().astype(np.int64)
    extractor = Extractor(index, clips, cuts=Cuts(card.input, 1), runtime=runtime)
    (views,) = extractor.outputs([network], [card])
    features = views[:, 0].double()
    mean, scale = features.mean(0), features.std(0, correction=0)
    if not bool(features.isfinite().all()):
        return card
    facts = {"feature_mean": mean, "feature_scale": scale}
    return msgspec.structs.replace(card, **{k: tuple(v.float().tolist()) for k, v in facts.items()})


def decoded(
    index: ClipIndex,
    plans: Iterable[ClipPlan],
    *,
    clip: Clip,
    batch_size: int,
    runtime: Runtime,
    num_frames: int | None = None,
    warn: Callable[[str], object] = warnings.warn,
) -> Iterator[ClipBatch]:
    """Planned batches without sound and flow, decoded in advance; ``num_frames``: T, by default the clip's."""
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
    yield from pipeline.batches(plans)


@torch.no_grad()
def forward(
    networks: Sequence[nn.Module],
    cards: Sequence[Card],
    frames: Tensor,
    *,
    runtime: Runtime,
    all_cores: bool = False,
) -> list[Tensor]:
    """Each network's output for uint8 (n, T, H, W, 3), by its card's statistics: float32 (n, D) on the device.

    On a CPU each network has a core of its own, unless ``all_cores``, which takes them in turn, on all of them.
    """
    each = {(card.mean, card.std): card for card in cards}
    clips = {key: normalised(frames, card, runtime.device) for key, card in each.items()}

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
    """The clips that judge, rising, and their classes numbered from 0."""
    clips = np.flatnonzero(index.label >= 0)
    known = len(np.unique(index.label[clips]))
    blind = not recipe.fitness.uses_labels and known < 2
    if blind:
        clips = np.arange(len(index.label))
    elif known == 0:
        raise ValueError(
            "no labelled clips: labels come from class folders, VIDEOS/CLASS/clip.mp4; "
            "put each class's videos into a folder of its own"
        )
    elif known == 1:
        raise ValueError(
            "the labelled clips are all of one class; fitness needs two classes or more"
        )
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


def batches(count: int, largest: int) -> list[NDArray[np.int64]]:
    """Split the places of ``count`` clips into the fewest batches of at most ``largest``, sizes equal within one.

    A small last batch would have unlike batch statistics.
    """
    return np.array_split(np.arange(count), -(-count // largest))


def check_undamaged(index: ClipIndex) -> None:
    """Raise ValueError where a damaged clip's place was taken by another, which might be of another part."""
    if index.substituted:
        raise ValueError(
            f"{len(index.substituted)} labelled clips were found damaged while reading, such as"
            f" {index.facts(min(index.substituted))['source']}: delete {index.folders[0]}, which is made again"
        )


def normalised(frames: Tensor, card: Card, device: torch.device) -> Tensor:
    """uint8 (n, T, H, W, 3) to (n, 3, T, H, W) by the card's statistics, channels-last."""
    mean, std = (_constant(values, device) for values in (card.mean, card.std))
    return kernels.clip_views(frames.to(device), mean, std)[0]


@cache
def _constant(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Made once: the host waits for a GPU at each."""
    return torch.tensor(values, device=device)


def clip_of(shape: ClipInput) -> Clip:
    """The recipe's section for a network's input, of T frames alone."""
    return without_future(
        Clip(num_frames=shape.num_frames, frame_stride=shape.frame_stride, size=shape.size)
    )


def without_future(clip: Clip) -> Clip:
    """The same clip of T frames alone; recipes can't ask for it, since a loss needs what comes next."""
    return msgspec.structs.replace(clip, num_future_frames=0)
