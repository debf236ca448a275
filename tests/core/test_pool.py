"""Which jobs are handed out, and again: a pool made of lists stands for the workers; and processes that misbehave."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from engine.core.pool import Done, Evaluator, Job, JobQueue, LocalPool, Lost, Plain, ProcessPool

ROOT = Path(__file__).resolve().parents[2]


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


def outcomes(queue: JobQueue, works: Sequence[Any]) -> dict[Any, Any]:
    found = list(queue.run(feeder(works)))
    ended = {w: r.result if isinstance(r, Done) else (r.kind, r.reason) for w, r in found}
    assert len(ended) == len(found), "a work ended twice"
    return ended


def test_a_bad_member_takes_no_other_down_twice() -> None:
    def fate(job: Job, worker: str) -> Any:
        return Lost(job, "worker_died", "bang", worker) if 2 in job.work else sum(job.work)

    pool, told = Scripted(2, fate), list[tuple[str, bool]]()
    queue = JobQueue(pool, 2, halves, on_lost=lambda lost, again: told.append((lost.kind, again)))
    ended = outcomes(queue, [(1, 2, 3), (4, 5)])
    assert ended == {(1,): 1, (2,): ("worker_died", "bang"), (3,): 3, (4, 5): 9}
    assert told == [("worker_died", True), ("worker_died", True), ("worker_died", False)]
    attempts = [attempt for work, _, attempt in pool.handed if 2 in work]
    assert attempts == [1, 2, 3]


def test_a_job_is_tried_again_by_another_worker() -> None:
    def fate(job: Job, worker: str) -> Any:
        return Lost(job, "error", "broken GPU", worker) if worker == "w0" else job.work

    pool = Scripted(3, fate)
    ended = outcomes(JobQueue(pool, 1, lambda work: [work]), list(range(6)))
    assert ended == {i: i for i in range(6)}
    again = [worker for _, worker, attempt in pool.handed if attempt == 2]
    assert again and "w0" not in again


def test_a_run_where_nothing_is_ever_done_ends() -> None:
    pool = Scripted(2, lambda job, worker: Lost(job, "error", "no such file", worker))
    with pytest.raises(RuntimeError, match=r"jobs in a row were lost .* no such file; mend that"):
        outcomes(JobQueue(pool, 1, lambda work: [work]), list(range(100)))
    assert len(pool.handed) < 30


def test_time_limits_are_those_of_the_work() -> None:
    limits = []

    def fate(job: Job, worker: str) -> Any:
        limits.append(job.seconds)
        return None

    queue = JobQueue(Scripted(1, fate), 0, halves, limit=lambda work: 2.0 * len(work))
    outcomes(queue, [(1, 2), (3,)])
    assert limits == [4.0, 2.0]


def test_this_process_does_jobs_while_it_waits() -> None:
    news: list[tuple[int, str]] = []

    def evaluate(work: str, tell: Callable[[Any], None]) -> str:
        tell(f"at {work}")
        return work.upper()

    pool = LocalPool(evaluate, on_news=lambda job, said: news.append((job.number, said)))
    assert outcomes(JobQueue(pool, 0, lambda work: [work]), ["a", "b"]) == {"a": "A", "b": "B"}
    assert news == [(1, "at a"), (2, "at b")]


def test_an_error_in_this_process_is_raised() -> None:
    def evaluate(work: str, tell: Callable[[Any], None]) -> str:
        raise OSError("disk")

    pool = LocalPool(evaluate, on_news=lambda job, said: None)
    with pytest.raises(OSError, match="disk"):
        outcomes(JobQueue(pool, 5, lambda work: [work]), ["a"])


def act(workers_here: int) -> Evaluator:
    """Works are (what, argument): see below."""

    def evaluate(work: Any, tell: Callable[[Any], None]) -> Any:
        what, *arguments = work
        if what == "die once" and not Path(arguments[0]).exists():
            Path(arguments[0]).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        elif what == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        elif what == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        elif what == "raise":
            raise arguments[0]
        elif what == "sleep":
            tell("at it")
            time.sleep(arguments[0])
        return os.getpid(), workers_here

    return evaluate


def cant_start(workers_here: int) -> Evaluator:
    raise ValueError("no such codec")


class Odd(Exception):
    """Can be pickled, and not unpickled."""

    def __init__(self, one: str, two: str) -> None:
        super().__init__(one + two)


@pytest.fixture
def pool() -> Iterator[ProcessPool]:
    """Two worker processes, none of which may be left at the end."""
    pool = ProcessPool(act, size=2)
    yield pool
    pids = pool.pids().values()
    pool.close()
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_processes_do_each_job_once_and_stay(pool: ProcessPool) -> None:
    ended = outcomes(JobQueue(pool, 0), [("sleep", 0.01, i) for i in range(12)])
    assert len(ended) == 12 and set(ended.values()) <= {(pid, 2) for pid in pool.pids().values()}


def test_a_process_that_dies_loses_its_own_job_alone(pool: ProcessPool, tmp_path: Path) -> None:
    lost: list[tuple[Any, bool]] = []
    queue = JobQueue(
        pool, 1, on_lost=lambda one, again: lost.append((one.job and one.job.work, again))
    )
    once = ("die once", str(tmp_path / "died"))
    works = [("sleep", 0.3, 0), once, ("die",), *(("sleep", 0.02, i) for i in range(1, 6))]
    ended = outcomes(queue, works)
    died = [(once, True), (("die",), True), (("die",), False)]
    assert sorted(lost, key=str) == sorted(died, key=str)
    assert ended.pop(("die",)) == ("worker_died", "its process was ended by SIGKILL")
    assert len(ended) == 7 and all(isinstance(end[0], int) for end in ended.values())


def test_a_process_that_hangs_is_replaced(pool: ProcessPool) -> None:
    ended = outcomes(JobQueue(pool, 0, limit=lambda work: 1.5), [("stop",), ("sleep", 0.01)])
    assert ended[("stop",)] == ("time_limit", "not done in its time limit of 1.5 s")
    assert ended[("sleep", 0.01)] in {(pid, 2) for pid in pool.pids().values()}


def test_an_idle_process_that_dies_is_replaced(pool: ProcessPool) -> None:
    outcomes(JobQueue(pool, 0), [("sleep", 0.01)])
    os.kill(next(iter(pool.pids().values())), signal.SIGKILL)
    ended = outcomes(JobQueue(pool, 1), [("sleep", 0.01, i) for i in range(6)])
    assert len(ended) == 6 and all(isinstance(end[0], int) for end in ended.values())


@pytest.mark.parametrize(
    ("error", "kind", "reason"),
    [
        (KeyError("weights"), "error", "KeyError: 'weights'"),
        (ValueError("too few\nand more"), "error", "too few"),
        (Odd("a", "b"), "error", "RuntimeError: Odd: ab"),
        (MemoryError("no room"), "out_of_memory", "no room"),
        (RuntimeError("CUDA out of memory. Tried"), "out_of_memory", "CUDA out of memory"),
    ],
)
def test_an_error_of_a_process_is_reported(error: Exception, kind: str, reason: str) -> None:
    lost: list[Lost] = []
    pool = ProcessPool(Plain(raise_it), size=1)
    try:
        queue = JobQueue(pool, 0, on_lost=lambda one, again: lost.append(one))
        outcomes(queue, [Sendable(error)])
    finally:
        pool.close()
    (one,) = lost
    assert one.kind == kind and reason in one.reason and one.error is not None
    assert "raise_it" in one.error.__notes__[0]


class Sendable:
    """Makes an error in the worker, since ``Odd`` can't be sent there."""

    def __init__(self, error: Exception) -> None:
        self.kind, self.arguments = type(error), error.args

    def __hash__(self) -> int:
        return 0


