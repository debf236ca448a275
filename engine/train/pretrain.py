"""Train one member with a given loss, in one process or many: exact resume, and the RGB network at the end."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.core.display import Display
from engine.core.provenance import provenance, write_provenance
from engine.core.ranks import ALONE, Ranks
from engine.core.recipe import Recipe, recipe_hash
from engine.core.runfolder import RunError, RunFolder
from engine.core.runtime import Runtime, choose_runtime, make_deterministic
from engine.data.library import Library, default_shard_cache, fingerprint, open_library
from engine.features.extract import LabelledClips
from engine.objective.lossfile import load_loss, loss_used_labels, save_loss
from engine.objective.terms import LossWeights
from engine.train.checkpoint import load_last
from engine.train.ema import RunningAverage
from engine.train.member import Member, tensors_of
from engine.train.optim import start_moments
from engine.train.pretrain_log import PretrainLog, Saving
from engine.train.trainer import Trainer


@dataclass(frozen=True)
class PretrainJob:
    """A pretraining, the same for all of its processes."""

    recipe: Recipe
    run: Path
    videos: tuple[Path, ...]
    labelled: tuple[Path, ...] = ()
    """Clips whose k-means fitness chooses ``best.safetensors``, and nothing else."""
    weights: LossWeights | None = None
    """None: those that the run began with."""
    labels_used: bool = False
    """Whether labels had a part in choosing the loss."""
    device: str = "auto"
    resume: bool = False
    saving: Saving = field(default_factory=Saving)


def pretrain(
    job: PretrainJob,
    display: Display,
    *,
    run: RunFolder | None,
    device: str,
    ranks: Ranks = ALONE,
    opened: Callable[[Library], object] = lambda library: None,
) -> tuple[Path | None, Library]:
    """Train in this process, which is one of ``ranks``; returns the RGB network's file, and the videos.

    A run that is continued equals one that was never interrupted, bit for bit on a CPU with as many processes.
    ``run`` is rank 0's, which alone writes; others have None, and get None. ``opened`` is called with the videos, and
    with the labelled clips. Raises CheckpointError where no checkpoint is whole, or one does not fit, RunError where
    the run has another loss, RanksDiffer where processes are not at one, and NonFiniteLoss where training diverges.
    """
    recipe, labelled = job.recipe, None
    runtime = choose_runtime(device, amp=recipe.optim.amp)
    make_deterministic(runtime)
    library = _open(job.videos, display, opened)
    if job.labelled and ranks.leads:
        judged = _open(job.labelled, display, opened).index
        labelled = LabelledClips(judged, recipe, runtime=runtime)
    trainer = Trainer(recipe, library.index, runtime, warn=display.say, ranks=ranks)
    weights = ranks.shared(lambda: _begin(run, job))
    member = trainer.member(weights, seed=recipe.seed, alone=True)
    average = RunningAverage(member.loss.rgb, recipe.optim.ema) if recipe.optim.ema else None
    ranks.agree(_identity(recipe, library, member))
    facts = {} if run is None else _provenance(recipe, library, run=run, runtime=runtime)
    _resume(run, member, average, digest=recipe_hash(recipe), ranks=ranks, display=display)
    log = None
    if run is not None:
        log = PretrainLog(
            trainer,
            member,
            average,
            run=run,
            display=display,
            saving=job.saving,
            weights=weights,
            provenance=facts,
            labelled=labelled,
        )
    for step, views in trainer.rounds([member], seed=recipe.seed):
        total = trainer.step(member, views)
        if average is not None:
            average.update(member.loss.rgb, step=step)
        if log is not None:
            log.after(step, total, views)
    return None if log is None else log.finish(), library


def _open(
    videos: tuple[Path, ...], display: Display, opened: Callable[[Library], object]
) -> Library:
    library = open_library(videos, cache=default_shard_cache(), report=display.prepare)
    opened(library)
    return library


def _begin(run: RunFolder | None, job: PretrainJob) -> LossWeights:
    """The loss that a run trains with, written to loss.toml as it begins; it never changes after that."""
    assert run is not None
    run.begin()
    path, weights = run.path / "loss.toml", job.weights
    if path.exists():
        own = load_loss(path)
        if weights not in (None, own):
            raise RunError(
                f"{run.path}: this run trains with another loss (loss.toml); resume without --loss, or "
                "give another --run"
            )
        return own
    if weights is None:
        raise RunError(f"{run.path}: ended before it had its loss (loss.toml); give --loss again")
    about = "the loss that this run trains with"
    save_loss(weights, path, name="loss", about=about, labels_used=job.labels_used)
    return weights


def _identity(recipe: Recipe, library: Library, member: Member) -> dict[str, Any]:
    """What must be the same in all processes."""
    checksum = 0
    for parameter in member.loss.parameters():
        checksum = zlib.crc32(parameter.detach().cpu().numpy().tobytes(), checksum)
    return {
        "recipe": recipe_hash(recipe),
        "data set": fingerprint(library),
        "network at the start": f"{checksum:08x}",
    }


def _resume(
    run: RunFolder | None,
    member: Member,
    average: RunningAverage | None,
    *,
    digest: str,
    ranks: Ranks,
    display: Display,
) -> None:
    """Bring the member, on every rank, to the state that rank 0 finds in the run's folder."""
    extra = {} if average is None else average.tensors
    parameters = [p for group in member.optimizer.param_groups for p in group["params"]]

    def load() -> tuple[int, list[int]]:
        assert run is not None
        if load_last(run.checkpoints, member, recipe_hash=digest, extra=extra, warn=display.say):
            display.say(f"going on from step {member.step}")
        return member.step, [i for i, p in enumerate(parameters) if member.optimizer.state.get(p)]

    member.step, moved = ranks.shared(load)
    if ranks.world == 1 or member.step == 0:
        return
    start_moments(member.optimizer)
    for i in sorted(set(range(len(parameters))) - set(moved)):
        del member.optimizer.state[parameters[i]]
    if member.values is None:
        member.values = member.ordered.clone()
    own = [*tensors_of(member.loss, member.optimizer), member.values, *extra.values()]
    ranks.broadcast_(own)


def _provenance(
    recipe: Recipe, library: Library, *, run: RunFolder, runtime: Runtime
) -> dict[str, Any]:
    """Write provenance.json; raises RunError where a run is continued on other videos than it began with."""
    facts = {
        **provenance(runtime),
        "seed": recipe.seed,
        "recipe_hash": recipe_hash(recipe),
        "labels_used": loss_used_labels(run.path / "loss.toml"),
        "num_clips": len(library.index),
        "data": fingerprint(library),
    }
    return write_provenance(run, facts)
