"""The work of ingesting, in steps that survive a kill: a cut for each source, and shards made of cuts.

A cut is a file of the source's clips as they will stand in the shard, followed by what the index needs of them.
When all sources of a group have theirs, they are put together as its shard, and a record of that shard is kept.
Cuts, shards and records appear whole or not at all, so whatever is there needs not be done again.
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

from engine.core.files import storing, write_atomic
from engine.data.ingest.cut import CRASHED, Settings, cut_source
from engine.data.ingest.grouping import Group, clip_key
from engine.data.ingest.sources import Reject, Source
from engine.data.shards.record import RECORD
from engine.data.shards.writer import END, ClipTar, NewClip, Shard

COPY = 1 << 20
"""Bytes copied at a time."""
CRASHES = 3
"""Clips of a source that may kill their process before the source is given up."""
TAIL = 16
"""Bytes at a cut's end: the length of what precedes them, its checksum, MAGIC."""
MAGIC = b"CUTS0001"


@dataclass(frozen=True)
class CutWork:
    """Cutting a source into the file at ``path``."""

    source: Source
    settings: Settings
    path: Path
    skip: tuple[int, ...] = ()
    """Numbers of clips that killed their process."""


@dataclass(frozen=True)
class ShardWork:
    """Putting a group's cuts together as its shard in ``out``; ``folder`` holds the cuts and gets the record."""

    group: Group
    settings: Settings
    folder: Path
    out: Path


Work = CutWork | ShardWork


@dataclass(frozen=True)
class Counts:
    """What a work gave."""

    clips: int = 0
    frames: int = 0
    rejects: int = 0
    missing: tuple[int, ...] = ()
    """Places in the group of sources whose cuts are damaged or absent and must be made again."""


@dataclass(frozen=True)
class Made:
    """A group's shard and rejects."""

    fingerprint: str
    sources: int
    shard: Shard | None
    """None where no source gave a clip."""
    rejects: list[Reject]


def do_work(work: Work) -> Counts:
    """Cut a source or write a shard; raises StorageError for files that can't be written, OSError for absent videos."""
    return _cut(work) if isinstance(work, CutWork) else _assemble(work)


def cut_name(fingerprint: bytes) -> str:
    """The file name of a source's cut, in an ingest's working folder."""
    return f"{fingerprint.hex()}.cut"


def made_path(folder: Path, fingerprint: str) -> Path:
    """Where the record of a group's shard is, in an ingest's working folder."""
    return folder / f"{fingerprint}.made"


def _cut(work: CutWork) -> Counts:
    tar = ClipTar(work.path, fps=work.settings.fps)

    def keep(clip: NewClip) -> None:
        tar.add(clip, key=clip_key(work.source, len(tar.labels)))

    def trying(number: int) -> None:
        marker.write_text(str(number))

    marker = _marker(work)
    try:
        rejects = cut_source(work.source, work.settings, keep, trying=trying, skip=work.skip)
        marker.unlink(missing_ok=True)
        return _end_cut(tar, rejects)
    except BaseException:
        tar.discard()
        raise


def _marker(work: CutWork) -> Path:
    """Where a process notes which clip it is at."""
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
    facts = {"size": tar.size, "crc32": tar.crc32, "labels": tar.labels}
    facts |= {"records": _packed(tar.records), "rejects": [r.told() for r in rejects]}
    frames = int(tar.records["num_frames"].sum())
    text = json.dumps(facts).encode()
    tail = len(text).to_bytes(4, "little") + zlib.crc32(text).to_bytes(4, "little") + MAGIC
    tar.append(text + tail)
    tar.finish(durable=False)  # its checksums tell whether all of it got to the disk
    return Counts(len(tar.labels), frames, len(rejects))


def _assemble(work: ShardWork) -> Counts:
    group, paths = work.group, [work.folder / cut_name(p) for p in work.group.prints]
    cuts = [_read_facts(path) for path in paths]
    missing = [i for i, facts in enumerate(cuts) if facts is None]
    shard = None
    if not missing and any(facts["labels"] for facts in cuts if facts):
        tar = ClipTar(work.out / group.shard, fps=work.settings.fps)
        try:
            records = []
            for place, (path, facts) in enumerate(zip(paths, cuts, strict=True)):
                assert facts is not None
                records.append(_unpacked(facts["records"]))
                records[-1]["at"] += tar.size
                if not _copy(path, facts, tar):
                    missing.append(place)
            if not missing:
                tar.append(END)
                tar.finish()
                labels = [name for facts in cuts if facts for name in facts["labels"]]
                size, crc = tar.size, tar.crc32
                shard = Shard(group.shard, size, crc, np.concatenate(records), labels)
        finally:
            tar.discard()
    if missing:
        for place in missing:
            paths[place].unlink(missing_ok=True)
        return Counts(missing=tuple(missing))
    rejects = [Reject(**reject) for facts in cuts if facts for reject in facts["rejects"]]
    made = Made(group.fingerprint, len(group.sources), shard, rejects)
    write_atomic(made_path(work.folder, group.fingerprint), json.dumps(_as_json(made)).encode())
    with suppress(OSError):
        for path in paths:
            path.unlink(missing_ok=True)
    frames = 0 if shard is None else int(shard.records["num_frames"].sum())
    return Counts(0 if shard is None else len(shard.labels), frames, len(rejects))


def _read_facts(path: Path) -> dict[str, Any] | None:
    """What a cut says of its clips; None where it is absent or damaged."""
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
    """Append a cut's clips; says whether they are what was written."""
    left, crc = facts["size"], 0
    with storing(path), open(path, "rb") as file:
        while left and (block := file.read(min(COPY, left))):
            crc = zlib.crc32(block, crc)
            tar.append(block)
            left -= len(block)
    return not left and crc == facts["crc32"]


def _packed(records: np.ndarray[Any, Any]) -> str:
    return base64.b64encode(records.tobytes()).decode()


def _unpacked(text: str) -> np.ndarray[Any, Any]:
    return np.frombuffer(base64.b64decode(text), RECORD).copy()


def _as_json(made: Made) -> dict[str, Any]:
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
        return _made_of(json.loads(path.read_bytes()), out)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _made_of(facts: dict[str, Any], out: Path) -> Made | None:
    """A group's shard from JSON's values; None where the shard in ``out`` is missing or of another size."""
    shard = None
    if "file" in facts:
        records = _unpacked(facts["records"])
        file, size = facts["file"], facts["bytes"]
        shard = Shard(file, size, facts["crc32"], records, facts["labels"])
        with suppress(OSError):
            if (out / file).stat().st_size == size:
                size = None
        if size is not None:
            return None
    rejects = [Reject(**reject) for reject in facts["rejects"]]
    return Made(facts["fingerprint"], facts["sources"], shard, rejects)


def cuts_in(folder: Path) -> Iterator[str]:
    """File names of the cuts in a working folder; leftovers of a kill are removed."""
    for entry in os.scandir(folder):
        if entry.name.endswith(".cut"):
            yield entry.name
        elif entry.name.endswith((".tmp", ".at")):
            with suppress(OSError):
                os.unlink(entry.path)
