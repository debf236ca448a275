"""Jobs on Ray: what is done, lost, done again, and what ends a run; workers here sleep or misbehave."""

from __future__ import annotations

import errno
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from engine.core.pool import Done, Evaluator, JobQueue, Lost
from engine.core.ray_pool import RayPool

ray = pytest.importorskip("ray")


@pytest.fixture(scope="module", autouse=True)
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One Ray for all tests here."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    path = os.environ.get("PYTHONPATH")
    here = Path(__file__).resolve().parents[1]
    os.environ["PYTHONPATH"] = os.pathsep.join([str(here.parent), str(here)])
    ray.init(
        address="local",
        num_cpus=4,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=80_000_000,
    )
    yield
    ray.shutdown()
    os.environ.pop("PYTHONPATH")
    if path is not None:
        os.environ["PYTHONPATH"] = path


def sleeper(workers_here: int) -> Evaluator:
    """Works are (what, argument): see below."""

    def evaluate(work: Any, tell: Callable[[Any], None]) -> Any:
        what, argument = work[0], work[1:]
        if what == "die once" and not Path(argument[0]).exists():
            Path(argument[0]).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        elif what == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        elif what == "stop":  # as a driver that hangs in the kernel
            os.kill(os.getpid(), signal.SIGSTOP)
        elif what == "raise":
            raise argument[0]
        elif what == "sleep":
            for i in range(4):
                tell(i)
                time.sleep(argument[0] / 4)
        return (work, os.getpid(), workers_here, os.environ["OMP_NUM_THREADS"])

    return evaluate


def broken(workers_here: int) -> Evaluator:
    raise ValueError("the videos are not on this node")


class Run:
    """Jobs through a queue, with all that became of them."""

    def __init__(
        self, works: list[Any], *, size: int, retries: int = 1, seconds: float = 0.0, **more: Any
    ) -> None:
        self.news: list[Any] = []
        self.lost: list[tuple[Lost, bool]] = []
        self.outcomes: list[tuple[Any, Done | Lost]] = []
        left = list(works)

        def feed(count: int) -> list[Any]:
            taken = left[:count]
            del left[:count]
            return taken

        factory = more.pop("factory", sleeper)
        pool = RayPool(
            factory, size=size, cpus=1.0, on_news=lambda job, news: self.news.append(news), **more
        )
        queue = JobQueue(
            pool,
            retries,
            lambda work: [work],
            limit=lambda work: seconds,
            on_lost=lambda lost, again: self.lost.append((lost, again)),
        )
        try:
            for outcome in queue.run(feed):
                self.outcomes.append(outcome)
        finally:
            pool.close()

    def results(self) -> list[Any]:
        return [o.result for _, o in self.outcomes if isinstance(o, Done)]

    def kinds(self) -> list[str]:
        return [lost.kind for lost, _ in self.lost]


