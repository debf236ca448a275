"""Sketches as SVG text: inside the page with CSS variables for colours, in files with light ones on white."""

from __future__ import annotations

from html import escape

from engine.reporting.sketch import FONT, PALETTE, Area, Box, Line, Marks, Sketch, Text


def svg(sketch: Sketch, *, label: str, variables: bool, name: str = "") -> str:
    """The sketch as SVG text, with ``label`` as its text alternative.

    ``variables`` leaves colours to the page's CSS variables; otherwise they are light ones on white.
    """
    size = f'viewBox="0 0 {sketch.width:g} {sketch.height:g}"'
    if not variables:
        size = f'xmlns="http://www.w3.org/2000/svg" width="{sketch.width:g}" height="{sketch.height:g}" {size}'
    style = f' class="{name}"' if name else ""
    family = "" if variables else f" font-family='{FONT}'"
    parts = [f'<svg {size} role="img" aria-label="{escape(label)}"{style}{family}>']
    if not variables:
        parts.append('<rect width="100%" height="100%" fill="#ffffff"/>')
    for shape in sketch.shapes:
        if isinstance(shape, Text | Box) or shape.points:
            parts.append(_element(shape, variables=variables))
    return "\n".join([*parts, "</svg>"])


def _n(value: float) -> str:
    return f"{round(value, 1):g}" if abs(value) < 1e5 else f"{value:.0f}"


def _element(shape: Text | Box | Line | Area | Marks, *, variables: bool) -> str:
    ink = f"var(--{shape.color})" if variables else PALETTE[shape.color][0]
    key = (
        f' data-k="{shape.key}"'
        if variables and not isinstance(shape, Line | Area) and shape.key
        else ""
    )
    if isinstance(shape, Text):
        weight = ' font-weight="600"' if shape.bold else ""
        anchor = "" if shape.anchor == "start" else f' text-anchor="{shape.anchor}"'
        at = f'x="{_n(shape.x)}" y="{_n(shape.baseline)}" font-size="{shape.size:g}"'
        return f"<text{key} {at}{anchor}{weight} {_ink('fill', ink)}>{escape(shape.text)}</text>"
    alpha = "" if shape.alpha == 1 else f' opacity="{shape.alpha:g}"'
    if isinstance(shape, Box):
        at = f'x="{_n(shape.x)}" y="{_n(shape.y)}" width="{_n(shape.width)}" height="{_n(shape.height)}"'
        round_ = f' rx="{shape.radius:g}"' if shape.radius else ""
        head = f"<rect{key} {at}{round_}{alpha} {_ink('fill', ink)}"
        return f"{head}><title>{escape(shape.title)}</title></rect>" if shape.title else head + "/>"
    if isinstance(shape, Line):
        dash = ' stroke-dasharray="3 3"' if shape.dash else ""
        path = "M" + "L".join(f"{_n(x)} {_n(y)}" for x, y in shape.points)
        return (
            f'<path d="{path}" fill="none" stroke-width="{shape.width:g}" stroke-linejoin="round"'
            f"{dash}{alpha} {_ink('stroke', ink)}/>"
        )
    if isinstance(shape, Area):
        path = "M" + "L".join(f"{_n(x)} {_n(y)}" for x, y in shape.points) + "Z"
        return f'<path d="{path}"{alpha} {_ink("fill", ink)}/>'
    return _marks(shape, ink=ink, alpha=alpha + key)


def _ink(what: str, ink: str) -> str:
    """var() is allowed in a style, not in an attribute."""
    return f'style="{what}:{ink}"' if ink.startswith("var") else f'{what}="{ink}"'


def _marks(shape: Marks, *, ink: str, alpha: str) -> str:
    r = shape.size / 2
    if (
        shape.kind == "dot"
    ):  # a stroke of no length with a round cap is the shortest way to write a disc
        path = "".join(f"M{_n(x)} {_n(y)}h0" for x, y in shape.points)
        how = f'stroke-linecap="round" stroke-width="{shape.size:g}"'
    elif shape.kind == "ring":
        arc = f"a{r:g} {r:g} 0 1 0 {2 * r:g} 0a{r:g} {r:g} 0 1 0 {-2 * r:g} 0"
        path = "".join(f"M{_n(x - r)} {_n(y)}{arc}" for x, y in shape.points)
        how = 'fill="none" stroke-width="1.4"'
    elif shape.kind == "cross":
        arms = f"l{2 * r:g} {2 * r:g}m0 {-2 * r:g}l{-2 * r:g} {2 * r:g}"
        path = "".join(f"M{_n(x - r)} {_n(y - r)}{arms}" for x, y in shape.points)
        how = 'fill="none" stroke-width="1.6"'
    else:
        path = "".join(
            f"M{_n(x - r)} {_n(y - r)}h{2 * r:g}l{-r:g} {1.6 * r:g}z" for x, y in shape.points
        )
        return f'<path d="{path}"{alpha} {_ink("fill", ink)}/>'
    return f'<path d="{path}" {how}{alpha} {_ink("stroke", ink)}/>'
