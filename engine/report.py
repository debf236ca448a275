"""A run as one self-contained HTML page, with the paper's figures and tables, and as image files.

Numbers come from ``reporting.facts``, sentences from ``reporting.words`` and drawings from
``reporting.curves`` and ``reporting.maps``; here the drawings are painted and the page is filled in.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import FancyBboxPatch

from engine.objective.terms import BY_NAME, TERM_NAMES
from engine.reporting import curves, facts, maps, words
from engine.reporting.facts import Run
from engine.reporting.sketch import (
    FONT,
    NARROW,
    PALETTE,
    WIDE,
    Box,
    Line,
    Marks,
    Sketch,
    Text,
)
from engine.reporting.svg import svg

PNG_SCALE = 2
"""Pixels of a PNG file per CSS pixel."""
MARGIN = 16
"""White space around a PNG file's figure, in CSS pixels."""
SHOWN = 25
"""Rows of a long list that are shown before the rest is folded."""


@dataclass(frozen=True)
class FigureKind:
    """A figure of the report: how it is drawn, and the sentence that is its text alternative."""

    key: str
    draw: Callable[[Run, float], Sketch]
    finding: Callable[[Run], str]
    present: Callable[[Run], bool]
    missing: str
    """What the page says where the run has nothing to draw."""


def _has_member(run: Run) -> bool:
    return bool(run.complete)


def _has_time(run: Run) -> bool:
    return bool(words.time_parts(run))


_NO_MEMBER = "no member is complete yet."
FIGURES = (
    FigureKind("fitness", curves.fitness, words.fitness_finding, _has_member, _NO_MEMBER),
    FigureKind("loss", maps.loss, words.loss_finding, _has_member, _NO_MEMBER),
    FigureKind("search", maps.search, words.search_finding, _has_member, _NO_MEMBER),
    FigureKind("tasks", curves.tasks, words.task_finding, _has_member, _NO_MEMBER),
    FigureKind("layers", curves.layers, words.layer_finding, _has_member, _NO_MEMBER),
    FigureKind("time", curves.time, words.time_finding, _has_time, "the run has not ended yet."),
)


def write_report(run: Path) -> Path:
    """Write ``report.html`` and ``figures/*.svg``, ``figures/*.png`` into a run folder, finished or not.

    The page needs no other file and no network. What the run does not hold yet is left out with a sentence that
    says so. Equal run folders give equal bytes. Figures are the paper's 3, 6, 7 and 8, the fitness curve and the
    time's shares.

    Returns the page's path. Raises ValueError where the folder is not a run.
    """
    seen = facts.read_run(run)
    folder = run / "figures"
    folder.mkdir(exist_ok=True)
    drawn: dict[str, dict[str, Any]] = {}
    for kind in FIGURES:
        if not kind.present(seen):
            drawn[kind.key] = {"missing": kind.missing}
            for suffix in (".svg", ".png"):
                (folder / f"{kind.key}{suffix}").unlink(missing_ok=True)
            continue
        label = kind.finding(seen)
        wide, narrow = (kind.draw(seen, width) for width in (WIDE, NARROW))
        _replace(folder / f"{kind.key}.svg", svg(wide, label=label, variables=False).encode())
        _paint(wide, folder / f"{kind.key}.png", title=label)
        drawn[kind.key] = {
            "wide": Markup(svg(wide, label=label, variables=True, name="wide")),
            "narrow": Markup(svg(narrow, label=label, variables=True, name="narrow")),
            "finding": label,
        }
    page = run / "report.html"
    _replace(page, _page(seen, drawn).encode())
    return page


def _replace(path: Path, content: bytes) -> None:
    """Write a file whole or not at all: a page may be looked at while it is written."""
    part = path.with_name(path.name + ".part")
    part.write_bytes(content)
    os.replace(part, path)


