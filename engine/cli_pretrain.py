"""``engine pretrain``: train the representation with a given loss."""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from engine.cli_common import (
    PATH,
    errors_explained,
    open_run,
    run_options,
    say_rejects,
    say_substitutes,
)

if TYPE_CHECKING:
    from engine.distributed import Ranks
    from engine.pretrain_job import Job
    from engine.runfolder import RunFolder

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
def pretrain(gpus: int | None, workers: int | None, restarts: int, **told: Any) -> None:
    """Train the representation with a given loss; ends with the RGB network as RUN/rgb.safetensors."""
    from engine.distributed import ranks_of_environment
    from engine.runtime import check_kernels_package

    if told["loss_name"] is None and not told["resume"]:
        raise ValueError(
            "--loss is missing: a loss file such as RUN/best.toml, a preset, or random:SEED"
        )
    if told["judge_every"] is not None and not told["labelled"]:
        raise ValueError("--judge-every needs --labelled")
    check_kernels_package()
    ranks = ranks_of_environment()
    if ranks is not None and ranks.world > 1:
        if gpus or workers:
            raise ValueError("torchrun chooses the processes: leave out --gpus and --workers")
        _under_torchrun(told, ranks)
        return
    if gpus and workers:
        raise ValueError("give --gpus or --workers, not both")
    if gpus or workers:
        told["device"] = _device(told["device"], gpus)
    if max(gpus or 1, workers or 1) > 1:
        _in_processes(told, processes=gpus or workers or 1, restarts=restarts)
    else:
        _here(told)


def _here(told: dict[str, Any]) -> None:
    """Train in this process."""
    from engine.display import Display
    from engine.pretrain_job import carry_out

    run, job = _opened(told)
    with Display(log=run.path) as display:
        say = partial(say_rejects, display)
        out, library = carry_out(job, display, run=run, opened=say)
        say_substitutes(display, library)
    click.echo(f"RGB network: {out}")


def _in_processes(told: dict[str, Any], *, processes: int, restarts: int) -> None:
    """Start processes on this machine; raw videos are made shards first, by this one."""
    from engine.data.library import default_shard_cache, open_library
    from engine.display import Display
    from engine.pretrain_job import check_gpus, in_processes

    if told["device"] == "cuda":
        check_gpus(processes)
    run, job = _opened(told)
    run.close()
    with Display() as display:
        cache, shards = default_shard_cache(), []
        for videos in (job.videos, job.labelled):
            if videos:
                library = open_library(videos, cache=cache, report=display.prepare)
                say_rejects(display, library)
                shards.append(library.shards)
    job = replace(job, videos=shards[0], labelled=shards[1] if job.labelled else ())
    click.echo(f"RGB network: {in_processes(job, processes=processes, restarts=restarts)}")


def _under_torchrun(told: dict[str, Any], ranks: Ranks) -> None:
    """Train as one of torchrun's processes; only the first one speaks of what ends them all.

    A run that is there already is gone on with: after a restart, or by a scheduler, the command is the same.
    """
    from engine.distributed import RanksDiffer
    from engine.pretrain_job import as_rank
    from engine.train import MemberFailed

    if told["run_path"] is None:
        raise ValueError("torchrun: name the run's folder with --run, for all processes")

    def make() -> Job:
        told["resume"] = told["resume"] or (told["run_path"] / "recipe.toml").exists()
        run, job = _opened(told)
        run.close()
        return job

    try:
        out, _ = as_rank(make, ranks, device=told["device"], run=told["run_path"])
    except (RanksDiffer, MemberFailed):
        if ranks.leads:
            raise
        sys.exit(1)
    if out is not None:
        click.echo(f"RGB network: {out}")


def _device(device: str, gpus: int | None) -> str:
    kind = "cuda" if gpus else "cpu"
    if device not in ("auto", kind):
        option = "--gpus" if gpus else "--workers"
        raise ValueError(f"--device {device} does not go with {option}, which means {kind}")
    return kind


def _opened(told: dict[str, Any]) -> tuple[RunFolder, Job]:
    """The run's folder, and what the options make of it."""
    from engine.lossfile import load_loss, loss_used_labels
    from engine.pretrain_job import Job
    from engine.pretrain_record import Saving

    loss = told["loss_name"]
    weights = load_loss(loss) if loss else None
    run, recipe = open_run(
        "pretrain",
        told["recipe_name"],
        told["assignments"],
        told["seed"],
        told["run_path"],
        told["resume"],
        "cpu/pretrain",
    )
    every, keep, judge = (told[f"{key}_every"] for key in ("checkpoint", "keep", "judge"))
    job = Job(
        recipe,
        run.path,
        videos=told["videos"],
        labelled=told["labelled"],
        weights=weights,
        labels_used=loss_used_labels(loss) if loss else False,
        device=told["device"],
        resume=told["resume"],
        saving=Saving(every, keep, judge),
    )
    return run, job
