"""The work of ingesting in pieces that survive a kill: a part for each source, and shards made of parts.

A part is a file of the source's clips as they will stand in the shard, followed by what the index needs of them.
When all sources of a group have theirs, they are put together as its shard, and a record of that shard is kept.
Parts, shards and records appear whole or not at all, so whatever is there needs not be done again.
"""

from __future__ import annotations

import base64
import json
import os
import zlib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from engine.data.cut import CRASHED, Settings, cut_source
from engine.data.groups import Group, clip_key
from engine.data.record import RECORD
from engine.data.shard_writer import END, ClipTar, NewClip, Shard, storing, write_atomic
from engine.data.sources import Reject, Source

COPY = 1 << 20
"""Bytes copied at a time."""
CRASHES = 3
"""Clips of a source that may kill their process before the source is given up."""
TAIL = 16
"""Bytes at a part's end: the length of what precedes them, its checksum, MAGIC."""
MAGIC = b"PART0001"


@dataclass(frozen=True)
class CutJob:
    """Cut a source into the part at ``path``."""

    source: Source
    settings: Settings
    path: Path
    skip: tuple[int, ...] = ()
    """Numbers of clips that killed their process."""


@dataclass(frozen=True)
class ShardJob:
    """Put a group's parts together as its shard in ``out``; ``folder`` holds the parts and gets the record."""

    group: Group
    settings: Settings
    folder: Path
    out: Path


Job = CutJob | ShardJob


@dataclass(frozen=True)
class Done:
    """What a job gave."""

    clips: int = 0
    frames: int = 0
    rejects: int = 0
    missing: tuple[int, ...] = ()
    """Places in the group of sources whose parts are damaged or absent and must be made again."""


@dataclass(frozen=True)
class Made:
    """A group's shard and rejects."""

    fingerprint: str
    sources: int
    shard: Shard | None
    """None where no source gave a clip."""
    rejects: list[Reject]


def run_job(job: Job) -> Done:
    """Do a job; raises StorageError where its files can't be written, and OSError where the videos are gone."""
    return _cut(job) if isinstance(job, CutJob) else _assemble(job)


def part_name(fingerprint: bytes) -> str:
    """The file name of a source's part."""
    return f"{fingerprint.hex()}.part"


def part_path(folder: Path, fingerprint: bytes) -> Path:
    """Where a source's part is, in an ingest's working folder."""
    return folder / part_name(fingerprint)


def made_path(folder: Path, fingerprint: str) -> Path:
    """Where the record of a group's shard is, in an ingest's working folder."""
    return folder / f"{fingerprint}.made"


def _cut(job: CutJob) -> Done:
    tar = ClipTar(job.path, fps=job.settings.fps)

    def keep(clip: NewClip) -> None:
        tar.add(clip, key=clip_key(job.source, len(tar.labels)))

    def trying(number: int) -> None:
        marker.write_text(str(number))

    marker = _marker(job)
    try:
        rejects = cut_source(job.source, job.settings, keep, trying=trying, skip=job.skip)
        marker.unlink(missing_ok=True)
        return _end_part(tar, rejects)
    except BaseException:
        tar.discard()
        raise


def _marker(job: CutJob) -> Path:
    """Where a job notes which clip it is at."""
    return job.path.with_suffix(".at")


def after_crash(job: CutJob) -> CutJob | None:
    """The job without the clip at which its process died; None where no clip is known, or it has died too often."""
    try:
        number = int(_marker(job).read_text())
    except (OSError, ValueError):
        return None
    _marker(job).unlink(missing_ok=True)
    again = number in job.skip or len(job.skip) == CRASHES
    return None if again else replace(job, skip=(*job.skip, number))


def reject_source(job: CutJob) -> Done:
    """Write the part of a source whose processes died of it."""
    source = job.source
    reject = Reject(source.relative, CRASHED, source.stretch, source.listed)
    return _end_part(ClipTar(job.path, fps=job.settings.fps), [reject])


def _end_part(tar: ClipTar, rejects: list[Reject]) -> Done:
    facts = {"size": tar.size, "crc32": tar.crc32, "labels": tar.labels}
    facts |= {"records": _packed(tar.records), "rejects": [r.told() for r in rejects]}
    frames = int(tar.records["num_frames"].sum())
    text = json.dumps(facts).encode()
    tail = len(text).to_bytes(4, "little") + zlib.crc32(text).to_bytes(4, "little") + MAGIC
    tar.append(text + tail)
    tar.finish(durable=False)  # its checksums tell whether all of it got to the disk
    return Done(len(tar.labels), frames, len(rejects))


