"""Raw video files to training shards: every file ends as clips or as a rejection with its reason.

The result is the same, byte for byte, whatever the number of worker processes, and whether it came of one run, of
several that were killed, or of an earlier data set to which files were added: where clips are cut depends on the
seed and a file's relative path alone, and each shard on its own sources alone.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

from engine.core.files import storing, take_lock
from engine.core.pool import Done, JobQueue, LocalPool, Lost, Plain, Pool, ProcessPool
from engine.core.ray_pool import RayPool
from engine.data.ingest.cut import Settings
from engine.data.ingest.grouping import Group, group
from engine.data.ingest.jobs import (
    Counts,
    CutWork,
    FinishedGroup,
    ShardWork,
    Work,
    after_crash,
    cut_name,
    cuts_in,
    do_work,
    read_record,
    record_path,
    reject_source,
)
from engine.data.ingest.publish import (
    all_rejects,
    check_out,
    commit,
    committed,
    fingerprint_of,
    has_rejects,
    sweep,
    write_rejects,
)
from engine.data.ingest.sources import Reject, SourceList, find_sources

SCRATCH = ".ingest"
"""Folder, in that of the shards, of what is finished before all is."""
RETRIES = 1
"""How often a source or shard is tried again whose worker died: once may be an accident."""


class IngestError(ValueError):
    """Ends an ingest of which nothing came; the message says why in one line."""


@dataclass(frozen=True)
class IngestReport:
    """Counts of an ingest's sources: files, or stretches of files that a list names."""

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
    """Counts of an ingest so far."""

    done: int = 0
    """Sources that are clips or rejects by now."""
    total: int = 0
    """0 while files are still being looked up, ``done`` of them so far."""
    reused: int = 0
    """Of those done, sources that an earlier run did."""
    clips: int = 0
    seconds: float = 0.0
    """Length of the clips."""
    rejects: int = 0
    waiting: bool = False
    """For another process that is making the same shards; reported once."""
    note: str = ""
    """How a list was understood; reported once, before all else."""


def ingest(
    videos: Sequence[Path] | SourceList,
    out: Path,
    *,
    workers: int | None = None,
    address: str | None = None,
    pool: Pool | None = None,
    progress: Callable[[Progress], None] | None = None,
    **settings: Any,
) -> IngestReport:
    """Cut clips from videos and write them as the shards ``out``; ``settings`` are the fields of ``Settings``.

    ``videos`` are files, folders and lists (see ``find_sources``), or the result of one of ``splits``' functions. A
    source no longer than ``clip_seconds`` is one clip; a longer one gives several. ``workers`` counts processes
    (None: one a core; 1: this one); ``address`` names a Ray cluster to run on instead, ``pool`` one of ``worker_pool``
    that the caller keeps.

    What an earlier run with the same settings finished in ``out``, even a killed one, is kept. Until all is finished,
    the data set that ``out`` held stays. Another process at work on it is waited for, unless the shards are complete.
    Raises IngestError where no source gives a clip, ValueError for bad settings and an ``out`` that holds other files,
    StorageError where writing fails, OSError where the videos' folder goes away: what was finished is kept then, too.
    RuntimeError where a script's own workers import it anew, and would wait for it for ever.
    """
    if getattr(
        multiprocessing.current_process(), "_inheriting", False
    ):  # as Python's own check has it
        raise RuntimeError(
            "worker processes import the script that starts them: put what it does under"
            ' `if __name__ == "__main__":`, or ingest with workers=1'
        )
    if workers is not None and workers < 1:
        raise ValueError(f"workers must be at least 1, not {workers}")
    chosen = Settings(**settings)
    check_out(out)
    listed = videos if isinstance(videos, SourceList) else find_sources(videos)
    if not listed.sources and not listed.rejects:
        where = ["the lists"] if isinstance(videos, SourceList) else videos
        text = ", ".join(map(str, where))
        raise IngestError(f"no videos found in {text}")
    cores = len(os.sched_getaffinity(0))

    def open_pool(most: int) -> AbstractContextManager[Pool]:
        if pool is not None:
            return nullcontext(pool)
        return closing(worker_pool(min(workers or cores, most), address))

    return _Ingest(out, listed, chosen, progress or (lambda _: None), open_pool).run()


def worker_pool(workers: int, address: str | None = None) -> Pool:
    """Workers for ``ingest``: this process (of 1), processes of this machine, or a Ray cluster's."""
    cut = Plain(do_work)
    if address is not None:
        return RayPool(cut, size=None, address=address)
    return LocalPool(cut(1)) if workers == 1 else ProcessPool(cut, size=workers)