def test_every_job_is_done_once_by_workers_that_stay() -> None:
    works = [("sleep", 0.25, i) for i in range(12)]
    run = Run(works, size=2)
    assert sorted(work for work, *_ in run.results()) == works
    assert len({pid for _, pid, *_ in run.results()}) == 2 and not run.lost
    cores = max(1, len(os.sched_getaffinity(0)) // 2)
    assert {tuple(rest) for _, _, *rest in run.results()} == {(2, str(cores))}


def test_progress_comes_while_a_job_is_at_work() -> None:
    assert set(Run([("sleep", 3.0)], size=1).news) & {1, 2, 3}


def test_a_killed_workers_job_is_done_again(tmp_path: Path) -> None:
    works = [("die once", str(tmp_path / "died")), *(("sleep", 0.05, i) for i in range(3))]
    run = Run(works, size=2)
    assert sorted(work[0] for work, *_ in run.results()) == ["die once", "sleep", "sleep", "sleep"]
    assert run.kinds() == ["worker_died"] and run.lost[0][1] is True


def test_a_job_that_kills_every_worker_fails_alone() -> None:
    run = Run([("die",), ("sleep", 0.05)], size=1, retries=1)
    (failed,) = [o for _, o in run.outcomes if isinstance(o, Lost)]
    assert failed.kind == "worker_died" and "ended unexpectedly" in failed.reason
    assert len(run.results()) == 1 and [again for _, again in run.lost] == [True, False]


def test_a_worker_that_hangs_is_replaced() -> None:
    run = Run([("stop",), ("sleep", 0.05)], size=1, retries=0, seconds=1.5)
    assert run.kinds() == ["time_limit"] and len(run.results()) == 1


@pytest.mark.parametrize(
    ("error", "kind", "reason"),
    [
        (KeyError("weights"), "error", "KeyError: 'weights'"),
        (MemoryError("no room"), "out_of_memory", "no room"),
        (RuntimeError("CUDA out of memory. Tried to"), "out_of_memory", "CUDA out of memory"),
    ],
)
def test_an_error_is_told_with_its_reason(error: Exception, kind: str, reason: str) -> None:
    run = Run([("raise", error), ("sleep", 0.0)], size=1, retries=0)
    assert run.kinds() == [kind] and reason in run.lost[0][0].reason
    assert len(run.results()) == 1


def test_a_full_disk_ends_the_run() -> None:
    error = OSError(errno.ENOSPC, "No space left on device", "/runs/x")
    with pytest.raises(OSError, match="No space left") as told:
        Run([("raise", error)], size=1)
    assert told.value.errno == errno.ENOSPC and told.value.filename == "/runs/x"


def test_workers_that_cant_start_end_the_run_in_one_line() -> None:
    with pytest.raises(RuntimeError, match="none can be started: the videos are not on this node"):
        Run([("sleep", 0.0)], size=2, factory=broken)


def test_workers_that_lose_every_job_end_the_run() -> None:
    with pytest.raises(RuntimeError, match="jobs in a row were lost and none was done") as told:
        Run([("raise", KeyError(i)) for i in range(30)], size=1, retries=0)
    assert "--resume" in str(told.value)


def test_a_cluster_without_gpus_says_so() -> None:
    with pytest.raises(ValueError, match="no GPUs: say how many workers"):
        RayPool(sleeper, size=None, gpus=1.0)
    with pytest.raises(ValueError, match="no room for a worker"):
        RayPool(sleeper, size=2, gpus=1.0)


def test_a_ray_that_cant_be_started_is_told_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    tries = []

    def init(**options: Any) -> None:
        tries.append(options["address"])
        raise Exception("the raylet failed to start")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(RuntimeError, match="Ray can't be started on this machine: the raylet"):
        RayPool(sleeper, size=1)
    assert tries == ["local"] * 3


def test_a_cluster_that_lets_nobody_in_is_told_with_what_to_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As one does whose nodes ask for tokens, where this machine shows none, or the other way round."""

    def refused(**options: Any) -> None:
        raise ConnectionError("Failed to connect to Ray cluster at 10.0.0.1:6379")

    with socket.create_server(("127.0.0.1", 0)) as there, monkeypatch.context() as patched:
        address = f"127.0.0.1:{there.getsockname()[1]}"
        patched.setattr(ray, "is_initialized", lambda: False)
        patched.setattr(ray, "init", refused)
        with pytest.raises(ValueError, match=r"can't join a Ray .* export RAY_AUTH_MODE=token"):
            RayPool(sleeper, size=1, address=address)


def test_a_folder_whose_path_is_too_long_for_ray_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """In Ray's words; batch systems set such a TMPDIR."""
    tries = []

    def init(**options: Any) -> None:
        tries.append(options["address"])
        raise OSError(
            "validate_socket_filename failed: AF_UNIX path length cannot exceed 107 bytes: /scratch/..."
        )

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(ValueError, match=r"path of its folder is too long .* set RAY_TMPDIR"):
        RayPool(sleeper, size=1)
    assert tries == ["local"]
