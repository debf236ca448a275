"""``engine evolve``: find a loss."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from engine.cli import common

if TYPE_CHECKING:
    from engine.core.display import Display
    from engine.core.recipe import Recipe
    from engine.core.run import RunFolder
    from engine.core.runtime import Runtime
    from engine.search.evolve import Data, Workers

UNEQUAL = 3
"""A class with so many times as many clips as the mean class is said to be large."""


def members(text: str) -> int | None:
    """A number of members, or auto, which becomes None; raises click's usage error for anything else."""
    if text == "auto":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise click.BadParameter(f"{text!r} is neither auto nor a number of members, 1 or more")
    return int(text)


@click.command()
@common.paths("--videos", help="Videos or shards to train on; may be given again.")
@common.paths(
    "--labelled",
    help="Class folders, or shards of them, to judge losses by; none for fitness.metric=zipf.",
)
@click.option("--method", help="How losses are proposed: search.method of the recipe.")
@common.natural(
    "--rounds", help="Members after the initial population; may be raised with --resume."
)
@common.count("--gpus", metavar="N", help="Workers, with a GPU each.")
@common.count("--workers", metavar="N", help="Workers on CPUs.")
@click.option(
    "--address", metavar="auto|HOST:PORT", help="Ray cluster to join [default: one here]."
)
@click.option(
    "--members-per-gpu",
    "members_at_once",
    type=members,
    default="auto",
    metavar="auto|N",
    help="Members of a generation that are trained at once; auto: as many as memory holds.",
)
@click.option(
    "--time-limit",
    type=click.FloatRange(min=0),
    default=0.0,
    show_default=False,
    metavar="SECONDS",
    help="Longest training of a member on a worker [default: any].",
)
@common.natural(
    "--max-retries", default=2, help="How often a member is tried again whose worker was lost."
)
@click.option(
    "--clip-bank",
    metavar="N|SIZE",
    help="Train on so many clips, or as many as fit a size such as 2GiB, kept decoded.",
)
@click.option(
    "--storage", metavar="URL", help="Database for the study [default: a file in the run]."
)
@common.flag("--dry-run", help="Say what would be done and how long it would take.")
@click.option(
    "--signal",
    type=click.IntRange(min=2),
    metavar="N",
    help="A dry run that also trains the first N losses under two seeds, and says how well fitness ranks them.",
)
@common.run_options
@common.errors_explained
def evolve(
    videos: tuple[Path, ...],
    labelled: tuple[Path, ...],
    gpus: int | None,
    workers: int | None,
    device: str,
    storage: str | None,
    dry_run: bool,
    signal: int | None,
    assignments: tuple[str, ...],
    **options: Any,
) -> None:
    """Find a loss: the main job. Without arguments it runs on a small data set that it makes itself."""
    from engine.core.display import Display
    from engine.core.runtime import check_kernels_package, choose_runtime
    from engine.search.estimate import dry_run as estimate

    if labelled and not videos and not options["resume"]:
        raise ValueError("--videos is missing: videos to train on, beside those that judge")
    check_kernels_package()
    settings = {key: options.pop(key) for key in ("method", "rounds", "clip_bank")}
    assignments += tuple(f"search.{k}={v}" for k, v in settings.items() if v is not None)
    limits = {key: options.pop(key) for key in ("members_at_once", "time_limit", "max_retries")}
    trainers = _workers(gpus, workers, options.pop("address"), device, **limits)
    default = common.search_recipe(videos=bool(videos))
    run, recipe = common.open_run("evolve", default, assignments=assignments, **options)
    if not recipe.fitness.uses_labels:
        labelled = labelled or videos
    if options["resume"]:
        videos, labelled = common.noted_videos(run, videos, labelled)
    if videos and not labelled:
        raise ValueError(
            "--labelled is missing: class folders to judge losses by; or judge without labels, by --set"
            " fitness.metric=zipf and --set fitness.num_clusters=N"
        )
    if trainers.count != 0:
        device = "auto" if trainers.gpus else "cpu"
    how: dict[str, Any] = {
        "runtime": choose_runtime(device, amp=recipe.optim.amp),
        "workers": trainers,
    }
    run.use_storage(storage)
    with Display(log=None if dry_run or signal else run.path) as display:
        data = _data(recipe, videos, labelled, display=display)
        if dry_run or signal:
            estimate(recipe, data, display=display, **how)
        else:
            _evolve(recipe, data, run=run, display=display, **how)
        if signal:
            _signal(recipe, data, signal, runtime=how["runtime"], display=display)


def _signal(recipe: Recipe, data: Data, losses: int, *, runtime: Runtime, display: Display) -> None:
    from engine.bench.signal import Signal, measure, plan_of

    libraries = data.videos, data.labelled
    heard = bool(data.videos.index.has_audio.any())
    plan = plan_of(recipe, losses=losses, repeats=1, looks=(), presets=False, sound=heard)
    bench = Signal(recipe, *libraries, runtime=runtime, rows=None, warn=display.say)
    measure(bench, plan, say=display.say, show=display.console.print)


def _workers(
    gpus: int | None, workers: int | None, address: str | None, device: str, **limits: Any
) -> Workers:
    """Options of the workers; raises ValueError where they contradict each other or the machine."""
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
    count = gpus or workers or (None if address else 0)
    return Workers(count, gpus=on_gpus, address=address, **limits)


def _data(
    recipe: Recipe, videos: tuple[Path, ...], labelled: tuple[Path, ...], *, display: Display
) -> Data:
    """Opens the videos, or where none are named the built-in ones."""
    from engine.data.demo.levels import levels
    from engine.data.library import demo_folders
    from engine.search.evolve import Data

    if videos:
        unlabelled, judging = common.open_videos(display, videos, labelled)
        if recipe.fitness.uses_labels:
            common.say_classes(display, judging.index)
            _say_if_unequal(display, recipe, common.clips_by_class(judging.index))
        return Data(unlabelled, judging, (common.names_of(videos), common.names_of(labelled)))
    unlabelled, judging = common.open_videos(display, *demo_folders(display.prepare))
    return Data(unlabelled, judging, (common.DEMO, common.DEMO), levels(recipe))


def _say_if_unequal(display: Display, recipe: Recipe, counts: Counter[str]) -> None:
    """Says what a network may have that tells nothing apart, where one class is much of the clips."""
    largest, equal = (
        max(counts.values(), default=0) / max(counts.total(), 1),
        1 / max(len(counts), 1),
    )
    # three times as large as others, or where there are few, half of what they would have
    if recipe.fitness.metric == "hungarian" and largest > min(UNEQUAL * equal, (1 + equal) / 2):
        display.say(
            f"one class has {largest:.0%} of the labelled clips: features that tell nothing apart may reach as high a"
            " fitness; give about as many clips of each class, or judge by --set fitness.metric=nmi"
        )


def _evolve(recipe: Any, data: Data, *, run: RunFolder, display: Display, **how: Any) -> None:
    from engine.cli.tables import print_events, print_outcome
    from engine.core.run import Events
    from engine.report import write_report
    from engine.search.evolve import evolve as search

    summary = search(recipe, data, run=run, display=display, **how)
    common.say_substitutes(display, data.videos, data.labelled)
    page = write_report(run.path)
    print_outcome(summary)
    print_events(Events(run.path).counts)
    click.echo(f"report: {page}")
