"""What is in a data set, and whether its bytes are still those that were written."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engine.data.shards.damage import index_name, size_problem
from engine.data.shards.record import MAX_SPLITS, PARTIAL, PARTS, RECORD
from engine.data.shards.index import ClipIndex, read_dataset

BLOCK = 1 << 20


@dataclass(frozen=True)
class Description:
    """What a data set holds."""

    facts: dict[str, Any]
    """``dataset.json``'s."""
    clips: int
    seconds: float
    bytes: int
    """Of its shards."""
    num_shards: int
    with_sound: int
    partial: int
    """Clips that end before they should."""
    classes: dict[str, int]
    """Clips of each class."""
    unlabelled: int
    splits: dict[str, int]
    """Clips of each part of each split, as "split 1, train"."""
    sizes: dict[str, int]
    """Clips of each picture size, as "170x128", most frequent first."""
    damaged: tuple[str, ...]
    """Shards that are missing or of the wrong size, and were left out of the counts."""


def describe(folder: Path) -> Description:
    """Tell what a data set holds, from its index alone; raises ValueError for no data set."""
    facts = read_dataset(folder)
    index = ClipIndex([folder], warn=lambda _: None)
    left_out = {damage.path.name for damage in index.damaged}
    counts = np.bincount(index.label + 1, minlength=len(index.classes) + 1)
    parts = [(n, part) for n in range(1, MAX_SPLITS + 1) for part in PARTS[1:]]
    splits = {f"split {n}, {part}": int(index.in_split(n, part).sum()) for n, part in parts}
    pictures, many = np.unique(np.stack([index.width, index.height], 1), axis=0, return_counts=True)
    order = np.argsort(-many, kind="stable")
    return Description(
        facts=facts,
        clips=len(index),
        seconds=float(index.duration.sum()),
        bytes=sum(shard["bytes"] for shard in facts["shards"] if shard["file"] not in left_out),
        num_shards=len(facts["shards"]) - len(index.damaged),
        with_sound=int(index.has_audio.sum()),
        partial=int((index.flags & PARTIAL > 0).sum()),
        classes={name: int(n) for name, n in zip(index.classes, counts[1:], strict=True)},
        unlabelled=int(counts[0]),
        splits={name: n for name, n in splits.items() if n},
        sizes={f"{pictures[i][0]}x{pictures[i][1]}": int(many[i]) for i in order},
        damaged=tuple(f"{damage}" for damage in index.damaged),
    )


def verify(folder: Path, *, progress: Callable[[int, int], None] | None = None) -> list[str]:
    """Read every byte of a data set and tell what is damaged, one line a file; an empty list is a sound one.

    ``progress`` is called with the bytes read so far and all bytes. Raises ValueError for no data set.
    """
    facts = read_dataset(folder)
    files = [(index_name(facts), facts["clips"] * RECORD.itemsize, facts["index_crc32"])]
    files += [(s["file"], s["bytes"], s["crc32"]) for s in facts["shards"]]
    total, done, problems = sum(size for _, size, _ in files), 0, []
    for name, size, expected in files:
        path = folder / name
        problem = size_problem(path, size)
        crc = 0
        try:
            with open(path, "rb") as file:
                while problem is None and (block := file.read(BLOCK)):
                    crc = zlib.crc32(block, crc)
                    if progress is not None:
                        done += len(block)
                        progress(done, total)
        except OSError as error:
            problem = problem or f"can't be read: {error.strerror}"
        if problem is None and crc != expected:
            problem = f"is damaged: its checksum is {crc:08x}, not {expected:08x}"
        if problem is not None:
            problems.append(f"{path} {problem}")
    return problems
