"""The queue of jobs: keeps workers busy and resubmits jobs whose worker died; knows nothing of losses, videos or Ray.

A job is what a worker does at a time. Workers are a pool: this process, processes of this machine, or Ray's actors
(``engine.core.ray_pool``), behind one interface.
"""

from __future__ import annotations

import ctypes
import errno
import multiprocessing
import os
import pickle
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from multiprocessing import connection
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, Protocol

Tell = Callable[[Any], None]
"""Called by an evaluator while it is at work, with how far it is."""
Evaluator = Callable[[Any, Tell], Any]
"""Does a job's work: (work, tell) -> result."""
Factory = Callable[[int], Evaluator]
"""Makes a worker's evaluator, in the worker's own process; given how many workers its machine has."""

POLL_SECONDS = 1.0
"""Between looks at time limits."""
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
"""Errors that another worker would meet too."""
FAILED_STARTS = 10
"""Worker processes that may die at their start, one after the other."""
PR_SET_PDEATHSIG = 1
"""Of Linux's prctl: the signal that a process gets when its parent ends."""


@dataclass(frozen=True)
class Plain:
    """A factory of evaluators that need nothing but the work itself."""

    function: Callable[[Any], Any]
    """Of a module, so that another process finds it."""

    def __call__(self, workers_here: int) -> Evaluator:
        return lambda work, tell: self.function(work)


@dataclass(frozen=True)
class Job:
    """Work for one worker."""

    work: Any
    seconds: float = 0.0
    """Time limit; 0: none."""
    attempt: int = 1
    lost_by: str = ""
    """The worker that took its last attempt down with it."""
    number: int = 0
    """Rises from job to job."""


@dataclass(frozen=True)
class Done:
    """A job that a worker has done."""

    job: Job
    result: Any
    worker: str


@dataclass(frozen=True)
class Lost:
    """A job that came to nothing, or (``job`` None) a worker that was lost without one."""

    job: Job | None
    kind: str
    """worker_died, node_lost, time_limit, out_of_memory, error; start_failed without a job."""
    reason: str
    worker: str
    error: BaseException | None = None
    """What the job raised, where it was an error that ended it."""


class Pool(Protocol):
    """Workers, each with one job at a time."""

    size: int
    """Workers when all are there."""

    def idle(self) -> list[str]:
        """The workers that wait for a job."""

    def ready(self) -> int:
        """Workers that are there, idle or at work."""

    def submit(self, job: Job, worker: str) -> None:
        """Give an idle worker a job."""

    def wait(self) -> Sequence[Done | Lost]:
        """Wait for news; none after a while. Raises RuntimeError where no worker is left, OSError for a full disk."""

    def close(self) -> None:
        """End all workers, whatever they are at."""


class LocalPool:
    """One worker: this process, which does a job while it waits for it and raises what the job raises."""

    size = 1

    def __init__(
        self, evaluator: Evaluator, *, on_news: Callable[[Job, Any], None] = lambda job, news: None
    ) -> None:
        """``on_news``: told a job and how far it is."""
        self._evaluator, self._on_news = evaluator, on_news
        self._job: Job | None = None

    def idle(self) -> list[str]:
        return [] if self._job else ["this process"]

    def ready(self) -> int:
        return 1

    def submit(self, job: Job, worker: str) -> None:
        assert self._job is None
        self._job = job

    def wait(self) -> Sequence[Done | Lost]:
        job, self._job = self._job, None
        assert job is not None, "nothing to wait for"
        result = self._evaluator(job.work, lambda news: self._on_news(job, news))
        return [Done(job, result, "this process")]

    def close(self) -> None:
        self._job = None


@dataclass
class _Worker:
    """A worker process, or the one that took its place."""

    name: str
    process: BaseProcess
    pipe: Connection
    ready: bool = False
    job: Job | None = None
    since: float = 0.0
    """When its job began."""


