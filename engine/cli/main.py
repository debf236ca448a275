"""The ``engine`` command: parse, call, print."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import click

import engine
from engine.cli.common import PATH, errors_explained, say_rejects
from engine.cli.evaluate import evaluate, finetune
from engine.cli.evolve import evolve
from engine.cli.ingest import ingest
from engine.cli.pretrain import pretrain
from engine.cli.recipes import recipes
from engine.cli.report import report, runs
from engine.cli.reproduce import reproduce
from engine.cli.use import embed, export


@click.group()
@click.version_option(engine.__version__)
def main() -> None:
    """Learn video representations from unlabelled video, and evolve the loss that learns them."""
    warnings.filterwarnings("ignore", category=UserWarning, module="torch|torchaudio")


COMMANDS = (ingest, evolve, pretrain, evaluate, finetune, embed, export)
for command in (*COMMANDS, reproduce, recipes, report, runs):
    main.add_command(command)


@main.command()
@errors_explained
def doctor() -> None:
    """Say what this machine has, and which path each stage will take."""
    from engine.cli.doctor import diagnose
    from engine.core.display import Display, table

    display = Display()
    display.console.print(table("", ["part", "found", "path taken"], diagnose()))


@main.command()
@click.argument("part", default="all")
@click.option("--videos", multiple=True, type=PATH, help="Videos or shards [default: the demo's].")
@click.option("--recipe", "recipe_name", metavar="FILE|NAME", help="Recipe that chooses the sizes.")
@click.option("--set", "assignments", multiple=True, metavar="SECTION.KEY=VALUE")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@click.option("--quick", is_flag=True, help="Fewer repeats and smaller cohorts.")
@click.option("--json", type=PATH, help="Append a row a measurement to this JSON Lines file.")
@click.option("--plot", type=PATH, help="Draw the stages' roofline: a .png or .svg file.")
@click.option(
    "--compare", nargs=2, type=PATH, metavar="A B", help="Only show two --json files side by side."
)
@errors_explained
def bench(
    part: str,
    videos: tuple[Path, ...],
    recipe_name: str | None,
    assignments: tuple[str, ...],
    device: str,
    compare: tuple[Path, Path] | None,
    **output: Any,
) -> None:
    """Measure PART (input, views, loss, step, kmeans, cohort, all) beside its physical limits and peers."""
    from engine.bench.suite import (
        WITH_VIDEOS,
        check_files,
        chosen_recipe,
        parts_named,
        run_bench,
        show_comparison,
    )
    from engine.core.display import Display
    from engine.core.runtime import check_kernels_package, choose_runtime
    from engine.data.library import default_shard_cache, demo_folders, open_library

    if compare is not None:
        show_comparison(*compare)
        return
    parts = parts_named(part)
    check_files(output["json"], output["plot"])
    check_kernels_package()
    gpu = choose_runtime(device).device.type == "cuda"
    recipe = chosen_recipe(recipe_name, list(assignments), gpu=gpu)
    runtime, index = choose_runtime(device, amp=recipe.optim.amp), None
    if WITH_VIDEOS & set(parts):
        with Display() as display:
            folders = videos or demo_folders(display.prepare)[0]
            library = open_library(folders, cache=default_shard_cache(), report=display.prepare)
            say_rejects(display, library)
        index = library.index
    run_bench(parts, recipe, runtime=runtime, index=index, **output)
