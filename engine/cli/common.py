"""What the commands share: errors in one line, the options of a run, and opening its folder."""

from __future__ import annotations

import errno
import functools
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from engine.core.display import Display
    from engine.core.recipe import Recipe
    from engine.data.library import Library

FAILURE, USAGE = 1, 2
PATH = click.Path(path_type=Path)


class MembersPerGpu(click.ParamType):  # type: ignore[type-arg]
    """A number of members, or auto, which becomes None."""

    name = "members"

    def convert(self, value: Any, param: Any, ctx: Any) -> int | None:
        """Raises click's usage error for anything else."""
        if value in ("auto", None):
            return None
        if not str(value).isdecimal() or int(value) < 1:
            self.fail(f"{value!r} is neither auto nor a number of members, 1 or more", param, ctx)
        return int(value)


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


def open_run(
    command: str,
    name: str | None,
    assignments: tuple[str, ...],
    seed: int | None,
    path: Path | None,
    resume: bool,
    default: str,
) -> tuple[Any, Recipe]:
    """The run folder and recipe of a command: a new run's, or with ``resume`` the one that it goes on with.

    Raises ValueError for a recipe that can't be used, and where there is no run to resume.
    """
    from engine.core.recipe import load_recipe, override
    from engine.core.runfolder import RunFolder, latest_run, new_run_path

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


def named_before(
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


def say_rejects(display: Display, library: Library) -> None:
    """Show the first files that could not be read, and why, and shards that were left out."""
    for warning in library.warnings:
        display.say(warning)
    for reject in library.rejects[:10]:
        display.say(f"rejected {reject.path}: {reject.reason}")
    if len(library.rejects) > 10:
        display.say(f"... and {len(library.rejects) - 10} more, in rejects.jsonl beside the shards")


def say_substitutes(display: Display, *libraries: Library) -> None:
    """Show how many clips were found damaged in a run, if any."""
    clips = sum((library.index.substituted for library in libraries), Counter[int]())
    if clips:
        display.say(
            f"{len(clips)} clips were found damaged, and others took their place {clips.total()} times:"
            " `engine ingest --verify SHARDS` names the shards"
        )
