"""Searches side by side on one page: runs with the same recipe but for the seed are one group."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.core.files import write_text_atomic
from engine.report.figures.compare import color, curves, final
from engine.report.measures import Group, stat
from engine.report.page import Kind, draw, render, when
from engine.report.run import Run, fitness_of, read_run
from engine.report.words import duration, fitness_metric, plural, pm, spoken

if TYPE_CHECKING:
    from engine.search.effects import Effect

SIDES = ("best", "random", "untrained")
"""Keys of the summary whose fitness fresh seeds confirmed."""


def groups_of(runs: Sequence[Run]) -> tuple[Group, ...]:
    """Runs by recipe, in the order in which they were named; labels tell groups apart."""
    by_recipe: dict[str, list[Run]] = {}
    for run in runs:
        recipe = {k: v for k, v in run.recipe.items() if k != "seed"}
        by_recipe.setdefault(json.dumps(recipe, sort_keys=True), []).append(run)
    firsts = [group[0] for group in by_recipe.values()]
    several = len({run.name for run in firsts}) > 1  # a name that all have tells nothing
    plain = [f"{run.name}, {run.method}" if several else run.method for run in firsts]
    labels = []
    for i, label in enumerate(plain):
        if plain.count(label) > 1:
            apart = [f"{k.split('.')[-1]} {v[i]}" for k, v in differences(firsts)]
            label = f"{label}, {', '.join(apart[:3])}" if apart else f"{label} ({i + 1})"
        labels.append(label)
    return tuple(Group(n, tuple(g)) for n, g in zip(labels, by_recipe.values(), strict=True))


def differences(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """Recipe keys on which runs differ, seed and name aside, each with every run's value."""
    flat = [_flat(run.recipe) for run in runs]
    keys = dict.fromkeys(k for f in flat for k in f if k not in ("seed", "name", "search.method"))
    rows = [(key, [f.get(key, "not given") for f in flat]) for key in keys]
    return [(key, values) for key, values in rows if len(set(values)) > 1]


def _flat(table: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for key, value in table.items():
        name = f"{prefix}{key}"
        flat |= _flat(value, f"{name}.") if isinstance(value, Mapping) else {name: str(value)}
    return flat


def cautions(groups: Sequence[Group]) -> list[str]:
    """Why these runs may not be comparable, a sentence each."""
    runs = [run for group in groups for run in group.runs]
    metrics = sorted({fitness_metric(run) for run in runs})
    data, code = ({str(run.provenance.get(key)) for run in runs} for key in ("data", "git_sha"))
    going = [run.folder.name for run in runs if not run.summary]
    sentences = {
        f"Their fitness is not the same measure: {spoken(metrics)}. Compare shapes, not heights.": metrics[
            1:
        ],
        "They did not see the same videos and labelled clips.": len(data) > 1,
        "They were made by different versions of the code.": len(code) > 1,
        f"{plural(len(going), 'run')} of them had not ended: {', '.join(going)}.": going,
        "A group of one run has no band: another seed might have gone another way.": any(
            len(group.runs) == 1 for group in groups
        ),
    }
    return [sentence for sentence, holds in sentences.items() if holds]


def matters(groups: Sequence[Group]) -> list[dict[str, list[tuple[Effect | None, str]]]]:
    """Effects of tasks, and the paper's claims with verdicts: by name, a cell a group, from all of its members."""
    from engine.search.effects import compared  # only here: it takes seconds

    tables: list[dict[str, list[tuple[Effect | None, str]]]] = [{}, {}]
    for place, group in enumerate(groups):
        if (found := group.effects) is None:
            continue
        tasks = ((name.replace("_", " "), effect, "") for name, effect in found.groups.items())
        lines: list[list[tuple[str, Effect | None, str]]] = [[*tasks], compared(found)]
        for table, rows in zip(tables, lines, strict=True):
            for name, effect, verdict in rows:
                table.setdefault(name, [(None, "")] * len(groups))[place] = effect, verdict
    return tables


def finding(groups: Sequence[Group]) -> str:
    """How high each group got, highest first."""
    last = [(float(g.band[0][-1]), g.label) for g in groups if len(g.band[0])]
    say = [f"{label} {value:.3f}" for value, label in sorted(last, reverse=True) if value == value]
    return (
        f"Best fitness so far over the members, at the end: {'; '.join(say) or 'none yet'}. "
        "These are maxima of noisy measurements, and so flatter themselves."
    )


def final_finding(groups: Sequence[Group]) -> str:
    """What fresh seeds confirmed, group by group."""
    parts = []
    for group in groups:
        keys = ("best", "random") if group.side("best") else ()
        sides = [pm(s.mean, s.sd) for key in keys if (s := group.side(key))]
        parts.append(f"{group.label}: {' against '.join(sides) or 'nothing yet'}")
    return f"Fitness of the best and of random losses with fresh seeds. {'; '.join(parts)}."


_measured = when(lambda groups: any(run.complete for group in groups for run in group.runs))
_confirmed = when(lambda groups: any(group.side("best") for group in groups))
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
        "matters": matters(groups),
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
        "numbers": [
            run.recipe.get("seed", "?"),
            len(run.trials),
            len(run.failed) + len(run.pruned),
            f"{fitness_of(run.improvements[-1]):.3f}" if run.improvements else "\N{EN DASH}",
        ],
        "time": duration(total) if total else "?",
        **{key: stat(run, key) for key in SIDES},
    }