def _paint(sketch: Sketch, path: Path, *, title: str) -> None:
    """The sketch as a PNG file on white."""
    width, height = sketch.width + 2 * MARGIN, sketch.height + 2 * MARGIN
    figure = Figure(figsize=(width / 72, height / 72), dpi=72 * PNG_SCALE, facecolor="white")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(-MARGIN, width - MARGIN), ylim=(height - MARGIN, -MARGIN))
    axes.set_axis_off()
    for order, artist in enumerate(a for shape in sketch.shapes for a in _artists(shape)):
        artist.set_zorder(order)
        axes.add_artist(artist)
    for order, shape in enumerate(s for s in sketch.shapes if isinstance(s, Text)):
        axes.text(
            shape.x,
            shape.baseline,
            shape.text,
            color=PALETTE[shape.color][0],
            fontsize=0.92 * shape.size,  # the font that comes with matplotlib is wide
            ha={"start": "left", "middle": "center", "end": "right"}[shape.anchor],
            fontweight="bold" if shape.bold else "normal",
            fontfamily="DejaVu Sans",
            parse_math=False,
            zorder=len(sketch.shapes) * 2 + order,
        )
    part = path.with_name(path.name + ".part")
    canvas.print_png(  # type: ignore[no-untyped-call]
        part, metadata={"Software": None, "Description": title}
    )
    os.replace(part, path)


def _artists(shape: Text | Box | Line | Marks) -> Iterator[Line2D | FancyBboxPatch]:
    ink = PALETTE[shape.color][0]
    if isinstance(shape, Box):
        round_ = min(shape.radius, shape.width / 2, shape.height / 2)
        style = f"round,pad=0,rounding_size={round_:g}" if round_ else "square,pad=0"
        corner = (shape.x, shape.y)
        yield FancyBboxPatch(
            corner,
            shape.width,
            shape.height,
            boxstyle=style,
            facecolor=ink,
            alpha=shape.alpha,
            lw=0,
        )
    elif isinstance(shape, Line | Marks) and shape.points:
        xs, ys = zip(*shape.points, strict=True)
        if isinstance(shape, Line):
            dash: Any = (0, (3 / shape.width, 3 / shape.width)) if shape.dash else "-"
            yield Line2D(xs, ys, color=ink, lw=shape.width, ls=dash, alpha=shape.alpha)
            return
        marker = {"dot": "o", "ring": "o", "cross": "x", "down": "v"}[shape.kind]
        edge = {"ring": 1.4, "cross": 1.6}.get(shape.kind, 0.0)
        face = "none" if shape.kind == "ring" else ink
        yield Line2D(
            xs,
            ys,
            ls="",
            marker=marker,
            ms=shape.size,
            color=ink,
            mfc=face,
            mew=edge,
            alpha=shape.alpha,
        )


def _page(run: Run, drawn: Mapping[str, Mapping[str, Any]]) -> str:
    """Fill in the page."""
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.undefined = jinja2.StrictUndefined
    environment.filters["duration"] = words.duration
    source = files("engine").joinpath("report.html.j2").read_text(encoding="utf-8")
    steps, results = facts.lineage(run), _results(run)
    return environment.from_string(source).render(
        run=run,
        font=Markup(FONT),
        palette=PALETTE,
        figures=drawn,
        verdict=words.verdict(run),
        caution=words.caution(run),
        evolved_share=words.evolved_share(run) if run.complete else "",
        metric=words.fitness_metric(run),
        plural=words.plural,
        names=BY_NAME,
        results=results,
        scale=_place_bars(results),
        tiles=_tiles(run),
        ranked=_ranked(run),
        steps=steps,
        ancestor=facts.ancestor(run),
        failures=facts.failures(run),
        shown=SHOWN,
        facts=_facts(run),
        versions=_pairs(run.provenance.get("versions")),
        recipe=_recipe(run),
        labels=_labels(run),
    )


def _results(run: Run) -> list[dict[str, Any]]:
    """Rows of the results table: key, loss, how it was drawn or trained, and its Stat."""
    rows = [
        ("untrained", "Untrained network", "no training", facts.stat(run.summary.get("untrained"))),
        ("initial", "Initial population", "the search's seed", facts.initial_stat(run)),
        ("random", "Random losses", "fresh seeds", facts.stat(run.summary.get("random"))),
        ("best", "Best loss", "fresh seeds", facts.stat(run.summary.get("best"))),
    ]
    return [{"key": k, "name": n, "note": o, "stat": s} for k, n, o, s in rows if s is not None]


