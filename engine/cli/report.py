"""The commands that show runs: ``engine report``, for one or side by side, and ``engine runs``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from engine.cli.common import PATH, errors_explained

if TYPE_CHECKING:
    from engine.report.runs import Row

STYLES = {
    "running": "bold green",
    "finished": "",
    "interrupted": "yellow",
    "failed": "red",
    "broken": "bold red",
}


@click.command()
@click.argument("runs", nargs=-1, required=True, type=PATH, metavar="RUN...")
@click.option("--compare", is_flag=True, help="Put two or more runs side by side on one page.")
@click.option(
    "--out",
    type=PATH,
    metavar="FILE.html",
    help="With --compare: the page; its figures lie beside it [default: compare.html].",
)
@errors_explained
def report(runs: tuple[Path, ...], compare: bool, out: Path | None) -> None:
    """Write a run's report again, also while it is at work: RUN/report.html.

    With --compare RUN RUN..., searches side by side: best-so-far curves with bands over seeds, final tables.
    """
    for run in runs:
        if not (run / "recipe.toml").exists():
            raise ValueError(f"{run}: no run there (it has no recipe.toml)")
    if compare:
        from engine.report.compare import write_comparison

        click.echo(f"report: {write_comparison(runs, out=out or Path('compare.html'))}")
        return
    if out is not None:
        raise ValueError("--out goes with --compare; a run's own report is RUN/report.html")
    if len(runs) > 1:
        raise ValueError(f"{len(runs)} runs given: add --compare to put them side by side")
    from engine.report import write_report

    click.echo(f"report: {write_report(runs[0])}")


@click.command()
@click.argument("folder", type=PATH, default=Path("runs"), metavar="[DIR]")
@click.option("--json", "as_lines", is_flag=True, help="One JSON object a line.")
@errors_explained
def runs(folder: Path, as_lines: bool) -> None:
    """List the runs in DIR [default: runs]: state, best fitness, members done, age.

    interrupted: stopped or killed before its end, --resume goes on; broken: its folder can't be read.
    """
    from engine.report.runs import as_json, list_runs

    rows = list_runs(folder)
    if as_lines:
        for row in rows:
            click.echo(json.dumps(as_json(row)))
    elif not rows:
        click.echo(f"{folder}: no runs")
    else:
        _show(rows)


def _show(rows: list[Row]) -> None:
    """A table on a terminal; elsewhere plain columns that tools can cut."""
    from rich.console import Console
    from rich.text import Text

    from engine.core.display import table
    from engine.core.runlog import plain

    columns = ["run", "state", "recipe", "method", "seed", "members", "best", "fresh", "age"]
    cells = [[plain(cell) for cell in (*_cells(row), row.note)] for row in rows]
    console = Console(highlight=False)
    if not console.is_terminal:
        lines = [[*columns, "note"], *cells]
        wide = [max(len(line[i]) for line in lines) for i in range(len(columns))]
        for line in lines:
            padded = [cell.ljust(width) for cell, width in zip(line, wide, strict=False)]
            click.echo("  ".join([*padded, line[-1]]).rstrip())
        return
    shown = table("", columns, [])
    for column in shown.columns[:4]:
        column.justify, column.no_wrap = "left", True
    for row, line in zip(rows, cells, strict=True):
        style = STYLES[row.state]
        shown.add_row(*(Text(c, style=style if i == 1 else "") for i, c in enumerate(line[:-1])))
    console.print(shown)
    for line in cells:
        if line[-1]:
            console.print(Text(f"{line[0]}: {line[-1]}"), soft_wrap=True)


def _cells(row: Row) -> list[str]:
    from engine.core.display import duration

    def short(value: float | None) -> str:
        return "-" if value is None else f"{value:.3f}"

    age = "-"
    if row.age_s is not None:
        age = duration(row.age_s) if row.age_s < 48 * 3600 else f"{row.age_s / 86400:.0f} days"
    members = "-" if row.done is None else f"{row.done}/{row.total}"
    return [
        row.path.name or str(row.path),
        row.state,
        row.recipe or "-",
        row.method or "-",
        "-" if row.seed is None else str(row.seed),
        f"{members}, {row.failed} failed" if row.failed else members,
        short(row.best),
        short(row.confirmed),
        age,
    ]
