"""Options that commands share, errors in one line, and the opening of runs, videos and labelled videos."""

from __future__ import annotations

import errno
import functools
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

if TYPE_CHECKING:
    from engine.core.display import Display
    from engine.core.recipe import Recipe
    from engine.core.run import RunFolder
    from engine.data.ingest.sources import Reject
    from engine.data.library import Library
    from engine.data.shards.index import ClipIndex
    from engine.evaluate.datasets import Dataset

Command = Callable[..., None]

FAILURE, USAGE = 1, 2
GO_ON = ("ingest", "embed", "reproduce")
"""Commands that go on where they were without being asked to."""
OPENED = "engine.run"
"""Key of the click context under which the command's run folder is noted."""
DEMO = ["demo"]
"""A run's note for the built-in videos."""
SHOWN = 20
"""Rejects that are shown; all are in a file."""
SHOWN_NAMES = 6
"""Classes or groups that are shown by name."""

PATH = click.Path(path_type=Path)
COUNT, NATURAL = click.IntRange(min=1), click.IntRange(min=0)
SECONDS = click.FloatRange(min=0, min_open=True)

path = functools.partial(click.option, type=PATH)
paths = functools.partial(path, multiple=True)
count = functools.partial(click.option, type=COUNT)
natural = functools.partial(click.option, type=NATURAL)
seconds = functools.partial(click.option, type=SECONDS)
flag = functools.partial(click.option, is_flag=True)
"""Options by the type of their value."""

RECIPE = click.option(
    "--recipe",
    "recipe_name",
    metavar="FILE|NAME",
    help="Recipe file, or its name [default: as docs/your-videos.md says].",
)
ASSIGNMENTS = click.option(
    "--set", "assignments", multiple=True, metavar="SECTION.KEY=VALUE", help="Override the recipe."
)
SEED = natural("--seed", help="Override the recipe's seed.")
RUN = path("--run", "run_path", help="Run folder [default: a new one under runs/].")
RESUME = flag("--resume", help="Go on with --run, or with the newest run.")
DEVICE = click.option("--device", default="auto", help="auto, cpu, cuda or cuda:N.")
WORKERS = count("--workers", help="Processes [default: one a core].")
BASELINES = flag("--baselines", "with_baselines", help="Show trivial baselines on the same folds.")
ROOT = paths("--root", help="Folder of the videos, or shards.")
SPLITS = path(
    "--splits",
    help="Folder of the lists [default: in or beside --root]; of --dataset folders: of train.csv, val.csv, test.csv.",
)
FOLDS = click.option(
    "--folds", type=click.Choice(["official", "group"]), help="group: each group is left out once."
)
GROUP_PATTERN = click.option(
    "--group-pattern", metavar="REGEX", help="Finds a clip's group in its file's name."
)
ALLOW_MISSING = flag("--allow-missing", help="Go on where listed videos are missing, and say so.")


def search_recipe(*, videos: bool) -> str:
    """The recipe of a search where none is named: for the user's videos, or for the built-in ones."""
    return "cpu/evolve" if videos else "demo"


def options(*declared: Callable[[Command], Command]) -> Callable[[Command], Command]:
    """Adds options to a command, in the order of its help."""
    return lambda command: functools.reduce(lambda c, option: option(c), declared[::-1], command)


run_options = options(RECIPE, ASSIGNMENTS, SEED, RUN, RESUME, DEVICE)
"""Options of every command with a recipe and a run folder."""
labelled_options = options(ROOT, SPLITS, FOLDS, GROUP_PATTERN, ALLOW_MISSING)
"""Options that say which labelled videos are used, and how they are divided: ``open_labelled`` takes them."""


def errors_explained(command: Command) -> Command:
    """Turns what can go wrong into one line and an exit code.

    2 for a user's mistake, 1 for a failure; 130 for Ctrl-C and 143 for SIGTERM, after either of which the line says
    how to go on.
    """

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        from engine.core.interrupt import interrupts

        context = click.get_current_context()

        def line() -> str:
            return f"interrupted; {_how_to_go_on(context, kwargs)}"

        with interrupts(lambda code: _say_end(line())) as received:
            try:
                command(*args, **kwargs)
            except click.ClickException:
                raise
            except BaseException as error:
                code = received.code(error)
                if code is not None:
                    _end(line(), code)
                _explain(error, lambda: _how_to_go_on(context, kwargs))

    return wrapped