def raise_it(work: Sendable) -> None:
    raise Odd("a", "b") if work.kind is Odd else work.kind(*work.arguments)


def test_a_full_disk_ends_everything(pool: ProcessPool) -> None:
    error = OSError(errno.ENOSPC, "No space left on device", "/runs/x")
    with pytest.raises(OSError, match="No space left") as told:
        outcomes(JobQueue(pool, 3), [("raise", error)])
    assert told.value.errno == errno.ENOSPC and told.value.filename == "/runs/x"


def test_processes_that_cant_start_say_why() -> None:
    pool = ProcessPool(cant_start, size=1)
    try:
        with pytest.raises(ValueError, match="no such codec"):
            outcomes(JobQueue(pool, 3), [("sleep", 0.0)])
    finally:
        pool.close()


def test_a_main_module_without_a_guard_is_told_in_a_line(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "from engine.core.pool import Plain, ProcessPool\n"
        "pool = ProcessPool(Plain(print), size=1)\n"
        "try:\n"
        "    while not pool.wait(): pass\n"
        "except ValueError as error:\n"
        "    print(error)\n"
        "pool.close()\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(script)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
    assert "can't start" in done.stdout and "__main__" in done.stdout


def test_progress_comes_from_processes() -> None:
    news: list[Any] = []
    pool = ProcessPool(act, size=1, on_news=lambda job, said: news.append((job.number, said)))
    try:
        outcomes(JobQueue(pool, 0), [("sleep", 0.01), ("sleep", 0.02)])
    finally:
        pool.close()
    assert news == [(1, "at it"), (2, "at it")]
