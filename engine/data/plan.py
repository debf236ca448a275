"""What a batch holds, decided before anything is read: a pure function of (seed, step, rank, world).

No process state enters, so a resumed run sees the batches that it would have seen, every member of a search
sees the same ones, and a batch split over ranks is the batch of one process: rank r of W takes its clips r, r + W,
r + 2 W and so on. The first (or last) clips of every rank are then, together, the first (or last) of the batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from engine.core.recipe import Audio, Clip

ORDER_STREAM, CUT_STREAM = 0x0DE5, 0x0C07
"""Keep the draws of a clip's place in an epoch and of its cut apart."""


class Facts(Protocol):
    """What planning needs to know of a data set's clips; a ``ClipIndex`` knows it."""

    num_frames: NDArray[np.int32]
    """(clips,) frames stored."""
    fps: float
    shard: NDArray[np.int32]
    """(clips,) number of the tar that holds the clip, rising; only a recipe with ``shuffle_shards`` asks for it."""


@dataclass(frozen=True)
class ClipPlan:
    """Which clips, frames, crops and orders make up a batch of N clips."""

    clip: NDArray[np.int64]
    """(N,) indices into the data set."""
    frames: NDArray[np.int64]
    """(N, F) stored frames wanted, in time's order; the last one repeats where a clip is too short."""
    box: NDArray[np.float32]
    """(N, 4) place across, place down and side of the crop, see ``square_boxes``; nan for the central square."""
    flip: NDArray[np.bool_]
    """(N,) mirror left and right."""
    sound_start: NDArray[np.float64]
    """(N,) seconds from the clip's start to the first frame wanted."""
    shift: NDArray[np.float64]
    """(N,) seconds by which the misaligned sound is off; 0 where a clip has no room for it."""
    order: NDArray[np.int64]
    """(N, T) the order of the shuffled copy's frames; never time's own."""

    def __len__(self) -> int:
        return len(self.clip)


def plan_batch(
    facts: Facts,
    clip: Clip,
    audio: Audio,
    *,
    seed: int,
    step: int,
    batch_size: int,
    rank: int = 0,
    world: int = 1,
) -> ClipPlan:
    """Plan a training batch of ``batch_size`` clips for one of ``world`` ranks.

    Every clip comes once an epoch, in an order drawn anew each epoch; the cut is drawn for each position. With
    ``clip.shuffle_shards`` the shards come in an order drawn anew, so many at a time, and the clips of those in
    random order; a batch then reads that many shards, or where one such window ends, those of the next one too.
    """
    first = step * world * batch_size
    positions = range(first + rank, first + world * batch_size, world)
    rows = [_plan_clip(facts, clip, audio, seed=seed, position=p) for p in positions]
    return ClipPlan(*(np.stack(column) for column in zip(*rows, strict=True)))


def plan_views(
    facts: Facts, clip: Clip, *, clips: NDArray[np.int64], view: int, num_views: int
) -> ClipPlan:
    """Plan evaluation: T frames at the given view's place in time, the largest central square, no flip.

    Views are spread evenly over each clip; a single view is the middle one.
    """
    span = (clip.num_frames - 1) * clip.frame_stride + 1
    room = np.maximum(facts.num_frames[clips] - span, 0)
    start = np.floor(room * (view + 0.5) / num_views).astype(np.int64)
    frames = start[:, None] + np.arange(clip.num_frames) * clip.frame_stride
    frames = np.minimum(frames, facts.num_frames[clips][:, None].astype(np.int64) - 1)
    return central_plan(clips, frames, sound_start=start / facts.fps)


def central_plan(
    clips: NDArray[np.int64],
    frames: NDArray[np.int64],
    *,
    sound_start: NDArray[np.float64] | None = None,
) -> ClipPlan:
    """Plan given frames (N, F) of clips (N,): the largest central square, no flip, shuffled order in reverse."""
    n, length = frames.shape
    return ClipPlan(
        clip=np.asarray(clips, np.int64),
        frames=frames,
        box=np.full((n, 4), np.nan, np.float32),
        flip=np.zeros(n, np.bool_),
        sound_start=np.zeros(n) if sound_start is None else sound_start,
        shift=np.zeros(n),
        order=np.tile(np.arange(length)[::-1], (n, 1)),
    )


@lru_cache(maxsize=4)
def _epoch_order(seed: int, epoch: int, num_clips: int) -> NDArray[np.int64]:
    return _order_rng(seed, epoch).permutation(num_clips)


