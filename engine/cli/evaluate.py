"""``engine evaluate`` and ``engine finetune``: what a network is worth on labelled videos."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from engine.cli import common

if TYPE_CHECKING:
    from engine.core.display import Display
    from engine.core.recipe import Recipe
    from engine.core.runtime import Runtime
    from engine.evaluate.datasets import Dataset
    from engine.evaluate.scores import Spread
    from engine.model.network_file import ClipInput

LABELLED = ("root", "splits", "folds", "group_pattern", "allow_missing")
PROTOCOLS = ("frozen", "kmeans", "linear", "retrieval", "finetune", "all")
DATASET_NAMES = ("ucf101", "hmdb51", "kinetics", "folders")
DATASETS = "ucf101, hmdb51, kinetics or folders"

DATASET = click.option(
    "--dataset", "name", help=f"{DATASETS} [default: the recipe's, or folders for class folders]"
)
TARGET = click.argument("target", metavar="[DATASET|RECIPE]", required=False)
JSON = common.path(
    "--json",
    "json_path",
    help="Append a row a protocol to this JSON Lines file, with confusion matrices as CSV beside it.",
)
SEEDS = common.count("--seeds", default=1, help="Seeds to repeat with.")


@click.command()
@TARGET
@common.paths(
    "--checkpoint",
    "checkpoints",
    help="A network's file, or a run; may be given again.",
)
@click.option(
    "--protocol",
    type=click.Choice(PROTOCOLS),
    default="frozen",
    help="frozen: all three that train no network.",
)
@common.options(DATASET, common.labelled_options, SEEDS, common.BASELINES, JSON)
@common.options(common.RECIPE, common.ASSIGNMENTS, common.SEED, common.DEVICE)
@common.errors_explained
def evaluate(
    target: str | None,
    checkpoints: tuple[Path, ...],
    protocol: str,
    seeds: int,
    json_path: Path | None,
    with_baselines: bool,
    device: str,
    **options: Any,
) -> None:
    """Judge networks on labelled videos: ``engine evaluate ucf101 --root DIR --checkpoint C``.

    By k-means, a linear layer, retrieval or fine-tuning.
    """
    from engine.cli.tables import print_baselines, print_evaluated
    from engine.core.display import Display
    from engine.core.runtime import choose_runtime, make_deterministic
    from engine.evaluate.protocols import FROZEN, evaluate_many
    from engine.evaluate.scores import append_rows
    from engine.model.network_file import load_network

    if not checkpoints:
        raise ValueError("--checkpoint is missing: a run's folder, or a network's file")
    runtime = choose_runtime(device)
    networks = [load_network(path, device=runtime.device, say=click.echo) for path in checkpoints]
    cards = [card for _, card in networks]
    protocols = {"frozen": FROZEN, "all": (*FROZEN, "finetune")}.get(protocol, (protocol,))
    labelled = {key: options.pop(key) for key in LABELLED}
    name, recipe = _evaluation_recipe(target, labelled["root"], cards[0].input, **options)
    runtime = choose_runtime(device, amp=recipe.optim.amp)
    make_deterministic(runtime)
    with Display() as display:
        size = max(card.input.size for card in cards)
        dataset = common.open_labelled(display, name, size, **labelled)
        shared: dict[str, Any] = {"runtime": runtime, "seed": recipe.seed}
        shared["on_progress"] = display.prepare
        training = recipe if "finetune" in protocols else None
        how: dict[str, Any] = {"settings": recipe.evaluation, "seeds": seeds, "training": training}
        results = evaluate_many(networks, dataset, protocols=protocols, **how, **shared)
        chosen = protocols if with_baselines else ()
        shapes = {card.input for card in cards}
        if chosen and len(shapes) > 1:
            display.say(f"baselines: on the clips of {checkpoints[0]}; others take other clips")
        trivial = _trivial(dataset, chosen, recipe, cards[0].input, runtime, display)
    for path, result in zip(checkpoints, results, strict=True):
        for evaluated in result.values():
            print_evaluated(evaluated, name=str(path))
    print_baselines(trivial)
    if json_path is not None:
        append_rows(json_path, [row for result in results for row in result.values()], trivial)


@click.command()
@TARGET
@common.path(
    "--checkpoint", help="The network's file, or a run; none for --set finetune.init=scratch."
)
@common.options(DATASET, common.labelled_options, common.BASELINES, JSON)
@common.count("--seeds", help="Seeds to repeat with [default: 1]; may be changed with --resume.")
@common.count("--checkpoint-every", default=200, help="Steps between saves.")
@common.run_options
@common.errors_explained
def finetune(
    target: str | None,
    recipe_name: str | None,
    checkpoint: Path | None,
    name: str | None,
    seeds: int | None,
    with_baselines: bool,
    json_path: Path | None,
    checkpoint_every: int,
    device: str,
    **options: Any,
) -> None:
    """Train a network with labels by a recipe, and test it: ``engine finetune ucf101 --root DIR --checkpoint C``.

    Without a recipe, that of the data set; else the defaults, on clips as the network was trained on.
    """
    from engine.cli.tables import print_baselines, print_evaluated
    from engine.core.display import Display
    from engine.core.runtime import check_kernels_package, choose_runtime
    from engine.evaluate.finetune_run import inputs_of, run_finetuning
    from engine.evaluate.scores import append_rows

    check_kernels_package()
    labelled = {key: options.pop(key) for key in LABELLED}
    if target in DATASET_NAMES:
        name = name or target
    folders = _folders(labelled["root"])
    named = _recipe_named(target, recipe_name, name or folders, resume=options["resume"])
    if named is None and checkpoint is not None and not options["resume"]:
        options["assignments"] = (*_as_trained(_input_of(checkpoint)), *options["assignments"])
    run, recipe = common.open_run("finetune", None, recipe_name=named, **options)
    name = name or (None if options["resume"] else recipe.finetune.dataset or folders)
    inputs = inputs_of(run, recipe, checkpoint=checkpoint, name=name, seeds=seeds, data=labelled)
    runtime = choose_runtime(device, amp=recipe.optim.amp)
    shape = _noted_input(inputs, recipe, resume=options["resume"])
    size = inputs.get("size", recipe.clip.size)
    with Display(log=run.path) as display:
        dataset = common.open_labelled(display, inputs["name"], size, **inputs["data"])
        how: dict[str, Any] = {"runtime": runtime, "on_progress": display.prepare}
        more: dict[str, Any] = {"checkpoint_every": checkpoint_every, "say": display.say}
        result = run_finetuning(run, recipe, dataset, inputs=inputs, **more, **how)
        chosen = (result.protocol,) if with_baselines else ()
        trivial = _trivial(dataset, chosen, recipe, shape, runtime, display)
    print_evaluated(result, name=inputs["checkpoint"] or "from scratch")
    print_baselines(trivial)
    if json_path is not None:
        append_rows(json_path, [result], trivial)
    click.echo(f"results: {run.path / 'results.json'}")


def _noted_input(inputs: dict[str, Any], recipe: Recipe, *, resume: bool) -> ClipInput | None:
    """The input of the network that is to be tuned, and its size among the run's inputs; None from scratch."""
    if not inputs["checkpoint"]:
        return None
    shape = _input_of(Path(inputs["checkpoint"]))
    if not resume and recipe.finetune.protocol == "linear":
        inputs["size"] = shape.size  # frozen networks see clips as they were trained on
    return shape


