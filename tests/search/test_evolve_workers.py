"""Searches on Ray's workers: the numbers of one process, whatever their number and whoever dies."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.core.pool import Done, Job, Lost
from engine.core.ray_pool import RayPool
from engine.data.library import open_library
from engine.data.shards.index import data_digest
from engine.search import evolve
from engine.search import worker as cohort_worker
from engine.search.worker import CohortFactory
from tests.runs import RECIPE, begin, ended_as, one_line, resume

ray = pytest.importorskip("ray")


pytestmark = pytest.mark.usefixtures("undrawn")


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    """One Ray for all tests here."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    quiet = {"include_dashboard": False, "log_to_driver": False}
    ray.init(address="local", num_cpus=3, object_store_memory=80_000_000, **quiet)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    ray.shutdown()


@pytest.fixture(scope="module")
def reference(tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory, undrawn: None) -> Path:
    """A run without Ray that nothing interrupted."""
    run = tmp_path_factory.mktemp("runs") / "reference"
    assert begin(tiny_shards, run)[0] == 0
    return run


def events(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]


class Killer(RayPool):
    """Kills the worker of the first job of several members."""

    killed = 0

    def submit(self, job: Job, worker: str) -> None:
        super().submit(job, worker)
        if not Killer.killed and len(job.work.numbers) > 1:
            Killer.killed = self.pids()[worker]

    def wait(self) -> Sequence[Done | Lost]:
        if Killer.killed > 0:
            os.kill(Killer.killed, signal.SIGKILL)
            Killer.killed = -1
        return super().wait()


@pytest.mark.slow
def test_a_search_goes_on_with_another_number_of_workers(
    reference: Path, tiny_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    with monkeypatch.context() as patched:
        patched.setattr(cohort_worker, "evaluate_cohort", interrupted)
        assert "interrupted" in one_line(begin(tiny_shards, run), code=130)
    code, out, err = resume(run, "--workers", 2)
    assert (code, err) == (0, "")
    ended_as(run, reference)
    assert [event["kind"] for event in events(run)] == ["resumed"] and "run resumed" in out


def interrupted(*args: Any, **kwargs: Any) -> Any:
    raise KeyboardInterrupt


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_worker_killed_in_mid_member_changes_no_number(
    reference: Path, tiny_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    monkeypatch.setattr(evolve, "RayPool", Killer)
    code, out, err = begin(tiny_shards, run, "--workers", 1)
    assert (code, err) == (0, "") and Killer.killed == -1
    ended_as(run, reference)
    died, again = events(run)
    assert died["kind"] == "worker_died" and died["trials"] == again["trials"] == [0, 1]
    assert str(died["worker"]).startswith("worker 0 (process ") and again["kind"] == "retry"
    assert "worker died" in out and "What happened" in out


def factory(shards: Path, run: Path, **changed: Any) -> CohortFactory:
    folders = [shards / "unlabelled", shards / "labelled"]
    libraries = [open_library([f], cache=shards, report=lambda *_: None) for f in folders]
    fields = {
        "recipe": RECIPE,
        "videos": libraries[0].shards,
        "labelled": libraries[1].shards,
        "data": data_digest(p for library in libraries for p in library.shards),
        "checkpoints": run / "checkpoints",
        "device": "cpu",
        "members_at_once": None,
    }
    return CohortFactory(**{**fields, **changed})


def test_a_worker_divides_its_machines_cores(reference: Path, tiny_shards: Path) -> None:
    cores = len(os.sched_getaffinity(0))
    make = factory(tiny_shards, reference)
    assert make(1).trainer.runtime.cores == cores
    assert make(cores).trainer.runtime.cores == make(4 * cores).trainer.runtime.threads == 1


def test_a_worker_that_does_not_see_the_data_says_where(reference: Path, tiny_shards: Path) -> None:
    with pytest.raises(ValueError, match=r"/nowhere is not there on .* where all nodes see them"):
        factory(tiny_shards, reference, videos=(Path("/nowhere"),))(1)
    with pytest.raises(ValueError, match="checkpoints is not there on"):
        factory(tiny_shards, reference.parent)(1)
    with pytest.raises(ValueError, match="holds other videos on"):
        factory(tiny_shards, reference, data="another")(1)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--workers", 1, "--gpus", 1), "not both"),
        (("--workers", 1, "--device", "cuda"), "contradicts --workers"),
        (("--gpus", 1, "--device", "cpu"), "contradicts --gpus"),
        (("--time-limit", 5), "needs a worker"),
    ],
)
def test_options_that_cant_be_are_told_in_a_line(
    tiny_shards: Path, tmp_path: Path, more: tuple[object, ...], message: str
) -> None:
    assert message in one_line(begin(tiny_shards, tmp_path / "run", *more), code=2)
