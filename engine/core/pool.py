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
from typing import Any

Tell = Callable[[Any], None]
"""Reports an evaluator's progress while it is at work."""
Evaluator = Callable[[Any, Tell], Any]
"""Does a job's work: (work, tell) -> result."""
Factory = Callable[[int], Evaluator]
"""Makes a worker's evaluator, in the worker's own process: (workers on its machine) -> evaluator."""

POLL_SECONDS = 1.0
"""Between checks of time limits."""
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


OnNews = Callable[[Job, Any], None]
"""Called with a job and its progress."""


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
    """The error that ended the job, where it was one."""


@dataclass
class Worker:
    """A worker's place in a pool, which one process after another may take."""

    name: str
    stage: str = "starting"
    """Until it is ``idle`` or ``busy``."""
    job: Job | None = None
    since: float = 0.0
    """When the stage began."""
    pid: int = 0


class Pool:
    """Workers, each with one job at a time."""

    size: int
    """Workers when all are there."""
    workers: Sequence[Any]
    """Each a ``Worker``."""

    def idle(self) -> list[str]:
        """The workers that wait for a job."""
        return [worker.name for worker in self.workers if worker.stage == "idle"]

    def ready(self) -> int:
        """Workers that are there, idle or at work."""
        return sum(worker.stage in ("idle", "busy") for worker in self.workers)

    def pids(self) -> dict[str, int]:
        """Process by worker, as far as they are there."""
        return {worker.name: worker.pid for worker in self.workers if worker.pid}

    def submit(self, job: Job, name: str) -> None:
        """Give an idle worker a job."""
        (worker,) = (each for each in self.workers if each.name == name)
        assert worker.stage == "idle"
        worker.stage, worker.job, worker.since = "busy", job, time.monotonic()
        self._begin(worker, job)

    def _begin(self, worker: Any, job: Job) -> None:
        """Let a worker begin its job."""

    def wait(self) -> Sequence[Done | Lost]:
        """Wait for news; none after a while. Raises RuntimeError where no worker is left, OSError for a full disk."""
        raise NotImplementedError

    def close(self) -> None:
        """End all workers, whatever they are at."""
        raise NotImplementedError


class LocalPool(Pool):
    """One worker: this process, which does a job while it waits for it and raises what the job raises."""

    size = 1

    def __init__(self, evaluator: Evaluator, *, on_news: OnNews = lambda job, news: None) -> None:
        self._evaluator, self._on_news = evaluator, on_news
        self.workers = [Worker("this process", "idle")]

    def wait(self) -> Sequence[Done | Lost]:
        (worker,) = self.workers
        job, worker.job, worker.stage = worker.job, None, "idle"
        assert job is not None, "nothing to wait for"
        result = self._evaluator(job.work, lambda news: self._on_news(job, news))
        return [Done(job, result, worker.name)]

    def close(self) -> None:
        self.workers = [Worker("this process", "idle")]


@dataclass
class _Process(Worker):
    """A worker process, or the one that took its place."""

    process: Any = None
    pipe: Any = None

    @property
    def title(self) -> str:
        return f"{self.name} (process {self.pid})"


