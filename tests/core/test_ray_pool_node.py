"""A node of a cluster that is lost with its worker: two nodes of Ray's own test cluster, on this machine."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from engine.core.pool import Done, Evaluator, JobQueue, Lost, Tell
from engine.core.ray_pool import RayPool

ray = pytest.importorskip("ray")


def sleeper(workers_here: int) -> Evaluator:
    def evaluate(seconds: float, tell: Tell) -> tuple[float, int]:
        time.sleep(seconds)
        return seconds, workers_here

    return evaluate


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    here = Path(__file__).resolve().parents[1]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(here.parent), str(here)]))
    node = {"num_cpus": 1, "object_store_memory": 80_000_000, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=node)
    node.pop("include_dashboard")
    cluster.second = cluster.add_node(**node)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


@pytest.mark.slow
def test_a_lost_nodes_member_is_evaluated_by_another(nodes: Any) -> None:
    lost: list[tuple[Lost, bool]] = []
    left = [0.4 + i / 1000 for i in range(10)]
    works = list(left)

    def feed(count: int) -> list[float]:
        now, left[:] = left[:count], left[count:]
        return now

    pool = RayPool(sleeper, size=2, address=nodes.address)
    try:
        queue = JobQueue(pool, 2, lambda work: [work], on_lost=lambda *told: lost.append(told))
        done: list[tuple[float, int]] = []
        gone = False
        for _, report in queue.run(feed):
            assert isinstance(report, Done)
            done.append(report.result)
            if len(done) == 3 and pool.ready() == 2 and not gone:
                gone = True
                nodes.remove_node(nodes.second, allow_graceful=False)
    finally:
        pool.close()
    assert sorted(seconds for seconds, _ in done) == works
    assert {here for _, here in done} == {1}, "one worker a node: each has all its cores"
    assert gone and [again for report, again in lost if report.job] == [True]
    assert lost[0][0].kind in ("node_lost", "worker_died")
