"""Fitness of given losses over given seeds, trained side by side: to set beside what a search found.

    python benchmarks/loss_fitness.py sec4 no_distillation random:1 runs/NAME/best.toml \
        --videos VIDEOS --labelled CLASSES --seeds 3
"""

from __future__ import annotations

from pathlib import Path
from statistics import fmean, stdev

import click
import torch
from rows import CHANGES, JSON, PATH, RECIPE, append

from engine.core.recipe import load_recipe, override, recipe_hash
from engine.core.runtime import choose_runtime, make_deterministic
from engine.data.library import default_shard_cache, open_library
from engine.features.extract import LabelledClips
from engine.objective.lossfile import load_loss
from engine.search.cohort import evaluate_cohort, untrained_fitness
from engine.search.members import Proposal
from engine.search.records import fresh_seeds
from engine.train.trainer import Trainer


@click.command()
@click.argument("losses", nargs=-1, required=True)
@click.option("--videos", multiple=True, type=PATH, required=True)
@click.option("--labelled", multiple=True, type=PATH, required=True)
@RECIPE
@CHANGES
@click.option("--seeds", "num_seeds", type=click.IntRange(min=1), default=3, show_default=True)
@JSON
def main(
    losses: tuple[str, ...],
    videos: tuple[Path, ...],
    labelled: tuple[Path, ...],
    recipe_name: str,
    assignments: tuple[str, ...],
    num_seeds: int,
    out: Path | None,
) -> None:
    """Print mean and sd of each loss's fitness, with the seeds that confirm a search's outcome."""
    recipe = override(load_recipe(recipe_name), list(assignments))
    runtime = choose_runtime(amp=recipe.optim.amp)
    make_deterministic(runtime)
    if runtime.device.type == "cpu":
        torch.set_num_threads(1)
    cache = default_shard_cache()
    index = open_library(videos, cache=cache, report=lambda *_: None).index
    judged_by = open_library(labelled, cache=cache, report=lambda *_: None).index
    trainer = Trainer(recipe, index, runtime)
    clips = LabelledClips(judged_by, recipe, runtime=runtime)
    found: dict[str, list[float]] = {name: [] for name in ("untrained", *losses)}
    fresh = override(recipe, [f"search.confirm_seeds={num_seeds}"])
    for seed in fresh_seeds(fresh):
        found["untrained"].append(untrained_fitness(trainer, clips, seed=seed).value)
        jobs = [Proposal(0, load_loss(name)) for name in losses]
        results = evaluate_cohort(trainer, clips, members=jobs, seeds=[seed])
        for name, result in zip(losses, results, strict=True):
            if result.fitness is None:
                click.echo(f"{name}: failed with seed {seed}: {result.reason}", err=True)
            else:
                found[name].append(result.fitness)
    for name, values in found.items():
        mean, sd = (fmean(values), stdev(values)) if len(values) > 1 else (sum(values), 0.0)
        click.echo(f"{name:24s} {mean:.3f} sd {sd:.3f} n {len(values)}")
        row = {"loss": name, "mean": mean, "sd": sd, "values": values}
        append(
            out, [row], runtime, seed=recipe.seed, recipe_hash=recipe_hash(recipe), labels_used=True
        )


if __name__ == "__main__":
    main()
