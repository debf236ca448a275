"""What the benchmarks share: their options, and rows that carry what they were measured on."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from engine.core.runtime import Runtime

PATH = click.Path(path_type=Path)
SHARDS = click.argument("shards", nargs=-1, required=True, type=click.Path(True, path_type=Path))
JSON = click.option("--json", "out", type=PATH, help="Append the rows to this JSON Lines file.")
DEVICE = click.option("--device", default="auto", show_default=True, help="auto, cpu or cuda.")
ROUNDS = click.option("--rounds", type=click.IntRange(min=1), default=3, show_default=True)
RECIPE = click.option("--recipe", "recipe_name", default="cpu/evolve", show_default=True)
CHANGES = click.option("--set", "assignments", multiple=True, metavar="SECTION.KEY=VALUE")


def append(
    out: Path | None, rows: Iterable[Mapping[str, Any]], runtime: Runtime, **about: Any
) -> None:
    """Append rows to a file, each with ``about`` and the device, versions and code; nothing without a file."""
    if out is None:
        return
    from engine.core.provenance import provenance  # late: a worker of Ray's needs no torch

    facts = {"seed": None, "recipe_hash": None, **about, **provenance(runtime)}
    facts.pop("command", None)  # it holds paths of this machine
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps({**row, **facts}) + "\n" for row in rows)
