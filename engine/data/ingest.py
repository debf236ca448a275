"""Raw video files to training shards: every file ends as clips or as a rejection with its reason.

The result is the same, byte for byte, whatever the number of worker processes, and whether it came of one run, of
several that were killed, or of an earlier data set to which files were added: where clips are cut depends on the
seed and a file's relative path alone, and each shard on its own sources alone.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.data.commit import (
    check_out,
    commit,
    committed,
    fingerprint_of,
    sweep,
    write_rejects,
)
from engine.data.cut import Settings
from engine.data.executors import Executor, InProcess, Pool
from engine.data.groups import Group, group
from engine.data.parts import (
    CutJob,
    Done,
    Job,
    Made,
    ShardJob,
    made_path,
    part_name,
    part_path,
    parts_in,
    read_made,
)
from engine.data.shard_writer import storing
from engine.data.sources import Found, Reject, find_sources

WORK = ".ingest"
"""Folder, in that of the shards, of what is finished before all is."""


class IngestError(ValueError):
    """Nothing could be ingested; one line says why."""


@dataclass(frozen=True)
class IngestReport:
    """What became of the sources: files, or stretches of files that a list names."""

    sources: int
    clips: int
    seconds: float
    """Length of all clips."""
    rejects: list[Reject]
    unlisted: int = 0
    """Files beside the listed ones that no official list names, and that were passed over."""
    reused: int = field(default=0, compare=False)
    """Sources whose clips an earlier run had made."""

    @property
    def rejected(self) -> int:
        """Sources that gave no clip."""
        return sum(not reject.partial for reject in self.rejects)


@dataclass(frozen=True)
class Progress:
    """How far an ingest is."""

    done: int
    """Sources that are clips or rejects by now."""
    total: int
    """0 while files are still being looked up, ``done`` of them so far."""
    reused: int
    """Of those done, sources that an earlier run did."""
    clips: int
    seconds: float
    """Length of the clips."""
    rejects: int


def ingest(
    videos: Sequence[Path] | Found,
    out: Path,
    *,
    fps: float = 25.0,
    short_side: int = 128,
    clip_seconds: float = 10.0,
    clips_per_video: int | None = None,
    min_seconds: float = 1.0,
    quality: int = 85,
    codec: str = "jpeg",
    seed: int = 0,
    every: float | None = None,
    workers: int | None = None,
    address: str | None = None,
    executor: Executor | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> IngestReport:
    """Cut clips from videos and write them as the shards ``out``.

    ``videos`` are files, folders and lists (see ``find_sources``), or what the functions of ``splits`` found. A
    source no longer than ``clip_seconds`` is one clip; from a longer one ``clips_per_video`` clips are cut at
    random starts (None: one a started minute), or with ``every`` clips that start that many seconds apart; those
    shorter than ``min_seconds`` are rejected. ``workers`` counts processes (None: one a core; 1: this one);
    ``address`` names a Ray cluster to run on instead, ``executor`` one that the caller keeps.

    What an earlier run with the same settings finished in ``out``, even one that was killed, is kept. Until all is
    finished, the data set that ``out`` held stays as it was. Raises IngestError where no source gives a clip,
    ValueError for bad settings and an ``out`` that holds other files, StorageError where writing fails, and
    OSError where the videos' folder goes away; what was finished is kept then, too.
    """
    settings = Settings(
        fps=fps,
        short_side=short_side,
        clip_seconds=clip_seconds,
        clips_per_video=clips_per_video,
        min_seconds=min_seconds,
        quality=quality,
        codec=codec,
        seed=seed,
        every=every,
    )
    if workers is not None and workers < 1:
        raise ValueError(f"workers must be at least 1, not {workers}")
    check_out(out)
    found = videos if isinstance(videos, Found) else find_sources(videos)
    if not found.sources and not found.rejects:
        named = "" if isinstance(videos, Found) else ", ".join(map(str, videos))
        raise IngestError(f"no videos found in {named}")
    return _Ingest(out, found, settings, progress).run(workers, address, executor)


class _Ingest:
    """One run: what is finished already, what is left to do, and how far it is."""

    def __init__(
        self,
        out: Path,
        found: Found,
        settings: Settings,
        progress: Callable[[Progress], None] | None,
    ) -> None:
        self.out, self.work, self.found, self.settings = out, out / WORK, found, settings
        self.tell = progress or (lambda _: None)
        self.groups: list[Group] = []
        self.made: dict[str, Made] = {}
        self.done = self.reused = self.clips = self.frames = self.rejects = 0

    def run(self, workers: int | None, address: str | None, given: Executor | None) -> IngestReport:
        """Do what is left, and make the whole the folder's data set."""
        with _locked(self.out, self.work):
            self.groups = group(self.found.sources, self.settings, progress=self._looked_up)
            prints = [g.fingerprint for g in self.groups]
            before, kept = committed(self.out)
            self._take_over(kept)
            if len(self.made) < len(self.groups):
                self._work(workers, address, given)
            made = [self.made[fingerprint] for fingerprint in prints]
            listed = self.found.rejects
            clips = sum(len(m.shard.labels) for m in made if m.shard is not None)
            if not clips:
                raise self._nothing(made)
            if before == fingerprint_of(prints, listed) and kept.keys() >= set(prints):
                write_rejects(self.out, made, listed)
            else:
                commit(self.out, made, self.settings, listed)
            sweep(self.out)
            shutil.rmtree(self.work, ignore_errors=True)
        frames = sum(int(m.shard.records["num_frames"].sum()) for m in made if m.shard is not None)
        rejects = [*listed, *(reject for m in made for reject in m.rejects)]
        count = len(self.found.sources) + len(listed)
        seconds = frames / self.settings.fps
        return IngestReport(count, clips, seconds, rejects, self.found.unlisted, self.reused)

    def _nothing(self, made: Sequence[Made]) -> IngestError:
        """Every source was rejected: leave the reasons beside ``out``, and nothing else that was not there."""
        rejects = [*self.found.rejects, *(reject for m in made for reject in m.rejects)]
        path = self.out.with_name(f"{self.out.name}.rejects.jsonl")
        beside = self.work / "none"
        beside.mkdir(exist_ok=True)
        write_rejects(beside, made, self.found.rejects)
        with storing(path):
            os.replace(beside / "rejects.jsonl", path)
        shutil.rmtree(self.work, ignore_errors=True)
        with suppress(OSError):
            self.out.rmdir()
        return IngestError(
            f"all {len(rejects)} files were rejected; the first, {rejects[0].path}: {rejects[0].reason}"
            f" (all reasons: {path})"
        )

    def _looked_up(self, number: int) -> None:
        self.tell(Progress(number, 0, 0, 0, 0.0, 0))

    def _take_over(self, kept: dict[str, Made]) -> None:
        """Use the groups that the data set in ``out`` or a killed run has finished."""
        for g in self.groups:
            made = kept.get(g.fingerprint)
            if made is None:
                made = read_made(made_path(self.work, g.fingerprint), self.out)
            if made is not None:
                self.made[g.fingerprint] = made
                self.reused += made.sources
                shard = made.shard
                if shard is not None:
                    self.clips += len(shard.labels)
                    self.frames += int(shard.records["num_frames"].sum())
                self.rejects += len(made.rejects)
        self.done = self.reused
        self._report()

    def _report(self) -> None:
        seconds = self.frames / self.settings.fps
        total = len(self.found.sources)
        self.tell(Progress(self.done, total, self.reused, self.clips, seconds, self.rejects))

    def _work(self, workers: int | None, address: str | None, given: Executor | None) -> None:
        left = [g for g in self.groups if g.fingerprint not in self.made]
        count = min(workers or len(os.sched_getaffinity(0)), sum(len(g.sources) for g in left))
        executor: Executor
        if given is not None:
            executor = given
        elif address is not None:
            from engine.data.ray_ingest import RayCluster

            executor = RayCluster(address)
        else:
            executor = InProcess() if count == 1 else Pool(count)
        try:
            self._drive(_Queue(left, self.settings, self.work, self.out), executor)
        finally:
            if given is None:
                executor.close()

    def _drive(self, queue: _Queue, executor: Executor) -> None:
        self.reused += queue.reused
        self.done += queue.reused
        while True:
            while executor.has_room() and (job := queue.next()) is not None:
                executor.submit(job)
            if not executor.is_busy():
                return
            job, done = executor.next()
            queue.finish(job, done)
            if isinstance(job, CutJob):
                self.done += 1
                self.clips, self.frames = self.clips + done.clips, self.frames + done.frames
                self.rejects += done.rejects
                self._report()
            elif done.missing:
                self.done -= len(done.missing)
            else:
                made = read_made(made_path(self.work, job.group.fingerprint), self.out)
                if made is None:
                    raise OSError(f"{self.out / job.group.shard} changed while it was being made")
                self.made[job.group.fingerprint] = made