def _place_bars(rows: list[dict[str, Any]]) -> tuple[float, float]:
    """Add to each row where its bar and values lie, in percent of a common scale; returns that scale's ends."""
    stats: list[facts.Stat] = [r["stat"] for r in rows]
    edges = [x for s in stats for x in (*s.values, *_ends(s))] or [0.0]
    low = math.floor(min(edges) * 20 - 0.2) / 20
    high = math.ceil(max(edges) * 20 + 0.2) / 20

    def place(value: float) -> float:
        return round(100 * (value - low) / (high - low), 2)

    for row in rows:
        s = row["stat"]
        left, right = (place(x) for x in _ends(s))
        row |= {"at": place(s.mean), "low": left, "high": right}
        row["dots"] = [place(v) for v in s.values[:50]]
    return low, high


def _ends(s: facts.Stat) -> tuple[float, float]:
    return s.mean - (s.sd or 0.0), s.mean + (s.sd or 0.0)


def _tiles(run: Run) -> list[tuple[str, str, str, str]]:
    """The numbers at the head of the page: key, value, its spread, what it is."""
    tiles = []
    for row in reversed(_results(run)):
        if row["key"] in ("best", "random"):
            s = row["stat"]
            spread = "" if s.sd is None else f"± {s.sd:.3f}"
            tiles.append((row["key"], f"{s.mean:.3f}", spread, row["name"].lower()))
    if not tiles and run.best:
        seen = f"{facts.fitness_of(run.best):.3f}"
        tiles.append(("seen", seen, "", "best fitness in the search so far"))
    failed = f", {len(run.failed):,} failed" if run.failed else ""
    noun = "member" if len(run.trials) == 1 else "members"
    tiles.append(("members", f"{len(run.trials):,}", "", f"{noun} trained{failed}"))
    seconds = run.summary.get("seconds")
    total = facts.number(seconds.get("total")) if isinstance(seconds, dict) else None
    if total:
        tiles.append(("time", words.duration(total), "", "the whole run"))
    return tiles


def _ranked(run: Run) -> list[tuple[str, list[dict[str, Any]]]]:
    """The ten highest and ten lowest weights, with the terms' last values where the run holds them."""
    if run.weights is None:
        return []
    weights = run.weights
    values = (run.best.terms if run.best else None) or {}
    order = sorted(TERM_NAMES, key=lambda n: (-weights[n], TERM_NAMES.index(n)))
    rows = [{"term": BY_NAME[n], "weight": weights[n], "value": values.get(n)} for n in order]
    return [("highest", rows[:10]), ("lowest", rows[:-11:-1])]


def _labels(run: Run) -> str:
    used = run.provenance.get("labels_used")
    count = facts.number(run.provenance.get("num_labelled"))
    clips = (
        "labelled training clips"
        if count is None
        else words.plural(int(count), "labelled training clip")
    )
    if used is False:
        return "No labels were used, neither to train nor to score members."
    if used is None:
        return "The run does not say whether labels were used."
    return f"Labels were used to score members ({clips}), never to train them."


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {_text(v)}" for k, v in value.items())
    if isinstance(value, list | tuple):
        more = f" and {len(value) - 12} more" if len(value) > 12 else ""
        return ", ".join(_text(v) for v in value[:12]) + more
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    return str(value)


def _pairs(table: Any) -> list[tuple[str, str]]:
    return [(str(k), _text(v)) for k, v in table.items()] if isinstance(table, Mapping) else []


def _facts(run: Run) -> list[tuple[str, str]]:
    """Provenance but for the versions, in its own order."""
    return [
        (key.replace("_", " "), value) for key, value in _pairs(run.provenance) if key != "versions"
    ]


def _recipe(run: Run) -> list[tuple[str, list[tuple[str, str]]]]:
    """The recipe's sections; keys outside any section come first."""
    loose = {k: v for k, v in run.recipe.items() if not isinstance(v, Mapping)}
    sections = [(k, _pairs(v)) for k, v in run.recipe.items() if isinstance(v, Mapping)]
    return [*([("", _pairs(loose))] if loose else []), *sections]
