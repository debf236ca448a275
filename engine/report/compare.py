"""Searches side by side on one page: runs with the same recipe but for the seed are one group."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from engine.core.files import write_text_atomic
from engine.report.figures.compare import color, curves, final
from engine.report.measures import Group, stat
from engine.report.page import Kind, draw, render
from engine.report.run import Run, fitness_of, read_run
from engine.report.words import duration, fitness_metric, plural, pm, spoken

SIDES = ("best", "random", "untrained")
"""Keys of the summary whose fitness fresh seeds confirmed."""


def _key(run: Run) -> str:
    """The recipe without its seed."""
    return json.dumps({k: v for k, v in run.recipe.items() if k != "seed"}, sort_keys=True)


def groups_of(runs: Sequence[Run]) -> tuple[Group, ...]:
    """Runs by recipe, in the order in which they were named; labels tell groups apart."""
    found: dict[str, list[Run]] = {}
    for run in runs:
        found.setdefault(_key(run), []).append(run)
    parts = list(found.values())
    names = [run[0].name for run in parts]
    several = len(set(names)) > 1  # a name that all have tells nothing
    plain = [
        f"{n}, {p[0].method}" if several else p[0].method for n, p in zip(names, parts, strict=True)
    ]
    labels = []
    for i, label in enumerate(plain):
        if plain.count(label) > 1:
            said = [f"{k.split('.')[-1]} {v[i]}" for k, v in differences([p[0] for p in parts])]
            label = f"{label}, {', '.join(said[:3])}" if said else f"{label} ({i + 1})"
        labels.append(label)
    return tuple(Group(label, tuple(p)) for label, p in zip(labels, parts, strict=True))


def differences(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """Recipe keys on which runs differ, seed and name aside, each with every run's value."""
    flat = [_flat(run.recipe) for run in runs]
    keys = dict.fromkeys(k for f in flat for k in f if k not in ("seed", "name", "search.method"))
    found = [(key, [f.get(key, "not given") for f in flat]) for key in keys]
    return [(key, values) for key, values in found if len(set(values)) > 1]


def _flat(table: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    found: dict[str, str] = {}
    for key, value in table.items():
        name = f"{prefix}{key}"
        found |= _flat(value, f"{name}.") if isinstance(value, Mapping) else {name: str(value)}
    return found


def cautions(groups: Sequence[Group]) -> list[str]:
    """Why these runs may not be comparable, a sentence each."""
    runs = [run for group in groups for run in group.runs]
    found = []
    if len({fitness_metric(run) for run in runs}) > 1:
        names = sorted({fitness_metric(run) for run in runs})
        found.append(
            f"Their fitness is not the same measure: {spoken(names)}. Compare shapes, not heights."
        )
    if len({str(run.provenance.get("data")) for run in runs}) > 1:
        found.append("They did not see the same videos and labelled clips.")
    if len({str(run.provenance.get("git_sha")) for run in runs}) > 1:
        found.append("They were made by different versions of the code.")
    going = [run.folder.name for run in runs if not run.summary]
    if going:
        found.append(f"{plural(len(going), 'run')} of them had not ended: {spoken(going)}.")
    if any(len(group.runs) == 1 for group in groups):
        found.append("A group of one run has no band: another seed might have gone another way.")
    return found


def finding(groups: Sequence[Group]) -> str:
    """How high each group got, highest first."""
    last = [
        (float(c[-1]), g.label) for g in groups for c in [g.band[0]] if len(c) and c[-1] == c[-1]
    ]
    if not last:
        return "Best fitness so far: no member has a fitness yet."
    say = [f"{label} {value:.3f}" for value, label in sorted(last, reverse=True)]
    return (
        f"Best fitness so far over the members, mean over seeds with a band of one sd. At the end: {'; '.join(say)}. "
        "These are maxima of noisy measurements, and so flatter themselves."
    )


def final_finding(groups: Sequence[Group]) -> str:
    """What fresh seeds confirmed, group by group."""
    parts = []
    for group in groups:
        best, random = group.side("best"), group.side("random")
        if best is None:
            parts.append(f"{group.label}: nothing yet")
            continue
        against = (
            "" if random is None else f" against {pm(random.mean, random.sd)} of random losses"
        )
        parts.append(f"{group.label}: {pm(best.mean, best.sd)}{against}")
    return f"Fitness of the best losses with fresh seeds. {'; '.join(parts)}."


def _measured(groups: Sequence[Group]) -> Sequence[Group] | None:
    return groups if any(run.complete for group in groups for run in group.runs) else None


def _confirmed(groups: Sequence[Group]) -> Sequence[Group] | None:
    return groups if any(group.side("best") for group in groups) else None


FIGURES: tuple[Kind[Any], ...] = (
    Kind("curves", _measured, curves, finding),
    Kind("final", _confirmed, final, final_finding),
)


def write_comparison(folders: Sequence[Path], *, out: Path) -> Path:
    """Write a page that puts searches side by side, and beside it its figures as .svg and .png.

    Returns the page's path. Raises ValueError for fewer than two runs, a run named twice, a folder that is not
    a run, and a run without members.
    """
    if len({f.resolve() for f in folders}) < max(2, len(folders)):
        raise ValueError("give two or more different runs to compare")
    if out.suffix != ".html":
        raise ValueError(f"{out}: the page's name must end in .html")
    runs = [read_run(folder) for folder in folders]
    for run in runs:
        if not run.trials:
            raise ValueError(f"{run.folder}: has no members to compare")
    groups = groups_of(runs)
    out.parent.mkdir(parents=True, exist_ok=True)
    figures = draw(FIGURES, groups, lambda key: out.with_name(f"{out.stem}-{key}"))
    write_text_atomic(out, render("compare.html.j2", figures=figures, **_values(groups)))
    return out


def _values(groups: Sequence[Group]) -> dict[str, Any]:
    runs = [(i, group, run) for i, group in enumerate(groups) for run in group.runs]
    return {
        "title": f"{len(runs)} searches side by side",
        "groups": [
            {"label": g.label, "runs": len(g.runs), "color": color(i)}
            | {key: g.side(key) for key in SIDES}
            for i, g in enumerate(groups)
        ],
        "runs": [_row(group, run, ink=color(i)) for i, group, run in runs],
        "metrics": sorted({fitness_metric(run) for *_, run in runs}),
        "cautions": cautions(groups),
        "differences": differences([g.runs[0] for g in groups]),
    }


def _row(group: Group, run: Run, *, ink: str) -> dict[str, Any]:
    """A run's line of the table."""
    total = run.seconds.get("total")
    return {
        "name": run.folder.resolve().name,
        "label": group.label,
        "color": ink,
        "seed": run.recipe.get("seed", "?"),
        "members": len(run.trials),
        "lost": len(run.failed) + len(run.pruned),
        "seen": fitness_of(run.improvements[-1]) if run.improvements else None,
        "time": duration(total) if total else "?",
        **{key: stat(run.summary.get(key)) for key in SIDES},
    }
