"""Jobs handed to workers, and lost ones handed out again; knows nothing of losses, videos or Ray.

A pool has workers and one interface: in this process here, on Ray in ``engine.workers``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

Tell = Callable[[Any], None]
"""Called by an evaluator while it is at work, with how far it is."""
Evaluator = Callable[[Any, Tell], Any]
"""Does a job's work: (work, tell) -> result."""
Factory = Callable[[int], Evaluator]
"""Makes a worker's evaluator, in the worker's own process; given how many workers its machine has."""


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
        """End all workers."""


class LocalPool:
    """One worker: this process, which does a job while it waits for it."""

    size = 1

    def __init__(self, evaluator: Evaluator, *, on_news: Callable[[Job, Any], None]) -> None:
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
class Crew:
    """Keeps a pool's workers busy until all work is done or has failed for good.

    Lost work is done again in the parts that ``split`` makes of it (so that one bad member can't take others down
    again), by another worker where there is one, at most ``max_retries`` times.
    """

    pool: Pool
    max_retries: int
    split: Callable[[Any], list[Any]]
    limit: Callable[[Any], float] = field(default=lambda work: 0.0)
    """Seconds that work may take; 0: any."""
    on_lost: Callable[[Lost, bool], None] = field(default=lambda lost, again: None)
    """Told what was lost, and whether it is done again."""

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
        if self._lost_in_a_row > (self.max_retries + 2) * max(self.pool.size, 4):
            raise RuntimeError(
                f"{self._lost_in_a_row} jobs in a row were lost and none was done, the last on {lost.worker}:"
                f" {lost.reason}; mend that, then use --resume"
            )
        if not again:
            yield job.work, lost
            return
        for part in self.split(job.work):
            self._retries.append(Job(part, attempt=job.attempt + 1, lost_by=lost.worker))
