"""What is embedded, in pieces: some videos, cut into shards on the way, or some clips of shards that are there.

A stretch is what becomes a row. Of shards it is a clip as it is stored. A raw video is cut into stretches of equal
length from its beginning to its end, ``every`` so many seconds; the rest at its end is one of them where it is at
least half as long. Several stretches are stored as one clip for the time being, so that no film is sought in, and
decoded from the key frame before, for each. Pictures go through the same cutting and storing as for training.

Counts are frames at ``fps`` unless they are seconds by name.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from engine.core.pool import Pool
from engine.core.recipe import Clip
from engine.data.ingest.run import IngestError, Progress, ingest, worker_pool
from engine.data.ingest.sources import Found, Source
from engine.data.plan import ClipPlan, central_plan
from engine.data.shards.index import ClipIndex, read_dataset
from engine.data.shards.record import PARTIAL
from engine.model.network_file import ClipInput

STORED_SECONDS = 30.0
"""Length of the clips that stretches are stored in, about."""
CLIPS_A_PIECE = 1024
SOURCES_A_WORKER = 16
"""Most videos of a piece, by worker process."""


class Workers:
    """Processes that cut videos, made when they are first needed; as a context, ended with it."""

    def __init__(self, count: int) -> None:
        self.count, self.stopping = count, threading.Event()
        self._pool: Pool | None = None

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.close()

    def pool(self) -> Pool:
        """The processes; of one, this process itself."""
        if self._pool is None:
            self._pool = worker_pool(self.count)
        return self._pool


class Stopped(Exception):
    """Whoever wanted the pieces is gone."""


@dataclass(frozen=True)
class EmbedSettings:
    """What becomes a row, and how it is seen."""

    per: Literal["clip", "video"] = "clip"
    """A row a stretch, or a row a video: the mean over its stretches."""
    views: int = 1
    """Views in time, spread evenly over a stretch, whose features are averaged."""
    clip_seconds: float | None = None
    """Length of a raw video's stretches; None: what the network sees at once."""
    every: float | None = None
    """Seconds from one stretch's start to the next one's; None: the stretches' length."""
    fps: float = 25.0
    """Frames a second that raw videos are read at; ``engine ingest`` has the same default."""
    batch_size: int = 32

    def __post_init__(self) -> None:
        if self.per not in ("clip", "video"):
            raise ValueError(f"per is {self.per!r}: a row is a clip or a video")
        if self.views < 1 or self.batch_size < 1:
            raise ValueError("views and batch_size must be at least 1")
        for name in ("clip_seconds", "every", "fps"):
            value = getattr(self, name)
            if value is not None and not 0.0 < value < float("inf"):
                raise ValueError(f"{name} must be above 0, not {value}")


