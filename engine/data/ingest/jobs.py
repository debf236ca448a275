"""The work of ingesting, in steps that survive a kill: a cut for each source, and shards made of cuts.

A cut is a file of the source's clips as they will stand in the shard, followed by what the index needs of them.
When all sources of a group have theirs, they are put together as its shard, and a record of that shard is kept.
Cuts, shards and records appear whole or not at all, so whatever is there needs not be done again.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import msgspec
import numpy as np

from engine.core.files import storing, write_atomic
from engine.data.ingest.cut import CRASHED, Settings, cut_source
from engine.data.ingest.grouping import Group, clip_key
from engine.data.ingest.sources import Reject, Source
from engine.data.shards.index import size_problem
from engine.data.shards.writer import END, ClipTar, Shard

BLOCK = 1 << 20
"""Bytes copied at a time."""
CRASHES = 3
"""Clips of a source that may kill their process before the source is given up."""
TAIL = 16
"""Bytes at a cut's end: the length of what precedes them, its checksum, MAGIC."""
MAGIC = b"CUTS0002"

T = TypeVar("T")


@dataclass(frozen=True)
class CutWork:
    """A source to be cut into the file at ``path``."""

    source: Source
    settings: Settings
    path: Path
    skip: tuple[int, ...] = ()
    """Numbers of clips that killed their process."""


@dataclass(frozen=True)
class ShardWork:
    """A group whose cuts become its shard in ``out``; ``folder`` holds the cuts and gets the record."""

    group: Group
    settings: Settings
    folder: Path
    out: Path


Work = CutWork | ShardWork


@dataclass(frozen=True)
class Counts:
    """The result of a work, in numbers."""

    clips: int = 0
    frames: int = 0
    rejects: int = 0
    missing: tuple[int, ...] = ()
    """Places in the group of sources whose cuts are damaged or absent and must be made again."""


@dataclass(frozen=True)
class CutFacts:
    """Facts at the end of a cut about the clips before it."""

    clips: Shard
    """As if they were a shard."""
    rejects: list[Reject]


@dataclass(frozen=True)
class FinishedGroup:
    """A group's shard and rejects."""

    fingerprint: str
    sources: int
    shard: Shard | None
    """None where no source gave a clip."""
    rejects: list[Reject]

    @property
    def counts(self) -> Counts:
        """The result of all of its sources, in numbers."""
        if self.shard is None:
            return Counts(rejects=len(self.rejects))
        return Counts(len(self.shard.labels), self.shard.num_frames, len(self.rejects))


def do_work(work: Work) -> Counts:
    """Cut a source or write a shard; raises StorageError for files that can't be written, OSError for absent videos."""
    return _cut(work) if isinstance(work, CutWork) else _assemble(work)


def cut_name(fingerprint: bytes) -> str:
    """The file name of a source's cut, in an ingest's working folder."""
    return f"{fingerprint.hex()}.cut"


def record_path(folder: Path, fingerprint: str) -> Path:
    """The path of the record of a group's shard, in an ingest's working folder."""
    return folder / f"{fingerprint}.made"


def _cut(work: CutWork) -> Counts:
    tar, marker = ClipTar(work.path, fps=work.settings.fps), _marker(work)
    try:
        rejects = cut_source(
            work.source,
            work.settings,
            lambda clip: tar.add(clip, key=clip_key(work.source, len(tar.labels))),
            trying=lambda number: marker.write_text(str(number)),
            skip=work.skip,
        )
        marker.unlink(missing_ok=True)
        return _end_cut(tar, rejects)
    except BaseException:
        tar.discard()
        raise


def _marker(work: CutWork) -> Path:
    """The file in which a process notes which clip it is at."""
    return work.path.with_suffix(".at")


def after_crash(work: CutWork) -> CutWork | None:
    """The work without the clip at which its process died; None where no clip is known, or it died too often."""
    try:
        number = int(_marker(work).read_text())
    except (OSError, ValueError):
        return None
    _marker(work).unlink(missing_ok=True)
    again = number in work.skip or len(work.skip) == CRASHES
    return None if again else replace(work, skip=(*work.skip, number))


def reject_source(work: CutWork) -> Counts:
    """Write the cut, without clips, of a source whose processes died of it."""
    source = work.source
    reject = Reject(source.relative, CRASHED, source.stretch, source.listed)
    return _end_cut(ClipTar(work.path, fps=work.settings.fps), [reject])


