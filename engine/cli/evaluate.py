"""``engine evaluate`` and ``engine finetune``: what a network is worth on labelled videos."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from engine.cli.common import PATH, errors_explained, run_options

if TYPE_CHECKING:
    from engine.core.display import Display
    from engine.core.recipe import Recipe
    from engine.evaluate.datasets import Dataset

PROTOCOLS = ("frozen", "kmeans", "linear", "retrieval", "finetune", "all")


def data_options(command: Callable[..., None]) -> Callable[..., None]:
    """Options that say which labelled videos are used, and how they are divided."""
    options = [
        click.option(
            "--root", multiple=True, type=PATH, help="Folder of the videos, or their shards."
        ),
        click.option(
            "--splits",
            type=PATH,
            help="Folder of the lists [default: looked for in and beside --root].",
        ),
        click.option(
            "--folds",
            type=click.Choice(["official", "group"]),
            help="group: each group is left out once.",
        ),
        click.option(
            "--group-pattern", metavar="REGEX", help="Finds a clip's group in its file's name."
        ),
        click.option(
            "--allow-missing",
            is_flag=True,
            help="Go on where listed videos are missing, and say so.",
        ),
        click.option(
            "--seeds",
            type=click.IntRange(min=1),
            default=1,
            show_default=True,
            help="Seeds to repeat with.",
        ),
    ]
    for option in reversed(options):
        command = option(command)
    return command


@click.command()
@click.option(
    "--checkpoint",
    "checkpoints",
    multiple=True,
    type=PATH,
    required=True,
    help="A network's file, or a run; may be given again.",
)
@click.option("--dataset", "name", required=True, help="ucf101, hmdb51, kinetics or folders.")
@click.option(
    "--protocol",
    type=click.Choice(PROTOCOLS),
    default="frozen",
    show_default=True,
    help="frozen: all three that train no network.",
)
@data_options
@click.option(
    "--json",
    "json_path",
    type=PATH,
    help="Append a row a protocol to this JSON Lines file, with confusion matrices as CSV beside it.",
)
@click.option(
    "--baselines", "with_baselines", is_flag=True, help="Show trivial baselines on the same folds."
)
@click.option(
    "--recipe",
    "recipe_name",
    metavar="FILE|NAME",
    help="Recipe with sections evaluation and finetune.",
)
@click.option(
    "--set", "assignments", multiple=True, metavar="SECTION.KEY=VALUE", help="Override the recipe."
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@errors_explained
def evaluate(
    checkpoints: tuple[Path, ...],
    name: str,
    protocol: str,
    seeds: int,
    json_path: Path | None,
    with_baselines: bool,
    recipe_name: str | None,
    assignments: tuple[str, ...],
    seed: int,
    device: str,
    **data: Any,
) -> None:
    """Judge networks on labelled videos: k-means, a linear layer, retrieval, fine-tuning."""
    from engine.cli.tables import print_baselines, print_evaluated
    from engine.core.display import Display
    from engine.core.runtime import choose_runtime, make_deterministic
    from engine.evaluate.baselines import baselines
    from engine.evaluate.evaluate import FROZEN, evaluate_many
    from engine.evaluate.protocols import append_rows
    from engine.model.network_file import load_network

    runtime = choose_runtime(device)
    networks = [load_network(path, device=runtime.device) for path in checkpoints]
    cards = [card for _, card in networks]
    protocols = {"frozen": FROZEN, "all": (*FROZEN, "finetune")}.get(protocol, (protocol,))
    recipe = _evaluation_recipe(recipe_name, name, assignments, cards[0].input)
    runtime = choose_runtime(device, amp=recipe.optim.amp)
    make_deterministic(runtime)
    with Display() as display:
        dataset = _open(display, name, max(card.input.size for card in cards), data)
        shared: dict[str, Any] = {"runtime": runtime, "seed": seed, "on_progress": display.prepare}
        results = evaluate_many(
            networks,
            dataset,
            protocols=protocols,
            settings=recipe.evaluation,
            seeds=seeds,
            training=recipe if "finetune" in protocols else None,
            **shared,
        )
        trivial = baselines(dataset, **shared) if with_baselines else {}
    for path, found in zip(checkpoints, results, strict=True):
        for each in found.values():
            print_evaluated(each, name=str(path))
    print_baselines(trivial)
    if json_path is not None:
        append_rows(json_path, [each for found in results for each in found.values()], trivial)


@click.command()
@click.argument("recipe_argument", metavar="[DATASET|RECIPE]", required=False)
@click.option(
    "--checkpoint",
    type=PATH,
    help="The network's file, or a run; none for --set finetune.init=scratch.",
)
@click.option("--dataset", "name", help="The data set, where the recipe names none.")
@data_options
@click.option(
    "--checkpoint-every",
    type=click.IntRange(min=1),
    default=200,
    show_default=True,
    help="In steps.",
)
@run_options
@errors_explained
def finetune(
    recipe_argument: str | None,
    checkpoint: Path | None,
    name: str | None,
    seeds: int,
    checkpoint_every: int,
    recipe_name: str | None,
    assignments: tuple[str, ...],
    seed: int | None,
    run_path: Path | None,
    resume: bool,
    device: str,
    **data: Any,
) -> None:
    """Train a network with labels by a recipe, and test it: ``engine finetune ucf101 --root DIR --checkpoint C``."""
    from engine.cli.common import open_run
    from engine.cli.tables import print_evaluated
    from engine.core.display import Display
    from engine.core.runtime import check_kernels_package, choose_runtime
    from engine.evaluate.finetune_run import inputs_of, run_finetuning

    chosen = _recipe_named(recipe_argument or recipe_name, resume=resume)
    check_kernels_package()
    run, recipe = open_run("finetune", chosen, assignments, seed, run_path, resume, "")
    inputs = inputs_of(run, recipe, checkpoint=checkpoint, name=name, seeds=seeds, data=data)
    runtime = choose_runtime(device, amp=recipe.optim.amp)
    with Display(log=run.path) as display:
        dataset = _open(display, inputs["name"], recipe.clip.size, inputs["data"])
        found = run_finetuning(
            run,
            recipe,
            dataset,
            inputs=inputs,
            runtime=runtime,
            checkpoint_every=checkpoint_every,
            on_progress=display.prepare,
            say=display.say,
        )
    print_evaluated(found, name=inputs["checkpoint"] or "from scratch")
    click.echo(f"results: {run.path / 'results.json'}")


def _evaluation_recipe(
    recipe_name: str | None, dataset: str, assignments: tuple[str, ...], shape: Any
) -> Recipe:
    """The recipe that is named, or the data set's own with clips as the network was trained on, and overrides."""
    from engine.core.presets import preset_names
    from engine.core.recipe import Recipe, load_recipe, override

    if recipe_name is not None:
        return override(load_recipe(recipe_name), list(assignments))
    own = f"{dataset}_finetune"
    recipe = load_recipe(own) if own in preset_names() else Recipe()
    as_trained = [f"clip.{name}={getattr(shape, name)}" for name in shape.__struct_fields__]
    return override(recipe, [*as_trained, *assignments])


