"""What a study costs a finished member, and what a kill leaves of it: python benchmarks/study_writes.py

For a journal file, an SQLite file and ``--storage URL`` where given: milliseconds a member (asked, told, stored; mean
since the row before), seconds to open the study with all of them, and for the files how many members were lost, and
how many torn, when their writer was killed (SIGKILL) at random moments, ``--kills`` times.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import tempfile
import time
import uuid
from pathlib import Path
from typing import Any

from engine.core.recipe import Search
from engine.objective.terms import TERM_NAMES
from engine.search.study import SearchStudy, read_trials

MARKS = (50, 250, 500, 1000, 2000, 4000, 8000)
"""Members after which a row is printed."""

ATTRIBUTES = {
    "metrics": dict.fromkeys(("hungarian", "nmi", "ari", "effective_rank"), 0.3125),
    "repeats": [dict.fromkeys(("fitness", "hungarian", "nmi", "ari", "effective_rank"), 0.3125)],
    "seeds": [0],
    "seconds": 31.25,
    "clips_per_second": 98.7,
    "terms": dict.fromkeys(TERM_NAMES, 0.71875),
    "recipe_hash": "0123456789ab",
    "labels_used": True,
}
"""What a run tells with a member."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--storage", help="a database URL of Optuna's, measured too")
    parser.add_argument("--folder", type=Path, help="where the files go")
    parser.add_argument("--method", default="evolution")
    parser.add_argument("--members", type=int, default=2000)
    parser.add_argument("--generation", type=int, default=4)
    parser.add_argument("--kills", type=int, default=50)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        for kind, suffix in (("journal", "jsonl"), ("SQLite", "db")):
            measure(kind, Path(folder) / f"study.{suffix}", options)
            kill(kind, Path(folder) / f"killed.{suffix}", options.kills)
        if options.storage:
            measure("URL", options.storage, options)


def measure(kind: str, storage: str | Path, options: argparse.Namespace) -> None:
    """Time writing and opening."""
    settings = Search(
        method=options.method,
        population=20,
        rounds=options.members - 20,
        generation=options.generation,
    )
    name = f"study-writes-{uuid.uuid4().hex[:8]}"
    facts: dict[str, Any] = {
        "storage": storage,
        "name": name,
        "seed": 0,
        "recipe_hash": "benchmark",
    }
    study = SearchStudy(settings, **facts)
    print(f"{kind:>8} {'members':>8} {'ms a member':>12} {'of which CPU':>14}")
    done, before, wall, cpu = 0, 0, time.perf_counter(), time.process_time()
    while not study.finished:
        for proposal in study.ask():
            study.tell(
                proposal.number, fitness=proposal.weights["rgb/predict"], attributes=ATTRIBUTES
            )
            done += 1
            if done in MARKS or done == options.members:
                count, now, now_cpu = done - before, time.perf_counter(), time.process_time()
                shares = ((now - wall) * 1000 / count, (now_cpu - cpu) * 1000 / count)
                print(f"{kind:>8} {done:>8} {shares[0]:>12.2f} {shares[1]:>14.2f}", flush=True)
                before, wall, cpu = done, now, now_cpu
    wall = time.perf_counter()
    opened = SearchStudy(settings, **facts)
    took = time.perf_counter() - wall
    print(f"{kind}: opened again with {len(opened.members())} members in {took:.2f} s")


def kill(kind: str, path: Path, kills: int) -> None:
    """Kill a writer again and again, and count what is there against what it was told was stored."""
    settings, rng = Search(method="random", population=20, rounds=100_000), random.Random(0)
    stored = lost = torn = half_lines = 0
    for _ in range(kills):
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            study = SearchStudy(settings, storage=path, name="x", seed=0, recipe_hash="benchmark")
            while True:
                for proposal in study.ask(100):
                    study.tell(proposal.number, fitness=0.5, attributes=ATTRIBUTES)
                    os.write(writing, b".")
        os.close(writing)
        acknowledged = len(os.read(reading, 1))
        time.sleep(rng.uniform(0.0, 0.2))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        with open(reading, "rb") as rest:
            acknowledged += len(rest.read())
        half_lines += path.suffix == ".jsonl" and not path.read_bytes().endswith(b"\n")
        members = read_trials(path, name="x")
        lost += max(0, stored + acknowledged - len(members))
        torn += sum(set(ATTRIBUTES) != set(member.attributes) for member in members)
        stored = len(members)
    print(
        f"{kind}: {kills} kills of a writer, {stored} members stored: {lost} lost, {torn} torn,"
        f" {half_lines} half lines that the next write cut off",
        flush=True,
    )


if __name__ == "__main__":
    main()
