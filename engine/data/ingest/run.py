"""Raw video files to training shards: every file ends as clips or as a rejection with its reason.

The result is the same, byte for byte, whatever the number of worker processes, and whether it came of one run, of
several that were killed, or of an earlier data set to which files were added: where clips are cut depends on the
seed and a file's relative path alone, and each shard on its own sources alone.
"""

from __future__ import annotations

import math
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path

from engine.core.files import storing, take_lock
from engine.core.pool import Crew, Done, LocalPool, Lost, Plain, Pool, ProcessPool
from engine.core.ray_pool import RayPool
from engine.data.ingest.cut import Settings
from engine.data.ingest.grouping import Group, group
from engine.data.ingest.jobs import (
    Counts,
    CutWork,
    Made,
    ShardWork,
    Work,
    after_crash,
    cut_name,
    cuts_in,
    do_work,
    made_path,
    read_made,
    reject_source,
)
from engine.data.ingest.publish import (
    check_out,
    commit,
    committed,
    fingerprint_of,
    has_rejects,
    sweep,
    write_rejects,
)
from engine.data.ingest.sources import Found, Reject, find_sources

SCRATCH = ".ingest"
"""Folder, in that of the shards, of what is finished before all is."""
RETRIES = 1
"""How often a source or shard is tried again whose worker died: once may be an accident."""


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
    waiting: bool = False
    """For another process that is making the same shards; told once."""


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
    pool: Pool | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> IngestReport:
    """Cut clips from videos and write them as the shards ``out``.

    ``videos`` are files, folders and lists (see ``find_sources``), or what the functions of ``splits`` found. A source
    no longer than ``clip_seconds`` is one clip; a longer one gives ``clips_per_video`` at random starts (None: one a
    started minute), or with ``every`` clips that start that many seconds apart; those shorter than ``min_seconds`` are
    rejected. ``workers`` counts processes (None: one a core; 1: this one); ``address`` names a Ray cluster to run on
    instead, ``pool`` one of ``worker_pool`` that the caller keeps.

    What an earlier run with the same settings finished in ``out``, even a killed one, is kept. Until all is finished,
    the data set that ``out`` held stays. Another process at work on it is waited for, unless the shards are complete.
    Raises IngestError where no source gives a clip, ValueError for bad settings and an ``out`` that holds other files,
    StorageError where writing fails, OSError where the videos' folder goes away: what was finished is kept then, too.
    """
    if workers is not None and workers < 1:
        raise ValueError(f"workers must be at least 1, not {workers}")
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
    check_out(out)
    named = "the lists" if isinstance(videos, Found) else ", ".join(map(str, videos))
    found = videos if isinstance(videos, Found) else find_sources(videos)
    if not found.sources and not found.rejects:
        raise IngestError(f"no videos found in {named}")
    return _Ingest(out, found, settings, progress).run(workers, address, pool)


def worker_pool(workers: int, address: str | None = None) -> Pool:
    """Workers for ``ingest``: this process (of 1), processes of this machine, or a Ray cluster's."""
    cut = Plain(do_work)
    if address is not None:
        return RayPool(cut, size=None, address=address)
    return LocalPool(cut(1)) if workers == 1 else ProcessPool(cut, size=workers)


