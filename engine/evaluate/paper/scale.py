"""Scales: the size of a table's networks, clips and trainings, and its seeds; TOML files in recipes/reproduce."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
from msgspec import Meta, Struct
from numpy.typing import NDArray

from engine.core import recipe

Share = Annotated[float, Meta(gt=0.0, le=1.0)]
Names = Annotated[tuple[str, ...], Meta(min_length=1)]


class Scale(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A scale's file, with its two recipes made whole."""

    name: str
    pretrain: recipe.Recipe
    finetune: recipe.Recipe
    seeds: Annotated[tuple[recipe.Natural, ...], Meta(min_length=1)] = (0, 1, 2)
    seen_groups: recipe.Natural = 0
    """Groups of the labelled data set, the first by name, whose clips are trained on without labels; only where
    ``--folds group``. Fine-tuning trains on these and is tested on the others. 0: none, and all folds."""
    checkpoint_every: recipe.Natural = 0
    """Steps between checkpoints of networks in training; 0: none, a training that is killed begins anew."""
    labelled: Annotated[tuple[Share, ...], Meta(min_length=1)] = (0.1, 0.25, 0.5, 1.0)
    """Shares of the labelled clips in Fig. 4."""
    unlabelled: Annotated[tuple[Share, ...], Meta(min_length=1)] = (0.1, 0.25, 0.5, 1.0)
    """Shares of the unlabelled clips in Fig. 5."""
    table1: Names = ("kmeans", "linear", "finetune")
    table2: Names = ("finetune",)
    fig4: Names = ("finetune",)
    fig5: Names = ("finetune",)
    """Protocols of each table and figure."""

    def protocols(self, table: str) -> tuple[str, ...]:
        """The protocols of a table or figure."""
        names: tuple[str, ...] = getattr(self, table)
        return names


def load_scale(name_or_path: str | Path, assignments: Sequence[str] = ()) -> Scale:
    """Read a scale by name or file; ``assignments`` such as ``pretrain.optim.steps=50`` and ``seen_groups=3`` override.

    ``[pretrain]`` is a recipe, on top of the one that the key ``recipe`` names if it does; ``[finetune]`` holds what
    fine-tuning changes of it. Raises RecipeError as ``load_recipe`` does.
    """
    read, where = recipe.read_toml(name_or_path, folder="reproduce")
    values = recipe.assigned(dict(read), assignments)
    base, name = values.pop("recipe", None), str(values.get("name", "custom"))
    start: dict[str, Any] = {} if base is None else msgspec.to_builtins(recipe.load_recipe(base))
    pretrain = _merged(start, {**values.pop("pretrain", {}), "name": name})
    change: dict[str, Any] = values.pop("finetune", {})
    finetune = _merged(pretrain, change)
    recipes = {
        "pretrain": recipe.recipe_from(pretrain, where=f"{where}: pretrain"),
        "finetune": recipe.recipe_from(finetune, where=f"{where}: finetune"),
    }
    try:
        scale = msgspec.convert({"name": name, **values, **recipes}, Scale)
    except msgspec.ValidationError as error:
        raise recipe.RecipeError(f"{where}: {error}") from None
    if others := [name for name in scale.fig4 if name != "finetune"]:
        raise recipe.RecipeError(
            f"{where}: fig4 = {others[0]!r}: only finetune trains with a share of the labels"
        )
    return scale


def _merged(base: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    """Nested values with others put in their places."""
    result = dict(base)
    for key, value in change.items():
        old = result.get(key)
        if isinstance(old, dict) and isinstance(value, dict):
            value = _merged(old, value)
        result[key] = value
    return result


def drawn(count: int, share: float, *, seed: int) -> NDArray[np.int64]:
    """A share of ``count`` things, rising; of one seed, a smaller share is inside a larger one."""
    rng = np.random.Generator(np.random.Philox(key=[seed, 0x5A4E]))
    return np.sort(rng.permutation(count)[: max(round(share * count), 1)])
