"""Recipes, losses and scales as TOML files: the user's own, and by name those that come with the package."""

from __future__ import annotations

import tomllib
from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path
from typing import Any


class RecipeError(ValueError):
    """A recipe that can't be used: the message names the file and the key."""


def preset_names(folder: str = "") -> list[str]:
    """Names of the recipes (or, with ``losses``, of the losses) that come with the package.

    A recipe in a folder goes by both names, such as ``paper/evolve``.
    """
    root = files("recipes").joinpath(folder) if folder else files("recipes")
    found = [p.name for p in root.iterdir()]
    if not folder:
        inside = (p for p in root.iterdir() if p.is_dir() and p.name not in ("losses", "reproduce"))
        found += [f"{p.name}/{each.name}" for p in inside for each in p.iterdir()]
    return sorted(name[:-5] for name in found if name.endswith(".toml"))


def preset_text(name: str, folder: str = "") -> str:
    """The text of a recipe (or, with ``losses``, of a loss) that comes with the package."""
    root = files("recipes").joinpath(folder) if folder else files("recipes")
    return root.joinpath(*f"{name}.toml".split("/")).read_text(encoding="utf-8")


def recipe_named(name: str) -> str:
    """The text of a recipe or loss that comes along, or of a file; raises RecipeError with the nearest known name."""
    loss = name.removeprefix("losses/")
    if loss in preset_names("losses"):
        return preset_text(loss, "losses")
    return _text_of(name, "")[0]


def read_toml(name_or_path: str | Path, *, folder: str) -> tuple[dict[str, Any], str]:
    """The values of a TOML file, or of one of ``recipes/folder`` by its name; and what to call it in messages.

    Raises RecipeError for a name or file that is not there, and for text that does not parse.
    """
    text, where = _text_of(name_or_path, folder)
    try:
        return tomllib.loads(text), where
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"{where}: not valid TOML: {error}") from None


def _text_of(name_or_path: str | Path, folder: str) -> tuple[str, str]:
    path = Path(name_or_path)
    name = str(name_or_path)
    kind = {"": "recipe", "losses": "loss"}.get(folder, "scale")
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8"), name
        except UnicodeDecodeError:
            raise RecipeError(f"{kind} {name}: not a text file in UTF-8") from None
    known = preset_names(folder)
    if name in known:
        return preset_text(name, folder), f"{kind} {name!r}"
    if path.suffix == ".toml" or path.is_absolute():
        raise RecipeError(f"{kind} {name}: no such file")
    near = [n for n in known if n.startswith(f"{name}/")] or get_close_matches(name, known, n=1)
    hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"known: {', '.join(known)}"
    raise RecipeError(f"{kind} {name!r} is neither a file nor a preset; {hint}")