class ProcessPool:
    """``size`` processes of this machine. One that dies loses its own job alone, and another takes its place.

    Each has a pipe of its own: its end names the job, and no death can leave a lock behind that others wait for.
    """

    def __init__(
        self,
        factory: Factory,
        *,
        size: int,
        on_news: Callable[[Job, Any], None] = lambda job, news: None,
    ) -> None:
        self.size, self._factory, self._on_news = size, factory, on_news
        self._started, self._failed_starts = False, 0
        self._workers = [self._start(f"worker {number}") for number in range(size)]

    def idle(self) -> list[str]:
        return [worker.name for worker in self._workers if worker.ready and worker.job is None]

    def ready(self) -> int:
        return sum(worker.ready for worker in self._workers)

    def submit(self, job: Job, worker: str) -> None:
        (chosen,) = (each for each in self._workers if each.name == worker)
        assert chosen.ready and chosen.job is None
        chosen.job, chosen.since = job, time.monotonic()
        with suppress(OSError):  # it died: the end of its pipe will tell
            chosen.pipe.send(job.work)

    def pids(self) -> dict[str, int]:
        """Process by worker."""
        return {worker.name: worker.process.pid or 0 for worker in self._workers}

    def wait(self) -> Sequence[Done | Lost]:
        """As ``Pool``; raises ValueError where no worker process ever starts, and what a factory raises."""
        found: list[Done | Lost] = []
        spoke = connection.wait([worker.pipe for worker in self._workers], timeout=POLL_SECONDS)
        for worker in list(self._workers):
            if worker.pipe in spoke:
                found += self._read(worker)
            elif (
                worker.job is not None and 0 < worker.job.seconds < time.monotonic() - worker.since
            ):
                reason = f"not done in its time limit of {worker.job.seconds:g} s"
                found.append(self._replace(worker, "time_limit", reason))
        return found

    def close(self) -> None:
        for worker in self._workers:
            worker.process.kill()
        for worker in self._workers:
            worker.process.join()
            worker.pipe.close()
        self._workers = []

    def _start(self, name: str) -> _Worker:
        context = multiprocessing.get_context("spawn")
        pipe, other = context.Pipe()
        arguments = (other, self._factory, self.size, os.getpid())
        process = context.Process(target=_serve, args=arguments, name=name, daemon=True)
        process.start()
        other.close()  # so that the worker alone holds it, and its end is seen
        return _Worker(name, process, pipe)

    def _read(self, worker: _Worker) -> Iterator[Done | Lost]:
        try:
            kind, told = worker.pipe.recv()
        except (EOFError, OSError):
            worker.process.join()
            if not self._started:
                raise ValueError(
                    "worker processes can't start: start them below `if __name__ == '__main__':`, or use workers=1"
                ) from None
            reason = _how_it_ended(worker.process.exitcode)
            self._failed_starts += not worker.ready
            if self._failed_starts > FAILED_STARTS:
                raise RuntimeError(f"no worker process can be started any more: {reason}") from None
            yield self._replace(worker, "worker_died", reason)
            return
        job = worker.job
        if kind == "ready":
            worker.ready = self._started = True
            self._failed_starts = 0
        elif kind == "failed":
            raise told
        elif job is not None and kind == "news":
            self._on_news(job, told)
        elif job is not None:
            worker.job = None
            title = self._title(worker)
            yield lost_by_error(job, told, title) if kind == "error" else Done(job, told, title)

    def _replace(self, worker: _Worker, kind: str, reason: str) -> Lost:
        """Put a new process in a worker's place."""
        lost = Lost(worker.job, kind, reason, self._title(worker))
        worker.process.kill()
        worker.process.join()
        worker.pipe.close()
        self._workers[self._workers.index(worker)] = self._start(worker.name)
        return lost

    def _title(self, worker: _Worker) -> str:
        return f"{worker.name} (process {worker.process.pid})"


def lost_by_error(job: Job | None, error: BaseException, worker: str) -> Lost:
    """A job that an error ended; raises the error itself where it is of the disk, which ends a whole run."""
    if isinstance(error, OSError) and error.errno in DISK:
        raise error from None
    text = str(error).strip() or type(error).__name__
    out = isinstance(error, MemoryError) or "out of memory" in text.lower()
    name = "" if isinstance(error, (ValueError, OSError)) else f"{type(error).__name__}: "
    kind = "out_of_memory" if out else "error"
    return Lost(job, kind, name + text.splitlines()[0], worker, error)


