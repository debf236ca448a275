"""The ``engine`` command: parse, call, print."""

from __future__ import annotations

import errno
import functools
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import engine

if TYPE_CHECKING:
    from engine.data.library import Library
    from engine.display import Display
    from engine.recipe import Recipe

FAILURE, USAGE = 1, 2
PATH = click.Path(path_type=Path)


def errors_explained(command: Callable[..., None]) -> Callable[..., None]:
    """Turn what can go wrong into one line and an exit code: 2 for a user's mistake, 1 for a failure."""

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except KeyboardInterrupt:
            _end("interrupted; what was finished is kept, and --resume goes on from there", FAILURE)
        except click.ClickException:
            raise
        except ValueError as error:
            _end(str(error), USAGE)
        except OSError as error:
            full = (
                " (the disk is full: make room, then use --resume)"
                if error.errno == errno.ENOSPC
                else ""
            )
            _end(f"{error}{full}", FAILURE)
        except RuntimeError as error:
            _end(str(error), FAILURE)

    return wrapped


def _end(message: str, code: int) -> None:
    click.echo(f"engine: {' '.join(message.split())}", err=True)
    sys.exit(code)


@click.group()
@click.version_option(engine.__version__)
def main() -> None:
    """Learn video representations from unlabelled video, and evolve the loss that learns them."""
    warnings.filterwarnings("ignore", category=UserWarning, module="torch|torchaudio")


