"""``engine pretrain``: train the representation with a given loss."""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from engine.cli import common

if TYPE_CHECKING:
    from pathlib import Path

    from engine.core.ranks import Ranks
    from engine.core.run import RunFolder
    from engine.train.pretrain import PretrainOptions


@click.command()
@click.option(
    "--loss",
    "loss_name",
    metavar="FILE|PRESET|random:SEED",
    help="The loss, such as RUN/best.toml.",
)
@common.paths("--videos", help="Videos or shards; several times.")
@common.count("--gpus", help="One process a GPU, on so many GPUs of this machine.")
@common.count("--workers", help="So many processes on this machine's CPU.")
@common.natural(
    "--restarts",
    default=3,
    help="How often all processes may start again, from the last checkpoint, after one died.",
)
@common.count("--checkpoint-every", default=500, help="In steps.")
@common.count("--keep-every", help="Steps between checkpoints that are kept.")
@common.paths(
    "--labelled", help="Labelled clips whose k-means fitness chooses checkpoints/best.safetensors."
)
@common.count("--judge-every", help="Steps between fitnesses [default: --checkpoint-every].")
@common.run_options
@common.errors_explained
def pretrain(gpus: int | None, workers: int | None, restarts: int, **options: Any) -> None:
    """Train the representation with a given loss; ends with the RGB network as RUN/rgb.safetensors."""
    from engine.core.launch import ranks_of_environment
    from engine.core.runtime import check_kernels_package

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
            kind, option = ("cuda", "--gpus") if gpus else ("cpu", "--workers")
            if options["device"] not in ("auto", kind):
                raise ValueError(
                    f"--device {options['device']} does not go with {option}, which means {kind}"
                )
            options["device"] = kind
        processes = gpus or workers or 1
        out = _in_processes(options, processes, restarts) if processes > 1 else _here(options)
    if out is not None:
        click.echo(f"RGB network: {out}")


def _here(options: dict[str, Any]) -> Path | None:
    """Train in this process."""
    from engine.core.display import Display
    from engine.train.pretrain import pretrain

    run, training = _new_run(options)
    with Display(log=run.path) as display:
        say = partial(common.say_library, display)
        out, library = pretrain(training, display, run=run, device=training.device, opened=say)
        common.say_substitutes(display, library)
    return out


def _in_processes(options: dict[str, Any], processes: int, restarts: int) -> Path:
    """Start processes on this machine; raw videos are made shards first, by this one."""
    from engine.core.display import Display
    from engine.train.processes import check_gpus, in_processes

    if options["device"] == "cuda":
        check_gpus(processes)
    run, training = _new_run(options)
    run.close()
    folders = [training.videos, training.labelled] if training.labelled else [training.videos]
    with Display() as display:
        videos, *labelled = [library.shards for library in common.open_videos(display, *folders)]
    training = replace(training, videos=videos, labelled=labelled[0] if labelled else ())
    return in_processes(training, processes=processes, restarts=restarts)


def _under_torchrun(options: dict[str, Any], ranks: Ranks) -> Path | None:
    """Train as one of torchrun's processes; only the first one speaks of what ends them all.

    A run that is there already is gone on with: after a restart, or by a scheduler, the command is the same.
    """
    from engine.core.pool import die_with_parent
    from engine.core.ranks import RanksDiffer
    from engine.train.processes import as_rank
    from engine.train.trainer import MemberFailed

    path = options["run_path"]
    if path is None:
        raise ValueError("torchrun: name the run's folder with --run, for all processes")
    die_with_parent()  # a launcher that is killed leaves its processes, which would train on beside new ones

    def make() -> PretrainOptions:
        resume = options["resume"] or (path / "recipe.toml").exists()
        run, training = _new_run({**options, "resume": resume})
        run.close()
        return training

    try:
        return as_rank(make, ranks, device=options["device"], run=path)[0]
    except (RanksDiffer, MemberFailed):
        if ranks.leads:
            raise
        sys.exit(1)


def _new_run(options: dict[str, Any]) -> tuple[RunFolder, PretrainOptions]:
    """The run's folder, and the options of its training."""
    from engine.objective.lossfile import load_loss, loss_objective, loss_used_labels
    from engine.train.pretrain import PretrainOptions

    if options["loss_name"] is None and not options["resume"]:
        raise ValueError(
            "--loss is missing: a loss file such as RUN/best.toml, a preset, or random:SEED"
        )
    if not options["videos"] and not options["resume"]:
        raise ValueError("--videos is missing: folders of videos, or shards, to train on")
    loss = options["loss_name"]
    weights = load_loss(loss) if loss else None
    run, recipe = common.open_run("pretrain", "cpu/pretrain", **options)
    videos, labelled = options["videos"], options["labelled"]
    if options["resume"]:
        videos, labelled = common.noted_videos(run, videos, labelled)
    if options["judge_every"] is not None and not labelled:
        raise ValueError("--judge-every needs --labelled")
    training = PretrainOptions(
        recipe,
        run.path,
        videos=videos,
        labelled=labelled,
        noted={"videos": common.names_of(videos), "labelled": common.names_of(labelled)},
        weights=weights,
        labels_used=loss_used_labels(loss) if loss else False,
        objective=loss_objective(loss) if loss else {},
        device=options["device"],
        resume=options["resume"],
        save_every=options["checkpoint_every"],
        keep_every=options["keep_every"],
        judge_every=options["judge_every"],
    )
    return run, training
