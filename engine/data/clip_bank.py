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
from contextlib import closing

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.core.prefetch import prefetch
from engine.core.recipe import Audio, Clip
from engine.core.runtime import free_memory
from engine.core.streams import SideStream, cross, finish, upload
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
"""The largest 16-bit sample, as which full volume is stored."""
UNITS = {"K": 1, "M": 2, "G": 3, "T": 4}


class ClipBank:
    """Decodes its clips when it is constructed, then cuts batches from them; plans read its facts like an index's.

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
        self.side, self.fps, self.flow, self.sound = _side(index, clip), index.fps, flow, sound
        rate = audio.sample_rate if sound else 0
        sizes = _bytes(index, self.side, rate, flow)
        self.clips = _chosen(size, sizes, seed=seed)
        self.num_frames, self.shard = index.num_frames[self.clips], index.shard[self.clips]
        num_frames = clip.num_frames + clip.num_future_frames
        self.samples = round(num_frames * clip.frame_stride / index.fps * audio.sample_rate)
        room = GPU_SHARE * free_memory(device) if device.type == "cuda" else 0
        home = device if sizes[self.clips].sum() <= room else torch.device("cpu")
        self._first = np.cumsum([0, *self.num_frames])
        total, side = int(self._first[-1]), self.side
        self._rgb = torch.zeros(total, 3, side, side, dtype=torch.uint8, device=home)
        shape = (total if flow else 0, 2, side, side)
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

        side = SideStream(self.device)

        def cut() -> Iterator[tuple[ClipBatch, torch.cuda.Event | None]]:
            if self.device.type == "cpu":
                torch.set_num_threads(1)  # of this thread; members have the other cores
            for plan in plans:
                with side.work():
                    batch = self.load(plan, flow=flow, sound=sound)
                    ready = side.mark()
                yield batch, ready

        with closing(prefetch(cut(), depth=1, name="bank-cut")) as batches:
            for batch, ready in batches:
                yield cross(batch, ready)

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
            mirrored = torch.where(torch.from_numpy(plan.flip), -size, size)
            scale = torch.stack([mirrored, size], dim=1)[:, None, :, None, None]
            flows = self._cropped(self._flow, rows[:, :-1], across, down).mul_(
                upload(scale, self.device)
            )
            flows = flows.permute(0, 1, 3, 4, 2).contiguous()
        wave, wave_shifted = self._waves(plan) if sound else (None, None)
        heard = self.has_audio[plan.clip] & sound
        has_audio, has_shift, order = (
            upload(torch.from_numpy(array), self.device)
            for array in (heard, heard & (plan.shift != 0.0), plan.order)
        )
        return ClipBatch(
            rgb=rgb.to(torch.uint8).permute(0, 1, 3, 4, 2).contiguous(),
            flow=flows,
            wave=wave,
            wave_shifted=wave_shifted,
            has_audio=has_audio,
            has_shift=has_shift,
            order=order,
            clip=self.clips[plan.clip],
        )

    def _cuts(self, plan: ClipPlan) -> tuple[Tensor, Tensor, NDArray[np.float64]]:
        """Weights (N, D, S) that bring kept rows, and columns, to a crop's, and the crops' sides in shares of S."""
        left, top, share, _ = np.nan_to_num(plan.box.astype(np.float64), nan=-1.0).T
        whole = share < 0
        share = np.where(whole, 1.0, share)
        length = share * self.side
        across, down = (
            triangles(start * self.side, length, size=self.clip.size, side=self.side)
            for start in (np.where(whole, 0.0, place * (1.0 - share)) for place in (left, top))
        )
        across[plan.flip] = across[plan.flip, ::-1]
        x, y = (upload(torch.from_numpy(w.astype(np.float32)), self.device) for w in (across, down))
        return x, y, share

    def _cropped(self, kept: Tensor, rows: Tensor, across: Tensor, down: Tensor) -> Tensor:
        """float32 (N, F, channels, D, D) of the kept rows (N, F)."""
        n, f = rows.shape
        x = upload(kept[upload(rows, kept.device)], self.device).float()
        channels, side, size = x.shape[2], self.side, self.clip.size
        x = torch.bmm(x.reshape(n, f * channels * side, side), across.transpose(1, 2))
        x = x.view(n, f * channels, side, size).transpose(2, 3)
        x = torch.bmm(x.reshape(n, f * channels * size, side), down.transpose(1, 2))
        return x.view(n, f, channels, size, size).transpose(3, 4)

    def _waves(self, plan: ClipPlan) -> tuple[Tensor, Tensor]:
        """float32 (N, samples) of the sound that goes with each clip, and of its shifted window."""
        waves = torch.zeros(2, len(plan), self.samples)
        for row, begin in enumerate((plan.sound_start, plan.sound_start + plan.shift)):
            starts = np.round(begin * self.audio.sample_rate).astype(np.int64)
            for out, clip, start in zip(waves[row], plan.clip, starts, strict=True):
                wave = self._wave[clip][max(start, 0) : start + self.samples]
                out[max(-start, 0) :][: len(wave)] = wave.float() / FULL_SCALE
        wave, shifted = upload(waves, self.device)
        return wave, shifted

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
        chunks = [rows[i : i + ROWS] for i in range(0, len(rows), ROWS)]
        batches = pipeline.batches(map(self._row_plan, chunks))
        for chunk, batch in zip(chunks, batches, strict=True):
            for i, (bank, start) in enumerate(chunk):
                self._keep(batch, i, bank, start)
        finish(self.device)  # batches are cut on another stream

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
    wide = np.maximum(1.0 - away / np.maximum(step, 1.0)[:, None, None], 0.0)
    weights: NDArray[np.float64] = wide[:, :, beyond:-beyond].copy()
    # beyond its edges a picture's last pixel repeats
    weights[:, :, 0] += wide[:, :, :beyond].sum(2)
    weights[:, :, -1] += wide[:, :, -beyond:].sum(2)
    weights /= weights.sum(2, keepdims=True)
    return weights


def bank_bytes(size: str) -> float:
    """Bytes of "500MB" or "2 GiB"; MB counts in thousands, MiB in 1024s. Raises ValueError for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT])(i?)B", size)
    if match is None:
        raise ValueError(
            f"search.clip_bank {size!r}: write a number of clips, or a size such as 2GiB"
        )
    number, unit, binary = match.groups()
    return float(number) * float(1024 if binary else 1000) ** UNITS[unit]


