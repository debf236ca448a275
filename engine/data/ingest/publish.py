"""Finished groups into a data set: all of it at once, beside and then instead of what the folder held before.

``groups-CRC.jsonl`` says which group each shard is, so that a later ingest keeps those that are still right. Its
first line holds what was rejected before any file was opened.
"""

from __future__ import annotations

import hashlib
import json
import re
import zlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from engine.core.files import write_atomic
from engine.data.ingest.cut import Settings
from engine.data.ingest.jobs import FinishedGroup
from engine.data.ingest.sources import Reject
from engine.data.media.decode import SAMPLE_RATE
from engine.data.shards.index import RECORD, index_name, is_shards, read_dataset, size_problem
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


def commit(
    out: Path, groups: Sequence[FinishedGroup], settings: Settings, listed: Sequence[Reject]
) -> None:
    """Make the groups' shards, all in ``out`` already, its data set; ``listed`` are rejects of no group.

    A kill at any moment leaves the old data set or the new one. Raises StorageError.
    """
    lines: list[dict[str, Any]] = [{"rejects": [reject.as_dict() for reject in listed]}]
    lines += [
        {
            "fingerprint": group.fingerprint,
            "sources": group.sources,
            "file": None if group.shard is None else group.shard.file,
            "rejects": [reject.as_dict() for reject in group.rejects],
        }
        for group in groups
    ]
    text = _lines(lines)
    name = f"groups-{zlib.crc32(text):08x}.jsonl"
    write_atomic(out / name, text)
    shards = [group.shard for group in groups if group.shard is not None]
    write_dataset(
        out,
        shards,
        fps=settings.fps,
        short_side=settings.short_side,
        sample_rate=SAMPLE_RATE,
        sources=sum(group.sources for group in groups) + len(listed),
        seconds=sum(group.counts.frames for group in groups) / settings.fps,
        settings=settings.identity(),
        fingerprint=fingerprint_of([group.fingerprint for group in groups], listed),
        groups=name,
    )
    write_rejects(out / "rejects.jsonl", all_rejects(groups, listed))


def all_rejects(groups: Sequence[FinishedGroup], listed: Sequence[Reject]) -> list[Reject]:
    """The rejects of a data set, in the order of ``rejects.jsonl``."""
    return [*listed, *(reject for group in groups for reject in group.rejects)]


def write_rejects(path: Path, rejects: Sequence[Reject]) -> None:
    """Write ``rejects.jsonl``."""
    write_atomic(path, _lines([reject.as_dict() for reject in rejects]))


def has_rejects(path: Path, rejects: Sequence[Reject]) -> bool:
    """Whether ``rejects.jsonl`` holds these."""
    with suppress(OSError):
        return path.read_bytes() == _lines([reject.as_dict() for reject in rejects])
    return False


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
    text = json.dumps([list(groups), [reject.as_dict() for reject in listed]])
    return hashlib.sha256(text.encode()).hexdigest()


def committed(out: Path) -> tuple[str, dict[str, FinishedGroup]]:
    """Read a data set's fingerprint, and its groups, by theirs, whose shards are there; none for no data set."""
    # a data set that can't be relied on is made anew
    with suppress(ValueError, OSError, KeyError, TypeError):
        if is_shards(out):
            facts = read_dataset(out)
            lines = (out / facts["groups"]).read_bytes().splitlines()[1:]
            groups = _finished(out, facts, [json.loads(line) for line in lines])
            return facts["fingerprint"], {group.fingerprint: group for group in groups}
    return "", {}


def _finished(
    out: Path, facts: dict[str, Any], lines: list[dict[str, Any]]
) -> Iterator[FinishedGroup]:
    index = np.fromfile(out / index_name(facts), RECORD)
    if zlib.crc32(index.tobytes()) != facts["index_crc32"]:
        return
    classes = [*facts["classes"], None]
    shards = {shard["file"]: shard for shard in facts["shards"]}
    first = 0
    for line in lines:
        shard = None
        if line["file"] is not None:
            entry = shards[line["file"]]
            rows = index[first : first + entry["clips"]]
            first += entry["clips"]
            if size_problem(out / entry["file"], entry["bytes"]) is not None:
                continue
            labels = [classes[i] for i in rows["label"]]
            shard = Shard(entry["file"], entry["bytes"], entry["crc32"], rows.tobytes(), labels)
        rejects = [Reject(**reject) for reject in line["rejects"]]
        yield FinishedGroup(line["fingerprint"], line["sources"], shard, rejects)


def _lines(values: Sequence[Any]) -> bytes:
    return "".join(f"{json.dumps(value)}\n" for value in values).encode()
