"""Milliseconds that a study takes for a trial, asked, stored and told, as it grows: python benchmarks/study_writes.py

Options: --storage (an Optuna storage URL; default an SQLite file in --folder, which is a temporary one), --method,
--trials. Prints the mean over the trials since the row before, and the time to open the study again at the end.
"""

from __future__ import annotations

import argparse
import tempfile
import time
import uuid
from pathlib import Path

from engine.objective.terms import TERM_NAMES
from engine.recipe import Search
from engine.search import SearchStudy

MARKS = (250, 500, 1000, 2000, 4000, 8000)
"""Trials after which a row is printed."""

ATTRIBUTES = {
    "metrics": dict.fromkeys(("hungarian", "nmi", "ari", "effective_rank"), 0.3125),
    "seeds": [0],
    "seconds": 31.25,
    "clips_per_second": 98.7,
    "terms": dict.fromkeys(TERM_NAMES, 0.71875),
    "recipe_hash": "0123456789ab",
    "labels_used": True,
}
"""What a run tells with a member."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--storage", help="an Optuna storage URL")
    parser.add_argument("--folder", type=Path, help="where the SQLite file goes")
    parser.add_argument("--method", default="evolution")
    parser.add_argument("--trials", type=int, default=2000)
    parser.add_argument("--generation", type=int, default=4)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        measure(options, options.storage or Path(folder) / "study.db")


def measure(options: argparse.Namespace, storage: str | Path) -> None:
    settings = Search(
        method=options.method,
        population=20,
        rounds=options.trials - 20,
        generation=options.generation,
    )
    name = f"study-writes-{uuid.uuid4().hex[:8]}"
    facts = {"storage": storage, "name": name, "seed": 0, "recipe_hash": "benchmark"}
    study = SearchStudy(settings, **facts)
    print(f"{'trials':>8} {'ms a trial':>12} {'of which CPU':>14}")
    done, before, wall, cpu = 0, 0, time.perf_counter(), time.process_time()
    while not study.finished:
        for proposal in study.ask():
            study.tell(
                proposal.number, fitness=proposal.weights["rgb/predict"], attributes=ATTRIBUTES
            )
            done += 1
            if done in MARKS or done == options.trials:
                count, now, now_cpu = done - before, time.perf_counter(), time.process_time()
                shares = ((now - wall) * 1000 / count, (now_cpu - cpu) * 1000 / count)
                print(f"{done:>8} {shares[0]:>12.2f} {shares[1]:>14.2f}", flush=True)
                before, wall, cpu = done, now, now_cpu
    wall = time.perf_counter()
    opened = SearchStudy(settings, **facts)
    print(
        f"opened again with {len(opened.members())} members in {time.perf_counter() - wall:.2f} s"
    )


if __name__ == "__main__":
    main()
