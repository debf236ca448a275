"""Pages from templates: one file each, with styles, figures and scripts inside."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from engine.reporting import words
from engine.reporting.paint import paint
from engine.reporting.sketch import FONT, PALETTE, RAMP, TURN, Sketch
from engine.reporting.svg import svg


def render(template: str, **values: Any) -> str:
    """A page as text; every value that is not Markup is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("engine"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["duration"] = words.duration
    common = {"font": Markup(FONT), "palette": PALETTE, "levels": len(RAMP), "turn": TURN}
    return environment.get_template(template).render(**common, plural=words.plural, **values)


def data(value: Any) -> Markup:
    """A value as JSON that a script element may hold: no ``<`` ends it early."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return Markup(text.replace("<", "\\u003c").replace("&", "\\u0026"))


def figure(wide: Sketch, narrow: Sketch, *, label: str, path: Path) -> dict[str, Any]:
    """Write a figure beside ``path`` as .svg and .png; returns what the template's macro ``figure`` takes."""
    replace(path.with_name(path.name + ".svg"), svg(wide, label=label, variables=False).encode())
    paint(wide, path.with_name(path.name + ".png"), title=label)
    return {
        "wide": Markup(svg(wide, label=label, variables=True, name="wide")),
        "narrow": Markup(svg(narrow, label=label, variables=True, name="narrow")),
        "finding": label,
        "controls": False,
    }


def replace(path: Path, content: bytes) -> None:
    """Write a file whole or not at all: a page may be looked at while it is written."""
    part = path.with_name(path.name + ".part")
    part.write_bytes(content)
    os.replace(part, path)