@dataclass(frozen=True)
class Stretches:
    """How raw videos are divided, for a network's input."""

    length: int
    every: int
    stored: int
    """Stretches that are stored as one clip."""

    @staticmethod
    def of(clip: ClipInput, settings: EmbedSettings) -> Stretches:
        """Raises ValueError for times of less than a frame."""
        fps, seen = settings.fps, clip.num_frames * clip.frame_stride
        length = seen if settings.clip_seconds is None else round(settings.clip_seconds * fps)
        every = length if settings.every is None else round(settings.every * fps)
        if min(length, every) < 1:
            raise ValueError(f"clip_seconds and every must be a frame or more, {1 / fps:g} s")
        return Stretches(length, every, max(1, int((STORED_SECONDS * fps - length) // every) + 1))

    @property
    def least(self) -> int:
        """Frames of the shortest stretch."""
        return (self.length + 1) // 2

    def within(self, stored: int) -> list[tuple[int, int]]:
        """(first frame, frames) of the stretches in a clip of ``stored`` frames."""
        starts = [number * self.every for number in range(self.stored)]
        sizes = [min(self.length, stored - start) for start in starts]
        return [(a, n) for a, n in zip(starts, sizes, strict=True) if n >= self.least]


@dataclass
class Opened:
    """A piece whose videos are there as shards: R stretches, in order."""

    key: str
    index: ClipIndex | None
    """None where no video gave a clip."""
    clip: NDArray[np.int64]
    first: NDArray[np.int64]
    size: NDArray[np.int64]
    """(R,) which clip of the index, its first frame, and how many frames."""
    path: list[str]
    start: NDArray[np.float64]
    label: list[str | None]
    rejects: list[dict[str, Any]]
    temporary: Path | None = None

    def plan(self, rows: NDArray[np.int64], clip: Clip, *, place: NDArray[np.float64]) -> ClipPlan:
        """T frames of each of some stretches, at a ``place`` (rows,) of 0 to 1 in time; the central square."""
        assert self.index is not None
        span = (clip.num_frames - 1) * clip.frame_stride + 1
        first, size = self.first[rows], self.size[rows]
        start = first + np.floor(np.maximum(size - span, 0) * place).astype(np.int64)
        frames = start[:, None] + np.arange(clip.num_frames) * clip.frame_stride
        frames = np.minimum(frames, (first + size - 1)[:, None])
        return central_plan(self.clip[rows], frames, sound_start=start / self.index.fps)

    def close(self) -> None:
        """Remove what was stored for the time being."""
        if self.temporary is not None:
            shutil.rmtree(self.temporary, ignore_errors=True)


@dataclass(frozen=True)
class Piece:
    """Some of what is to be embedded."""

    key: str
    """Identifies it: same names, times of change and sizes, and so same features."""
    units: int
    """Videos, or clips of shards."""
    open: Callable[[], Opened]


def raw_pieces(
    found: Found,
    clip: ClipInput,
    settings: EmbedSettings,
    *,
    folder: Path,
    workers: Workers,
) -> Iterator[Piece]:
    """Pieces of raw videos, cut when they are opened, by ``workers``, into ``folder``."""
    # a margin, as 128 is to 112; films are no larger than that before they are cropped
    side = max(128, -(-clip.size * 8 // 14) * 2)
    cut = _Cutter(Stretches.of(clip, settings), settings.fps, side, folder, workers)
    count = workers.count
    most = min(SOURCES_A_WORKER * count, max(2 * count, len(found.sources) // 8))
    chunk: list[Source] = []
    homes: dict[str, str] = {}
    for source in found.sources:
        if len(chunk) == most or homes.get(source.relative, source.folder) != source.folder:
            yield cut.piece(chunk)
            chunk, homes = [], {}
        chunk.append(source)
        homes[source.relative] = source.folder
    if chunk:
        yield cut.piece(chunk)


@dataclass(frozen=True)
class _Cutter:
    """Cuts pieces of raw videos."""

    stretches: Stretches
    fps: float
    short_side: int
    folder: Path
    workers: Workers

    def piece(self, sources: Sequence[Source]) -> Piece:
        """The piece of these videos."""
        told = [[*asdict(source).values(), *_state(source.path)] for source in sources]
        key = _key([told, asdict(self.stretches), self.fps, self.short_side])
        chosen = tuple(sources)
        return Piece(key, len(sources), lambda: self._open(key, chosen))

    def _open(self, key: str, sources: tuple[Source, ...]) -> Opened:
        shards, s = self.folder / key, self.stretches
        rejects_file = shards / "rejects.jsonl"
        index = None
        try:
            ingest(
                Found(list(sources)),
                shards,
                fps=self.fps,
                short_side=self.short_side,
                clip_seconds=((s.stored - 1) * s.every + s.length) / self.fps,
                every=s.stored * s.every / self.fps,
                min_seconds=s.least / self.fps,
                pool=self.workers.pool(),
                progress=self._check,
            )
            index = ClipIndex([shards])
        except IngestError:  # each was rejected, with its reason
            rejects_file = shards.with_name(f"{shards.name}.rejects.jsonl")
        rejects = [json.loads(line) for line in rejects_file.read_text().splitlines()]
        homes = {source.relative: source.folder for source in sources}
        for reject in rejects:
            reject["path"] = str(Path(homes[reject["path"]], reject["path"]))
        opened = _rows(key, index, range(0 if index is None else len(index)), s)
        opened.path = [str(Path(homes[path], path)) for path in opened.path]
        opened.rejects = [*rejects, *_cut_short(index, homes, s)]
        opened.temporary = shards
        rejects_file.unlink()
        return opened

    def _check(self, _: Progress) -> None:
        if self.workers.stopping.is_set():
            raise Stopped


def _cut_short(
    index: ClipIndex | None, homes: dict[str, str], stretches: Stretches
) -> list[dict[str, Any]]:
    """Stretches that are missing since a film is damaged."""
    told: list[dict[str, Any]] = []
    if index is None:
        return told
    for clip in np.flatnonzero(index.flags & PARTIAL):
        if len(stretches.within(int(index.num_frames[clip]))) < stretches.stored:
            facts = index.facts(int(clip))
            where = f"{facts['start'] + index.duration[clip]:.3f} s"
            path = str(Path(homes[facts["source"]], facts["source"]))
            told.append({"path": path, "reason": facts["note"], "where": where, "partial": True})
    return told


def shard_pieces(index: ClipIndex) -> Iterator[Piece]:
    """Pieces of a data set of shards: its clips as they are stored."""
    facts = [read_dataset(folder) for folder in index.folders]
    whole = _key([facts, [str(damage) for damage in index.damaged]])
    for first in range(0, len(index), CLIPS_A_PIECE):
        clips = range(first, min(first + CLIPS_A_PIECE, len(index)))
        key = _key([whole, clips.start, clips.stop])
        yield Piece(key, len(clips), lambda key=key, clips=clips: _rows(key, index, clips, None))  # type: ignore[misc]


def _rows(key: str, index: ClipIndex | None, clips: range, stretches: Stretches | None) -> Opened:
    """The stretches of an index's clips; each clip is one where no ``stretches`` are given."""
    clip, first, size, path, start, label = [], [], [], [], [], []
    for number in clips:
        assert index is not None
        facts, stored = index.facts(number), int(index.num_frames[number])
        for a, n in [(0, stored)] if stretches is None else stretches.within(stored):
            clip.append(number)
            first.append(a)
            size.append(n)
            path.append(facts["source"])
            start.append(facts["start"] + a / index.fps)
            label.append(facts["class"])
    places = [np.array(column, np.int64) for column in (clip, first, size)]
    moments = np.array(start, np.float64)
    return Opened(key, index, places[0], places[1], places[2], path, moments, label, [])


def _key(told: Any) -> str:
    text = json.dumps(told, default=str)
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:24]


def _state(path: Path) -> tuple[int, int]:
    try:
        stat = os.stat(path)
    except OSError:  # reading it will tell
        return 0, 0
    return stat.st_size, stat.st_mtime_ns
