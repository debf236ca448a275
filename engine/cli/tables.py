"""Tables of results on the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.text import Text

from engine.core.display import duration, spread_cells, table
from engine.core.run import plain

if TYPE_CHECKING:
    from engine.data.shards.inspect import Description
    from engine.evaluate.scores import Evaluated, Spread
    from engine.report.paper import Table
    from engine.report.runs import Row

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
"""Kinds of events, in words."""
STYLES = {"running": "bold green", "interrupted": "yellow", "failed": "red", "broken": "bold red"}
"""A run's state -> its colour."""


def print_evaluated(result: Evaluated, *, name: str) -> None:
    """Prints a protocol's metrics in percent, under the words that say how they came about."""
    console = Console(highlight=False)
    used = "used before" if result.labels_used else "not used before"
    console.print(f"\n{result.protocol_string}; labels {used}", markup=False, soft_wrap=True)
    console.print(f"checkpoint: {name}", markup=False, soft_wrap=True)
    console.print(_spreads("", result.metrics))


def print_baselines(found: Mapping[str, Mapping[str, Spread]]) -> None:
    """Prints each protocol's trivial baselines, if any were asked for."""
    for protocol, values in found.items():
        Console(highlight=False).print(_spreads(f"trivial, the same folds: {protocol}", values))


def _spreads(heading: str, spreads: Mapping[str, Spread]) -> Any:
    rows = [
        [name, f"{100 * s.mean:.1f}", f"{100 * s.sd:.1f}", str(s.n)] for name, s in spreads.items()
    ]
    return table("", [heading, "mean %", "sd", "n"], rows)


def print_outcome(summary: Mapping[str, Any]) -> None:
    """Prints a search's highest and lowest weights, and fitness with fresh seeds."""
    from engine.objective.terms import BY_NAME

    console = Console(highlight=False)
    ranked = sorted(summary["weights"].items(), key=lambda item: -item[1])
    cells = [[BY_NAME[name].code, name, f"{weight:.2f}"] for name, weight in ranked if weight > 0]
    title, columns = f"Best loss (trial {summary['best_trial']})", ["", "term", "weight"]
    if few := len(cells) < 20:
        rows = cells
    else:
        rows = [high + low for high, low in zip(cells[:10], cells[::-1][:10], strict=True)]
        columns = ["", "ten highest", "weight", "", "ten lowest", "weight"]
    console.print(table(title, columns, rows))
    if few:
        console.print(f"the other {len(ranked) - len(cells)} terms have weight 0")
    kinds = {
        "untrained": "untrained network",
        "initial_population": "initial population",
        "random": "random losses, fresh seeds",
    }
    if (count := summary["luckiest_random"]["of"]) > 1:
        kinds["luckiest_random"] = f"luckiest of {count} random losses"
    if (each := summary["random"]["each"]) > 1:
        kinds["random"] += f", means of {each}"
    kinds["best"] = "best loss, fresh seeds"
    rows = [[label, *spread_cells(summary[key])] for key, label in kinds.items()]
    rows[1:1] = [[name, *spread_cells(spread)] for name, spread in summary["compared"].items()]
    rows += [["best loss, as the search saw it", f"{summary['best_search_fitness']:.3f}", "", "1"]]
    console.print(table("Fitness", ["", "mean", "sd", "n"], rows))
    if summary["failures"]:
        console.print(
            f"{summary['failures']} of {summary['members']} members failed; see the report"
        )


def print_events(counts: Mapping[str, int]) -> None:
    """Prints what happened beside a search, by kind, if anything did."""
    if counts:
        rows = [[EVENTS.get(kind, kind), str(count)] for kind, count in counts.items()]
        Console(highlight=False).print(table("What happened", ["", "times"], rows))


def print_shards(shards: Description, *, title: str) -> None:
    """Prints what a data set holds, and its classes."""
    facts = shards.facts
    share = shards.with_sound / shards.clips if shards.clips else 0.0
    rows = [
        ["clips", str(shards.clips)],
        ["hours", f"{shards.seconds / 3600:.2f}"],
        ["shards", f"{shards.num_shards}, {shards.bytes / 1e9:.3f} GB"],
        ["codec", f"{facts['codec']}, {facts['fps']:g} frames/s, short side {facts['short_side']}"],
        ["pictures", ", ".join(f"{n} {size}" for size, n in list(shards.sizes.items())[:6])],
        ["with sound", f"{shards.with_sound} ({share:.0%})"],
        ["cut short", str(shards.partial)],
        ["without a class", str(shards.unlabelled)],
        *([name, str(count)] for name, count in shards.splits.items()),
        ["settings", ", ".join(f"{k} {v}" for k, v in facts.get("settings", {}).items())],
        ["made by", f"engine {facts['engine']}"],
        *(["left out", problem] for problem in shards.damaged),
    ]
    console = Console(highlight=False)
    console.print(table(title, ["", "what it holds"], rows))
    if shards.classes:
        rows = [[name, str(count)] for name, count in shards.classes.items()]
        console.print(table(f"{len(rows)} classes", ["class", "clips"], rows))


def print_runs(runs: Sequence[Row]) -> None:
    """Prints runs as a table on a terminal; elsewhere as plain columns that tools can cut."""
    columns = ["run", "state", "recipe", "method", "seed", "members", "best", "fresh", "age"]
    lines = [[plain(cell) for cell in (*_run_cells(run), run.note)] for run in runs]
    console = Console(highlight=False)
    if not console.is_terminal:
        lines.insert(0, [*columns, "note"])
        widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
        for line in lines:
            padded = [cell.ljust(width) for cell, width in zip(line, widths, strict=False)]
            click.echo("  ".join([*padded, line[-1]]).rstrip())
        return
    shown = table("", columns, [])
    for column in shown.columns[:4]:
        column.justify, column.no_wrap = "left", True
    for run, line in zip(runs, lines, strict=True):
        styles = ["", STYLES.get(run.state, ""), *[""] * 7]
        shown.add_row(*(Text(c, style=style) for c, style in zip(line[:-1], styles, strict=True)))
    console.print(shown)
    for line in lines:
        if line[-1]:
            console.print(Text(f"{line[0]}: {line[-1]}"), soft_wrap=True)


def _run_cells(run: Row) -> list[str]:
    age = "-"
    if run.age_s is not None:
        age = duration(run.age_s) if run.age_s < 48 * 3600 else f"{run.age_s / 86400:.0f} days"
    members = "-" if run.done is None else f"{run.done}/{run.total}"
    return [
        run.path.name or str(run.path),
        run.state,
        run.recipe or "-",
        run.method or "-",
        "-" if run.seed is None else str(run.seed),
        f"{members}, {run.failed} failed" if run.failed else members,
        *("-" if value is None else f"{value:.3f}" for value in (run.best, run.confirmed)),
        age,
    ]


def print_paper(results: Table, folder: Path) -> None:
    """Prints one of the paper's tables, and where its files lie."""
    from engine.report.paper import as_text

    console = Console(highlight=False, width=None if Console().is_terminal else 200)
    shown, under = as_text(results)
    console.print(shown)
    for line in under:
        console.print(line, markup=False, soft_wrap=True)
    click.echo(f"{folder / results.name}: .md .csv .json .svg .png")
