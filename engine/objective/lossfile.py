"""Losses as files: 39 weights in a TOML file, the presets that come with the package, and random ones."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import tomli_w

from engine.core.files import write_text_atomic
from engine.core.recipe import Objective, RecipeError, read_toml
from engine.objective.terms import TERM_NAMES, LossWeights, check_weights, present, reaching

RANDOM_LOSS_STREAM = 0x10553
"""Keeps random losses' draws apart from every other use of the same seed."""


def load_loss(name_or_path: str | Path) -> LossWeights:
    """Read a loss: a TOML file with a ``[weights]`` table, a preset's name, ``random:SEED`` or ``random:SEED:ZEROS``.

    Returns every term's weight; names that the file leaves out get 0. Raises RecipeError as ``load_recipe``.
    """
    name = str(name_or_path)
    if name.startswith("random:"):
        match = re.fullmatch(r"random:(\d+)(?::(0?\.\d+|0))?", name)
        if match is None:
            raise RecipeError(
                f"loss {name!r}: write random:SEED with a whole number, or random:SEED:ZEROS with"
                " the share of weights that are 0, as random:3:0.85"
            )
        return random_weights(int(match[1]), sparsity=float(match[2] or 0))
    values, where = read_toml(name_or_path, folder="losses")
    weights = values.get("weights")
    if not isinstance(weights, dict):
        raise RecipeError(
            f"{where}: no [weights] table; a loss maps term names to numbers in [0, 1]"
        )
    try:
        return check_weights(weights, where=where)
    except ValueError as error:
        raise RecipeError(str(error)) from None


def loss_used_labels(name_or_path: str | Path) -> bool:
    """Whether a loss's file says that labels had a part in choosing it; errors are left to ``load_loss``."""
    if str(name_or_path).startswith("random:"):
        return False
    return read_toml(name_or_path, folder="losses")[0].get("labels_used") is True


def loss_objective(name_or_path: str | Path) -> dict[str, str]:
    """The settings of ``objective`` under which a search found a loss; none where its file doesn't say."""
    if str(name_or_path).startswith("random:"):
        return {}
    noted = read_toml(name_or_path, folder="losses")[0].get("objective")
    return {k: v for k, v in noted.items() if isinstance(v, str)} if isinstance(noted, dict) else {}


def found_otherwise(objective: Mapping[str, str], recipe: Objective) -> str:
    """One line where weights found under ``objective`` mean something else under a recipe's; else ""."""
    other = {k: v for k, v in objective.items() if getattr(recipe, k, v) != v}
    if not other:
        return ""
    found = " and ".join(f"objective.{k} = {v}" for k, v in other.items())
    here = " and ".join(str(getattr(recipe, k)) for k in other)
    settings = " ".join(f"--set objective.{k}={v}" for k, v in other.items())
    return f"this loss was found with {found}, and is trained with {here}, where its weights pull otherwise: {settings}"


def save_loss(
    weights: LossWeights,
    path: Path,
    *,
    name: str,
    about: str,
    labels_used: bool = False,
    objective: Mapping[str, str] | None = None,
) -> None:
    """Write a loss that ``load_loss`` reads.

    ``labels_used``: labels had a part in choosing it; ``objective``: the settings that its weights go with.
    """
    facts: dict[str, object] = {"labels_used": True} if labels_used else {}
    if objective:
        facts["objective"] = dict(objective)
    text = tomli_w.dumps({"name": name, "about": about, **facts, "weights": weights})
    write_text_atomic(path, text)


def draw_weights(rng: np.random.Generator, *, sparsity: float) -> LossWeights:
    """Every weight 0 with probability ``sparsity``, else uniform in [0, 1).

    Drawn again where no term above 0 can change the RGB network.
    """
    while True:
        values = rng.random(len(TERM_NAMES))
        if sparsity:
            values[rng.random(len(TERM_NAMES)) < sparsity] = 0.0
        weights = dict(zip(TERM_NAMES, values.tolist(), strict=True))
        if reaching(present(weights)):
            return weights


def random_weights(seed: int, *, sparsity: float = 0.0) -> LossWeights:
    """A loss drawn at random: a weight for every term, uniformly from [0, 1] (the paper), or with zeros."""
    rng = np.random.Generator(np.random.Philox(key=[seed, RANDOM_LOSS_STREAM]))
    return draw_weights(rng, sparsity=sparsity)