class _Ingest:
    """Does one ingest: finds what is finished already, and does what is left."""

    def __init__(
        self,
        out: Path,
        videos: SourceList,
        settings: Settings,
        progress: Callable[[Progress], None],
        open_pool: Callable[[int], AbstractContextManager[Pool]],
    ) -> None:
        self.out, self.scratch, self.settings = out, out / SCRATCH, settings
        self.sources, self.listed, self.unlisted = videos.sources, videos.rejects, videos.unlisted
        self.progress, self.open_pool, self.notes = progress, open_pool, videos.notes
        self.groups: list[Group] = []
        self.finished: dict[str, FinishedGroup] = {}
        self.done = self.reused = self.clips = self.frames = self.rejects = 0

    def run(self) -> IngestReport:
        """Do what is left, and make the whole the folder's data set."""
        for note in self.notes:
            self.progress(Progress(note=note))
        self.groups = group(
            self.sources, self.settings, progress=lambda number: self.progress(Progress(number))
        )
        if not self._complete():
            waiting = Progress(waiting=True)
            with _locked(self.out, self.scratch, on_wait=lambda: self.progress(waiting)):
                if not self._complete():  # another process may have done it by now
                    self._make()
                self._clean()
        elif self.scratch.exists():  # a kill left it, unless another process is at work
            with suppress(OSError), take_lock(self.scratch / "lock"):
                self._clean()
        groups = self._in_order()
        return IngestReport(
            sources=len(self.sources) + len(self.listed),
            clips=sum(g.counts.clips for g in groups),
            seconds=sum(g.counts.frames for g in groups) / self.settings.fps,
            rejects=all_rejects(groups, self.listed),
            unlisted=self.unlisted,
            reused=self.reused,
        )

    def _in_order(self) -> list[FinishedGroup]:
        return [self.finished[g.fingerprint] for g in self.groups]

    def _complete(self) -> bool:
        """Whether ``out`` holds the whole data set already; notes which groups it holds."""
        before, kept = committed(self.out)
        prints = [g.fingerprint for g in self.groups]
        self._take_over(kept)
        if before != fingerprint_of(prints, self.listed) or not kept.keys() >= set(prints):
            return False
        rejects = all_rejects([kept[p] for p in prints], self.listed)
        return has_rejects(self.out / "rejects.jsonl", rejects)

    def _clean(self) -> None:
        sweep(self.out)
        shutil.rmtree(self.scratch, ignore_errors=True)

    def _make(self) -> None:
        if len(self.finished) < len(self.groups):
            self._cut()
        groups = self._in_order()
        if not any(g.counts.clips for g in groups):
            raise self._nothing(all_rejects(groups, self.listed))
        commit(self.out, groups, self.settings, self.listed)

    def _nothing(self, rejects: Sequence[Reject]) -> IngestError:
        """Leave the reasons beside ``out``, where every source was rejected, and nothing else that was not there."""
        path = self.out.with_name(f"{self.out.name}.rejects.jsonl")
        write_rejects(path, rejects)
        shutil.rmtree(self.scratch, ignore_errors=True)
        with suppress(OSError):
            self.out.rmdir()
        return IngestError(
            f"all {len(rejects)} files were rejected; the first, {rejects[0].path}: {rejects[0].reason}"
            f" (all reasons: {path})"
        )

    def _take_over(self, kept: dict[str, FinishedGroup]) -> None:
        """Use the groups that the data set in ``out`` or a killed run has finished."""
        records = (record_path(self.scratch, g.fingerprint) for g in self.groups)
        groups = [
            kept.get(g.fingerprint) or read_record(record, self.out)
            for g, record in zip(self.groups, records, strict=True)
        ]
        self.finished = {g.fingerprint: g for g in groups if g is not None}
        self.done = self.reused = sum(g.sources for g in self.finished.values())
        self.clips = self.frames = self.rejects = 0
        self._count(*(g.counts for g in self.finished.values()))

    def _count(self, *results: Counts) -> None:
        """Add results to those so far, and report how far the ingest is."""
        self.clips += sum(counts.clips for counts in results)
        self.frames += sum(counts.frames for counts in results)
        self.rejects += sum(counts.rejects for counts in results)
        seconds, total = self.frames / self.settings.fps, len(self.sources)
        self.progress(Progress(self.done, total, self.reused, self.clips, seconds, self.rejects))

    def _cut(self) -> None:
        """Cut the sources that are left and write their shards."""
        left = [g for g in self.groups if g.fingerprint not in self.finished]
        queue = _Queue(left, self.settings, self.scratch, self.out)
        self.reused += queue.reused
        self.done += queue.reused
        with self.open_pool(sum(len(g.sources) for g in left)) as pool:
            jobs = JobQueue(pool, RETRIES, on_lost=_stop_on_error, max_in_a_row=math.inf)
            for work, report in jobs.run(queue.feed):
                self._take(queue, work, report)

    def _take(self, queue: _Queue, work: Work, report: Done | Lost) -> None:
        """Note the result of a work; a source whose workers died is cut without the clip they died at, or rejected."""
        if isinstance(report, Done):
            counts: Counts = report.result
        elif isinstance(work, ShardWork):
            raise RuntimeError(
                f"the process that wrote {work.group.shard} was lost twice, {report.reason}: is there enough memory?"
            )
        elif (again := after_crash(work)) is not None:
            queue.first.append(again)
            return
        else:
            counts = reject_source(work)
        queue.finish(work, counts)
        if isinstance(work, CutWork):
            self.done += 1
            self._count(counts)
        elif counts.missing:
            self.done -= len(counts.missing)
        else:
            fingerprint = work.group.fingerprint
            finished = read_record(record_path(self.scratch, fingerprint), self.out)
            if finished is None:
                raise OSError(f"{self.out / work.group.shard} changed while it was being made")
            self.finished[fingerprint] = finished