def _trivial(
    dataset: Dataset,
    protocols: tuple[str, ...],
    recipe: Recipe,
    shape: ClipInput | None,
    runtime: Runtime,
    display: Display,
) -> dict[str, dict[str, Spread]]:
    """Trivial baselines of the protocols, for networks of input ``shape``; none where no protocol is given."""
    from engine.evaluate.baselines import baselines

    if not protocols:
        return {}
    how: dict[str, Any] = {"recipe": recipe, "shape": shape, "runtime": runtime}
    return baselines(dataset, protocols=protocols, on_progress=display.prepare, **how)


def _folders(root: tuple[Path, ...]) -> str | None:
    """The data set's name where none is named and ``root`` holds class folders."""
    return "folders" if root and common.holds_class_folders(root) else None


def _evaluation_recipe(
    target: str | None,
    root: tuple[Path, ...],
    shape: ClipInput,
    *,
    name: str | None,
    recipe_name: str | None,
    assignments: tuple[str, ...],
    seed: int | None,
) -> tuple[str, Recipe]:
    """The data set's name, and the recipe that is named, or the data set's own for clips as the network was trained on.

    Raises ValueError where nothing says what the data set is.
    """
    from engine.core.recipe import Recipe, load_recipe, override, preset_names

    if target in DATASET_NAMES:
        name = name or target
    else:
        recipe_name = recipe_name or target
    recipe = None if recipe_name is None else load_recipe(recipe_name)
    name = name or (recipe and recipe.finetune.dataset) or _folders(root)
    if not name:
        raise ValueError(
            f"--dataset is missing: {DATASETS} (also for shards of class folders), or give --root with class folders"
        )
    changed = [*assignments, *([] if seed is None else [f"seed={seed}"])]
    if recipe is not None:
        return name, override(recipe, changed)
    preset = f"{name}_finetune"
    recipe = load_recipe(preset) if preset in preset_names() else Recipe()
    return name, override(recipe, [*_as_trained(shape), *changed])


def _as_trained(shape: ClipInput) -> list[str]:
    """Assignments that make a recipe's clips those that a network was trained on."""
    return [f"clip.{key}={getattr(shape, key)}" for key in shape.__struct_fields__]


def _input_of(checkpoint: Path) -> ClipInput:
    from engine.model.network_file import load_network

    return load_network(checkpoint, say=lambda line: None)[1].input


def _recipe_named(
    target: str | None, recipe_name: str | None, dataset: str | None, *, resume: bool
) -> str | None:
    """A recipe's file or name; of a data set's name, its fine-tuning recipe; None for the defaults, or the run's own.

    Raises ValueError where neither a recipe nor a data set is named.
    """
    from engine.core.recipe import preset_names

    named = recipe_name if target is None or target in DATASET_NAMES else target
    named = named or target or dataset
    if named is None and not resume:
        known = [n for n in preset_names() if n.endswith(("_finetune", "_linear"))]
        raise ValueError(
            f"no recipe: name a file or one of {', '.join(known)} (ucf101 is short for ucf101_finetune), or give"
            " --root with class folders"
        )
    if named is None or (resume and target is None and recipe_name is None):
        return None
    if f"{named}_finetune" in preset_names():
        return f"{named}_finetune"
    return None if named in DATASET_NAMES else named
