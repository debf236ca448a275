"""A fine-tuning in a run's folder: its inputs, which a continued run keeps, and its results."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from engine.core.provenance import provenance, write_provenance
from engine.core.recipe import Recipe
from engine.core.run import RunError, RunFolder, check_still_there
from engine.core.runtime import Runtime, make_deterministic
from engine.data.library import Report
from engine.data.shards.index import data_digest
from engine.evaluate.datasets import Dataset
from engine.evaluate.finetune import Finetuning, check_recipe, from_scratch
from engine.evaluate.protocols import evaluate_many
from engine.evaluate.scores import Evaluated, write_confusion
from engine.model.network_file import load_network

INPUTS = "finetune.json"


def inputs_of(
    run: RunFolder,
    recipe: Recipe,
    *,
    checkpoint: Path | None,
    name: str | None,
    seeds: int | None,
    data: dict[str, Any],
) -> dict[str, Any]:
    """A run's network, data set and seeds: as asked for now, or as a continued run began with them.

    A continued run may have other ``seeds``, and its videos and their lists may have moved. Raises ValueError for what
    is missing, RunError where it is asked for with another network or data set, or what it began with is gone.
    """
    plain = {k: str(v.resolve()) if isinstance(v, Path) else v for k, v in data.items()}
    plain["root"] = [str(Path(p).resolve()) for p in data["root"]]
    before = run.read_json(INPUTS)
    if before is not None:
        if checkpoint is not None and str(checkpoint.resolve()) != before["checkpoint"]:
            raise RunError(
                f"{run.path}: began with {before['checkpoint'] or 'no checkpoint'}, not {checkpoint}; resume without"
                " --checkpoint, or start a new run"
            )
        movable = ("root", "splits") if before["data"].get("splits") else ("root",)
        moved = {key: plain[key] for key in movable if plain.get(key)}
        for option, now in {"dataset": name, **plain, **dict.fromkeys(moved)}.items():
            then = before["name"] if option == "dataset" else before["data"].get(option)
            if now and now != then:
                named = option.replace("_", "-")
                raise RunError(
                    f"{run.path}: began with {f'--{named} {then}' if then else f'no --{named}'}, not {now}; resume"
                    f" without --{named}, or start a new run"
                )
        check_still_there(run.path, filter(None, [before["checkpoint"]]), option="")
        if not plain["root"]:
            check_still_there(run.path, before["data"]["root"], option="--root")
        again = {**before, "data": {**before["data"], **moved}}
        return again if seeds is None else {**again, "seeds": seeds}
    name = name or recipe.finetune.dataset
    if not name:
        raise ValueError(f"recipe {recipe.name!r} names no data set: give --dataset")
    if checkpoint is None and recipe.finetune.init == "checkpoint":
        raise ValueError(
            "--checkpoint is missing: a network's file or a run's folder, or --set finetune.init=scratch for none"
        )
    source = "" if checkpoint is None else str(checkpoint.resolve())
    return {"checkpoint": source, "name": name, "seeds": seeds or 1, "data": plain}


def run_finetuning(
    run: RunFolder,
    recipe: Recipe,
    dataset: Dataset,
    *,
    inputs: dict[str, Any],
    runtime: Runtime,
    checkpoint_every: int,
    on_progress: Report,
    say: Callable[[str], object],
) -> Evaluated:
    """Do what is left of the recipe's protocol, and write results.json and confusion.csv.

    Raises RunError where the videos are not those that the run began with, and what ``Finetuning`` raises.
    """
    make_deterministic(runtime)
    check_recipe(recipe, dataset)
    if inputs["checkpoint"]:
        path = Path(inputs["checkpoint"])
        network, card = load_network(path, device=runtime.device, say=say)
    else:
        network, card = from_scratch(recipe, runtime)

    def note() -> None:
        """Write what the run begins with, or check that it is continued on the same videos."""
        if (run.read_json(INPUTS) or inputs) != inputs:  # of fewer seeds, say
            (run.path / "results.json").unlink(missing_ok=True)
        write_provenance(run, {**provenance(runtime), "data": data_digest(dataset.index.folders)})
        run.write_json(INPUTS, inputs)

    run.begin(note)
    shared: dict[str, Any] = {"runtime": runtime, "on_progress": on_progress}
    if recipe.finetune.protocol == "linear":
        shared |= {"seed": recipe.seed, "seeds": inputs["seeds"], "settings": recipe.evaluation}
        (results,) = evaluate_many([(network, card)], dataset, protocols=["linear"], **shared)
        result = results["linear"]
    else:
        shared |= {"folder": run.path, "checkpoint_every": checkpoint_every, "say": say}
        seeds = range(recipe.seed, recipe.seed + inputs["seeds"])
        result = Finetuning(network, card, dataset, recipe, **shared).run(seeds)
    run.write_json("results.json", result.row())
    write_confusion(run.path / "confusion.csv", result)
    return result
