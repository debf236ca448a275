"""What the report's page says in tables and lists, as values for its template."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from engine.objective.terms import BY_NAME, TERM_NAMES
from engine.reporting import html, measures, words
from engine.reporting.facts import Run, fitness_of, number
from engine.reporting.measures import Stat, stat

SHOWN = 25
"""Rows of a long list that are shown before the rest is folded."""


def values(run: Run) -> dict[str, Any]:
    """Everything but the figures that ``report.html.j2`` names."""
    results, frames = _results(run), _frames(run)
    return {
        "run": run,
        "verdict": words.verdict(run),
        "caution": words.caution(run),
        "evolved_share": words.evolved_share(run) if run.complete else "",
        "metric": words.fitness_metric(run),
        "names": BY_NAME,
        "results": results,
        "scale": _place_bars(results),
        "tiles": _tiles(run),
        "ranked": _ranked(run),
        "frames": html.data(frames) if frames else None,
        "steps": measures.lineage(run),
        "ancestor": measures.ancestor(run),
        "noise": words.noise(run),
        "failures": measures.failures(run),
        "incidents": measures.incidents(run),
        "incident_labels": words.EVENT_LABELS,
        "recovered": measures.recovered(run),
        "pruned": _pruned(run),
        "speed": _speed(run),
        "shown": SHOWN,
        "facts": _facts(run),
        "versions": _pairs(run.provenance.get("versions")),
        "recipe": _recipe(run),
        "labels": _labels(run),
    }


def _frames(run: Run) -> dict[str, Any] | None:
    """What the slider shows: the best loss so far wherever it changed; None where it never did."""
    if len(run.improvements) < 2:
        return None
    return {
        "terms": list(TERM_NAMES),
        "codes": [BY_NAME[n].code for n in TERM_NAMES],
        "last": run.trials[-1].number,
        "frames": [
            {
                "trial": t.number,
                "round": run.round_of(t.number),
                "fitness": round(fitness_of(t), 7),
                "weights": [round(t.weights[n], 7) for n in TERM_NAMES],
            }
            for t in run.improvements
        ],
    }


def _pruned(run: Run) -> str:
    """How many members were pruned, and how good they were when they were."""
    if not run.pruned:
        return ""
    seen = [t.partial for t in run.pruned if t.partial is not None]
    best = f", the fittest of them at {max(seen):.3f} when it was" if seen else ""
    took = [t.seconds for t in run.pruned if t.seconds is not None]
    whole = [t.seconds for t in run.complete if t.seconds is not None]
    if took and whole:
        share = (sum(took) / len(took)) / (sum(whole) / len(whole))
        best += f"; each took {100 * share:.0f} % of a whole member's time on average"
    return f"{words.plural(len(run.pruned), 'member')} pruned{best}."


def _speed(run: Run) -> list[tuple[str, str]]:
    """Throughput in words."""
    found = measures.throughput(run)
    rows = [
        ("members an hour", found.members_per_hour, "{:,.1f}"),
        ("training clips a second, median member", found.clips_per_second, "{:,.1f}"),
        ("a member, median", found.seconds, None),
        ("the slowest member", found.slowest, None),
        ("training's share of the time", found.training_share, "{:.0%}"),
    ]
    return [
        (name, words.duration(value) if form is None else form.format(value))
        for name, value, form in rows
        if value is not None
    ]


def _results(run: Run) -> list[dict[str, Any]]:
    """Rows of the results table: key, loss, how it was drawn or trained, and its Stat."""
    rows = [
        ("untrained", "Untrained network", "no training", stat(run.summary.get("untrained"))),
        ("initial", "Initial population", "the search's seed", measures.initial_stat(run)),
        ("random", "Random losses", "fresh seeds", stat(run.summary.get("random"))),
        ("best", "Best loss", "fresh seeds", stat(run.summary.get("best"))),
    ]
    return [{"key": k, "name": n, "note": o, "stat": s} for k, n, o, s in rows if s is not None]


def _place_bars(rows: list[dict[str, Any]]) -> tuple[float, float]:
    """Add to each row where its bar and values lie, in percent of a common scale; returns that scale's ends."""
    stats: list[Stat] = [r["stat"] for r in rows]
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


def _ends(s: Stat) -> tuple[float, float]:
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
        seen = f"{fitness_of(run.best):.3f}"
        tiles.append(("seen", seen, "", "best fitness in the search so far"))
    failed = f", {len(run.failed):,} failed" if run.failed else ""
    if run.pruned:
        failed = f", {len(run.pruned):,} pruned{failed}"
    noun = "member" if len(run.trials) == 1 else "members"
    tiles.append(("members", f"{len(run.trials):,}", "", f"{noun} trained{failed}"))
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


def _labels(run: Run) -> str:
    used = run.provenance.get("labels_used")
    count = number(run.provenance.get("num_labelled"))
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