def _assemble(job: ShardJob) -> Done:
    group, paths = job.group, [part_path(job.folder, p) for p in job.group.prints]
    parts = [_read_facts(path) for path in paths]
    missing = [i for i, facts in enumerate(parts) if facts is None]
    shard = None
    if not missing and any(facts["labels"] for facts in parts if facts):
        tar = ClipTar(job.out / group.shard, fps=job.settings.fps)
        try:
            records = []
            for place, (path, facts) in enumerate(zip(paths, parts, strict=True)):
                assert facts is not None
                records.append(unpacked(facts["records"]))
                records[-1]["at"] += tar.size
                if not _copy(path, facts, tar):
                    missing.append(place)
            if not missing:
                tar.append(END)
                tar.finish()
                labels = [name for facts in parts if facts for name in facts["labels"]]
                size, crc = tar.size, tar.crc32
                shard = Shard(group.shard, size, crc, np.concatenate(records), labels)
        finally:
            tar.discard()
    if missing:
        for place in missing:
            paths[place].unlink(missing_ok=True)
        return Done(missing=tuple(missing))
    rejects = [Reject(**reject) for facts in parts if facts for reject in facts["rejects"]]
    made = Made(group.fingerprint, len(group.sources), shard, rejects)
    write_atomic(made_path(job.folder, group.fingerprint), json.dumps(told(made)).encode())
    with suppress(OSError):
        for path in paths:
            path.unlink(missing_ok=True)
    frames = 0 if shard is None else int(shard.records["num_frames"].sum())
    return Done(0 if shard is None else len(shard.labels), frames, len(rejects))


def _read_facts(path: Path) -> dict[str, Any] | None:
    """What a part says of its clips; None where it is absent or damaged."""
    with suppress(OSError, ValueError), open(path, "rb") as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(0, end - TAIL))
        tail = file.read()
        length, crc = (int.from_bytes(tail[i : i + 4], "little") for i in (0, 4))
        if tail[8:] == MAGIC and end >= TAIL + length:
            file.seek(end - TAIL - length)
            text = file.read(length)
            if zlib.crc32(text) == crc:
                facts: dict[str, Any] = json.loads(text)
                return facts if facts["size"] == end - TAIL - length else None
    return None


def _copy(path: Path, facts: dict[str, Any], tar: ClipTar) -> bool:
    """Append a part's clips; says whether they are what was written."""
    left, crc = facts["size"], 0
    with storing(path), open(path, "rb") as file:
        while left and (block := file.read(min(COPY, left))):
            crc = zlib.crc32(block, crc)
            tar.append(block)
            left -= len(block)
    return not left and crc == facts["crc32"]


def _packed(records: np.ndarray[Any, Any]) -> str:
    return base64.b64encode(records.tobytes()).decode()


def unpacked(text: str) -> np.ndarray[Any, Any]:
    """Records from their text in a part or a shard's record."""
    return np.frombuffer(base64.b64decode(text), RECORD).copy()


def told(made: Made) -> dict[str, Any]:
    """A group's shard and rejects as JSON's values."""
    shard = made.shard
    facts: dict[str, Any] = {"fingerprint": made.fingerprint, "sources": made.sources}
    facts["rejects"] = [reject.told() for reject in made.rejects]
    if shard is not None:
        facts |= {"file": shard.file, "bytes": shard.size, "crc32": shard.crc32}
        facts |= {"labels": shard.labels, "records": _packed(shard.records)}
    return facts


def read_made(path: Path, out: Path) -> Made | None:
    """The record of a group's shard; None where it is absent or damaged, or its shard in ``out`` is."""
    try:
        return made_of(json.loads(path.read_bytes()), out)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def made_of(facts: dict[str, Any], out: Path) -> Made | None:
    """A group's shard from JSON's values; None where the shard in ``out`` is missing or of another size."""
    shard = None
    if "file" in facts:
        records = unpacked(facts["records"])
        file, size = facts["file"], facts["bytes"]
        shard = Shard(file, size, facts["crc32"], records, facts["labels"])
        with suppress(OSError):
            if (out / file).stat().st_size == size:
                size = None
        if size is not None:
            return None
    rejects = [Reject(**reject) for reject in facts["rejects"]]
    return Made(facts["fingerprint"], facts["sources"], shard, rejects)


def parts_in(folder: Path) -> Iterator[str]:
    """File names of the parts in a working folder; leftovers of a kill are removed."""
    for entry in os.scandir(folder):
        if entry.name.endswith(".part"):
            yield entry.name
        elif entry.name.endswith((".tmp", ".at")):
            with suppress(OSError):
                os.unlink(entry.path)
