"""A few of a data set's clips, kept decoded: a batch of them costs a crop.

The bank holds, of each clip, every frame (uint8), the flow from every frame to the one a stride later (float16) and
the whole sound (16 bits), on the GPU where a quarter of its free memory suffices, else in the host's. Plans are those
of any data set, and start, crop, flip, order, sound and its shift are drawn as ever. What differs from the pipeline:

- a clip's crops come from one square of its frames, as large as they allow, at a place along the longer side that is
  drawn once a clip;
- frames are kept so large that the smallest crop has the clip's size, and so larger crops are scaled down twice;
- flow is that of the whole square, cropped, scaled and mirrored with the frames, and not that of the crop.

Which clips, and where their squares are, depends on the seed and the data set alone.

Shape letters: N clips, F frames, S side of the kept square, D side of a clip, R rows of frames decoded at once.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.core.prefetch import ahead
from engine.core.recipe import Audio, Clip
from engine.core.runtime import free_memory
from engine.data.pipeline import ClipBatch, InputPipeline
from engine.data.plan import ClipPlan
from engine.data.shards.index import ClipIndex

BANK_STREAM = 0xBA2C
"""Keeps the draw of the clips apart from other draws of the same seed."""
ROW_FRAMES = 16
"""Frames of a row that is decoded for the bank; one of them is the next row's first."""
ROWS = 16
"""Rows decoded at once."""
GPU_SHARE = 0.25
"""Of a GPU's free memory, what a bank may take."""
FULL_SCALE = 32768.0
"""What 16-bit samples are shares of."""
UNITS = {"K": 1, "M": 2, "G": 3, "T": 4}