def _recipe_named(name: str | None, *, resume: bool) -> str | None:
    """A recipe's file or name; of a data set's name, its fine-tuning recipe."""
    from engine.core.presets import preset_names

    if name is None:
        if resume:
            return None
        known = [n for n in preset_names() if n.endswith(("_finetune", "_linear"))]
        raise ValueError(
            f"no recipe: name a file or one of {', '.join(known)} (ucf101 is short for ucf101_finetune)"
        )
    return f"{name}_finetune" if f"{name}_finetune" in preset_names() else name


def _open(display: Display, name: str, size: int, data: dict[str, Any]) -> Dataset:
    """Open the labelled videos, and say what is missing of them."""
    from engine.data.ingest.splits import MISSING
    from engine.data.library import default_shard_cache
    from engine.evaluate.datasets import open_dataset

    root = data["root"]
    if not root:
        raise ValueError(f"--root is missing: the folder of {name}'s videos")
    dataset = open_dataset(
        [Path(path) for path in root],
        name=name,
        cache=default_shard_cache(),
        report=display.prepare,
        short_side=128 if size <= 128 else 2 * round(size * 4 / 7),
        **{key: value for key, value in data.items() if key != "root"},
    )
    for warning in dataset.warnings:
        display.say(warning)
    rejects = [r for r in dataset.rejects if not r.reason.startswith(MISSING)]
    for reject in rejects[:10]:
        display.say(f"rejected {reject.path}: {reject.reason}")
    if dataset.incomplete:
        display.say(f"{name}: {dataset.incomplete}; every number below says so")
    return dataset
