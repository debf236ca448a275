"""Finished groups into a data set: all of it at once, beside and then instead of what the folder held before.

``groups-CRC.jsonl`` says which group each shard is, so that a later ingest keeps those that are still right. Its
first line holds what was rejected before any file was opened.
"""

from __future__ import annotations

import hashlib
import json
import re
import zlib
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from engine.core.files import write_atomic
from engine.data.ingest.cut import Settings
from engine.data.ingest.jobs import Made
from engine.data.ingest.sources import Reject
from engine.data.media.decode import SAMPLE_RATE
from engine.data.shards.damage import index_name, size_problem
from engine.data.shards.index import is_shards, read_dataset
from engine.data.shards.record import RECORD
from engine.data.shards.writer import Shard, write_dataset

OURS = re.compile(
    r"dataset\.json|rejects\.jsonl|\.ingest|(index|groups)[-\w]*\.(bin|jsonl)|shard-\w+\.tar"
)
"""Files and folders of an ingest's; whatever is left half written is hidden besides."""
STALE = re.compile(
    r"(index|groups)[-\w]*\.(bin|jsonl)|shard-\w+\.tar|\.shard-.*\.tmp|\.(dataset|index|groups).*\.tmp"
)


def check_out(out: Path) -> None:
    """Raise ValueError where ``out`` can't become a data set, or holds files that are not an ingest's."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file: give a folder for the shards")
    for file in sorted(out.iterdir()) if out.is_dir() else []:
        if not OURS.fullmatch(file.name) and not STALE.fullmatch(file.name):
            raise ValueError(
                f"{out} holds {file.name}, which is no shard: give another folder for the shards"
            )


def commit(out: Path, made: Sequence[Made], settings: Settings, listed: Sequence[Reject]) -> None:
    """Make the groups' shards, all in ``out`` already, its data set; ``listed`` are rejects of no group.

    A kill at any moment leaves the old data set or the new one. Raises StorageError.
    """
    lines: list[dict[str, Any]] = [{"rejects": _told(listed)}]
    for group in made:
        shard = None if group.shard is None else group.shard.file
        lines.append(
            {
                "fingerprint": group.fingerprint,
                "sources": group.sources,
                "file": shard,
                "rejects": _told(group.rejects),
            }
        )
    text = _lines(lines)
    name = f"groups-{zlib.crc32(text):08x}.jsonl"
    write_atomic(out / name, text)
    shards = [group.shard for group in made if group.shard is not None]
    write_dataset(
        out,
        shards,
        fps=settings.fps,
        short_side=settings.short_side,
        sample_rate=SAMPLE_RATE,
        sources=sum(group.sources for group in made) + len(listed),
        seconds=sum(int(s.records["num_frames"].sum()) for s in shards) / settings.fps,
        settings=settings.told(),
        fingerprint=fingerprint_of([group.fingerprint for group in made], listed),
        groups=name,
    )
    write_rejects(out, made, listed)


def write_rejects(out: Path, made: Sequence[Made], listed: Sequence[Reject]) -> None:
    """Write ``rejects.jsonl``."""
    write_atomic(out / "rejects.jsonl", _rejects_text(made, listed))


def has_rejects(out: Path, made: Sequence[Made], listed: Sequence[Reject]) -> bool:
    """Whether ``rejects.jsonl`` is as it should be."""
    try:
        return (out / "rejects.jsonl").read_bytes() == _rejects_text(made, listed)
    except OSError:
        return False


def _rejects_text(made: Sequence[Made], listed: Sequence[Reject]) -> bytes:
    return _lines(_told([*listed, *(reject for group in made for reject in group.rejects)]))


def sweep(out: Path) -> None:
    """Remove files of earlier data sets and unfinished ones that ``out``'s data set doesn't name."""
    facts = read_dataset(out)
    named = {index_name(facts), facts.get("groups"), *(s["file"] for s in facts["shards"])}
    for file in out.iterdir():
        if STALE.fullmatch(file.name) and file.name not in named:
            with suppress(OSError):
                file.unlink()


def fingerprint_of(groups: Sequence[str], listed: Sequence[Reject]) -> str:
    """Identifies a data set before it is made: by its groups, and by what was rejected before."""
    return hashlib.sha256(json.dumps([list(groups), _told(listed)]).encode()).hexdigest()


def committed(out: Path) -> tuple[str, dict[str, Made]]:
    """A data set's fingerprint, and its groups, by theirs, whose shards are there; none for no data set."""
    try:
        if not is_shards(out):
            return "", {}
        facts = read_dataset(out)
        groups = [json.loads(line) for line in (out / facts["groups"]).read_bytes().splitlines()]
        return facts["fingerprint"], {m.fingerprint: m for m in _made(out, facts, groups[1:])}
    except (
        ValueError,
        OSError,
        KeyError,
        TypeError,
    ):  # what it says can't be relied on: make it anew
        return "", {}


def _made(out: Path, facts: dict[str, Any], groups: list[dict[str, Any]]) -> list[Made]:
    index = np.fromfile(out / index_name(facts), RECORD)
    if zlib.crc32(index.tobytes()) != facts["index_crc32"]:
        return []
    labels = [*facts["classes"], None]
    found, first = [], 0
    listed = {shard["file"]: shard for shard in facts["shards"]}
    for group in groups:
        rejects = [Reject(**reject) for reject in group["rejects"]]
        shard = None
        if group["file"] is not None:
            entry = listed[group["file"]]
            records = index[first : first + entry["clips"]]
            first += entry["clips"]
            if size_problem(out / entry["file"], entry["bytes"]) is not None:
                continue
            names = [labels[i] for i in records["label"]]
            shard = Shard(entry["file"], entry["bytes"], entry["crc32"], records, names)
        found.append(Made(group["fingerprint"], group["sources"], shard, rejects))
    return found


def _told(rejects: Sequence[Reject]) -> list[dict[str, Any]]:
    return [reject.told() for reject in rejects]


def _lines(values: Sequence[Any]) -> bytes:
    return "".join(f"{json.dumps(value)}\n" for value in values).encode()
