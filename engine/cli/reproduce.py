"""``engine reproduce``: the paper's tables and figures."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from engine.cli import common

if TYPE_CHECKING:
    from engine.evaluate.paper.rows import Inputs


@click.command()
@click.argument("table", type=click.Choice(["table1", "table2", "fig4", "fig5"]))
@click.option("--scale", "scale_name", default="cpu", metavar="cpu|small|paper|FILE")
@common.paths("--videos", required=True, help="Unlabelled videos or shards.")
@click.option(
    "--dataset",
    "names",
    multiple=True,
    default=["folders"],
    help="ucf101, hmdb51, kinetics or folders; for table2 again, each with its --root.",
)
@common.labelled_options
@click.option(
    "--loss",
    "losses",
    multiple=True,
    metavar="[NAME=]LOSS",
    help="The evolved loss, RUN/best.toml; with NAME= a further row.",
)
@common.path("--imagenet", help="State dict of a ResNet trained on ImageNet.")
@common.path("--kinetics", help="State dict of a video ResNet trained on Kinetics.")
@click.option("--rows", help="Only these, by name, with commas.")
@click.option("--seeds", help="Only these, with commas [default: the scale's].")
@click.option("--protocols", help="Only these, with commas: kmeans, linear, finetune.")
@common.BASELINES
@click.option(
    "--set",
    "assignments",
    multiple=True,
    metavar="KEY=VALUE",
    help="Override the scale, such as pretrain.optim.steps=50.",
)
@common.flag("--retry-failed", help="Do failed cells again.")
@common.flag("--dry-run", help="List what is to do, with an estimate.")
@common.path("--run", "run_path", help="Run folder [default: runs/reproduce-TABLE-SCALE].")
@common.DEVICE
@common.errors_explained
def reproduce(
    table: str,
    scale_name: str,
    assignments: tuple[str, ...],
    videos: tuple[Path, ...],
    names: tuple[str, ...],
    root: tuple[Path, ...],
    run_path: Path | None,
    device: str,
    dry_run: bool,
    retry_failed: bool,
    with_baselines: bool,
    **more: Any,
) -> None:
    """Run one of the paper's tables or figures; the same command goes on after a kill."""
    from engine.cli.tables import print_paper
    from engine.core.display import Display
    from engine.core.run import RunFolder
    from engine.core.runtime import check_kernels_package, choose_runtime
    from engine.evaluate.paper.run import Reproduction, Selection
    from engine.evaluate.paper.scale import load_scale
    from engine.report.paper import table_of, write

    check_kernels_package()
    scale = load_scale(scale_name, assignments)
    inputs = _inputs(*(more.pop(key) for key in ("losses", "imagenet", "kinetics")))
    rows, seeds, protocols = (
        _listed(more.pop(key), f"--{key}", digits=key == "seeds")
        for key in ("rows", "seeds", "protocols")
    )
    only = Selection(rows, [int(seed) for seed in seeds], protocols)
    pairs = _pairs(names, root)
    _check_apart(videos, root)
    runtime = choose_runtime(device, amp=scale.pretrain.optim.amp)
    path = run_path or Path("runs") / f"reproduce-{table}-{scale.name}"
    run = RunFolder.begun(path, scale.pretrain)
    with closing(run), Display(log=run.path) as display:
        size = scale.pretrain.clip.size
        datasets = [common.open_labelled(display, name, size, root=r, **more) for name, r in pairs]
        (library,) = common.open_videos(display, videos)
        todo = Reproduction(
            table, scale, inputs, library, datasets, run, runtime, display, only, with_baselines
        )
        if dry_run:
            for line in todo.plan():
                click.echo(line)
            return
        todo.go(write, retry_failed=retry_failed)
        common.say_substitutes(display, library)
    print_paper(table_of(todo), run.path)


def _inputs(texts: tuple[str, ...], imagenet: Path | None, kinetics: Path | None) -> Inputs:
    from engine.evaluate.paper.rows import TABLE1, Inputs

    losses = {}
    for text in texts:
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
    return Inputs(losses, imagenet, kinetics)


def _listed(text: str | None, option: str, *, digits: bool = False) -> list[str]:
    items = [item.strip() for item in (text or "").split(",") if item.strip()]
    bad = [item for item in items if digits and not item.isdecimal()]
    if bad or (text is not None and not items):
        raise ValueError(
            f"{option} {text}: write {'whole numbers' if digits else 'names'} with commas"
        )
    return list(dict.fromkeys(items))


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


def _pairs(names: tuple[str, ...], roots: tuple[Path, ...]) -> list[tuple[str, tuple[Path, ...]]]:
    """Each data set's name with its folders."""
    if len(names) == 1:
        return [(names[0], roots)]
    if len(names) != len(roots):
        raise ValueError(
            f"{len(names)} times --dataset and {len(roots)} times --root: give one root to each"
        )
    return [(name, (root,)) for name, root in zip(names, roots, strict=True)]
