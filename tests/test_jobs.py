"""Which jobs are handed out, and again; a pool made of lists stands for the workers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from engine.jobs import Crew, Done, Job, LocalPool, Lost


class Scripted:
    """Workers whose jobs end as ``fate`` says: a result, or the kind of a loss."""

    def __init__(self, size: int, fate: Callable[[Job, str], Any]) -> None:
        self.size, self._fate = size, fate
        self._free = [f"w{i}" for i in range(size)]
        self._out: list[tuple[Job, str]] = []
        self.handed: list[tuple[Any, str, int]] = []

    def idle(self) -> list[str]:
        return list(self._free)

    def ready(self) -> int:
        return self.size

    def submit(self, job: Job, worker: str) -> None:
        self._free.remove(worker)
        self._out.append((job, worker))
        self.handed.append((job.work, worker, job.attempt))

    def wait(self) -> Sequence[Done | Lost]:
        if not self._out:
            return []
        job, worker = self._out.pop(0)
        self._free.append(worker)
        end = self._fate(job, worker)
        return [end if isinstance(end, Lost) else Done(job, end, worker)]

    def close(self) -> None:
        pass


def feeder(works: Sequence[Any]) -> Callable[[int], list[Any]]:
    left = list(works)

    def feed(count: int) -> list[Any]:
        now, left[:] = left[:count], left[count:]
        return now

    return feed


def halves(work: tuple[int, ...]) -> list[tuple[int, ...]]:
    return [(member,) for member in work]


def outcomes(crew: Crew, works: Sequence[Any]) -> dict[Any, Any]:
    found = list(crew.run(feeder(works)))
    ended = {w: r.result if isinstance(r, Done) else (r.kind, r.reason) for w, r in found}
    assert len(ended) == len(found), "a work ended twice"
    return ended


def test_a_bad_member_takes_no_other_down_twice() -> None:
    def fate(job: Job, worker: str) -> Any:
        return Lost(job, "worker_died", "bang", worker) if 2 in job.work else sum(job.work)

    pool, told = Scripted(2, fate), list[tuple[str, bool]]()
    crew = Crew(pool, 2, halves, on_lost=lambda lost, again: told.append((lost.kind, again)))
    ended = outcomes(crew, [(1, 2, 3), (4, 5)])
    assert ended == {(1,): 1, (2,): ("worker_died", "bang"), (3,): 3, (4, 5): 9}
    assert told == [("worker_died", True), ("worker_died", True), ("worker_died", False)]
    attempts = [attempt for work, _, attempt in pool.handed if 2 in work]
    assert attempts == [1, 2, 3]


def test_a_job_is_tried_again_by_another_worker() -> None:
    def fate(job: Job, worker: str) -> Any:
        return Lost(job, "error", "broken GPU", worker) if worker == "w0" else job.work

    pool = Scripted(3, fate)
    ended = outcomes(Crew(pool, 1, lambda work: [work]), list(range(6)))
    assert ended == {i: i for i in range(6)}
    again = [worker for _, worker, attempt in pool.handed if attempt == 2]
    assert again and "w0" not in again


def test_a_run_where_nothing_is_ever_done_ends() -> None:
    pool = Scripted(2, lambda job, worker: Lost(job, "error", "no such file", worker))
    with pytest.raises(RuntimeError, match=r"jobs in a row were lost .* no such file; mend that"):
        outcomes(Crew(pool, 1, lambda work: [work]), list(range(100)))
    assert len(pool.handed) < 30


def test_time_limits_are_those_of_the_work() -> None:
    limits = []

    def fate(job: Job, worker: str) -> Any:
        limits.append(job.seconds)
        return None

    crew = Crew(Scripted(1, fate), 0, halves, limit=lambda work: 2.0 * len(work))
    outcomes(crew, [(1, 2), (3,)])
    assert limits == [4.0, 2.0]


def test_this_process_does_jobs_while_it_waits() -> None:
    news: list[tuple[int, str]] = []

    def evaluate(work: str, tell: Callable[[Any], None]) -> str:
        tell(f"at {work}")
        return work.upper()

    pool = LocalPool(evaluate, on_news=lambda job, said: news.append((job.number, said)))
    assert outcomes(Crew(pool, 0, lambda work: [work]), ["a", "b"]) == {"a": "A", "b": "B"}
    assert news == [(1, "at a"), (2, "at b")]


def test_an_error_in_this_process_is_raised() -> None:
    def evaluate(work: str, tell: Callable[[Any], None]) -> str:
        raise OSError("disk")

    pool = LocalPool(evaluate, on_news=lambda job, said: None)
    with pytest.raises(OSError, match="disk"):
        outcomes(Crew(pool, 5, lambda work: [work]), ["a"])