def run_options(command: Callable[..., None]) -> Callable[..., None]:
    """Options that every command with a recipe and a run folder takes."""
    options = [
        click.option(
            "--recipe", "recipe_name", metavar="FILE|NAME", help="Recipe file, or a recipe's name."
        ),
        click.option(
            "--set",
            "assignments",
            multiple=True,
            metavar="SECTION.KEY=VALUE",
            help="Override the recipe.",
        ),
        click.option("--seed", type=click.IntRange(min=0), help="Override the recipe's seed."),
        click.option(
            "--run", "run_path", type=PATH, help="Run folder [default: a new one under runs/]."
        ),
        click.option("--resume", is_flag=True, help="Go on with --run, or with the newest run."),
        click.option(
            "--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N."
        ),
    ]
    for option in reversed(options):
        command = option(command)
    return command


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
@run_options
@errors_explained
def evolve(
    videos: tuple[Path, ...],
    labelled: tuple[Path, ...],
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
    default = "demo" if not videos else "cpu"
    run, recipe = _open_run(
        "evolve", recipe_name, assignments, seed, run_path, resume, default=default
    )
    runtime = choose_runtime(device, amp=recipe.optim.amp)
    with Display() as display:
        if resume:
            videos, labelled = _named_before(run.read_json("provenance.json"), videos, labelled)
        named = ([str(p) for p in videos] or ["demo"], [str(p) for p in labelled] or ["demo"])
        if named == (["demo"], ["demo"]):
            videos, labelled = (tuple(folders) for folders in demo_folders(display.prepare))
        cache = default_shard_cache()
        unlabelled = open_library(videos, cache=cache, report=display.prepare)
        judged_by = open_library(labelled, cache=cache, report=display.prepare)
        for library in (unlabelled, judged_by):
            _say_rejects(display, library)
        data = Data(unlabelled, judged_by, named)
        evolution = Evolution(recipe, data, run=run, runtime=runtime, display=display)
        display.say(f"run folder {run.path}")
        summary = evolution.go()
        with evolution.clock("report"):
            report = write_report(run.path)
    print_outcome(summary)
    click.echo(f"report: {report}")


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
    run, recipe = _open_run(
        "pretrain", recipe_name, assignments, seed, run_path, resume, default="cpu"
    )
    runtime = choose_runtime(device, amp=recipe.optim.amp)
    with Display() as display:
        library = open_library(videos, cache=default_shard_cache(), report=display.prepare)
        _say_rejects(display, library)
        out = train(
            recipe,
            library,
            weights=weights,
            run=run,
            runtime=runtime,
            display=display,
            checkpoint_every=checkpoint_every,
        )
    click.echo(f"RGB network: {out}")


@main.command()
@click.argument("videos", nargs=-1, type=PATH, required=True)
@click.option("--out", type=PATH, required=True, help="Folder for the shards.")
@click.option("--fps", type=click.FloatRange(min=1), default=25.0, show_default=True)
@click.option(
    "--short-side", type=click.IntRange(min=16), default=128, show_default=True, help="In pixels."
)
@click.option("--clip-seconds", type=click.FloatRange(min=0.5), default=10.0, show_default=True)
@click.option(
    "--clips-per-video", type=click.IntRange(min=1), help="[default: one per started minute]"
)
@click.option(
    "--quality",
    type=click.IntRange(1, 100),
    default=85,
    show_default=True,
    help="Of the JPEG frames.",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option("--workers", type=click.IntRange(min=1), help="Processes [default: one a core].")
@errors_explained
def ingest(videos: tuple[Path, ...], out: Path, workers: int | None, **settings: Any) -> None:
    """Turn raw videos into training shards, once. Labels are the names of class folders."""
    from engine.data.ingest import ingest as run
    from engine.display import Display, table

    with Display() as display:

        def progress(done: int, total: int, _: int) -> None:
            display.prepare("reading videos", done, total)

        report = run(videos, out, workers=workers, progress=progress, **settings)
        rows = [[str(r.path), r.reason] for r in report.rejects[:20]]
        if rows:
            display.console.print(
                table(f"{len(report.rejects)} rejected", ["file", "reason"], rows)
            )
        display.say(
            f"{report.sources} files: {report.clips} clips, {report.seconds / 3600:.2f} hours, "
            f"{len(report.rejects)} rejected (all in {out / 'rejects.jsonl'}) -> {out}"
        )


@main.command()
@click.argument("run", type=PATH)
@errors_explained
def report(run: Path) -> None:
    """Write a run's report again, also while it is at work: RUN/report.html."""
    from engine.report import write_report

    if not (run / "recipe.toml").exists():
        raise ValueError(f"{run}: no run there (it has no recipe.toml)")
    click.echo(f"report: {write_report(run)}")


@main.command()
@errors_explained
def doctor() -> None:
    """Say what this machine has, and which path each stage will take."""
    from engine.display import Display, table
    from engine.doctor import diagnose

    display = Display()
    display.console.print(table("", ["part", "found", "path taken"], diagnose()))


def _open_run(
    command: str,
    name: str | None,
    assignments: tuple[str, ...],
    seed: int | None,
    path: Path | None,
    resume: bool,
    *,
    default: str,
) -> tuple[Any, Recipe]:
    from engine.recipe import load_recipe, override
    from engine.runfolder import RunFolder, latest_run, new_run_path

    changed = [*assignments, *([] if seed is None else [f"seed={seed}"])]
    if resume:
        run_path = path or latest_run(command)
        asked = None
        if name is not None or changed:
            base = (
                run_path / "recipe.toml"
                if name is None and (run_path / "recipe.toml").exists()
                else name or default
            )
            asked = override(load_recipe(base), changed)
        return RunFolder.reopen(run_path, asked)
    recipe = override(load_recipe(name or default), changed)
    return RunFolder.create(path or new_run_path(command), recipe), recipe


def _named_before(
    facts: dict[str, Any] | None, videos: tuple[Path, ...], labelled: tuple[Path, ...]
) -> tuple[tuple[Path, ...], tuple[Path, ...]]:
    """The videos that a resumed run began with, unless they are given again (they may have moved)."""
    if videos:
        return videos, labelled
    if facts is None:
        raise ValueError(
            "the run ended before it noted its videos: give --videos and --labelled again"
        )
    named = (facts["videos"], facts["labelled"])
    if named == (["demo"], ["demo"]):
        return (), ()
    return tuple(map(Path, named[0])), tuple(map(Path, named[1]))


def _say_rejects(display: Display, library: Library) -> None:
    for reject in library.rejects[:10]:
        display.say(f"rejected {reject.path}: {reject.reason}")
    if len(library.rejects) > 10:
        display.say(f"... and {len(library.rejects) - 10} more, in rejects.jsonl beside the shards")
