"""Tables of results on the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console

from engine.core.display import spread_cells, table
from engine.evaluate.protocols import Evaluated
from engine.evaluate.scores import Spread
from engine.objective.terms import BY_NAME


def print_evaluated(found: Evaluated, *, name: str) -> None:
    """A protocol's metrics in percent, under the words that say how they came about."""
    console = Console(highlight=False)
    rows = [[metric, *_cells(spread)] for metric, spread in found.metrics.items()]
    used = "used before" if found.labels_used else "not used before"
    console.print(f"\n{found.protocol_string}; labels {used}", markup=False, soft_wrap=True)
    console.print(f"checkpoint: {name}", markup=False, soft_wrap=True)
    console.print(table("", ["", "mean %", "sd", "n"], rows))


def print_baselines(found: Mapping[str, Spread]) -> None:
    """Trivial baselines, if any were asked for."""
    if found:
        rows = [[name, *_cells(spread)] for name, spread in found.items()]
        Console(highlight=False).print(
            table("", ["trivial, the same folds", "mean %", "sd", "n"], rows)
        )


def _cells(spread: Spread) -> list[str]:
    return [f"{100 * spread.mean:.1f}", f"{100 * spread.sd:.1f}", str(spread.n)]


def print_outcome(summary: Mapping[str, Any]) -> None:
    """Print a search's outcome: its highest and lowest weights, and fitness with fresh seeds."""
    console = Console(highlight=False)
    ranked = sorted(summary["weights"].items(), key=lambda item: -item[1])
    rows = [
        [BY_NAME[high].code, high, f"{a:.2f}", BY_NAME[low].code, low, f"{b:.2f}"]
        for (high, a), (low, b) in zip(ranked[:10], ranked[::-1][:10], strict=True)
    ]
    columns = ["", "ten highest", "weight", "", "ten lowest", "weight"]
    console.print(table(f"Best loss (trial {summary['best_trial']})", columns, rows))
    kinds = {
        "untrained": "untrained network",
        "initial_population": "initial random population",
        "random": "random losses, fresh seeds",
        "best": "best loss, fresh seeds",
    }
    rows = [[label, *spread_cells(summary[key])] for key, label in kinds.items()]
    rows.append(
        ["best loss, as the search saw it", f"{summary['best_search_fitness']:.3f}", "", "1"]
    )
    console.print(table("Fitness", ["", "mean", "sd", "n"], rows))
    if summary["failures"]:
        console.print(
            f"{summary['failures']} of {summary['members']} members failed; see the report"
        )


EVENTS = {
    "worker_died": "worker died",
    "node_lost": "node lost",
    "time_limit": "time limit reached",
    "out_of_memory": "out of memory",
    "error": "error in a worker",
    "start_failed": "worker could not start",
    "retry": "jobs done again",
    "non_finite": "member not finite",
    "failed": "member failed",
    "storage": "study's storage was away",
    "resumed": "run resumed",
}
"""Kinds of events, for the closing table."""


def print_events(counts: Mapping[str, int]) -> None:
    """Print what happened beside the search, by kind, if anything did."""
    if counts:
        rows = [[EVENTS.get(kind, kind), str(count)] for kind, count in counts.items()]
        Console(highlight=False).print(table("What happened", ["", "times"], rows))
