"""A command's data, shards or folders of raw videos, opened as one data set of clips."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from engine.core.files import user_cache
from engine.data.demo.demo import default_cache, make_demo
from engine.data.ingest.run import Progress, ingest
from engine.data.ingest.sources import Reject
from engine.data.shards.index import ClipIndex, is_shards

Report = Callable[[str, int, int], None]
"""Called while something is prepared: what, done, total; once with a total of 0 for a line to be said."""


@dataclass(frozen=True)
class Library:
    """Opened data, its folders, and what is missing of it."""

    index: ClipIndex
    shards: tuple[Path, ...]
    rejects: tuple[Reject, ...]
    """Sources that could not be used; only of folders that were ingested now or before by this engine."""
    warnings: tuple[str, ...] = ()
    """Shards or folders that were left out, and why."""


def demo_folders(report: Report) -> tuple[list[Path], list[Path]]:
    """The built-in set's folders, made on first use: (videos to train on, labelled videos)."""
    demo = make_demo(
        default_cache(),
        progress=lambda done, total: report("drawing the demo's clips", done, total),
        on_wait=lambda: report("waiting for another process that draws the demo's clips", 0, 0),
    )
    return [demo.unlabelled], [demo.labelled]


def open_library(
    paths: Sequence[Path], *, cache: Path, report: Report, workers: int | None = None
) -> Library:
    """Open shard folders as they are, and raw videos by way of shards that ``cache`` keeps.

    Videos in a folder inside another one that is read count once. Raises ValueError for a path that is absent or holds
    no videos.
    """
    shards: list[Path] = []
    rejects: list[Reject] = []
    warnings: list[str] = []
    every = list(dict.fromkeys(p.expanduser().resolve() for p in paths))
    for path in every:
        if not path.exists():
            raise ValueError(f"{path}: no such file or folder")
        if is_shards(path):
            shards.append(path)
            continue
        if around := [other for other in every if other in path.parents and not is_shards(other)]:
            warnings.append(f"{path}: read with {around[0]}, which it is in: its clips count once")
            continue
        out = cache / f"{path.name}-{hashlib.sha256(str(path).encode()).hexdigest()[:10]}"
        result = ingest([path], out, workers=workers, progress=reported(path.name, report))
        rejects += result.rejects
        shards.append(out)
    index = ClipIndex(shards, warn=warnings.append)
    return Library(index, tuple(shards), tuple(rejects), tuple(warnings))


def reported(name: str, report: Report) -> Callable[[Progress], None]:
    """A callback for ``ingest`` that reports its progress as reading ``name``."""

    def show(now: Progress) -> None:
        if now.note:
            report(now.note, 0, 0)
        elif now.waiting:
            report(f"waiting for another process that reads {name}", 0, 0)
        elif now.total or now.done:
            report(f"reading {name}", now.done, now.total)

    return show


def default_shard_cache() -> Path:
    """The folder that keeps shards of raw folders between commands."""
    return user_cache() / "shards"