def _stop_on_error(lost: Lost, again: bool) -> None:
    """Raise a work's own error: the disk is full, the videos are gone, or it is a bug."""
    if lost.error is not None:
        raise lost.error


class _Queue:
    """The works that are left: a cut for each source, and when a group has all of them, its shard."""

    def __init__(
        self, groups: Sequence[Group], settings: Settings, scratch: Path, out: Path
    ) -> None:
        # other nodes have other working folders
        self.settings, self.scratch, self.out = settings, scratch.absolute(), out.absolute()
        cuts = set(cuts_in(scratch))
        self._waiting = {
            g.fingerprint: {i for i, p in enumerate(g.prints) if cut_name(p) not in cuts}
            for g in groups
        }
        self.reused = sum(len(g.sources) - len(self._waiting[g.fingerprint]) for g in groups)
        self._group_of: dict[Path, tuple[Group, int]] = {}
        self.first = deque[Work]()
        self._cuts = self._all_cuts(groups)

    def _all_cuts(self, groups: Sequence[Group]) -> Iterator[CutWork]:
        for g in groups:
            waiting = sorted(self._waiting[g.fingerprint])
            if not waiting:
                self.first.append(self._shard(g))
            yield from (self._cut(g, place) for place in waiting)

    def _cut(self, g: Group, place: int) -> CutWork:
        path = self.scratch / cut_name(g.prints[place])
        self._group_of[path] = g, place
        source = g.sources[place]
        return CutWork(replace(source, folder=os.path.abspath(source.folder)), self.settings, path)

    def _shard(self, g: Group) -> ShardWork:
        return ShardWork(g, self.settings, self.scratch, self.out)

    def feed(self, count: int) -> list[Work]:
        """The next works, ``count`` at most; fewer where all that are left wait for others."""
        return list(islice(iter(self._next, None), count))

    def _next(self) -> Work | None:
        work = None if self.first else next(self._cuts, None)  # which may add to the first
        return self.first.popleft() if work is None and self.first else work

    def finish(self, work: Work, counts: Counts) -> None:
        """Take note of a work that is done."""
        if isinstance(work, CutWork):
            g, place = self._group_of.pop(work.path)
            waiting = self._waiting[g.fingerprint]
            waiting.discard(place)
            if not waiting:
                self.first.append(self._shard(g))
        else:
            self._waiting[work.group.fingerprint] = set(counts.missing)
            self.first.extend(self._cut(work.group, place) for place in counts.missing)


@contextmanager
def _locked(out: Path, scratch: Path, *, on_wait: Callable[[], None]) -> Iterator[None]:
    """Hold ``out`` against other ingests; waits for one that is at work."""
    with storing(out):
        is_new = not out.exists()
        file = take_lock(scratch / "lock", on_wait=on_wait)
    with file:
        try:
            yield
        finally:
            if is_new and not (out / "dataset.json").exists():
                with suppress(OSError):  # nothing was finished: leave nothing
                    if [f.name for f in scratch.iterdir()] == ["lock"]:
                        shutil.rmtree(scratch)
                        out.rmdir()
