"""``engine bench``: throughput of every stage, and whether fitness ranks losses."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from engine.cli import common

if TYPE_CHECKING:
    from engine.core.recipe import Recipe
    from engine.core.runtime import Runtime

SIGNAL = "signal"


@click.command()
@click.argument("part", default="all")
@common.paths("--videos", help="Videos or shards [default: the demo's].")
@common.options(common.RECIPE, common.ASSIGNMENTS, common.DEVICE)
@common.flag("--quick", help="Fewer repeats and smaller cohorts.")
@common.path("--json", help="Append a row a measurement to this JSON Lines file.")
@common.path("--plot", help="Draw the stages' roofline: a .png or .svg file.")
@click.option(
    "--compare",
    nargs=2,
    type=common.PATH,
    metavar="A B",
    help="Only show two --json files side by side.",
)
@common.paths(
    "--labelled", help="signal: class folders, or shards of them, that judge [default: the demo's]."
)
@common.natural("--losses", default=24, help="signal: losses of those that a search begins with.")
@common.count("--repeats", default=1, help="signal: seeds in each of the two sets.")
@click.option(
    "--looks", multiple=True, type=int, metavar="STEP", help="signal: judge after STEP steps, too."
)
@click.option(
    "--presets/--no-presets", default=True, help="signal: also train the losses that come along."
)
@common.path("--features", help="signal: keep the judged features in this folder.")
@common.errors_explained
def bench(
    part: str,
    videos: tuple[Path, ...],
    recipe_name: str | None,
    assignments: tuple[str, ...],
    device: str,
    compare: tuple[Path, Path] | None,
    **more: Any,
) -> None:
    """Measure PART (input, views, loss, step, kmeans, cohort, all) beside its physical limits and peers.

    PART signal trains losses that a search begins with under two sets of seeds, and says how well fitness ranks them
    at what cost; it goes on with what is in its --json file. It is no part of "all": it takes two trainings a loss.
    """
    from engine.bench import suite
    from engine.core.display import Display
    from engine.core.runtime import check_kernels_package, choose_runtime
    from engine.data.library import demo_folders

    if compare is not None:
        suite.show_comparison(*compare)
        return
    parts = () if part == SIGNAL else suite.parts_named(part)
    suite.check_files(more["json"], more["plot"])
    check_kernels_package()
    gpu = choose_runtime(device).device.type == "cuda"
    if part == SIGNAL and recipe_name is None:
        recipe_name = common.search_recipe(videos=bool(videos))
    recipe = suite.chosen_recipe(recipe_name, list(assignments), gpu=gpu)
    runtime = choose_runtime(device, amp=recipe.optim.amp)
    if part == SIGNAL:
        _signal(recipe, videos, runtime=runtime, **more)
        return
    index = None
    if suite.WITH_VIDEOS & set(parts):
        with Display() as display:
            (library,) = common.open_videos(display, videos or demo_folders(display.prepare)[0])
        index = library.index
    shown = {key: more[key] for key in ("quick", "json", "plot")}
    suite.run_bench(parts, recipe, runtime=runtime, index=index, **shown)


def _signal(
    recipe: Recipe,
    videos: tuple[Path, ...],
    *,
    runtime: Runtime,
    labelled: tuple[Path, ...],
    losses: int,
    repeats: int,
    looks: tuple[int, ...],
    presets: bool,
    json: Path | None,
    features: Path | None,
    **_: Any,
) -> None:
    from engine.bench.signal import Signal, measure, plan_of
    from engine.bench.suite import wide_console
    from engine.core.display import Display
    from engine.data.library import demo_folders

    if bool(videos) != bool(labelled):
        raise ValueError("give --videos to train on and --labelled to judge by, or neither")
    how: dict[str, Any] = {"losses": losses, "repeats": repeats, "looks": looks, "presets": presets}
    plan_of(recipe, **how)  # before videos are read
    with Display() as display:
        folders = (videos, labelled) if videos else demo_folders(display.prepare)
        train, judging = common.open_videos(display, *folders)
        plan = plan_of(recipe, sound=bool(train.index.has_audio.any()), **how)
        files = {"rows": json, "features": features}
        bench = Signal(recipe, train, judging, runtime=runtime, warn=display.say, **files)
        measure(bench, plan, say=display.say, show=wide_console().print)
