"""``engine evolve``: find a loss."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from engine.cli.common import (
    PATH,
    MembersPerGpu,
    errors_explained,
    named_before,
    open_run,
    run_options,
    say_rejects,
    say_substitutes,
)

if TYPE_CHECKING:
    from engine.core.display import Display
    from engine.core.recipe import Recipe
    from engine.core.runfolder import RunFolder
    from engine.core.runtime import Runtime
    from engine.search.evolve import Data, Workers


@click.command()
@click.option(
    "--videos", multiple=True, type=PATH, help="Videos or shards to train on; may be given again."
)
@click.option(
    "--labelled",
    multiple=True,
    type=PATH,
    help="Class folders, or shards of them, to judge losses by; none for fitness.metric=zipf.",
)
@click.option("--method", help="How losses are proposed: search.method of the recipe.")
@click.option(
    "--rounds",
    type=click.IntRange(min=0),
    help="Members after the initial population; may be raised with --resume.",
)
@click.option("--gpus", type=click.IntRange(min=1), metavar="N", help="Workers, with a GPU each.")
@click.option("--workers", type=click.IntRange(min=1), metavar="N", help="Workers on CPUs.")
@click.option(
    "--address",
    metavar="auto|HOST:PORT",
    help="Ray cluster to join [default: Ray is started here].",
)
@click.option(
    "--members-per-gpu",
    type=MembersPerGpu(),
    default="auto",
    show_default=True,
    metavar="auto|N",
    help="Members of a generation that are trained at once; auto: as many as memory holds.",
)
@click.option(
    "--time-limit",
    type=click.FloatRange(min=0),
    default=0.0,
    metavar="SECONDS",
    help="Longest training of a member on a worker [default: any].",
)
@click.option(
    "--max-retries",
    type=click.IntRange(min=0),
    default=2,
    show_default=True,
    help="How often a member is tried again whose worker was lost.",
)
@click.option(
    "--clip-bank",
    metavar="N|SIZE",
    help="Train on so many clips, or as many as fit a size such as 2GiB, kept decoded.",
)
@click.option(
    "--storage", metavar="URL", help="Database for the study [default: a file in the run]."
)
@click.option("--dry-run", is_flag=True, help="Say what would be done and how long it would take.")
@click.option(
    "--signal",
    type=click.IntRange(min=2),
    metavar="N",
    help="A dry run that also trains N random losses under two seeds, and says how well fitness ranks them.",
)
@run_options
@errors_explained
def evolve(
    videos: tuple[Path, ...],
    labelled: tuple[Path, ...],
    method: str | None,
    rounds: int | None,
    gpus: int | None,
    workers: int | None,
    address: str | None,
    members_per_gpu: int | None,
    time_limit: float,
    max_retries: int,
    clip_bank: str | None,
    storage: str | None,
    dry_run: bool,
    signal: int | None,
    recipe_name: str | None,
    assignments: tuple[str, ...],
    seed: int | None,
    run_path: Path | None,
    resume: bool,
    device: str,
) -> None:
    """Find a loss: the main job. Without arguments it runs on a small data set that it makes itself."""
    from engine.core.display import Display
    from engine.core.runtime import check_kernels_package, choose_runtime

    if labelled and not videos:
        raise ValueError("--videos is missing: videos to train on, beside those that judge")
    check_kernels_package()
    given = {"search.method": method, "search.rounds": rounds, "search.clip_bank": clip_bank}
    assignments += tuple(f"{key}={value}" for key, value in given.items() if value is not None)
    default = "cpu/evolve" if videos else "demo"
    run, recipe = open_run("evolve", recipe_name, assignments, seed, run_path, resume, default)
    labelled = labelled or _judged(videos, recipe)
    crew = _workers(gpus, workers, address, members_per_gpu, time_limit, max_retries, device)
    if crew.count != 0:
        device = "auto" if crew.gpus else "cpu"
    runtime = choose_runtime(device, amp=recipe.optim.amp)
    run.use_storage(storage)
    with Display(log=None if dry_run or signal else run.path) as display:
        data = _data(run, videos, labelled, resume=resume, display=display)
        if dry_run or signal:
            from engine.search.estimate import dry_run as look

            look(recipe, data, runtime=runtime, workers=crew, display=display)
            if signal:
                _signal(recipe, data, signal, runtime=runtime, display=display)
            return
        _evolve(recipe, data, run=run, runtime=runtime, workers=crew, display=display)


def _signal(recipe: Recipe, data: Data, losses: int, *, runtime: Runtime, display: Display) -> None:
    from engine.bench.signal import Signal, measure, plan_of

    plan = plan_of(recipe, losses=losses, repeats=1, looks=(), presets=False)
    bench = Signal(recipe, data.videos, data.labelled, runtime=runtime, rows=None)
    measure(bench, plan, say=display.say, show=display.console.print)


def _judged(videos: tuple[Path, ...], recipe: Recipe) -> tuple[Path, ...]:
    """What judges where no labelled clips are given: the videos themselves, if that takes no labels."""
    if videos and recipe.fitness.uses_labels:
        raise ValueError(
            "--labelled is missing: class folders to judge losses by; or judge without labels, by --set"
            " fitness.metric=zipf and --set fitness.num_clusters=N"
        )
    return videos


def _workers(
    gpus: int | None,
    workers: int | None,
    address: str | None,
    members_at_once: int | None,
    time_limit: float,
    max_retries: int,
    device: str,
) -> Workers:
    """Who does the work; raises ValueError for options that contradict each other or the machine."""
    import torch

    from engine.search.evolve import Workers

    if gpus and workers:
        raise ValueError("give --gpus N (a GPU each) or --workers N (on CPUs), not both")
    on_gpus = bool(gpus) or (address is not None and not workers)
    if (on_gpus and device == "cpu") or (workers and device.startswith("cuda")):
        raise ValueError(
            f"--device {device} contradicts {'--gpus' if gpus else '--workers' if workers else '--address'}"
        )
    here = torch.cuda.device_count()
    if gpus and address is None and gpus > here:
        raise ValueError(f"--gpus {gpus}: this machine has {here}; use --workers N for its CPUs")
    in_process = gpus is None and workers is None and address is None
    count = 0 if in_process else gpus or workers
    return Workers(
        count,
        gpus=on_gpus,
        address=address,
        members_at_once=members_at_once,
        time_limit=time_limit,
        max_retries=max_retries,
    )


def _data(
    run: RunFolder,
    videos: tuple[Path, ...],
    labelled: tuple[Path, ...],
    *,
    resume: bool,
    display: Display,
) -> Data:
    """Open what was named, or what a resumed run began with."""
    from engine.data.library import default_shard_cache, demo_folders, open_library
    from engine.search.evolve import Data

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
    return Data(unlabelled, judged_by, named)


def _evolve(
    recipe: Recipe,
    data: Data,
    *,
    run: RunFolder,
    runtime: Runtime,
    workers: Workers,
    display: Display,
) -> None:
    from engine.cli.tables import print_events, print_outcome
    from engine.core.events import Events
    from engine.report import write_report
    from engine.search.evolve import evolve as search

    summary = search(recipe, data, run=run, runtime=runtime, display=display, workers=workers)
    say_substitutes(display, data.videos, data.labelled)
    page = write_report(run.path)
    print_outcome(summary)
    print_events(Events(run.path).counts)
    click.echo(f"report: {page}")
