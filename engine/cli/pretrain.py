"""``engine pretrain``: train the representation with a given loss."""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from engine.cli.common import (
    PATH,
    errors_explained,
    open_run,
    run_options,
    say_rejects,
    say_substitutes,
)

if TYPE_CHECKING:
    from pathlib import Path

    from engine.core.ranks import Ranks
    from engine.core.runfolder import RunFolder
    from engine.train.pretrain import PretrainJob

COUNT = click.IntRange(min=1)


@click.command()
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
@click.option("--gpus", type=COUNT, help="One process a GPU, on so many GPUs of this machine.")
@click.option("--workers", type=COUNT, help="So many processes on this machine's CPU.")
@click.option(
    "--restarts",
    type=click.IntRange(min=0),
    default=3,
    show_default=True,
    help="How often all processes may start again, from the last checkpoint, after one died.",
)
@click.option("--checkpoint-every", type=COUNT, default=500, show_default=True, help="In steps.")
@click.option("--keep-every", type=COUNT, help="Steps between checkpoints that are kept.")
@click.option(
    "--labelled",
    multiple=True,
    type=PATH,
    help="Labelled clips whose k-means fitness chooses checkpoints/best.safetensors.",
)
@click.option(
    "--judge-every", type=COUNT, help="Steps between fitnesses [default: --checkpoint-every]."
)
@run_options
@errors_explained
def pretrain(gpus: int | None, workers: int | None, restarts: int, **options: Any) -> None:
    """Train the representation with a given loss; ends with the RGB network as RUN/rgb.safetensors."""
    from engine.core.ranks import ranks_of_environment
    from engine.core.runtime import check_kernels_package

    if options["loss_name"] is None and not options["resume"]:
        raise ValueError(
            "--loss is missing: a loss file such as RUN/best.toml, a preset, or random:SEED"
        )
    if options["judge_every"] is not None and not options["labelled"]:
        raise ValueError("--judge-every needs --labelled")
    check_kernels_package()
    ranks = ranks_of_environment()
    if ranks is not None and ranks.world > 1:
        if gpus or workers:
            raise ValueError("torchrun chooses the processes: leave out --gpus and --workers")
        out = _under_torchrun(options, ranks)
    elif gpus and workers:
        raise ValueError("give --gpus or --workers, not both")
    else:
        if gpus or workers:
            options["device"] = _device(options["device"], gpus)
        processes = gpus or workers or 1
        out = _in_processes(options, processes, restarts) if processes > 1 else _here(options)
    if out is not None:
        click.echo(f"RGB network: {out}")


def _here(options: dict[str, Any]) -> Path | None:
    """Train in this process."""
    from engine.core.display import Display
    from engine.train.pretrain import pretrain

    run, job = _new_job(options)
    with Display(log=run.path) as display:
        say = partial(say_rejects, display)
        out, library = pretrain(job, display, run=run, device=job.device, opened=say)
        say_substitutes(display, library)
    return out


def _in_processes(options: dict[str, Any], processes: int, restarts: int) -> Path:
    """Start processes on this machine; raw videos are made shards first, by this one."""
    from engine.core.display import Display
    from engine.data.library import default_shard_cache, open_library
    from engine.train.pretrain_job import check_gpus, in_processes

    if options["device"] == "cuda":
        check_gpus(processes)
    run, job = _new_job(options)
    run.close()
    with Display() as display:

        def shards(videos: tuple[Path, ...]) -> tuple[Path, ...]:
            library = open_library(videos, cache=default_shard_cache(), report=display.prepare)
            say_rejects(display, library)
            return tuple(library.shards)

        videos, labelled = shards(job.videos), shards(job.labelled) if job.labelled else ()
    job = replace(job, videos=videos, labelled=labelled)
    return in_processes(job, processes=processes, restarts=restarts)


def _under_torchrun(options: dict[str, Any], ranks: Ranks) -> Path | None:
    """Train as one of torchrun's processes; only the first one speaks of what ends them all.

    A run that is there already is gone on with: after a restart, or by a scheduler, the command is the same.
    """
    from engine.core.ranks import RanksDiffer
    from engine.train.pretrain_job import as_rank
    from engine.train.trainer import MemberFailed

    path = options["run_path"]
    if path is None:
        raise ValueError("torchrun: name the run's folder with --run, for all processes")

    def make() -> PretrainJob:
        resume = options["resume"] or (path / "recipe.toml").exists()
        run, job = _new_job({**options, "resume": resume})
        run.close()
        return job

    try:
        return as_rank(make, ranks, device=options["device"], run=path)[0]
    except (RanksDiffer, MemberFailed):
        if ranks.leads:
            raise
        sys.exit(1)


def _device(device: str, gpus: int | None) -> str:
    kind = "cuda" if gpus else "cpu"
    if device not in ("auto", kind):
        option = "--gpus" if gpus else "--workers"
        raise ValueError(f"--device {device} does not go with {option}, which means {kind}")
    return kind


def _new_job(options: dict[str, Any]) -> tuple[RunFolder, PretrainJob]:
    """The run's folder, and the job that the options describe."""
    from engine.objective.lossfile import load_loss, loss_used_labels
    from engine.train.pretrain import PretrainJob
    from engine.train.pretrain_log import Saving

    loss = options["loss_name"]
    weights = load_loss(loss) if loss else None
    keys = ("recipe_name", "assignments", "seed", "run_path", "resume")
    name, assignments, seed, path, resume = (options[key] for key in keys)
    run, recipe = open_run("pretrain", name, assignments, seed, path, resume, "cpu/pretrain")
    job = PretrainJob(
        recipe,
        run.path,
        videos=options["videos"],
        labelled=options["labelled"],
        weights=weights,
        labels_used=loss_used_labels(loss) if loss else False,
        device=options["device"],
        resume=options["resume"],
        saving=Saving(*(options[f"{key}_every"] for key in ("checkpoint", "keep", "judge"))),
    )
    return run, job
