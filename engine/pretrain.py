"""Train one member with a given loss: checkpoints, TensorBoard, exact resume, the RGB network at the end."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from engine.checkpoint import load_member, save_member
from engine.data.library import Library, fingerprint
from engine.display import Display
from engine.lossfile import load_loss, save_loss
from engine.network_file import card_of, save_network
from engine.objective.terms import LossWeights
from engine.recipe import Recipe, recipe_hash
from engine.runfolder import RunError, RunFolder
from engine.runtime import Runtime, make_deterministic, provenance
from engine.train import Trainer, learning_rate

LOG_EVERY = 10
"""Steps between points in TensorBoard."""


def pretrain(
    recipe: Recipe,
    library: Library,
    *,
    weights: LossWeights | None,
    run: RunFolder,
    runtime: Runtime,
    display: Display,
    checkpoint_every: int,
) -> Path:
    """Train with ``weights`` (None: those that the run began with) and return the RGB network's file.

    A run that is continued equals one that was never interrupted, bit for bit on a CPU. Raises
    CheckpointError where the last checkpoint does not fit, RunError where the run has another loss, and
    NonFiniteLoss where training diverges.
    """
    make_deterministic(runtime)
    trainer = Trainer(recipe, library.index, runtime, warn=display.say)
    run.begin()
    weights = _own_loss(run, weights)
    facts = _provenance(recipe, library, run=run, runtime=runtime)
    digest = facts["recipe_hash"]
    member = trainer.member(weights, seed=recipe.seed, alone=True)
    last = run.checkpoints / "last.safetensors"
    if last.exists():
        load_member(last, member, recipe_hash=digest)
        display.say(f"going on from step {member.step}")
    board = SummaryWriter(str(run.tensorboard), purge_step=member.step)
    steps, first, began = recipe.optim.steps, member.step, time.perf_counter()
    display.start("training", steps)
    for step, views in trainer.rounds([member], seed=recipe.seed):
        total = trainer.step(member, views)
        rate = (member.step - first) * recipe.optim.batch_size / (time.perf_counter() - began)
        display.update("training", member.step, steps, note=f"loss {total:.3f}  {rate:.0f} clips/s")
        if step % LOG_EVERY == 0 or member.step == steps:
            scalars = {
                "train/loss": total,
                "train/lr": learning_rate(recipe.optim, step),
                "train/clips_per_second": rate,
                **{f"terms/{name}": value for name, value in member.term_values().items()},
            }
            for name, value in scalars.items():
                board.add_scalar(name, value, step)
        if member.step % checkpoint_every == 0 or member.step == steps:
            save_member(last, member, facts={"recipe_hash": digest, "seed": recipe.seed})
    board.close()
    out = run.path / "rgb.safetensors"
    told = {key: facts[key] for key in ("recipe_hash", "seed", "num_clips", "git_sha", "versions")}
    save_network(out, member.loss.rgb.state_dict(), card_of(recipe, loss=weights, **told))
    return out


def _provenance(
    recipe: Recipe, library: Library, *, run: RunFolder, runtime: Runtime
) -> dict[str, Any]:
    """Write provenance.json, or check that a run is continued on the videos that it began with."""
    facts = {
        **provenance(runtime),
        "seed": recipe.seed,
        "recipe_hash": recipe_hash(recipe),
        "num_clips": len(library.index),
        "data": fingerprint(library),
    }
    old = run.read_json("provenance.json")
    if old is not None:
        if old["data"] != facts["data"]:
            raise RunError(
                f"{run.path}: the videos are not those that this run began with; "
                "bring them back, or start a new run"
            )
        facts = {**old, "resumed": [*old.get("resumed", []), facts["started"]]}
    run.write_json("provenance.json", facts)
    return facts


def _own_loss(run: RunFolder, weights: LossWeights | None) -> LossWeights:
    """The loss that a run trains with, written to loss.toml as it begins; it never changes after that."""
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
    save_loss(weights, path, name="loss", about="the loss that this run trains with")
    return weights