def _explain(error: BaseException, how_to_go_on: Callable[[], str]) -> None:
    """Ends the process with an error's line, or raises it where it is none of those that users meet."""
    if isinstance(error, ValueError):
        _end(str(error), USAGE)
    if isinstance(error, (OSError, RuntimeError)):
        full = isinstance(error, OSError) and error.errno == errno.ENOSPC
        hint = f" (the disk is full: make room; {how_to_go_on()})" if full else ""
        _end(f"{error}{hint}", FAILURE)
    raise error


def _how_to_go_on(context: click.Context, options: dict[str, Any]) -> str:
    run = context.meta.get(OPENED)
    if run is not None and (run / "recipe.toml").exists():
        return "what was finished is kept, and --resume goes on from there"
    if "resume" in options or context.info_name in GO_ON:
        return "what was finished is kept, and the same command goes on from there"
    return "run the same command again"


def _say_end(message: str) -> None:
    click.echo(f"engine: {' '.join(message.split())}", err=True)


def _end(message: str, code: int) -> NoReturn:
    _say_end(message)
    sys.exit(code)


def open_run(
    command: str,
    default: str | None,
    *,
    recipe_name: str | None,
    assignments: tuple[str, ...],
    seed: int | None,
    run_path: Path | None,
    resume: bool,
    **_: Any,
) -> tuple[RunFolder, Recipe]:
    """The run folder and recipe of a command: a new run's, or with ``resume`` the one that it goes on with.

    ``default`` names the recipe of a new run where none is named; None: every setting's default.
    Raises ValueError for a recipe that can't be used, and where there is no run to resume.
    """
    from engine.core.recipe import Recipe, load_recipe, override
    from engine.core.run import RunFolder, latest_run, new_run_path

    changed = [*assignments, *([] if seed is None else [f"seed={seed}"])]
    path = run_path or (latest_run if resume else new_run_path)(command)
    if (context := click.get_current_context(silent=True)) is not None:
        context.meta[OPENED] = path
    named = recipe_name or default
    if not resume:
        recipe = override(load_recipe(named) if named else Recipe(), changed)
        run = RunFolder.create(path, recipe)
    elif recipe_name is None and not changed:
        run, recipe = RunFolder.reopen(path, None)
    else:
        own = path / "recipe.toml"
        base = recipe_name or (own if own.exists() else default)
        run, recipe = RunFolder.reopen(
            path, override(load_recipe(base) if base else Recipe(), changed)
        )
    if context is not None:  # a process may run several commands
        context.call_on_close(run.close)
    return run, recipe


def noted_videos(
    run: RunFolder, videos: tuple[Path, ...], labelled: tuple[Path, ...]
) -> tuple[tuple[Path, ...], tuple[Path, ...]]:
    """Videos and labelled folders of a run that goes on: those that are named now, or else those that it noted.

    Empty ones for the built-in videos. Raises ValueError where none were noted, or one of them is gone.
    """
    from engine.core.run import check_still_there

    facts = run.read_json("provenance.json") or {}
    noted = {key: facts.get(key, []) for key in ("videos", "labelled")}
    if noted == {"videos": DEMO, "labelled": DEMO}:
        return videos, labelled
    named = {"videos": videos, "labelled": labelled}
    if not videos and not noted["videos"]:
        raise ValueError(f"{run.path}: the run did not note its videos: give --videos again")
    for key, folders in noted.items():
        if not named[key]:
            check_still_there(run.path, folders, option=f"--{key}")
            named[key] = tuple(map(Path, folders))
    return named["videos"], named["labelled"]


def names_of(folders: Iterable[Path]) -> list[str]:
    """Folders as a run notes them: it may be resumed from another working folder."""
    return [str(path.expanduser().resolve()) for path in folders]


def open_videos(display: Display, *folders: Iterable[Path]) -> list[Library]:
    """Opens videos or shards, one data set for each of ``folders``, and shows what of them can't be read."""
    from engine.data.library import default_shard_cache, open_library

    cache = default_shard_cache()
    libraries = [open_library(tuple(f), cache=cache, report=display.prepare) for f in folders]
    for library in libraries:
        say_library(display, library)
    return libraries