class ClipBank:
    """Decodes its clips when it is made, and then gives batches of them; what planning needs to know is here too.

    A plan's clips are places in the bank; a batch's ``clip`` is the data set's own.
    """

    def __init__(
        self,
        index: ClipIndex,
        clip: Clip,
        *,
        audio: Audio,
        size: int | str,
        seed: int,
        device: torch.device,
        threads: int = 2,
        flow: bool = True,
        sound: bool = True,
    ) -> None:
        """``size``: how many clips, or the bytes that they may take, as "2GiB"; ``flow`` and ``sound``: whether they
        are kept. Raises ValueError where not one clip fits.
        """
        self.clip, self.audio, self.device = clip, audio, device
        self.side = _side(index, clip)
        rate = audio.sample_rate if sound else 0
        self.clips, cost = _chosen(
            index, size, seed=seed, each=_bytes(index, self.side, rate, flow)
        )
        self.num_frames, self.fps = index.num_frames[self.clips], index.fps
        self.shard, self.flow, self.sound = index.shard[self.clips], flow, sound
        self.samples = round(_frames(clip) * clip.frame_stride / index.fps * audio.sample_rate)
        on_gpu = device.type == "cuda" and cost <= GPU_SHARE * free_memory(device)
        home = device if on_gpu else torch.device("cpu")
        self._first = np.cumsum([0, *self.num_frames])
        total = int(self._first[-1])
        self._rgb = torch.zeros(total, 3, self.side, self.side, dtype=torch.uint8, device=home)
        shape = (total if flow else 0, 2, self.side, self.side)
        self._flow = torch.zeros(shape, dtype=torch.float16, device=home)
        # a window may end a stride after the last frame
        heard = np.ceil((self.num_frames + clip.frame_stride) / index.fps * rate).astype(np.int64)
        self._wave = [torch.zeros(int(n), dtype=torch.int16) for n in heard]
        self.has_audio = np.zeros(len(self.clips), np.bool_)
        self.places = _places(index, seed=seed)[self.clips]
        """(clips, 2): across and down, where in its frames a clip's square is, as a plan's box has it."""
        self._fill(index, threads)

    def __len__(self) -> int:
        return len(self.clips)

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return sum(t.nbytes for t in (self._rgb, self._flow, *self._wave))

    def batches(self, plans: Iterable[ClipPlan], *, flow: bool, sound: bool) -> Iterator[ClipBatch]:
        """Cut planned batches, one ahead of the reader; ``flow`` and ``sound`` say whether they carry them."""

        def cut() -> Iterator[ClipBatch]:
            if self.device.type == "cpu":
                torch.set_num_threads(1)  # of this thread; members have the other cores
            for plan in plans:
                yield self.load(plan, flow=flow, sound=sound)

        return ahead(cut(), depth=1, name="bank-cut")

    @torch.no_grad()
    def load(self, plan: ClipPlan, *, flow: bool, sound: bool) -> ClipBatch:
        """Cut one planned batch."""
        assert (flow <= self.flow) and (sound <= self.sound)
        last = self.num_frames[plan.clip][:, None] - 1
        next_one = np.minimum(plan.frames[:, :-1] + self.clip.frame_stride, last)
        assert (plan.frames[:, 1:] == next_one).all(), "flow is kept from each frame to the next"
        rows = torch.from_numpy(self._first[plan.clip][:, None] + plan.frames)
        across, down, share = self._cuts(plan)
        rgb = self._cropped(self._rgb, rows, across, down).round_().clamp_(0.0, 255.0)
        flows = None
        if flow:
            size = torch.from_numpy(self.clip.size / (share * self.side)).float()
            scale = torch.stack(
                [torch.where(torch.from_numpy(plan.flip), -size, size), size], dim=1
            )
            moved = self._cropped(self._flow, rows[:, :-1], across, down)
            flows = moved.mul_(scale[:, None, :, None, None].to(self.device))
            flows = flows.permute(0, 1, 3, 4, 2).contiguous()
        waves = self._waves(plan) if sound else (None, None)
        heard = self.has_audio[plan.clip] & sound
        return ClipBatch(
            rgb=rgb.to(torch.uint8).permute(0, 1, 3, 4, 2).contiguous(),
            flow=flows,
            wave=waves[0],
            wave_shifted=waves[1],
            has_audio=torch.from_numpy(heard).to(self.device),
            has_shift=torch.from_numpy(heard & (plan.shift != 0.0)).to(self.device),
            order=torch.from_numpy(plan.order).to(self.device),
            clip=self.clips[plan.clip],
        )

    def _cuts(self, plan: ClipPlan) -> tuple[Tensor, Tensor, NDArray[np.float64]]:
        """What brings a kept row, and a kept column, to a crop's: (N, D, S) each; and crops' sides in shares of S."""
        left, top, share, _ = np.nan_to_num(plan.box.astype(np.float64), nan=-1.0).T
        whole = share < 0
        share = np.where(whole, 1.0, share)
        left, top = (np.where(whole, 0.0, x * (1.0 - share)) for x in (left, top))
        size, side = self.clip.size, self.side
        across = triangles(left * side, share * side, size=size, side=side)
        down = triangles(top * side, share * side, size=size, side=side)
        across[plan.flip] = across[plan.flip, ::-1]
        return _float(across, self.device), _float(down, self.device), share

    def _cropped(self, kept: Tensor, rows: Tensor, across: Tensor, down: Tensor) -> Tensor:
        """float32 (N, F, channels, D, D) of the kept rows (N, F)."""
        n, f = rows.shape
        x = kept[rows.to(kept.device)].to(self.device).float()
        channels, side, size = x.shape[2], self.side, self.clip.size
        x = torch.bmm(x.reshape(n, f * channels * side, side), across.transpose(1, 2))
        x = x.view(n, f * channels, side, size).transpose(2, 3)
        x = torch.bmm(x.reshape(n, f * channels * size, side), down.transpose(1, 2))
        return x.view(n, f, channels, size, size).transpose(3, 4)

    def _waves(self, plan: ClipPlan) -> tuple[Tensor, Tensor]:
        """float32 (N, samples) of the sound that goes with each clip, and of its shifted window."""
        found = torch.zeros(2, len(plan), self.samples)
        rate = self.audio.sample_rate
        for row, begin in zip(
            found, (plan.sound_start, plan.sound_start + plan.shift), strict=True
        ):
            starts = np.round(begin * rate).astype(np.int64)
            for out, clip, start in zip(row, plan.clip, starts, strict=True):
                wave = self._wave[clip][max(start, 0) : start + self.samples]
                out[max(-start, 0) :][: len(wave)] = wave.float() / FULL_SCALE
        waves = found.to(self.device)
        return waves[0], waves[1]

    def _fill(self, index: ClipIndex, threads: int) -> None:
        """Decode all clips, in rows of frames a stride apart, so that the pipeline computes the flow between them."""
        pipeline = InputPipeline(
            index,
            msgspec.structs.replace(self.clip, size=self.side),
            audio=self.audio,
            device=self.device,
            batch_size=ROWS,
            num_frames=ROW_FRAMES,
            threads=threads,
            flow=self.flow,
            sound=self.sound,
        )
        rows = [
            (bank, start)
            for bank, n in enumerate(self.num_frames.tolist())
            for phase in range(min(self.clip.frame_stride, n))
            for start in range(phase, n, (ROW_FRAMES - 1) * self.clip.frame_stride)
        ]
        parts = [rows[i : i + ROWS] for i in range(0, len(rows), ROWS)]
        plans = (self._row_plan(part) for part in parts)
        for part, batch in zip(parts, pipeline.batches(plans), strict=True):
            for i, (bank, start) in enumerate(part):
                self._keep(batch, i, bank, start)

    def _row_plan(self, rows: list[tuple[int, int]]) -> ClipPlan:
        bank, start = (np.array(column, np.int64) for column in zip(*rows, strict=True))
        frames = start[:, None] + np.arange(ROW_FRAMES) * self.clip.frame_stride
        box = np.ones((len(rows), 4), np.float32)
        box[:, :2] = self.places[bank]
        return ClipPlan(
            clip=self.clips[bank],
            frames=np.minimum(frames, self.num_frames[bank][:, None].astype(np.int64) - 1),
            box=box,
            flip=np.zeros(len(rows), np.bool_),
            sound_start=start / self.fps,
            shift=np.zeros(len(rows)),
            order=np.zeros((len(rows), self.clip.num_frames), np.int64),
        )

    def _keep(self, batch: ClipBatch, i: int, bank: int, start: int) -> None:
        """Put row ``i`` of a decoded batch into its place; its last frame is the next row's."""
        stride, n = self.clip.frame_stride, int(self.num_frames[bank])
        frames = np.arange(start, n, stride)[: ROW_FRAMES - 1]
        where = torch.from_numpy(self._first[bank] + frames).to(self._rgb.device)
        count = len(frames)
        self._rgb[where] = batch.rgb[i, :count].permute(0, 3, 1, 2).to(self._rgb.device)
        if batch.flow is not None:
            flow = batch.flow[i, :count].permute(0, 3, 1, 2)
            self._flow[where] = flow.to(self._flow.device, torch.float16)
        if batch.wave is not None and start % stride == 0:
            self.has_audio[bank] |= bool(batch.has_audio[i])
            first = round(start / self.fps * self.audio.sample_rate)
            out = self._wave[bank][first : first + batch.wave.shape[1]]
            heard = (batch.wave[i, : len(out)] * FULL_SCALE).round().clamp(-FULL_SCALE, 32767.0)
            out.copy_(heard)