def _chosen(size: int | str, sizes: NDArray[np.int64], *, seed: int) -> NDArray[np.int64]:
    """Draws clips, of ``sizes`` bytes each, in a random order until there are enough or no more fit; rising."""
    order = _rng(seed).permutation(len(sizes))
    if isinstance(size, int):
        return np.sort(order[:size])
    count = int(np.searchsorted(np.cumsum(sizes[order]), bank_bytes(size), side="right"))
    if count == 0:
        raise ValueError(
            f"search.clip_bank {size!r} holds no clip: the first needs {sizes[order[0]]:,} bytes"
        )
    return np.sort(order[:count])


def _places(index: ClipIndex, *, seed: int) -> NDArray[np.float64]:
    """Draws squares' places, (clips, 2), at whole pixels: else keeping them would soften frames."""
    drawn = _rng(seed).random((len(index), 2))
    frames = np.stack([index.width, index.height], axis=1)
    room = (frames - frames.min(1, keepdims=True)).astype(np.float64)
    return np.asarray(np.round(drawn * room) / np.maximum(room, 1.0))


def _bytes(index: ClipIndex, side: int, rate: int, flow: bool) -> NDArray[np.int64]:
    """Bytes that each clip of the data set would take."""
    pictures = index.num_frames.astype(np.int64) * side * side * (3 + 4 * flow)
    return np.asarray(pictures + (2 * rate * index.duration).astype(np.int64))


def _side(index: ClipIndex, clip: Clip) -> int:
    """Pixels of the kept squares: what the smallest crop needs, and no more than there are."""
    largest = int(np.minimum(index.width, index.height).max())
    return min(math.ceil(clip.size / math.sqrt(clip.min_area)), largest)


def _rng(seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=[seed, BANK_STREAM]))