def open_labelled(
    display: Display, name: str, size: int, *, root: Iterable[Path | str], **options: Any
) -> Dataset:
    """Opens a labelled data set for clips of ``size`` pixels, and shows what is missing of it.

    ``options`` are those of ``labelled_options``. Raises ValueError without ``root``, and what ``open_dataset`` does.
    """
    from engine.data.ingest.splits import MISSING
    from engine.data.library import default_shard_cache
    from engine.evaluate.datasets import open_dataset

    if not root:
        raise ValueError(f"--root is missing: the folder of {name}'s videos")
    dataset = open_dataset(
        [Path(folder) for folder in root],
        name=name,
        cache=default_shard_cache(),
        report=display.prepare,
        short_side=128 if size <= 128 else 2 * round(size * 4 / 7),
        **options,
    )
    for warning in dataset.warnings:
        display.say(warning)
    say_rejects(display, [r for r in dataset.rejects if not r.reason.startswith(MISSING)])
    if dataset.incomplete:
        display.say(f"{name}: {dataset.incomplete}; every number below says so")
    say_classes(display, dataset.index)
    if dataset.folds_by.startswith("leave one group out"):
        names = [fold.name for fold in dataset.folds]
        display.say(f"groups: {len(names)}: {_some(names)}")
    return dataset


def say_classes(display: Display, index: ClipIndex) -> None:
    """Shows the classes of labelled clips, and how many clips they have: a wrong folder shows at once."""
    if counts := clips_by_class(index):
        few, many = min(counts.values()), max(counts.values())
        each = f"{many} each" if few == many else f"{few} to {many} each"
        words = f"{counts.total()} clips of {len(counts)} classes, {each}: {_some(sorted(counts))}"
        display.say(f"labels: {words}")


def clips_by_class(index: ClipIndex) -> Counter[str]:
    """How many clips there are of each class that has some."""
    return Counter(index.classes[label] for label in index.label.tolist() if label >= 0)


def _some(names: Sequence[str]) -> str:
    """The first of some names."""
    return ", ".join(names[:SHOWN_NAMES]) + (", ..." if len(names) > SHOWN_NAMES else "")


def say_library(display: Display, library: Library) -> None:
    """Shows shards that were left out, and the first files that could not be read."""
    for warning in library.warnings:
        display.say(warning)
    say_rejects(display, library.rejects, file="rejects.jsonl beside the shards")


def say_rejects(display: Display, rejects: Iterable[Reject], *, file: str = "") -> None:
    """Shows the first sources that gave no clips, or not all, a line for each cause; ``file`` holds all of them."""
    from engine.data.ingest.sources import by_cause

    lines = []
    for reject in by_cause(rejects):
        notes = (reject.where, reject.listed, f"and {reject.more} more" if reject.more else None)
        where = "".join(f" ({note})" for note in notes if note)
        lost = "incomplete" if reject.partial and reject.where is None else "rejected"
        lines.append(f"{lost} {reject.path}{where}: {reject.reason}")
    for line in lines[:SHOWN]:
        display.say(line)
    if len(lines) > SHOWN:
        display.say(f"... and {len(lines) - SHOWN} more" + (f", in {file}" if file else ""))


def say_substitutes(display: Display, *libraries: Library) -> None:
    """Shows how many clips were found damaged in a run, if any."""
    clips = sum((library.index.substituted for library in libraries), Counter[int]())
    if clips:
        display.say(
            f"{len(clips)} clips were found damaged, and others took their place {clips.total()} times:"
            " `engine ingest --verify SHARDS` names the shards"
        )


def holds_class_folders(root: Iterable[Path]) -> bool:
    """Whether all of ``root`` are folders of folders with videos, which name their classes."""
    from engine.data.ingest.sources import OTHER_SUFFIXES
    from engine.data.shards.index import is_shards

    return all(
        not is_shards(path)
        and any(
            file.is_file() and file.suffix.lower() not in OTHER_SUFFIXES
            for file in path.glob("[!.]*/[!.]*")
        )
        for path in root
    )
