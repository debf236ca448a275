"""The ``engine`` command: parse, call, print."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import click

import engine
from engine.cli_common import (
    PATH,
    MembersPerGpu,
    errors_explained,
    named_before,
    open_run,
    run_options,
    say_rejects,
    say_substitutes,
)
from engine.cli_ingest import ingest
from engine.cli_report import report, runs


@click.group()
@click.version_option(engine.__version__)
def main() -> None:
    """Learn video representations from unlabelled video, and evolve the loss that learns them."""
    warnings.filterwarnings("ignore", category=UserWarning, module="torch|torchaudio")


for command in (ingest, report, runs):
    main.add_command(command)


@main.command()
@click.option(
    "--videos", multiple=True, type=PATH, help="Videos or shards to train on; may be given again."
)
@click.option(
    "--labelled",
    multiple=True,
    type=PATH,
    help="Class folders, or shards of them, to judge losses by.",
)
@click.option(
    "--members-per-gpu",
    type=MembersPerGpu(),
    default="auto",
    show_default=True,
    metavar="auto|N",
    help="Members of a generation that are trained at once; auto: as many as memory holds.",
)
@run_options
@errors_explained
def evolve(
    videos: tuple[Path, ...],
    labelled: tuple[Path, ...],
    members_per_gpu: int | None,
    recipe_name: str | None,
    assignments: tuple[str, ...],
    seed: int | None,
    run_path: Path | None,
    resume: bool,
    device: str,
) -> None:
    """Find a loss: the main job. Without arguments it runs on a small data set that it makes itself."""
    from engine.data.library import default_shard_cache, demo_folders, open_library
    from engine.display import Display, print_outcome
    from engine.evolve import Data, Evolution
    from engine.report import write_report
    from engine.runtime import check_kernels_package, choose_runtime

    if bool(videos) != bool(labelled):
        raise ValueError("give both --videos and --labelled, or neither for the demo's data")
    check_kernels_package()
    default = "cpu" if videos else "demo"
    run, recipe = open_run("evolve", recipe_name, assignments, seed, run_path, resume, default)
    runtime = choose_runtime(device, amp=recipe.optim.amp)
    with Display(log=run.path) as display:
        if resume:
            videos, labelled = named_before(run.read_json("provenance.json"), videos, labelled)
        named = ([str(p) for p in videos] or ["demo"], [str(p) for p in labelled] or ["demo"])
        if named == (["demo"], ["demo"]):
            videos, labelled = (tuple(folders) for folders in demo_folders(display.prepare))
        cache = default_shard_cache()
        unlabelled = open_library(videos, cache=cache, report=display.prepare)
        judged_by = open_library(labelled, cache=cache, report=display.prepare)
        for library in (unlabelled, judged_by):
            say_rejects(display, library)
        evolution = Evolution(
            recipe,
            Data(unlabelled, judged_by, named),
            run=run,
            runtime=runtime,
            display=display,
            members_at_once=members_per_gpu,
        )
        display.say(f"run folder {run.path}")
        summary = evolution.go()
        say_substitutes(display, unlabelled, judged_by)
        with evolution.clock("report"):
            page = write_report(run.path)
    print_outcome(summary)
    click.echo(f"report: {page}")


@main.command()
@click.option(
    "--loss",
    "loss_name",
    metavar="FILE|PRESET|random:SEED",
    help="The loss, such as RUN/best.toml.",
)
@click.option(
    "--videos",
    multiple=True,
    type=PATH,
    required=True,
    help="Videos or shards; may be given again.",
)
@click.option(
    "--checkpoint-every",
    type=click.IntRange(min=1),
    default=500,
    show_default=True,
    help="In steps.",
)
@run_options
@errors_explained
def pretrain(
    loss_name: str | None,
    videos: tuple[Path, ...],
    checkpoint_every: int,
    recipe_name: str | None,
    assignments: tuple[str, ...],
    seed: int | None,
    run_path: Path | None,
    resume: bool,
    device: str,
) -> None:
    """Train the representation with a given loss; ends with the RGB network as RUN/rgb.safetensors."""
    from engine.data.library import default_shard_cache, open_library
    from engine.display import Display
    from engine.pretrain import pretrain as train
    from engine.recipe import load_loss
    from engine.runtime import check_kernels_package, choose_runtime

    if loss_name is None and not resume:
        raise ValueError(
            "--loss is missing: a loss file such as RUN/best.toml, a preset, or random:SEED"
        )
    check_kernels_package()
    weights = load_loss(loss_name) if loss_name else None
    run, recipe = open_run("pretrain", recipe_name, assignments, seed, run_path, resume, "cpu")
    runtime = choose_runtime(device, amp=recipe.optim.amp)
    with Display(log=run.path) as display:
        library = open_library(videos, cache=default_shard_cache(), report=display.prepare)
        say_rejects(display, library)
        out = train(
            recipe,
            library,
            weights=weights,
            run=run,
            runtime=runtime,
            display=display,
            checkpoint_every=checkpoint_every,
        )
        say_substitutes(display, library)
    click.echo(f"RGB network: {out}")


@main.command()
@errors_explained
def doctor() -> None:
    """Say what this machine has, and which path each stage will take."""
    from engine.display import Display, table
    from engine.doctor import diagnose

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
    from engine.data.library import default_shard_cache, demo_folders, open_library
    from engine.display import Display
    from engine.runtime import check_kernels_package, choose_runtime

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
