"""The bench as a whole: its parts, the sizes that a device gets, and the tables at the end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from difflib import get_close_matches
from functools import partial
from pathlib import Path

import msgspec
import torch
from rich.console import Console

from engine.bench import cohort, input, kmeans, loss, rows, step, views
from engine.bench.base import Bench, keep_heap
from engine.core.provenance import provenance
from engine.core.recipe import Recipe, load_recipe, override, recipe_hash
from engine.core.runtime import Runtime, make_deterministic
from engine.data.shards.index import ClipIndex

PARTS: dict[str, Callable[[Bench], Iterator[rows.Row]]] = {
    "input": input.run,
    "views": views.run,
    "loss": loss.run,
    "step": step.run,
    "kmeans": kmeans.run,
    "cohort": cohort.run,
}
WITH_VIDEOS = {"input", "step", "cohort"}
ALL = "all"
WIDE = 190
"""Columns of the tables where they are not shown on a terminal."""
GPU_SIZES = (
    "name=gpu clip.min_area=1.0 model.pool=false objective.order_share=1.0 optim.batch_size=16 optim.ema=0.0"
).split()
"""Changes to ``small/pretrain`` on a GPU, unless a recipe is named: R3D-18 as it is, all work that a step can have."""


def parts_named(part: str) -> tuple[str, ...]:
    """The parts that a name stands for; raises ValueError for an unknown one."""
    if part == ALL:
        return tuple(PARTS)
    if part not in PARTS:
        near = get_close_matches(part, [*PARTS, ALL], n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"no part {part!r} to bench{hint}; parts: {', '.join([*PARTS, ALL])}")
    return (part,)


def chosen_recipe(name: str | None, assignments: list[str], *, gpu: bool) -> Recipe:
    """The recipe named, or the device's default; then what is assigned. Raises RecipeError."""
    if gpu and name is None:
        return override(load_recipe("small/pretrain"), [*GPU_SIZES, *assignments])
    return override(load_recipe(name or "demo"), assignments)


def check_files(json: Path | None, plot: Path | None) -> None:
    """Raise ValueError for files that can't be written, before anything is measured."""
    if plot is not None:
        rows.check_path(plot)
    if json is not None and (json.is_dir() or not json.absolute().parent.is_dir()):
        raise ValueError(f"--json {json}: name a file in a folder that exists")


def run_bench(
    parts: tuple[str, ...],
    recipe: Recipe,
    *,
    runtime: Runtime,
    index: ClipIndex | None,
    quick: bool = False,
    json: Path | None = None,
    plot: Path | None = None,
) -> list[rows.Row]:
    """Measure parts, show each one's table when it is there, and name the bottleneck.

    ``index`` may be None where no part is in WITH_VIDEOS. Rows are appended to ``json`` part by part.
    """
    console = wide_console()
    say = partial(console.print, markup=False, soft_wrap=True)
    make_deterministic(runtime)
    if runtime.device.type == "cpu":
        torch.set_num_threads(1)  # as in a search: members take the cores
        keep_heap()
    else:
        torch.cuda.set_device(runtime.device)
    notes: list[str] = []
    bench = Bench(recipe, runtime, index, notes.append, quick)
    about = {**provenance(runtime), "seed": recipe.seed, "recipe": recipe.name}
    about |= {"recipe_hash": recipe_hash(recipe), "threads": torch.get_num_threads()}
    measured: list[rows.Row] = []
    for part in parts:
        new = [msgspec.structs.replace(row, about=about) for row in PARTS[part](bench)]
        measured += new
        console.print(rows.rows_table(f"{part} on {about['device']}", new))
        while notes:
            say(notes.pop(0))
        if json is not None:
            rows.append_json(new, json)
    if plot is not None:
        drawn = rows.draw_roofline(measured, plot)
        none = "nothing to draw: only views, loss and step count both bytes and FLOPs"
        say(f"roofline: {plot}" if drawn else none)
    if (worst := rows.bottleneck(measured)) is not None:
        say(worst)
    return measured


def show_comparison(first: Path, second: Path) -> None:
    """Print two result files side by side; raises ValueError for one that holds no results."""
    console = wide_console()
    both = rows.read_json(first), rows.read_json(second)
    shown, missing = rows.comparison(*both, names=(first.name, second.name))
    console.print(shown)
    for line in missing:
        console.print(line, markup=False, soft_wrap=True)


def wide_console() -> Console:
    """A terminal as it is, and anything else wide enough for a table."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=WIDE)
