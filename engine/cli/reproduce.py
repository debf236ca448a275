"""``engine reproduce``: the paper's tables and figures."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from engine.cli.common import PATH, errors_explained, say_rejects, say_substitutes

if TYPE_CHECKING:
    from engine.core.display import Display
    from engine.core.runfolder import RunFolder
    from engine.evaluate.datasets import Dataset
    from engine.evaluate.paper.rows import Given
    from engine.report.paper import Table


@click.command()
@click.argument("table", type=click.Choice(["table1", "table2", "fig4", "fig5"]))
@click.option(
    "--scale", "scale_name", default="cpu", show_default=True, metavar="cpu|small|paper|FILE"
)
@click.option(
    "--videos", multiple=True, type=PATH, required=True, help="Unlabelled videos or shards."
)
@click.option(
    "--dataset",
    "names",
    multiple=True,
    default=["folders"],
    show_default=True,
    help="ucf101, hmdb51, kinetics or folders; for table2 again, each with its --root.",
)
@click.option(
    "--root", "roots", multiple=True, type=PATH, required=True, help="Its folder, or its shards."
)
@click.option("--splits", type=PATH, help="Folder of its lists [default: in and beside --root].")
@click.option(
    "--folds", type=click.Choice(["official", "group"]), help="group: each is left out once."
)
@click.option("--group-pattern", metavar="REGEX", help="Finds a clip's group in its file's name.")
@click.option("--allow-missing", is_flag=True, help="Go on where listed videos are missing.")
@click.option(
    "--loss",
    "losses",
    multiple=True,
    metavar="[NAME=]LOSS",
    help="The evolved loss, RUN/best.toml; with NAME= a further row.",
)
@click.option("--imagenet", type=PATH, help="State dict of a ResNet trained on ImageNet.")
@click.option("--kinetics", type=PATH, help="State dict of a video ResNet trained on Kinetics.")
@click.option("--rows", help="Only these, by name, with commas.")
@click.option("--seeds", help="Only these, with commas [default: the scale's].")
@click.option("--protocols", help="Only these, with commas: kmeans, linear, finetune.")
@click.option(
    "--baselines", "with_baselines", is_flag=True, help="Trivial baselines under the table."
)
@click.option(
    "--set",
    "assignments",
    multiple=True,
    metavar="KEY=VALUE",
    help="Override the scale, such as pretrain.optim.steps=50.",
)
@click.option("--retry-failed", is_flag=True, help="Do failed cells again.")
@click.option("--dry-run", is_flag=True, help="List what is to do, with an estimate.")
@click.option(
    "--run", "run_path", type=PATH, help="Run folder [default: runs/reproduce-TABLE-SCALE]."
)
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@errors_explained
def reproduce(
    table: str,
    scale_name: str,
    videos: tuple[Path, ...],
    names: tuple[str, ...],
    roots: tuple[Path, ...],
    run_path: Path | None,
    device: str,
    dry_run: bool,
    retry_failed: bool,
    with_baselines: bool,
    **more: Any,
) -> None:
    """Run one of the paper's tables or figures; the same command goes on after a kill."""
    from engine.core.display import Display
    from engine.core.runtime import check_kernels_package, choose_runtime
    from engine.data.library import default_shard_cache, open_library
    from engine.evaluate.paper.run import Chosen, Reproduction
    from engine.evaluate.paper.scale import load_scale
    from engine.report.paper import table_of, write

    check_kernels_package()
    scale = load_scale(scale_name, more["assignments"])
    given = _given(more)
    seeds = [int(s) for s in _listed(more["seeds"], "--seeds", digits=True)]
    chosen = Chosen(
        _listed(more["rows"], "--rows"), seeds, _listed(more["protocols"], "--protocols")
    )
    _check_apart(videos, roots)
    runtime = choose_runtime(device, amp=scale.pretrain.optim.amp)
    run = _run_folder(run_path or Path("runs") / f"reproduce-{table}-{scale.name}", scale.pretrain)
    with Display(log=run.path) as display:
        datasets = _datasets(display, names, roots, scale.pretrain.clip.size, more)
        library = open_library(videos, cache=default_shard_cache(), report=display.prepare)
        say_rejects(display, library)
        todo = Reproduction(
            table, scale, given, library, datasets, run, runtime, display, chosen, with_baselines
        )
        if dry_run:
            for line in todo.plan():
                click.echo(line)
            return
        todo.go(write, retry_failed=retry_failed)
        say_substitutes(display, library)
    _show(table_of(todo), run.path)