class ProcessPool(Pool):
    """``size`` processes of this machine. One that dies loses its own job alone, and another takes its place.

    Each has a pipe of its own: its end names the job, and no death can leave a lock behind that others wait for.
    """

    workers: list[_Process]

    def __init__(
        self, factory: Factory, *, size: int, on_news: OnNews = lambda job, news: None
    ) -> None:
        self.size, self._factory, self._on_news = size, factory, on_news
        self._started, self._failed_starts = False, 0
        self.workers = [self._start(f"worker {number}") for number in range(size)]

    def _begin(self, worker: _Process, job: Job) -> None:
        with suppress(OSError):  # the worker died: ``wait`` reads the end of its pipe
            worker.pipe.send(job.work)

    def wait(self) -> Sequence[Done | Lost]:
        """As ``Pool``; raises ValueError where no worker process ever starts, and what a factory raises."""
        reports: list[Done | Lost] = []
        readable = connection.wait([worker.pipe for worker in self.workers], timeout=POLL_SECONDS)
        for worker in list(self.workers):
            limit = worker.job.seconds if worker.job else 0.0
            if worker.pipe in readable:
                reports += self._read(worker)
            elif 0 < limit < time.monotonic() - worker.since:
                reason = f"not done in its time limit of {limit:g} s"
                reports.append(self._replace(worker, "time_limit", reason))
        return reports

    def close(self) -> None:
        for worker in self.workers:
            worker.process.kill()
        for worker in self.workers:
            worker.process.join()
            worker.pipe.close()
        self.workers = []

    def _start(self, name: str) -> _Process:
        context = multiprocessing.get_context("spawn")
        pipe, other = context.Pipe()
        arguments = (other, self._factory, self.size, os.getpid())
        process = context.Process(target=_serve, args=arguments, name=name, daemon=True)
        process.start()
        other.close()  # so that the worker alone holds it, and its end is seen
        return _Process(name, pid=process.pid or 0, process=process, pipe=pipe)

    def _read(self, worker: _Process) -> Iterator[Done | Lost]:
        try:
            kind, value = worker.pipe.recv()
        except (EOFError, OSError):
            worker.process.join()
            if not self._started:
                raise ValueError(
                    "worker processes can't start: start them below `if __name__ == '__main__':`, or use workers=1"
                ) from None
            reason = _how_it_ended(worker.process.exitcode)
            self._failed_starts += worker.stage == "starting"
            if self._failed_starts > FAILED_STARTS:
                raise RuntimeError(f"no worker process can be started any more: {reason}") from None
            yield self._replace(worker, "worker_died", reason)
            return
        job = worker.job
        if kind == "ready":
            worker.stage, self._started, self._failed_starts = "idle", True, 0
        elif kind == "failed":
            raise value
        elif job is not None and kind == "news":
            self._on_news(job, value)
        elif job is not None:
            worker.stage, worker.job = "idle", None
            error = kind == "error"
            yield (
                lost_by_error(job, value, worker.title) if error else Done(job, value, worker.title)
            )

    def _replace(self, worker: _Process, kind: str, reason: str) -> Lost:
        """Put a new process in a worker's place."""
        worker.process.kill()
        worker.process.join()
        worker.pipe.close()
        self.workers[self.workers.index(worker)] = self._start(worker.name)
        return Lost(worker.job, kind, reason, worker.title)


def lost_by_error(job: Job | None, error: BaseException, worker: str) -> Lost:
    """The loss of a job that an error ended; raises errors of the disk, which end a whole run."""
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
    """Runs in a worker process: does job after job until the pool is closed, and leaves signals to its parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # which kills it when it ends
    die_with_parent()
    if os.getppid() != parent:  # the parent died before
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
    """The error with its traceback as a note; where it can't be pickled, a RuntimeError with its message."""
    where = "".join(traceback.format_exception(error))
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        error = RuntimeError(f"{type(error).__name__}: {error}")
    error.add_note(where)
    return error


@dataclass
class JobQueue:
    """The queue of jobs: keeps a pool's workers busy until all work is done or has failed for good.

    Lost work is done again, divided by ``split`` into smaller jobs (so that one bad member can't take others down
    again), by another worker where there is one, at most ``max_retries`` times.
    """

    pool: Pool
    max_retries: int
    split: Callable[[Any], list[Any]] = field(default=lambda work: [work])
    limit: Callable[[Any], float] = field(default=lambda work: 0.0)
    """Seconds that work may take; 0: any."""
    on_lost: Callable[[Lost, bool], None] = field(default=lambda lost, again: None)
    """Called with each loss, and whether the job is done again."""
    max_in_a_row: float | None = None
    """Most jobs lost with none done between them; None: ``max_retries`` + 2 for each worker, and for 4 at least."""

    def __post_init__(self) -> None:
        self._retries: list[Job] = []
        self._running: dict[int, Job] = {}
        self._submitted = self._lost_in_a_row = 0

    def run(self, feed: Callable[[int], Sequence[Any]]) -> Iterator[tuple[Any, Done | Lost]]:
        """Each work with its outcome, as outcomes come; Lost means that it failed for good.

        ``feed`` is asked for work for so many idle workers whenever some are; where it has none although nothing
        is at work, the run is over. Raises RuntimeError where jobs are lost one after the other and none is done.
        """
        while True:
            self._submit_retries()
            idle = self.pool.idle()
            for worker, work in zip(idle, feed(len(idle)) if idle else (), strict=False):
                self._submit(Job(work), worker)
            if not self._running and not self._retries and idle:
                return
            for report in self.pool.wait():
                if isinstance(report, Done):
                    self._lost_in_a_row = 0
                    del self._running[report.job.number]
                    yield report.job.work, report
                else:
                    yield from self._lost(report)

    def _submit(self, job: Job, worker: str) -> None:
        self._submitted += 1
        job = replace(job, number=self._submitted, seconds=self.limit(job.work))
        self._running[job.number] = job
        self.pool.submit(job, worker)

    def _submit_retries(self) -> None:
        """Submits retries to other workers than those that lost them: a broken one is idle soonest."""
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
        del self._running[job.number]
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