class _Queue:
    """The jobs that are left: a part for each source, and when a group has all of them, its shard."""

    def __init__(self, groups: Sequence[Group], settings: Settings, work: Path, out: Path) -> None:
        self.settings, self.work, self.out = settings, work, out
        parts = set(parts_in(work))
        self._waiting = {
            g.fingerprint: {i for i, p in enumerate(g.prints) if part_name(p) not in parts}
            for g in groups
        }
        self.reused = sum(len(g.sources) - len(self._waiting[g.fingerprint]) for g in groups)
        self._group_of: dict[Path, tuple[Group, int]] = {}
        self._first = deque[Job]()
        self._cuts = self._all_cuts(groups)

    def _all_cuts(self, groups: Sequence[Group]) -> Iterator[CutJob]:
        for g in groups:
            if not self._waiting[g.fingerprint]:
                self._first.append(ShardJob(g, self.settings, self.work, self.out))
            for place in sorted(self._waiting[g.fingerprint]):
                yield self._cut(g, place)

    def _cut(self, g: Group, place: int) -> CutJob:
        path = part_path(self.work, g.prints[place])
        self._group_of[path] = g, place
        return CutJob(g.sources[place], self.settings, path)

    def next(self) -> Job | None:
        """The next job, or None where all that are left wait for others."""
        if self._first:
            return self._first.popleft()
        job = next(self._cuts, None)
        return job if job is not None or not self._first else self._first.popleft()

    def finish(self, job: Job, done: Done) -> None:
        """Take note of a job that is done."""
        if isinstance(job, CutJob):
            g, place = self._group_of.pop(job.path)
            waiting = self._waiting[g.fingerprint]
            waiting.discard(place)
            if not waiting:
                self._first.append(ShardJob(g, self.settings, self.work, self.out))
        else:
            self._waiting[job.group.fingerprint] = set(done.missing)
            self._first.extend(self._cut(job.group, place) for place in done.missing)


@contextmanager
def _locked(out: Path, work: Path) -> Iterator[None]:
    """Hold ``out`` against other ingests; the lock ends with this process, however that ends."""
    with storing(out):
        made = not out.exists()
        work.mkdir(parents=True, exist_ok=True)
        file: Any = open(work / "lock", "w")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another ingest is at work on {out}: wait for it to end") from None
        except OSError:  # a file system without locks
            pass
        try:
            yield
        finally:
            if made and not (out / "dataset.json").exists():
                with suppress(OSError):  # nothing was finished: leave nothing
                    if [f.name for f in work.iterdir()] == ["lock"]:
                        shutil.rmtree(work)
                        out.rmdir()