def _order_rng(seed: int, epoch: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=[seed, ORDER_STREAM], counter=[0, 0, 0, epoch]))


class _ById:
    """An array as a key of a cache: the very array, not its contents, which it keeps alive."""

    def __init__(self, array: NDArray[np.int32]) -> None:
        self.array = array

    def __hash__(self) -> int:
        return id(self.array)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _ById) and self.array is other.array


@lru_cache(maxsize=4)
def _epoch_order_by_shards(seed: int, epoch: int, shard: _ById, at_once: int) -> NDArray[np.int64]:
    """An epoch's clips, ``at_once`` shards at a time; ``shard`` is each clip's, rising."""
    rng = _order_rng(seed, epoch)
    first = np.flatnonzero(np.diff(shard.array, prepend=-1, append=np.iinfo(np.int32).max))
    shards = rng.permutation(len(first) - 1)
    windows = [shards[i : i + at_once] for i in range(0, len(shards), at_once)]
    clips = [np.concatenate([np.arange(first[s], first[s + 1]) for s in w]) for w in windows]
    return np.concatenate([rng.permutation(window) for window in clips])


def _plan_clip(
    facts: Facts, clip: Clip, audio: Audio, *, seed: int, position: int
) -> tuple[NDArray[Any], ...]:
    epoch, place = divmod(position, len(facts.num_frames))
    if clip.shuffle_shards:
        order = _epoch_order_by_shards(seed, epoch, _ById(facts.shard), clip.shuffle_shards)
    else:
        order = _epoch_order(seed, epoch, len(facts.num_frames))
    which = int(order[place])
    rng = np.random.Generator(np.random.Philox(key=[seed, CUT_STREAM], counter=[0, 0, 0, position]))
    stored = int(facts.num_frames[which])
    num_frames = clip.num_frames + clip.num_future_frames
    span = (num_frames - 1) * clip.frame_stride + 1
    start = int(rng.integers(0, max(stored - span, 0) + 1))
    frames = np.minimum(start + np.arange(num_frames) * clip.frame_stride, stored - 1)
    area = rng.uniform(clip.min_area, 1.0)
    left, top = rng.random(2)
    side = np.sqrt(area)
    box = np.array(
        [left, top, side, side], np.float32
    )  # in shares of the largest square: see square_boxes
    flip = clip.flip and bool(rng.random() < 0.5)
    window = num_frames * clip.frame_stride / facts.fps
    shift = _draw_shift(rng, start / facts.fps, window, stored / facts.fps, audio.min_shift)
    shuffled = _draw_order(rng, clip.num_frames)
    return (
        np.array(which, np.int64),
        frames.astype(np.int64),
        box,
        np.array(flip),
        np.array(start / facts.fps),
        np.array(shift),
        shuffled,
    )


def _draw_shift(
    rng: np.random.Generator, start: float, window: float, duration: float, least: float
) -> float:
    """Draw a shift of at least ``least`` seconds, back or ahead, whose window stays inside the clip."""
    back, ahead = max(start - least, 0.0), max(duration - window - start - least, 0.0)
    draw = rng.random() * (back + ahead)
    if back + ahead <= 0.0:
        return 0.0
    return -(least + draw) if draw < back else least + (draw - back)


def _draw_order(rng: np.random.Generator, num_frames: int) -> NDArray[np.int64]:
    order = rng.permutation(num_frames)
    while np.array_equal(order, np.arange(num_frames)):
        order = rng.permutation(num_frames)
    return order


def square_boxes(
    plan: ClipPlan, width: NDArray[np.int32], height: NDArray[np.int32]
) -> NDArray[np.float32]:
    """Turn a plan's crops into (N, 4) left, top, right, bottom in shares of frames of the given sizes.

    A plan's box holds (place across, place down, side, side), places and side in shares of what the frame
    allows, so that crops are square in pixels whatever the frame's shape; nan asks for the central square.
    """
    across, down, side, _ = np.nan_to_num(plan.box, nan=-1.0).T
    central = side < 0
    side = np.where(central, 1.0, side) * np.minimum(width, height)
    across, down = np.where(central, 0.5, across), np.where(central, 0.5, down)
    left, top = across * (width - side), down * (height - side)
    edges = [left / width, top / height, (left + side) / width, (top + side) / height]
    return np.stack(edges, axis=1).astype(np.float32)