class _Ingest:
    """One run: what is finished already, what is left to do, and how far it is."""

    def __init__(
        self,
        out: Path,
        found: Found,
        settings: Settings,
        progress: Callable[[Progress], None] | None,
    ) -> None:
        self.out, self.scratch, self.found, self.settings = out, out / SCRATCH, found, settings
        self.tell = progress or (lambda _: None)
        self.groups: list[Group] = []
        self.made: dict[str, Made] = {}
        self.done = self.reused = self.clips = self.frames = self.rejects = 0

    def run(self, workers: int | None, address: str | None, pool: Pool | None) -> IngestReport:
        """Do what is left, and make the whole the folder's data set."""
        self.groups = group(self.found.sources, self.settings, progress=self._looked_up)
        if not self._complete():
            self._work_alone(workers, address, pool)
        elif self.scratch.exists():  # a kill left it, unless another process is at work
            with suppress(OSError), take_lock(self.scratch / "lock"):
                self._clean()
        return self._report_of([self.made[g.fingerprint] for g in self.groups])

    def _complete(self) -> bool:
        """Whether ``out`` holds what is wanted and nothing is to be done; notes what it holds."""
        listed = self.found.rejects
        before, kept = committed(self.out)
        prints = [g.fingerprint for g in self.groups]
        self._take_over(kept)
        same = before == fingerprint_of(prints, listed) and kept.keys() >= set(prints)
        return same and has_rejects(self.out, [kept[p] for p in prints], listed)

    def _work_alone(self, workers: int | None, address: str | None, pool: Pool | None) -> None:
        """Hold ``out`` against other processes, and do what they haven't done by then."""
        with _locked(self.out, self.scratch, on_wait=self._waits):
            if not self._complete():
                self._make(workers, address, pool)
            self._clean()

    def _clean(self) -> None:
        sweep(self.out)
        shutil.rmtree(self.scratch, ignore_errors=True)

    def _make(self, workers: int | None, address: str | None, pool: Pool | None) -> None:
        if len(self.made) < len(self.groups):
            self._cut(workers, address, pool)
        made = [self.made[g.fingerprint] for g in self.groups]
        if not any(m.shard is not None and m.shard.labels for m in made):
            raise self._nothing(made)
        commit(self.out, made, self.settings, self.found.rejects)

    def _report_of(self, made: Sequence[Made]) -> IngestReport:
        listed = self.found.rejects
        shards = [m.shard for m in made if m.shard is not None]
        frames = sum(int(shard.records["num_frames"].sum()) for shard in shards)
        return IngestReport(
            sources=len(self.found.sources) + len(listed),
            clips=sum(len(shard.labels) for shard in shards),
            seconds=frames / self.settings.fps,
            rejects=[*listed, *(reject for m in made for reject in m.rejects)],
            unlisted=self.found.unlisted,
            reused=self.reused,
        )

    def _nothing(self, made: Sequence[Made]) -> IngestError:
        """Every source was rejected: leave the reasons beside ``out``, and nothing else that was not there."""
        rejects = [*self.found.rejects, *(reject for m in made for reject in m.rejects)]
        path = self.out.with_name(f"{self.out.name}.rejects.jsonl")
        beside = self.scratch / "none"
        beside.mkdir(exist_ok=True)
        write_rejects(beside, made, self.found.rejects)
        with storing(path):
            os.replace(beside / "rejects.jsonl", path)
        shutil.rmtree(self.scratch, ignore_errors=True)
        with suppress(OSError):
            self.out.rmdir()
        return IngestError(
            f"all {len(rejects)} files were rejected; the first, {rejects[0].path}: {rejects[0].reason}"
            f" (all reasons: {path})"
        )

    def _looked_up(self, number: int) -> None:
        self.tell(Progress(number, 0, 0, 0, 0.0, 0))

    def _waits(self) -> None:
        self.tell(Progress(0, 0, 0, 0, 0.0, 0, waiting=True))

    def _take_over(self, kept: dict[str, Made]) -> None:
        """Use the groups that the data set in ``out`` or a killed run has finished."""
        self.made.clear()
        self.done = self.reused = self.clips = self.frames = self.rejects = 0
        for g in self.groups:
            made = kept.get(g.fingerprint)
            if made is None:
                made = read_made(made_path(self.scratch, g.fingerprint), self.out)
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

    def _cut(self, workers: int | None, address: str | None, pool: Pool | None) -> None:
        """Cut the sources that are left and write their shards."""
        left = [g for g in self.groups if g.fingerprint not in self.made]
        queue = _Queue(left, self.settings, self.scratch, self.out)
        self.reused += queue.reused
        self.done += queue.reused
        count = min(workers or len(os.sched_getaffinity(0)), sum(len(g.sources) for g in left))
        with (
            nullcontext(pool) if pool is not None else closing(worker_pool(count, address)) as pool
        ):
            crew = Crew(pool, RETRIES, on_lost=_stop_on_error, max_in_a_row=math.inf)
            for work, report in crew.run(queue.feed):
                self._take(queue, work, report)

    def _take(self, queue: _Queue, work: Work, report: Done | Lost) -> None:
        """Note what became of a work; a source whose workers died is cut without the clip they died at, or rejected."""
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
            self.clips, self.frames = self.clips + counts.clips, self.frames + counts.frames
            self.rejects += counts.rejects
            self._report()
        elif counts.missing:
            self.done -= len(counts.missing)
        else:
            made = read_made(made_path(self.scratch, work.group.fingerprint), self.out)
            if made is None:
                raise OSError(f"{self.out / work.group.shard} changed while it was being made")
            self.made[work.group.fingerprint] = made


def _stop_on_error(lost: Lost, again: bool) -> None:
    """Raise what a work raised: the disk is full or the videos are gone, and any other is a bug."""
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
            if not self._waiting[g.fingerprint]:
                self.first.append(self._shard(g))
            for place in sorted(self._waiting[g.fingerprint]):
                yield self._cut(g, place)

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
        if self.first:
            return self.first.popleft()
        work = next(self._cuts, None)
        return work if work is not None or not self.first else self.first.popleft()

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
        made = not out.exists()
        file = take_lock(scratch / "lock", on_wait=on_wait)
    with file:
        try:
            yield
        finally:
            if made and not (out / "dataset.json").exists():
                with suppress(OSError):  # nothing was finished: leave nothing
                    if [f.name for f in scratch.iterdir()] == ["lock"]:
                        shutil.rmtree(scratch)
                        out.rmdir()