def _given(more: dict[str, Any]) -> Given:
    from engine.evaluate.paper.rows import TABLE1, Given

    losses = {}
    for text in more["losses"]:
        name, sign, loss = text.partition("=")
        if not sign or "/" in name:
            name, loss = "evolved", text
        if not loss or not name.replace("_", "").replace("-", "").isalnum():
            raise ValueError(
                f"--loss {text}: write LOSS, or NAME=LOSS with a name of letters and digits"
            )
        if name in losses:
            raise ValueError(f"--loss {text}: a row {name} has its loss already; name it NAME=LOSS")
        if name != "evolved" and (name in TABLE1 or name in ("equal", "no_distillation")):
            raise ValueError(
                f"--loss {text}: the table has a row {name} of its own; give another name"
            )
        losses[name] = str(Path(loss).resolve()) if Path(loss).is_file() else loss
    return Given(losses, more["imagenet"], more["kinetics"])


def _listed(text: str | None, option: str, *, digits: bool = False) -> list[str]:
    found = [part.strip() for part in (text or "").split(",") if part.strip()]
    bad = [part for part in found if digits and not part.isdecimal()]
    if bad or (text is not None and not found):
        raise ValueError(
            f"{option} {text}: write {'whole numbers' if digits else 'names'} with commas"
        )
    return list(dict.fromkeys(found))


def _check_apart(videos: tuple[Path, ...], roots: tuple[Path, ...]) -> None:
    """Held-out clips must not be among the unlabelled ones by way of the same folder."""
    for video in videos:
        for root in roots:
            a, b = video.expanduser().resolve(), root.expanduser().resolve()
            if a == b or a in b.parents or b in a.parents:
                raise ValueError(
                    f"--videos {video} and --root {root} share videos, so that held-out clips would be trained on: give"
                    " other --videos; with folds by group, some groups' clips are added to them, without labels"
                )


def _run_folder(path: Path, recipe: Any) -> RunFolder:
    """A new run, or the one that the same command began."""
    from engine.core.runfolder import RunFolder

    if (path / "recipe.toml").exists():
        return RunFolder.reopen(path, recipe)[0]
    return RunFolder.create(path, recipe)


def _datasets(
    display: Display,
    names: tuple[str, ...],
    roots: tuple[Path, ...],
    size: int,
    more: dict[str, Any],
) -> list[Dataset]:
    from engine.data.library import default_shard_cache
    from engine.evaluate.datasets import open_dataset

    if len(names) == 1:
        pairs = [(names[0], roots)]
    elif len(names) == len(roots):
        pairs = [(name, (root,)) for name, root in zip(names, roots, strict=True)]
    else:
        raise ValueError(
            f"{len(names)} times --dataset and {len(roots)} times --root: give one root to each"
        )
    found = []
    for name, folders in pairs:
        dataset = open_dataset(
            [Path(folder) for folder in folders],
            name=name,
            splits=more["splits"],
            folds=more["folds"],
            group_pattern=more["group_pattern"],
            cache=default_shard_cache(),
            report=display.prepare,
            allow_missing=more["allow_missing"],
            short_side=128 if size <= 128 else 2 * round(size * 4 / 7),
        )
        for line in (
            *dataset.warnings,
            *(f"rejected {r.path}: {r.reason}" for r in dataset.rejects[:10]),
        ):
            display.say(line)
        found.append(dataset)
    return found


def _show(table: Table, folder: Path) -> None:
    """Print a table and where it lies."""
    from rich.console import Console

    from engine.report.paper import as_text

    console = Console(highlight=False, width=None if Console().is_terminal else 200)
    shown, under = as_text(table)
    console.print(shown)
    for line in under:
        console.print(line, markup=False, soft_wrap=True)
    click.echo(f"{folder / table.name}: .md .csv .json .svg .png")
