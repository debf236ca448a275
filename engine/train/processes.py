"""The processes of a pretraining: one by one under torchrun, or all started here.

Under ``torchrun`` every process runs the command; rank 0 alone opens the run and tells the others. ``--gpus`` and
``--workers`` start the processes here, on one machine, by the same elastic launcher, which starts all of them again
from the last checkpoint when one dies.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch

from engine.core.display import Display
from engine.core.launch import (
    OWN_STORE,
    launch,
    may_miss_each_other,
    ranks_of_environment,
    restarts_so_far,
)
from engine.core.pool import die_with_parent
from engine.core.ranks import Ranks, joined
from engine.core.run import RunFolder
from engine.data.library import Library
from engine.data.shards.index import is_shards
from engine.train.pretrain import PretrainOptions, pretrain
from engine.train.trainer import MemberFailed


def device_of(device: str, ranks: Ranks) -> str:
    """The device of a rank; raises ValueError where its machine has too few GPUs, or one is named for many ranks."""
    if ranks.world == 1:
        return device
    if device.startswith("cuda:"):
        raise ValueError(f"--device {device} is one GPU: give --device cuda for several processes")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        return device
    check_gpus(ranks.local_world)
    return f"{device}:{ranks.local_rank}"


def check_gpus(processes: int) -> None:
    """Raise ValueError where this machine has fewer GPUs than processes."""
    there = torch.cuda.device_count()
    if processes > there:
        raise ValueError(
            f"{processes} processes, one GPU each, but this machine shows {there}: ask for fewer, or use "
            "--device cpu --workers N"
        )


def in_processes(options: PretrainOptions, *, processes: int, restarts: int) -> Path:
    """Start so many processes on this machine, and all again, up to ``restarts`` times, when one dies.

    Returns the RGB network's file. Raises ValueError for what a restart can't help, Ended once restarts are used up,
    and KeyboardInterrupt.
    """
    optim = options.recipe.optim
    Ranks(world=processes).share_of(optim.batch_size, pieces=optim.accumulate)
    launch(_work, options, processes=processes, restarts=restarts)
    return options.run / "rgb.safetensors"


def _work(options: PretrainOptions, notes: Path) -> None:
    """Train as one of the processes that ``in_processes`` starts."""
    die_with_parent()
    if (notes / "final").exists():  # started again, after what a restart can't help
        return
    ranks = ranks_of_environment()
    assert ranks is not None
    try:
        as_rank(lambda: options, ranks, device=options.device, run=options.run)
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, OSError, MemberFailed) as error:
        _note(notes / "final", error)
        sys.exit(1)
    except Exception as error:
        _note(notes / f"rank-{ranks.rank}", error)
        sys.exit(1)


def _note(path: Path, error: Exception) -> None:
    if not path.exists() or path.name != "final":
        path.write_text(" ".join(str(error).split()) or type(error).__name__, encoding="utf-8")


def as_rank(
    make: Callable[[], PretrainOptions], ranks: Ranks, *, device: str, run: Path
) -> tuple[Path | None, Library]:
    """Train as one of several processes; ``make`` is called on rank 0 alone, which sends the options to the others.

    Every machine must find the shards at the same path. Returns and raises as ``pretrain``.
    """
    own = torch.device(device_of(device, ranks))
    log = run if ranks.leads else None
    with joined(ranks, own), Display(log=log, quiet=not ranks.leads) as display:
        options = _of_shards(ranks.shared(lambda: _of_shards(make())))  # here as on rank 0
        if may_miss_each_other():
            display.say(f"restarts can fail: start torchrun with {OWN_STORE}=1 in its environment")
        if restarts_so_far():
            display.say(f"a process ended: all of them start again ({restarts_so_far()})")
        folder = _folder(options) if ranks.leads else None
        return pretrain(options, display, run=folder, device=str(own), ranks=ranks)


def _of_shards(options: PretrainOptions) -> PretrainOptions:
    """The options; raises ValueError where this machine does not find shards under their paths."""
    for path in options.videos:
        if not is_shards(path):
            raise ValueError(
                f"{path}: not shards, which several machines need: engine ingest {path} --out SHARDS, then "
                "--videos SHARDS"
            )
    return options


def _folder(options: PretrainOptions) -> RunFolder:
    """The run's folder: a new one, or one that a process before this one has begun."""
    path, recipe = options.run, options.recipe
    if options.resume:
        return RunFolder.reopen(path, recipe)[0]
    return (RunFolder.begun if restarts_so_far() else RunFolder.create)(path, recipe)
