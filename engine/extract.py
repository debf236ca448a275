"""What networks make of a data set's clips, view by view: decoded once for all of them, ahead of them.

Shape letters: N clips, V views (in time x crops), D outputs of a network.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import kernels
from engine.data.pipeline import InputPipeline
from engine.data.plan import ClipPlan, plan_views
from engine.data.shards import ClipIndex
from engine.features import _evaluating, balanced
from engine.network_file import Card, ClipInput
from engine.recipe import Audio, Clip
from engine.runtime import Runtime

BANK_BYTES = 512 * 2**20
"""Decoded views up to this size stay in memory between networks."""
CROPS = {1: (float("nan"),), 3: (float("nan"), 0.0, 1.0)}
"""Where the squares of a view lie along the frame's longer side; nan: in the middle."""
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
        rng = np.random.Generator(np.random.Philox(key=[0, 0xFEA7]))
        self._order = rng.permutation(len(clips))
        self._sizes = balanced(len(clips), cuts.batch_size)

    @torch.no_grad()
    def outputs(
        self,
        networks: Sequence[nn.Module],
        cards: Sequence[Card],
        *,
        batch_norm: str = "running",
        on_progress: Report | None = None,
    ) -> list[Tensor]:
        """Each network's output for every view of every clip: float32 (N, V, D), on the CPU, in the clips' order.

        Clips are normalised by each card's mean and std. Batch norm uses the ``running`` statistics, or each
        ``batch``'s own; nothing in the networks changes. Networks run side by side on a CPU.
        """
        device, found, done = self.runtime.device, list[Tensor](), 0
        total = len(self.clips) * self.cuts.count
        together = list(zip(networks, cards, strict=True))
        with _evaluating(networks, batch_norm=batch_norm):
            for view, part, frames in self._batches():
                clips = {(card.mean, card.std): normalised(frames, card, device) for card in cards}
                made = self._map(partial(self._output, clips=clips), together)
                if not found:
                    shape = (len(self.clips), self.cuts.count)
                    found = [torch.empty(*shape, out.shape[1], device=device) for out in made]
                rows = torch.from_numpy(self._order[part]).to(device)
                for whole, out in zip(found, made, strict=True):
                    whole[rows, view] = out
                done += len(part)
                if on_progress is not None:
                    on_progress("taking features", done, total)
        check_undamaged(self.index)
        return [each.cpu() for each in found]

    def _map(self, function: Callable[[Any], Tensor], items: Sequence[Any]) -> list[Tensor]:
        return [function(items[0])] if len(items) == 1 else self.runtime.map(function, items)

    @torch.no_grad()
    def _output(self, pair: tuple[nn.Module, Card], *, clips: dict[Any, Tensor]) -> Tensor:
        network, card = pair
        with torch.autocast(self.runtime.device.type, torch.bfloat16, self.runtime.amp):
            out: Tensor = network(clips[card.mean, card.std])
        return out.float()

    def _batches(self) -> Iterator[tuple[int, NDArray[np.int64], Tensor]]:
        """(view, places in the shuffled order, uint8 (n, T, H, W, 3)): all clips at one view, then at the next."""
        ends = np.cumsum(self._sizes)
        parts = [np.arange(end - size, end) for end, size in zip(ends, self._sizes, strict=True)]
        places = [(view, part) for view in range(self.cuts.count) for part in parts]
        kept = None if self._bank is None else self._bank.get(self._key)
        if kept is not None:
            for (view, part), frames in zip(places, kept, strict=True):
                yield view, part, frames
            return
        kept = []
        decoded = self.frames(
            self._plan(view, self.clips[self._order[part]]) for view, part in places
        )
        for (view, part), frames in zip(places, decoded, strict=True):
            if self._bank is not None:
                kept.append(frames)
            yield view, part, frames
        if self._bank is not None:
            self._bank.clear()  # one set of clips at a time
            self._bank[self._key] = kept

    def frames(self, plans: Iterator[ClipPlan]) -> Iterator[Tensor]:
        """Frames of planned batches, decoded ahead."""
        pipeline = InputPipeline(
            self.index,
            clip_of(self.cuts.clip),
            audio=Audio(),
            device=self.runtime.device,
            batch_size=max(self._sizes),
            num_frames=self.cuts.clip.num_frames,
            threads=self.runtime.threads,
            flow=False,
            sound=False,
        )
        for batch in pipeline.batches(plans):
            yield batch.rgb

    def _plan(self, number: int, clips: NDArray[np.int64]) -> ClipPlan:
        view, crop = divmod(number, self.cuts.crops)
        plan = plan_views(
            self.index, clip_of(self.cuts.clip), clips=clips, view=view, num_views=self.cuts.views
        )
        place = CROPS[self.cuts.crops][crop]
        # the largest square has room along the longer side alone
        box = [np.nan] * 4 if np.isnan(place) else [place, place, 1.0, 1.0]
        return replace(plan, box=np.tile(np.array(box, np.float32), (len(clips), 1)))


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
