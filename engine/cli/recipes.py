"""``engine recipes``: the recipes and losses that come along, listed and printed."""

from __future__ import annotations

import click

from engine.cli import common


@click.command()
@click.argument("name", required=False)
@common.errors_explained
def recipes(name: str | None) -> None:
    """List the recipes and losses that come along, or print the one called NAME, to change a copy of it."""
    from engine.core.recipe import preset_names, preset_text, recipe_named

    if name is not None:
        click.echo(recipe_named(name), nl=False)
        return
    for folder, option in (("", "--recipe"), ("losses", "--loss")):
        names = preset_names(folder)
        width = max(map(len, names))
        click.echo(f"{option}:")
        for each in names:
            click.echo(f"  {each:{width}}  {_about(preset_text(each, folder))}")


def _about(text: str) -> str:
    """The first thing that a file says of itself: its comment's first sentence, or its ``about``."""
    first = text.splitlines()[0] if text else ""
    if first.startswith("#"):
        return first.lstrip("# ")
    about = next((x for x in text.splitlines() if x.startswith("about = ")), "")
    return about.removeprefix("about = ").strip('"')
