"""Segments of videos to embed, in chunks: some videos, cut into shards on the way, or some clips of shards.

A segment becomes a row. Of shards it is a clip as it is stored. A raw video is cut into segments of equal length from
its beginning to its end, ``every`` so many seconds; the rest at its end is one of them where it is at least half as
long. Several segments are stored as one clip for the time being, so that no film is sought in, and decoded from the
key frame before, for each. Pictures go through the same cutting and storing as for training.

Counts are frames at ``fps`` unless they are seconds by name.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from engine.core.pool import Pool
from engine.core.recipe import Clip, Readout
from engine.data.ingest.run import IngestError, Progress, ingest, worker_pool
from engine.data.ingest.sources import Reject, Source, SourceList, by_cause
from engine.data.plan import ClipPlan, central_plan
from engine.data.shards.index import PARTIAL, ClipIndex, read_dataset
from engine.model.network_file import ClipInput

STORED_SECONDS = 30.0
"""Length of the clips that segments are stored in, about."""
CLIPS_A_CHUNK = 1024
SOURCES_A_WORKER = 16
"""Most videos of a chunk, by worker process."""


class Stopped(Exception):
    """Nobody waits for the segments any more."""


@dataclass(frozen=True)
class EmbedSettings:
    """Settings of ``embed``: what a row is, and how it is seen."""

    per: Literal["clip", "video"] = "clip"
    """A row a segment, or a row a video: the mean over its segments."""
    views: int = 1
    """Views in time, spread evenly over a segment, whose features are averaged."""
    clip_seconds: float | None = None
    """Length of a raw video's segments; None: what the network sees at once."""
    every: float | None = None
    """Seconds from one segment's start to the next one's; None: the segments' length."""
    fps: float = 25.0
    """Frames a second that raw videos are read at; ``engine ingest`` has the same default."""
    batch_size: int = 32
    readout: Readout = "raw"
    """How a row's vector is scaled: ``raw``, or by the mean and scale in the network's card, ``unit`` or ``zscore``."""

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
class Cutting:
    """The division of raw videos into segments, for a network's input."""

    length: int
    every: int
    stored: int
    """Segments that are stored as one clip."""

    @staticmethod
    def of(clip: ClipInput, settings: EmbedSettings) -> Cutting:
        """Raises ValueError for times of less than a frame."""
        fps, seen = settings.fps, clip.num_frames * clip.frame_stride
        length = seen if settings.clip_seconds is None else round(settings.clip_seconds * fps)
        every = length if settings.every is None else round(settings.every * fps)
        if min(length, every) < 1:
            raise ValueError(f"clip_seconds and every must be a frame or more, {1 / fps:g} s")
        return Cutting(length, every, max(1, int((STORED_SECONDS * fps - length) // every) + 1))

    @property
    def least(self) -> int:
        """Frames of the shortest segment."""
        return (self.length + 1) // 2

    def within(self, stored: int) -> list[tuple[int, int]]:
        """(first frame, frames) of the segments in a clip of ``stored`` frames."""
        starts = [number * self.every for number in range(self.stored)]
        sizes = [min(self.length, stored - start) for start in starts]
        return [(a, n) for a, n in zip(starts, sizes, strict=True) if n >= self.least]


@dataclass
class Segments:
    """R segments of a chunk, in order, whose videos are there as shards."""

    index: ClipIndex | None
    """None where no video gave a clip."""
    clip: NDArray[np.int64]
    first: NDArray[np.int64]
    size: NDArray[np.int64]
    """(R,) which clip of the index, its first frame, and how many frames."""
    path: list[str]
    start: NDArray[np.float64]
    label: list[str | None]
    rejects: list[dict[str, Any]] = field(default_factory=list)
    temporary: Path | None = None

    def plan(self, rows: NDArray[np.int64], clip: Clip, *, place: NDArray[np.float64]) -> ClipPlan:
        """T frames of each of some segments, at a ``place`` (rows,) of 0 to 1 in time; the central square."""
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
class Chunk:
    """Some of the videos or clips to embed."""

    key: str
    """Identifies it: same names, times of change and sizes, and so same features."""
    units: int
    """Videos, or clips of shards."""
    open: Callable[[], Segments]


class Cutter:
    """Cuts raw videos into shards in ``folder``, by processes that start with the first video, until it is closed."""

    def __init__(
        self, clip: ClipInput, settings: EmbedSettings, folder: Path, workers: int
    ) -> None:
        self.cutting, self.fps = Cutting.of(clip, settings), settings.fps
        # a margin, as 128 is to 112; films are no larger than that before they are cropped
        self.short_side = max(128, -(-clip.size * 8 // 14) * 2)
        self.folder, self.workers = folder, workers
        self.stopping = threading.Event()
        self._pool: Pool | None = None

    def close(self) -> None:
        """End the processes."""
        if self._pool is not None:
            self._pool.close()

    def chunks(self, videos: SourceList) -> Iterator[Chunk]:
        """Chunks of raw videos, cut when they are opened; a name stands for one video in each."""
        sources = videos.sources
        most = min(SOURCES_A_WORKER * self.workers, max(2 * self.workers, len(sources) // 8))
        chunk: list[Source] = []
        folders: dict[str, str] = {}
        for source in sources:
            if len(chunk) == most or folders.get(source.relative, source.folder) != source.folder:
                yield self._chunk(chunk)
                chunk, folders = [], {}
            chunk.append(source)
            folders[source.relative] = source.folder
        if chunk:
            yield self._chunk(chunk)

    def _chunk(self, sources: Sequence[Source]) -> Chunk:
        files = [[*_facts_of(source).values(), *source.state()] for source in sources]
        key = _key([files, asdict(self.cutting), self.fps, self.short_side])
        return Chunk(key, len(sources), partial(self._open, key, sources))

    def _open(self, key: str, sources: Sequence[Source]) -> Segments:
        shards, c = self.folder / key, self.cutting
        rejects_file = shards / "rejects.jsonl"
        index = None
        self._pool = self._pool or worker_pool(self.workers)
        try:
            ingest(
                SourceList(list(sources)),
                shards,
                fps=self.fps,
                short_side=self.short_side,
                clip_seconds=((c.stored - 1) * c.every + c.length) / self.fps,
                every=c.stored * c.every / self.fps,
                min_seconds=c.least / self.fps,
                pool=self._pool,
                progress=self._check,
            )
            index = ClipIndex([shards])
        except IngestError:  # each was rejected, with its reason
            rejects_file = shards.with_name(f"{shards.name}.rejects.jsonl")
        rejects = [json.loads(line) for line in rejects_file.read_text().splitlines()]
        rejects_file.unlink()
        segments = _segments(index, range(0 if index is None else len(index)), c)
        paths = {source.relative: str(source.path) for source in sources}
        segments.path = [paths[path] for path in segments.path]
        rejects = [{**reject, "path": paths[reject["path"]]} for reject in rejects]
        known = {(reject["path"], reject["reason"]) for reject in rejects}
        short = _cut_short(index, paths, c)
        rejects += [r for r in short if (r["path"], r["reason"]) not in known]
        segments.rejects = [reject.as_dict() for reject in by_cause(Reject(**r) for r in rejects)]
        segments.temporary = shards
        return segments

    def _check(self, _: Progress) -> None:
        if self.stopping.is_set():
            raise Stopped


def _cut_short(
    index: ClipIndex | None, paths: Mapping[str, str], cutting: Cutting
) -> Iterator[dict[str, Any]]:
    """Segments that are missing since a film is damaged."""
    for clip in [] if index is None else np.flatnonzero(index.flags & PARTIAL).tolist():
        assert index is not None
        if len(cutting.within(int(index.num_frames[clip]))) < cutting.stored:
            facts = index.facts(clip)
            where = f"{facts['start'] + index.duration[clip]:.3f} s"
            reject = {"path": paths[facts["source"]], "reason": facts["note"], "where": where}
            yield {**reject, "partial": True}


def shard_chunks(index: ClipIndex) -> Iterator[Chunk]:
    """Chunks of a data set of shards: its clips as they are stored."""
    facts = [read_dataset(folder) for folder in index.folders]
    whole = _key([facts, [str(damage) for damage in index.damaged]])
    for first in range(0, len(index), CLIPS_A_CHUNK):
        clips = range(first, min(first + CLIPS_A_CHUNK, len(index)))
        key = _key([whole, clips.start, clips.stop])
        yield Chunk(key, len(clips), partial(_segments, index, clips, None))


def _segments(index: ClipIndex | None, clips: range, cutting: Cutting | None) -> Segments:
    """The segments of an index's clips; without a ``cutting`` each clip is one."""
    rows = []
    for number in clips:
        assert index is not None
        facts, stored = index.facts(number), int(index.num_frames[number])
        for first, size in [(0, stored)] if cutting is None else cutting.within(stored):
            start = facts["start"] + first / index.fps
            rows.append((number, first, size, facts["source"], start, facts["class"]))
    columns = list(zip(*rows, strict=True)) or [()] * 6
    clip, first_frame, frames = (np.array(column, np.int64) for column in columns[:3])
    path, seconds, label = columns[3:]
    moments = np.array(seconds, np.float64)
    return Segments(index, clip, first_frame, frames, list(path), moments, list(label))


def _key(content: Any) -> str:
    text = json.dumps(content, default=str)
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:24]


def _facts_of(source: Source) -> dict[str, Any]:
    """What names a source; a file of its own has no place in a tar."""
    return {k: v for k, v in asdict(source).items() if (k, v) != ("member", None)}
