"""Where an ingest's jobs run: in this process, or in processes of this machine."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
from collections import deque
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Protocol

from engine.data.parts import CutJob, Done, Job, after_crash, reject_source, run_job


class Executor(Protocol):
    """Takes jobs while it has room, and gives them back done, in any order."""

    def has_room(self) -> bool:
        """Whether another job may be submitted now."""

    def is_busy(self) -> bool:
        """Whether jobs are on their way."""

    def submit(self, job: Job) -> None:
        """Take a job."""

    def next(self) -> tuple[Job, Done]:
        """Wait for a job; raises what the job raised."""

    def close(self) -> None:
        """Drop jobs that haven't begun."""


class InProcess:
    """Runs jobs one after the other."""

    def __init__(self) -> None:
        self._jobs = deque[Job]()

    def has_room(self) -> bool:
        return not self._jobs

    def is_busy(self) -> bool:
        return bool(self._jobs)

    def submit(self, job: Job) -> None:
        self._jobs.append(job)

    def next(self) -> tuple[Job, Done]:
        job = self._jobs.popleft()
        return job, run_job(job)

    def close(self) -> None:
        self._jobs.clear()


class Pool:
    """Runs jobs in worker processes; a source that kills its worker is rejected.

    A dead worker fails every job then in flight, and nothing tells which one killed it: those are run again, one
    at a time, so that only the guilty one is rejected: the clip that it was at, and if that is not enough, the
    whole source.
    """

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self._pool = _pool(workers)
        self._running: dict[Future[Done], Job] = {}
        self._suspects = deque[Job]()
        self._alone = False

    def has_room(self) -> bool:
        return not self._suspects and not self._alone and len(self._running) < 2 * self.workers

    def is_busy(self) -> bool:
        return bool(self._running or self._suspects)

    def submit(self, job: Job) -> None:
        try:
            self._running[self._pool.submit(run_job, job)] = job
        except BrokenProcessPool:  # ``next`` will see to the others that broke with it
            future = Future[Done]()
            future.set_exception(BrokenProcessPool())
            self._running[future] = job

    def next(self) -> tuple[Job, Done]:
        while True:
            if not self._running:
                self._alone = True
                self.submit(self._suspects.popleft())
            done, _ = wait(self._running, return_when=FIRST_COMPLETED)
            intact = [future for future in done if not _broke(future)]
            if intact:
                job = self._running.pop(intact[0])
                self._alone = False
                return job, intact[0].result()
            self._pool.shutdown(wait=False)
            self._pool = _pool(self.workers)
            # Jobs that the same death ended later count as broken too, so none is lost or run twice at once.
            broken = list(self._running.values())
            self._running.clear()
            if not self._alone:
                self._suspects.extend(broken)
                continue
            again = without_crash(broken[0])
            if again is None:
                self._alone = False
                return broken[0], rejected(broken[0])
            self._suspects.appendleft(again)

    def close(self) -> None:
        if (
            self._running
        ):  # an end before the end: jobs leave nothing half done, so nobody waits for them
            for process in list(getattr(self._pool, "_processes", {}).values()):
                process.kill()
        self._pool.shutdown(wait=True, cancel_futures=True)


def without_crash(job: Job) -> Job | None:
    """What to do of a job whose process died of it; None for no more."""
    return after_crash(job) if isinstance(job, CutJob) else None


def rejected(job: Job) -> Done:
    """The outcome of a job whose processes died of it; raises RuntimeError where that was no source's fault."""
    if isinstance(job, CutJob):
        return reject_source(job)
    raise RuntimeError(
        f"the process that wrote {job.group.shard} was killed twice: is there enough memory?"
    )


def _broke(future: Future[Done]) -> bool:
    return isinstance(future.exception(), BrokenProcessPool)


def _follow(parent: int) -> None:
    """Leave Ctrl-C to the parent, and die when it dies, however that is."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        die_with_parent = 1  # PR_SET_PDEATHSIG
        ctypes.CDLL(None).prctl(die_with_parent, signal.SIGKILL)
        if os.getppid() != parent:  # it died before
            os._exit(1)


def _pool(workers: int) -> ProcessPoolExecutor:
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(
        workers, mp_context=context, initializer=_follow, initargs=(os.getpid(),)
    )
    try:
        pool.submit(os.getpid).result()
    except BrokenProcessPool as error:
        raise ValueError(
            "worker processes can't start: call ingest below `if __name__ == '__main__':`, or with workers=1"
        ) from error
    return pool
