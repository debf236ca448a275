"""What handing jobs to Ray's workers costs: sleeping members, whose ideal time is known.

    python benchmarks/ray_overhead.py --json benchmarks/results/ray_overhead.jsonl

Two cases: 64 members of 1 s on 2 workers (ideal 32 s), and 2,000 members of about 2 s on 64 workers that share this
machine's cores. Time counts from when all workers are ready; how long that took stands beside it. ``overhead`` is the
time above the ideal as a share of it; ``efficiency`` is the share of the workers' time that members slept.
"""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import click
from rows import JSON, append

from engine.core.pool import Done, Evaluator, JobQueue
from engine.core.ray_pool import RayPool


def sleeper(workers_here: int) -> Evaluator:
    """A worker whose members sleep, and tell how far they are as a member that is trained does."""

    def evaluate(seconds: float, tell: Callable[[Any], None]) -> float:
        began = time.perf_counter()
        for step in range(10):
            tell(step)
            time.sleep(max(0.0, began + seconds * (step + 1) / 10 - time.perf_counter()))
        return time.perf_counter() - began

    return evaluate


def measure(name: str, *, workers: int, members: list[float], cpus: float) -> dict[str, Any]:
    """Run all members and compare with the ideal: the longest of the workers' equal shares."""
    began = time.perf_counter()
    pool = RayPool(sleeper, size=workers, cpus=cpus)
    queue = JobQueue(pool, 0, split=lambda work: [work])
    left = list(members)
    try:
        while pool.ready() < workers:
            pool.wait()
        ready = time.perf_counter()

        def feed(count: int) -> list[float]:
            now, left[:] = left[:count], left[count:]
            return now

        cpu = time.process_time()
        slept = [report.result for _, report in queue.run(feed) if isinstance(report, Done)]
        wall, cpu = time.perf_counter() - ready, time.process_time() - cpu
    finally:
        pool.close()
    assert len(slept) == len(members)
    ideal = ideal_seconds(members, workers)
    return {
        "case": name,
        "workers": workers,
        "members": len(members),
        "seconds_a_member": round(sum(members) / len(members), 4),
        "ideal_s": round(ideal, 3),
        "wall_s": round(wall, 3),
        "overhead": round(wall / ideal - 1, 4),
        "efficiency": round(sum(members) / (workers * wall), 4),
        "driver_ms_a_member": round(1e3 * cpu / len(members), 3),
        "start_s": round(ready - began, 2),
    }


def ideal_seconds(members: list[float], workers: int) -> float:
    """When the last member ends if each begins the moment that a worker is free, in this order."""
    free = [0.0] * workers
    for seconds in members:
        at = free.index(min(free))
        free[at] += seconds
    return max(free)


@click.command()
@JSON
@click.option("--only", type=click.Choice(["few", "many"]))
@click.option("--seed", default=0, show_default=True)
def main(out: Path | None, only: str | None, seed: int) -> None:
    """Run both cases, or one, and print a row of each."""
    rng = random.Random(seed)
    shorter = [rng.uniform(1.8, 2.2) for _ in range(2000)]
    cases = {
        "few": {"workers": 2, "members": [1.0] * 64, "cpus": 1.0},
        "many": {"workers": 64, "members": shorter, "cpus": 1 / 32},
    }
    for name, case in cases.items():
        if only in (None, name):
            row = measure(name, **case)
            click.echo(json.dumps(row))
            from engine.core.runtime import choose_runtime  # late: a worker needs no torch

            load = {"load_1_min": round(os.getloadavg()[0], 1), "ray": metadata.version("ray")}
            row = {"benchmark": "ray_overhead", **row, **load}
            append(out, [row], choose_runtime("cpu"), seed=seed)


if __name__ == "__main__":
    main()