def _end_cut(tar: ClipTar, rejects: list[Reject]) -> Counts:
    clips = tar.shard()
    text = _to_json(CutFacts(clips, rejects))
    tail = len(text).to_bytes(4, "little") + zlib.crc32(text).to_bytes(4, "little") + MAGIC
    tar.append(text + tail)
    tar.finish(durable=False)  # its checksums tell whether all of it got to the disk
    return Counts(len(clips.labels), clips.num_frames, len(rejects))


def _assemble(work: ShardWork) -> Counts:
    group, paths = work.group, [work.folder / cut_name(p) for p in work.group.prints]
    cuts = [_read_facts(path) for path in paths]
    shard, missing = None, [i for i, cut in enumerate(cuts) if cut is None]
    whole = [cut for cut in cuts if cut is not None]
    if not missing and any(cut.clips.labels for cut in whole):
        shard, missing = _join(work, paths, [cut.clips for cut in whole])
    if missing:
        for place in missing:
            paths[place].unlink(missing_ok=True)
        return Counts(missing=tuple(missing))
    rejects = [reject for cut in whole for reject in cut.rejects]
    finished = FinishedGroup(group.fingerprint, len(group.sources), shard, rejects)
    write_atomic(record_path(work.folder, group.fingerprint), _to_json(finished))
    with suppress(OSError):
        for path in paths:
            path.unlink(missing_ok=True)
    return finished.counts


def _join(
    work: ShardWork, paths: Sequence[Path], cuts: Sequence[Shard]
) -> tuple[Shard | None, list[int]]:
    """Write the cuts' clips as one shard; where some are not what was written, give their places instead."""
    tar = ClipTar(work.out / work.group.shard, fps=work.settings.fps)
    damaged: list[int] = []
    records = []
    try:
        for place, (path, cut) in enumerate(zip(paths, cuts, strict=True)):
            records.append(cut.records.copy())
            records[-1]["at"] += tar.size
            if not _copy(path, cut, tar):
                damaged.append(place)
        if damaged:
            return None, damaged
        tar.append(END)
        tar.finish()
    finally:
        tar.discard()
    labels = [name for cut in cuts for name in cut.labels]
    return replace(tar.shard(), rows=np.concatenate(records).tobytes(), labels=labels), []


def _copy(path: Path, cut: Shard, tar: ClipTar) -> bool:
    """Append a cut's clips; returns whether they are what was written."""
    left, crc = cut.size, 0
    with storing(path), open(path, "rb") as file:
        while left and (block := file.read(min(BLOCK, left))):
            crc = zlib.crc32(block, crc)
            tar.append(block)
            left -= len(block)
    return not left and crc == cut.crc32


def _read_facts(path: Path) -> CutFacts | None:
    """Read a cut's facts; None where it is absent or damaged."""
    with suppress(OSError), open(path, "rb") as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(0, end - TAIL))
        tail = file.read()
        length, crc = (int.from_bytes(tail[i : i + 4], "little") for i in (0, 4))
        if tail[8:] == MAGIC and end >= TAIL + length:
            file.seek(end - TAIL - length)
            text = file.read(length)
            facts = _from_json(text, CutFacts) if zlib.crc32(text) == crc else None
            return facts if facts and facts.clips.size == end - TAIL - length else None
    return None


def _to_json(value: CutFacts | FinishedGroup) -> bytes:
    # json's, since names that are no UTF-8 hold surrogates, which msgspec doesn't write
    return json.dumps(msgspec.to_builtins(value)).encode()


def _from_json(text: bytes, kind: type[T]) -> T | None:
    try:
        return msgspec.convert(json.loads(text), kind)
    except ValueError:
        return None


def read_record(path: Path, out: Path) -> FinishedGroup | None:
    """Read the record of a group's shard; None where it is absent or damaged, or its shard in ``out`` is."""
    try:
        finished = _from_json(path.read_bytes(), FinishedGroup)
    except OSError:
        return None
    shard = None if finished is None else finished.shard
    damaged = shard is not None and size_problem(out / shard.file, shard.size) is not None
    return None if damaged else finished


def cuts_in(folder: Path) -> Iterator[str]:
    """List the file names of the cuts in a working folder, and remove leftovers of a kill."""
    for entry in os.scandir(folder):
        if entry.name.endswith(".cut"):
            yield entry.name
        elif entry.name.endswith((".tmp", ".at")):
            with suppress(OSError):
                os.unlink(entry.path)
