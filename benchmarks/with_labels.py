"""What training with labels reaches, judged as a search judges: the level that ``engine/data/demo/levels.py`` holds.

    python benchmarks/with_labels.py --seeds 3 --json benchmarks/results/with_labels-cpu.jsonl
    python benchmarks/with_labels.py --seeds 3 --shuffled
    python benchmarks/with_labels.py --recipe cpu/evolve --train OTHER_CLASSES --labelled CLASSES

The recipe's RGB network, from scratch, is trained with labels on the clips of ``--train`` (by default clips of the
built-in classes, drawn with another seed), and k-means of its features finds the classes of ``--labelled`` or not.
``--shuffled`` gives the clips to train on each other's labels: then it must not.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev

import click
import numpy as np
import torch
from rows import CHANGES, DEVICE, JSON, PATH, append

from engine.core.recipe import Recipe, load_recipe, override, recipe_hash
from engine.core.runtime import Runtime, choose_runtime, make_deterministic
from engine.data.demo.demo import default_cache, make_demo
from engine.data.demo.levels import STEPS, setting
from engine.data.library import default_shard_cache, demo_folders, open_library
from engine.data.shards.index import ClipIndex
from engine.evaluate.datasets import Dataset, Fold
from engine.evaluate.finetune import Finetuning, from_scratch
from engine.features.extract import LabelledClips

OTHER_SEED = 1
SCRATCH = (
    "finetune.init=scratch",
    "finetune.head_lr=1",
    "finetune.dropout=0",
    "optim.name=adamw",
    "optim.lr=3e-3",
    "optim.warmup_steps=8",
)
"""From random weights, by AdamW: a level should not move with the optimizer that members have."""


def dataset_of(train: Sequence[Path], labelled: Sequence[Path], *, cache: Path) -> Dataset:
    """Class folders or shards as one data set of one fold, each clip a group of its own."""
    opened = [open_library(f, cache=cache, report=lambda *_: None) for f in (train, labelled)]
    index = ClipIndex([path for library in opened for path in library.shards])
    label, first = index.label.astype(np.int64), len(opened[0].index)
    each, names = np.arange(len(index)), tuple(map(str, range(len(index))))
    known = np.flatnonzero(label >= 0)
    return Dataset(
        name="folders",
        index=index,
        classes=index.classes,
        label=label,
        group=each,
        groups=names,
        video=each,
        videos=names,
        folds=(Fold("other clips", known[known < first], known[known >= first]),),
        folds_by="trained on other clips",
        rejects=(),
        listed=len(index),
    )


def shuffled(dataset: Dataset, *, seed: int) -> Dataset:
    """The same data set, in which the clips to train on have each other's labels."""
    label, train = dataset.label.copy(), dataset.folds[0].train
    label[train] = np.random.default_rng(seed).permutation(label[train])
    return replace(dataset, label=label)


def measure(
    dataset: Dataset, recipe: Recipe, runtime: Runtime, *, seed: int
) -> tuple[float, float, float]:
    """Fitness of the trained network's features and accuracy of its classes on the test part, and core-seconds."""
    began = time.process_time()
    tuning = Finetuning(*from_scratch(recipe, runtime), dataset, recipe, runtime)
    model = tuning.trained(dataset.folds[0], seed=seed)
    took, test = time.process_time() - began, dataset.folds[0].test
    judging = LabelledClips(dataset.index.subset(test), recipe, runtime=runtime)
    features, logits = judging.features([model.network, model])
    (result,) = judging.judged([features], seed=seed)
    assert not isinstance(result, str), result
    right = logits.argmax(1).cpu().numpy() == dataset.label[test][judging.clips]
    return result.value, float(right.mean()), took


@click.command()
@click.option("--recipe", "recipe_name", default="demo", show_default=True)
@CHANGES
@click.option("--train", multiple=True, type=PATH, help="Class folders [default: drawn ones].")
@click.option("--labelled", multiple=True, type=PATH, help="Class folders [default: the demo's].")
@click.option("--steps", type=click.IntRange(min=1), default=STEPS, show_default=True)
@click.option("--seeds", type=click.IntRange(min=1), default=3, show_default=True)
@click.option("--shuffled", "shuffle", is_flag=True, help="Train with shuffled labels.")
@DEVICE
@JSON
def main(
    recipe_name: str,
    assignments: tuple[str, ...],
    train: tuple[Path, ...],
    labelled: tuple[Path, ...],
    steps: int,
    seeds: int,
    shuffle: bool,
    device: str,
    out: Path | None,
) -> None:
    """Train with labels, once a seed, and print each fitness, then their mean and sd."""
    changes = [*SCRATCH, f"optim.steps={steps}", *assignments]
    recipe = override(load_recipe(recipe_name), changes)
    runtime = choose_runtime(device, amp=recipe.optim.amp)
    make_deterministic(runtime)
    if runtime.device.type == "cpu":
        torch.set_num_threads(1)
    if not train:
        folder = default_cache().with_name(f"{default_cache().name}-seed{OTHER_SEED}")
        train = (make_demo(folder, seed=OTHER_SEED, unlabelled_clips=0).labelled,)
    labelled = labelled or tuple(demo_folders(lambda *_: None)[1])
    dataset = dataset_of(train, labelled, cache=default_shard_cache())
    if shuffle:
        dataset = shuffled(dataset, seed=recipe.seed)
    found, fold = [], dataset.folds[0]
    for seed in range(recipe.seed, recipe.seed + seeds):
        fitness, accuracy, took = measure(dataset, recipe, runtime, seed=seed)
        click.echo(
            f"seed {seed}: fitness {fitness:.3f}, accuracy {accuracy:.3f}, {took:.1f} core-s"
        )
        row = {"benchmark": "with_labels", "recipe": recipe_name, "steps": steps}
        row |= {"train": len(fold.train), "test": len(fold.test), "shuffled": shuffle}
        row |= {"fitness": fitness, "accuracy": accuracy, "core_seconds": took}
        append(out, [row], runtime, seed=seed, recipe_hash=recipe_hash(recipe))
        found.append(fitness)
    spread = f"{fmean(found):.3f} sd {stdev(found) if seeds > 1 else 0.0:.3f} n {seeds}"
    click.echo(f"{spread}, setting {setting(recipe)}")


if __name__ == "__main__":
    main()
