"""The small built-in data set: moving, sounding scenes, drawn and encoded on first use."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from engine.core.files import take_lock, user_cache
from engine.data.demo.scenes import CLASSES, FPS, SAMPLE_RATE, UNLABELLED, draw_scene
from engine.data.media.encode import write_video

VERSION = 2
"""Raised whenever a clip would look or sound different, so that cached sets are made again."""
MARKER = "demo.json"


@dataclass(frozen=True)
class Demo:
    """Folders of a finished set: of CLASS/NNN.mp4, all with sound, and of NNN.mp4."""

    labelled: Path
    unlabelled: Path


def default_cache() -> Path:
    """The set's folder in the user's cache."""
    return user_cache() / f"demo-v{VERSION}"


def make_demo(
    folder: Path,
    *,
    seed: int = 0,
    clips_per_class: int = 50,
    unlabelled_clips: int = 96,
    progress: Callable[[int, int], None] | None = None,
    on_wait: Callable[[], object] = lambda: None,
) -> Demo:
    """Return the set in ``folder``, made first where absent, incomplete or of other parameters.

    ``progress(done, total)`` is called after each clip. The set is made beside ``folder`` and renamed into place, so
    that a kill at any moment leaves nothing that is taken for finished. Where another process is making it, calls
    ``on_wait`` once and waits. Raises ValueError where ``folder`` holds anything but such a set, and OSError that
    names the folder where it can't be written.
    """
    folder = Path(folder).absolute()
    facts = {"version": VERSION, "seed": seed}
    facts |= {"clips_per_class": clips_per_class, "unlabelled_clips": unlabelled_clips}
    jobs = {f"labelled/{c}/{n:03d}.mp4": (c, n) for c in CLASSES for n in range(clips_per_class)}
    jobs |= {f"{UNLABELLED}/{n:03d}.mp4": (UNLABELLED, n) for n in range(unlabelled_clips)}
    part, old, lock = (folder.with_name(f".{folder.name}.{end}") for end in ("part", "old", "lock"))
    try:
        if not _finished(folder, facts, jobs):
            with take_lock(lock, on_wait=on_wait), _absent(part, old):
                if not _finished(folder, facts, jobs):
                    _check_ours(folder)
                    _write(part, jobs, seed=seed, progress=progress)
                    (part / MARKER).write_text(json.dumps(facts) + "\n")
                    if folder.exists():
                        folder.rename(old)
                    part.rename(folder)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        why = "the disk is full (about 60 MB are needed)" if full else error.strerror or str(error)
        hint = "free some space or set XDG_CACHE_HOME to a folder elsewhere"
        what = f"can't write the demo videos: {why}; {hint}"
        raise OSError(error.errno, what, str(folder)) from error
    return Demo(folder / "labelled", folder / UNLABELLED)


def _finished(folder: Path, facts: dict[str, int], names: Iterable[str]) -> bool:
    try:
        marker = json.loads((folder / MARKER).read_text())
    except (OSError, ValueError):
        return False
    return bool(marker == facts) and all((folder / name).is_file() for name in names)


def _check_ours(folder: Path) -> None:
    """Raise ValueError for a folder of somebody's own files, since a set is replaced as a whole."""
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    foreign = names - {MARKER, "labelled", UNLABELLED} or (names and MARKER not in names)
    if foreign or (folder.exists() and not folder.is_dir()):
        raise ValueError(f"{folder} is not a demo set of ours: name a new or empty folder")


@contextmanager
def _absent(*folders: Path) -> Iterator[None]:
    """Remove the folders before and after the block."""
    try:
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)
        yield
    finally:
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)


def _write(
    folder: Path,
    jobs: dict[str, tuple[str, int]],
    *,
    seed: int,
    progress: Callable[[int, int], None] | None,
) -> None:
    def write(name: str) -> None:
        scene = draw_scene(*jobs[name], seed=seed)
        sound, rate = scene.sound, SAMPLE_RATE
        write_video(folder / name, scene.frames, fps=FPS, sound=sound, sample_rate=rate)

    for name in jobs:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
    pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1))
    try:
        for done, _ in enumerate(pool.map(write, jobs), start=1):
            if progress is not None:
                progress(done, len(jobs))
    finally:
        pool.shutdown(cancel_futures=True)
