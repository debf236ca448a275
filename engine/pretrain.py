"""Train one member with a given loss, in one process or many: exact resume, and the RGB network at the end."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

from engine.checkpoint import restore_member
from engine.data.library import Library, fingerprint
from engine.display import Display
from engine.distributed import ALONE, Ranks
from engine.lossfile import load_loss, loss_used_labels, save_loss
from engine.objective.terms import LossWeights
from engine.pretrain_record import SAVING, Judge, Record, Saving
from engine.provenance import provenance, write_provenance
from engine.recipe import Recipe, recipe_hash
from engine.runfolder import RunError, RunFolder
from engine.runtime import Runtime, make_deterministic
from engine.train import Trainer
from engine.train_average import RunningAverage
from engine.train_state import Member, start_moments, tensors_of


def pretrain(
    recipe: Recipe,
    library: Library,
    *,
    weights: LossWeights | None,
    run: RunFolder | None,
    runtime: Runtime,
    display: Display,
    saving: Saving = SAVING,
    labelled: Library | None = None,
    labels_used: bool = False,
    ranks: Ranks = ALONE,
) -> Path | None:
    """Train with ``weights`` (None: those that the run began with) and return the RGB network's file.

    A run that is continued equals one that was never interrupted, bit for bit on a CPU with as many processes.
    ``labelled`` clips choose ``best.safetensors`` by their k-means fitness, and nothing else; ``labels_used`` says that
    labels had a part in choosing the loss. ``run`` is rank 0's, which alone writes; others have None, and get None.
    Raises CheckpointError where no checkpoint is whole, or one does not fit, RunError where the run has another loss,
    RanksDiffer where processes are not at one, and NonFiniteLoss where training diverges.
    """
    make_deterministic(runtime)
    trainer = Trainer(recipe, library.index, runtime, warn=display.say, ranks=ranks)
    weights = ranks.shared(lambda: _begin(run, weights, labels_used))
    member = trainer.member(weights, seed=recipe.seed, alone=True)
    decay = recipe.optim.ema
    average = RunningAverage(member.loss.rgb, decay) if decay else None
    ranks.agree(_identity(recipe, library, member))
    record: Record | None = None
    if run is not None:
        facts = _provenance(recipe, library, run=run, runtime=runtime)
        record = Record(trainer, member, average, run=run, display=display, saving=saving)
        record.facts, record.weights = {**facts, "processes": ranks.world}, weights
        record.judge = None if labelled is None else Judge(labelled, recipe, runtime)
    _resume(run, member, average, digest=recipe_hash(recipe), ranks=ranks, display=display)
    if record is not None:
        record.start()
    for step, views in trainer.rounds([member], seed=recipe.seed):
        total = trainer.step(member, views)
        if average is not None:
            average.update(member.loss.rgb, step=step)
        if record is not None:
            record.after(step, total, views)
    return None if record is None else record.finish()


def _begin(run: RunFolder | None, weights: LossWeights | None, labels_used: bool) -> LossWeights:
    """The loss that a run trains with, written to loss.toml as it begins; it never changes after that."""
    assert run is not None
    run.begin()
    path = run.path / "loss.toml"
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
    save_loss(weights, path, name="loss", about=about, labels_used=labels_used)
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
        found = restore_member(
            run.checkpoints, member, recipe_hash=digest, extra=extra, warn=display.say
        )
        if found is not None:
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
