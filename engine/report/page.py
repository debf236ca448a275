"""A run as one self-contained HTML page, with the paper's figures and tables, and as image files."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Generic, TypeVar

import jinja2
from markupsafe import Markup

from engine.core.files import write_text_atomic
from engine.data.demo.levels import STEPS, WITH_LABELS
from engine.features.trivial import TRIVIAL
from engine.objective.terms import BY_NAME, TERM_NAMES
from engine.report import measures, words
from engine.report.figures import losses, search
from engine.report.figures.theme import (
    FONT,
    NARROW,
    PALETTE,
    RAMP,
    TURN,
    WIDE,
    Figure,
    inlined,
    svg,
    write_png,
)
from engine.report.learnt import NEAR_CHANCE, collapsed, what_each_learnt
from engine.report.measures import Agreement, Stat, stat
from engine.report.run import Run, fitness_of, read_run, table_of, whole
from engine.search.effects import compared
from engine.search.members import finite, finite_values
from engine.search.surrogate import FEWEST

T = TypeVar("T")


@dataclass(frozen=True)
class Kind(Generic[T]):
    """A figure of a page; its template says where it stands, and its caption."""

    key: str
    data: Callable[[Any], T | None]
    """What it shows, from what the page is about; None where there is none of it."""
    draw: Callable[[T, float], Figure]
    finding: Callable[[T], str]
    """What it shows in a sentence or two: its text alternative."""


def when(holds: Callable[[Any], object]) -> Callable[[Any], Any]:
    """What the page is about, where that holds."""
    return lambda about: about if holds(about) else None


_complete = when(lambda run: run.complete)
_with_gains = when(lambda run: any(s.fitness_after is not None for s in measures.lineage(run)))
_with_rates = when(lambda run: any(t.clips_per_second for t in run.complete))


def _zipf(run: Run) -> Agreement | None:
    return measures.agreement(run, "zipf", "hungarian")


FIGURES: tuple[Kind[Any], ...] = (
    Kind("fitness", _complete, search.fitness, words.fitness_finding),
    Kind("loss", _complete, losses.loss, words.loss_finding),
    Kind("effects", lambda run: run.effects, losses.effects, words.effects_finding),
    Kind("rounds", _complete, losses.rounds, words.rounds_finding),
    Kind("search", _complete, losses.weights, words.search_finding),
    Kind("tasks", _complete, losses.tasks, words.task_finding),
    Kind("modalities", _complete, losses.modalities, words.modality_finding),
    Kind("lineage", _with_gains, search.ancestry, words.lineage_finding),
    Kind("layers", _complete, losses.layers, words.layer_finding),
    Kind("zipf", _zipf, search.zipf, words.zipf_finding),
    Kind("time", when(words.time_parts), search.time, words.time_finding),
    Kind("rates", _with_rates, search.rates, words.rate_finding),
)
"""A new figure is a line here, a function that draws it, and a line of ``report.html.j2``."""


def write_report(run: Path) -> Path:
    """Write ``report.html`` and ``figures/*.svg``, ``figures/*.png`` into a run folder, finished or not.

    The page needs no other file and no network. What the run does not hold yet is left out with a sentence that
    says so. Equal run folders give equal bytes.

    Returns the page's path. Raises ValueError where the folder is not a run.
    """
    read = read_run(run)
    (run / "figures").mkdir(exist_ok=True)
    figures = draw(FIGURES, read, lambda key: run / "figures" / key)
    path = run / "report.html"
    write_text_atomic(path, render("report.html.j2", figures=figures, **values(read)))
    return path


def draw(
    kinds: Sequence[Kind[Any]], about: object, place: Callable[[str], Path]
) -> dict[str, dict[str, Any]]:
    """Draw a page's figures for desktops and phones, by key, and write each as .svg and .png.

    ``place`` gives a figure's path without a suffix. Gives what the template's macro ``figure`` takes.
    """
    figures: dict[str, dict[str, Any]] = {}
    for kind in kinds:
        svg_path, png_path = (Path(f"{place(kind.key)}{suffix}") for suffix in (".svg", ".png"))
        if (data := kind.data(about)) is None:
            svg_path.unlink(missing_ok=True)
            png_path.unlink(missing_ok=True)
            figures[kind.key] = {"key": kind.key, "finding": ""}
            continue
        label, wide = kind.finding(data), kind.draw(data, WIDE)
        text, narrow = svg(wide, label=label), svg(kind.draw(data, NARROW), label=label)
        write_text_atomic(svg_path, text)
        write_png(wide, png_path, title=label)
        drawings = f"{inlined(text, name='wide')}\n{inlined(narrow, name='narrow')}"
        figures[kind.key] = {"key": kind.key, "finding": label, "drawings": Markup(drawings)}
    return figures


def render(template: str, **values: Any) -> str:
    """A page as text; every value that is not Markup is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("engine.report"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    common = {"font": Markup(FONT), "palette": PALETTE, "levels": len(RAMP), "turn": TURN}
    common |= {"words": words, "measures": measures, "plural": words.plural}
    return environment.get_template(template).render(**common, **values)


NOTES = {**dict.fromkeys(TRIVIAL, "no training"), WITH_LABELS: f"{STEPS} steps, measured before"}
"""How what stands beside the losses was made; losses to compare with have no entry."""
SHOWN = 25
"""Rows of a long list that are shown before the rest is folded."""


def values(run: Run) -> dict[str, Any]:
    """Everything but the figures that ``report.html.j2`` names."""
    results, signal = _results(run), measures.ranking(run)
    return {
        "run": run,
        "names": BY_NAME,
        "results": results,
        "scale": _place_bars(results),
        "tiles": _tiles(run, results),
        "ranked": _ranked(run),
        "learnt": _learnt(run),
        "claims": compared(run.effects) if run.effects else [],
        "frames": _frames(run),
        "steps": measures.lineage(run),
        "pruned": _pruned(run),
        "shown": SHOWN,
        "fewest": FEWEST,
        "verdict": words.verdict(run, signal),
        "trust": words.trust(run, signal),
        "facts": [(k.replace("_", " "), v) for k, v in _pairs(run.provenance) if k != "versions"],
        "versions": _pairs(table_of(run.provenance, "versions")),
        "recipe": _recipe(run),
        "labels": _labels(run),
    }


def _frames(run: Run) -> dict[str, Any] | None:
    """What the slider shows: the best loss so far wherever it changed; None where it never did."""
    if len(run.improvements) < 2 or run.best is None:
        return None
    shown = [*(t for t in run.improvements if t.number < run.best.number), run.best]
    return {
        "terms": list(TERM_NAMES),
        "codes": [BY_NAME[n].code for n in TERM_NAMES],
        "last": run.trials[-1].number,
        "frames": [
            {
                "trial": t.number,
                "round": t.round,
                "fitness": round(fitness_of(t), 7),
                "weights": [round(t.weights[n], 7) for n in TERM_NAMES],
            }
            for t in shown
        ],
    }


def _pruned(run: Run) -> str:
    """How many members were pruned, and how good they were when they were."""
    if not run.pruned:
        return ""
    scores = [t.partial for t in run.pruned if t.partial is not None]
    text = f", the fittest of them at {max(scores):.3f}" if scores else ""
    took = [t.seconds for t in run.pruned if t.seconds is not None]
    whole = [t.seconds for t in run.complete if t.seconds is not None]
    if took and whole:
        text += f"; each took {100 * fmean(took) / fmean(whole):.0f} % of a whole member's time"
    return f"{words.plural(len(run.pruned), 'member')} pruned{text}."


def _results(run: Run) -> list[dict[str, Any]]:
    """Rows of the results table: key, loss, how it was drawn or trained, and its Stat."""
    lucky, count = measures.luckiest(run)
    each = whole(table_of(run.summary, "random").get("each"), 1)
    means = f", means of {each}" if each > 1 else ""
    rows = [
        ("untrained", "Untrained network", "no training", stat(run, "untrained")),
        ("initial", "Initial population", "the search's seed", measures.initial_stat(run)),
        ("random", "Random losses", f"fresh seeds{means}", stat(run, "random")),
        ("luckiest", f"Luckiest of {count} of these", "a fresh seed", lucky),
        ("best", "Best loss", "fresh seeds", stat(run, "best")),
    ]
    compared = table_of(run.summary, "compared")
    for place, name in enumerate(compared, start=1):
        title, note = name.replace("_", " ").capitalize(), NOTES.get(name, "fresh seeds")
        rows.insert(place, ("untrained", title, note, measures.stat_in(compared, name)))
    return [{"key": k, "name": n, "note": o, "stat": s} for k, n, o, s in rows if s is not None]


def _place_bars(rows: list[dict[str, Any]]) -> tuple[float, float]:
    """Add to each row where its bar and values lie, in percent of a common scale; returns that scale's ends."""
    stats: list[Stat] = [r["stat"] for r in rows]
    bars = [(s.mean - (s.sd or 0.0), s.mean + (s.sd or 0.0)) for s in stats]
    edges = [x for s, bar in zip(stats, bars, strict=True) for x in (*s.values, *bar)] or [0.0]
    low = math.floor(min(edges) * 20 - 0.2) / 20
    high = math.ceil(max(edges) * 20 + 0.2) / 20

    def place(value: float) -> float:
        return round(100 * (value - low) / (high - low), 2)

    for row, s, bar in zip(rows, stats, bars, strict=True):
        row |= {"at": place(s.mean), "low": place(bar[0]), "high": place(bar[1])}
        row["dots"] = [place(v) for v in s.values[:50]]
    return low, high


def _tiles(run: Run, results: list[dict[str, Any]]) -> list[tuple[str, str, str, str]]:
    """The numbers at the head of the page: key, value, its spread, what it is."""
    tiles = []
    for row in reversed(results):
        if row["key"] in ("best", "random"):
            mean, _, sd = words.pm(row["stat"].mean, row["stat"].sd).partition(" ")
            tiles.append((row["key"], mean, sd, row["name"].lower()))
    if not tiles and run.best:
        seen = f"{fitness_of(run.best):.3f}"
        tiles.append(("seen", seen, "", "best fitness in the search so far"))
    count, noun = words.plural(len(run.trials), "member").split(" ")
    lost = {"pruned": len(run.pruned), "failed": len(run.failed)}
    more = "".join(f", {number:,} {state}" for state, number in lost.items() if number)
    tiles.append(("members", count, "", f"{noun} trained{more}"))
    if total := run.seconds.get("total"):
        what = "the whole run" if run.summary else "so far"
        tiles.append(("time", words.duration(total), "", what))
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


def _learnt(run: Run) -> dict[str, Any]:
    """What each task of the best member learnt: rows, and the tasks and networks that learnt nothing."""
    attributes = run.best.attributes if run.best else {}
    start, end = (finite_values(attributes.get(key)) for key in ("terms_at_start", "terms"))
    rows = what_each_learnt(start, end)
    ranks = {
        network: pair
        for network, pair in table_of(attributes, "feature_ranks").items()
        if isinstance(pair, list | tuple) and len(pair) == 2 and None not in map(finite, pair)
    }
    chance = table_of(run.recipe, "objective").get("units", "chance") != "raw"
    return {
        "rows": rows,
        "chance": chance,
        "near": [row.term for row in rows if chance and row.near_chance],
        "bound": NEAR_CHANCE,
        "collapsed": collapsed(ranks),
    }


def _labels(run: Run) -> str:
    used, count = run.provenance.get("labels_used"), finite(run.provenance.get("num_labelled"))
    if used is False:
        return "No labels were used, neither to train nor to score members."
    if used is None:
        return "The run does not say whether labels were used."
    clips = "" if count is None else f" ({words.plural(int(count), 'labelled clip')})"
    return f"Labels were used to score members{clips}, never to train them."


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {_text(v)}" for k, v in value.items())
    if isinstance(value, list | tuple):
        more = f" and {len(value) - 12} more" if len(value) > 12 else ""
        return ", ".join(_text(v) for v in value[:12]) + more
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    return str(value)


def _pairs(table: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(str(key), _text(value)) for key, value in table.items()]


def _recipe(run: Run) -> list[tuple[str, list[tuple[str, str]]]]:
    """The recipe's sections; keys outside any section come first."""
    loose = {k: v for k, v in run.recipe.items() if not isinstance(v, Mapping)}
    sections = {k: v for k, v in run.recipe.items() if isinstance(v, Mapping)}
    return [(name, _pairs(rows)) for name, rows in ({"": loose} | sections).items() if rows]
