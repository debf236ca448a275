"""The commands that show runs: ``engine report``, for one or side by side, and ``engine runs``."""

from __future__ import annotations

import json
from pathlib import Path

import click

from engine.cli import common

DEFAULT_RUNS = Path("runs")


@click.command()
@click.argument("runs", nargs=-1, required=True, type=common.PATH, metavar="RUN...")
@common.flag("--compare", help="Put two or more runs side by side on one page.")
@common.path(
    "--out",
    metavar="FILE.html",
    help="With --compare: the page; its figures lie beside it [default: compare.html].",
)
@common.errors_explained
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
@click.argument("folder", type=common.PATH, default=DEFAULT_RUNS, metavar="[DIR]")
@common.flag("--json", "as_lines", help="One JSON object a line.")
@common.errors_explained
def runs(folder: Path, as_lines: bool) -> None:
    """List the runs in DIR [default: runs]: state, best fitness, members done, age.

    interrupted: stopped or killed before its end, --resume goes on; broken: its folder can't be read.
    """
    from engine.cli.tables import print_runs
    from engine.report.runs import as_json, list_runs

    rows = list_runs(folder) if folder.is_dir() or folder != DEFAULT_RUNS else []
    if as_lines:
        for row in rows:
            click.echo(json.dumps(as_json(row)))
    elif not rows:
        hint = "; engine evolve makes one" if folder == DEFAULT_RUNS else ""
        click.echo(f"{folder}: no runs{hint}")
    else:
        print_runs(rows)