def triangles(
    start: NDArray[np.float64], length: NDArray[np.float64], *, size: int, side: int
) -> NDArray[np.float64]:
    """Weights (N, size, side) that bring stretches of ``side`` pixels to ``size``: linear, smoothed where they shrink.

    ``start`` and ``length`` (N,) in pixels. As DALI has it: a triangle as wide as two pixels of the larger grid.
    """
    step = length / size
    beyond = math.ceil(max(float(step.max()), 1.0))
    pixels = np.arange(-beyond, side + beyond)
    centres = start[:, None] + (np.arange(size) + 0.5) * step[:, None]
    away = np.abs(pixels + 0.5 - centres[:, :, None])
    weights = np.maximum(1.0 - away / np.maximum(step, 1.0)[:, None, None], 0.0)
    found: NDArray[np.float64] = weights[:, :, beyond:-beyond].copy()
    found[:, :, 0] += weights[:, :, :beyond].sum(
        2
    )  # beyond its edges a picture's last pixel repeats
    found[:, :, -1] += weights[:, :, -beyond:].sum(2)
    found /= found.sum(2, keepdims=True)
    return found


def bank_bytes(size: str) -> float:
    """Bytes of "500MB" or "2 GiB"; MB counts in thousands, MiB in 1024s. Raises ValueError for anything else."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT])(i?)B", size)
    if found is None:
        raise ValueError(
            f"search.clip_bank {size!r}: write a number of clips, or a size such as 2GiB"
        )
    number, unit, binary = found.groups()
    return float(number) * float(1024 if binary else 1000) ** UNITS[unit]


def _chosen(
    index: ClipIndex, size: int | str, *, seed: int, each: NDArray[np.int64]
) -> tuple[NDArray[np.int64], int]:
    """The clips, rising, and their bytes: of all in an order drawn, the first so many, or those that fit."""
    order = _rng(seed).permutation(len(index))
    if isinstance(size, int):
        count = min(size, len(order))
    else:
        count = int(np.searchsorted(np.cumsum(each[order]), bank_bytes(size), side="right"))
        if count == 0:
            raise ValueError(
                f"search.clip_bank {size!r} holds no clip: the first needs {each[order[0]]:,} bytes"
            )
    clips = np.sort(order[:count])
    return clips, int(each[clips].sum())


def _places(index: ClipIndex, *, seed: int) -> NDArray[np.float64]:
    """(clips, 2) where squares are drawn to be, at whole pixels: else keeping them would soften frames."""
    drawn = _rng(seed).random((len(index), 2))
    frames = np.stack([index.width, index.height], axis=1)
    room = (frames - frames.min(1, keepdims=True)).astype(np.float64)
    found: NDArray[np.float64] = np.round(drawn * room) / np.maximum(room, 1.0)
    return found


def _bytes(index: ClipIndex, side: int, rate: int, flow: bool) -> NDArray[np.int64]:
    """Bytes that each clip of the data set would take."""
    pictures = index.num_frames.astype(np.int64) * side * side * (3 + 4 * flow)
    found: NDArray[np.int64] = pictures + (2 * rate * index.duration).astype(np.int64)
    return found


def _side(index: ClipIndex, clip: Clip) -> int:
    """Pixels of the kept squares: what the smallest crop needs, and no more than there are."""
    largest = int(np.minimum(index.width, index.height).max())
    return min(math.ceil(clip.size / math.sqrt(clip.min_area)), largest)


def _frames(clip: Clip) -> int:
    return clip.num_frames + clip.num_future_frames


def _rng(seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=[seed, BANK_STREAM]))


def _float(array: NDArray[np.float64], device: torch.device) -> Tensor:
    return torch.from_numpy(array.astype(np.float32)).to(device)
