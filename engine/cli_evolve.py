"""``engine evolve``: find a loss."""

from __future__ import annotations

from pathlib import Path

import click

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


@click.command()
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
    default = "cpu/evolve" if videos else "demo"
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