def die_with_parent() -> None:
    """End this process as soon as its parent ends, however that is; on Linux alone."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _how_it_ended(code: int | None) -> str:
    if code is not None and code < 0:
        return f"its process was ended by {signal.Signals(-code).name}"
    return f"its process ended unexpectedly, with exit code {code}"


def _serve(pipe: Connection, factory: Factory, workers_here: int, parent: int) -> None:
    """A worker process: does one work after another until the pool is closed, and leaves Ctrl-C to its parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    die_with_parent()
    if os.getppid() != parent:  # it died before
        os._exit(1)
    try:
        evaluate = factory(workers_here)
    except Exception as error:
        pipe.send(("failed", _sendable(error)))
        return
    pipe.send(("ready", None))
    while True:
        try:
            work = pipe.recv()
        except EOFError:
            return
        try:
            answer = ("done", evaluate(work, lambda news: pipe.send(("news", news))))
        except Exception as error:
            answer = ("error", _sendable(error))
        pipe.send(answer)


def _sendable(error: Exception) -> Exception:
    """The error with its traceback as a note, or one of its words where it can't be pickled."""
    where = "".join(traceback.format_exception(error))
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        error = RuntimeError(f"{type(error).__name__}: {error}")
    error.add_note(where)
    return error


@dataclass
class Crew:
    """Keeps a pool's workers busy until all work is done or has failed for good.

    Lost work is done again, in the smaller works that ``split`` makes of it (so that one bad member can't take others
    down again), by another worker where there is one, at most ``max_retries`` times.
    """

    pool: Pool
    max_retries: int
    split: Callable[[Any], list[Any]] = field(default=lambda work: [work])
    limit: Callable[[Any], float] = field(default=lambda work: 0.0)
    """Seconds that work may take; 0: any."""
    on_lost: Callable[[Lost, bool], None] = field(default=lambda lost, again: None)
    """Told what was lost, and whether it is done again."""
    max_in_a_row: float | None = None
    """Most jobs lost with none done between them; None: ``max_retries`` + 2 for each worker, and for 4 at least."""

    def __post_init__(self) -> None:
        self._retries: list[Job] = []
        self._out: dict[int, Job] = {}
        self._made = 0
        self._lost_in_a_row = 0

    def run(self, feed: Callable[[int], Sequence[Any]]) -> Iterator[tuple[Any, Done | Lost]]:
        """Each work with its outcome, as outcomes come; Lost means that it failed for good.

        ``feed`` is asked for work for so many idle workers whenever some are; where it has none although nothing
        is at work, the run is over. Raises RuntimeError where jobs are lost one after the other and none is done.
        """
        while True:
            self._hand_out_retries()
            idle = self.pool.idle()
            for worker, work in zip(idle, feed(len(idle)) if idle else (), strict=False):
                self._submit(Job(work), worker)
            if not self._out and not self._retries and idle:
                return
            for report in self.pool.wait():
                if isinstance(report, Done):
                    self._lost_in_a_row = 0
                    del self._out[report.job.number]
                    yield report.job.work, report
                else:
                    yield from self._lost(report)

    def _submit(self, job: Job, worker: str) -> None:
        self._made += 1
        job = replace(job, number=self._made, seconds=self.limit(job.work))
        self._out[job.number] = job
        self.pool.submit(job, worker)

    def _hand_out_retries(self) -> None:
        """To another worker than the one that lost it: a broken one is idle soonest."""
        for worker in self.pool.idle():
            for job in self._retries:
                if job.lost_by != worker or self.pool.ready() == 1:
                    self._retries.remove(job)
                    self._submit(job, worker)
                    break

    def _lost(self, lost: Lost) -> Iterator[tuple[Any, Lost]]:
        job = lost.job
        if job is None:
            self.on_lost(lost, False)
            return
        del self._out[job.number]
        self._lost_in_a_row += 1
        again = job.attempt <= self.max_retries
        self.on_lost(lost, again)
        most = self.max_in_a_row or (self.max_retries + 2) * max(self.pool.size, 4)
        if self._lost_in_a_row > most:
            raise RuntimeError(
                f"{self._lost_in_a_row} jobs in a row were lost and none was done, the last on {lost.worker}:"
                f" {lost.reason}; mend that, then use --resume"
            )
        if not again:
            yield job.work, lost
            return
        for work in self.split(job.work):
            self._retries.append(Job(work, attempt=job.attempt + 1, lost_by=lost.worker))
