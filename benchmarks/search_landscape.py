"""Search methods on a fitness that is known: how good the best-looking member truly is after 50, 100, 250 members.

    python benchmarks/search_landscape.py --json benchmarks/results/search_landscape-cpu.jsonl \
        --figure docs/search-landscape.svg          # the methods
    python benchmarks/search_landscape.py --variants --json ...     # their settings

A landscape has 39 weights, of which 10 count, with gains drawn within a factor of three of one another that add up to
0.20. "peaks": each of the ten has a target t, uniform in [0, 1], and adds gain * (1 - d^2), where d is the weight's
distance from the target as a share of the largest there can be. "slopes": each adds gain * w or gain * (1 - w), so that
the best loss lies in a corner. The worst loss has a fitness of 0.25, the best 0.45; losses drawn at random have a mean
of 0.39 and an sd of 0.019 (slopes: 0.35 and 0.019). A search sees it under normal noise of sd 0.03, drawn by (seed,
trial). A seed is a landscape, its noise and a search; all methods meet the same.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import click
import msgspec
import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rows import JSON, PATH, append

from engine.core.display import table
from engine.core.recipe import Search
from engine.core.runtime import choose_runtime
from engine.objective.terms import TERM_NAMES, LossWeights
from engine.report.figures.compare import color
from engine.report.figures.theme import COLOR, WIDE, ends, note, place, rounded, sheet, svg, themed
from engine.search.study import SearchStudy

BASE, GAIN, IMPORTANT, NOISE = 0.25, 0.20, 10, 0.03
MARKS = (50, 100, 250, 2000)
LAST = 14
"""Members whose mean weights are judged too: the place where a search has arrived."""

METHODS: dict[str, dict[str, Any]] = {
    "evolution": {"method": "evolution"},
    "cmaes": {"method": "cmaes"},
    "surrogate": {"method": "surrogate"},
    "random": {"method": "random"},
}
"""Every setting at its default."""

VARIANTS: dict[str, dict[str, Any]] = {
    "surrogate, race": {"method": "surrogate", "seeds": "generation"},
    "evolution, worst leaves": {"method": "evolution", "replace": "worst"},
    "evolution, generation 1": {"method": "evolution", "generation": 1},
    "evolution, generation 16": {"method": "evolution", "generation": 16},
    "evolution, population 50": {"method": "evolution", "population": 50},
    "cmaes, sigma 0.1": {"method": "cmaes", "sigma": 0.1},
    "cmaes, sigma 1/6": {"method": "cmaes", "sigma": 1 / 6},
    "cmaes, sigma 0.2": {"method": "cmaes", "sigma": 0.2},
    "cmaes, sigma 0.3": {"method": "cmaes", "sigma": 0.3},
    "cmaes, sigma 0.5": {"method": "cmaes", "sigma": 0.5},
    "cmaes, 7 a generation": {"method": "cmaes", "cmaes_population": 7},
    "cmaes, 28 a generation": {"method": "cmaes", "cmaes_population": 28},
}


def landscape(kind: str, seed: int) -> Callable[[LossWeights], float]:
    """The true fitness of a loss."""
    rng = np.random.default_rng([seed, 1])
    which = rng.permutation(len(TERM_NAMES))[:IMPORTANT]
    targets, gains = rng.random(IMPORTANT), rng.uniform(1, 3, IMPORTANT)
    gains *= GAIN / gains.sum()
    if kind == "slopes":
        targets = np.round(targets)
    reach = np.maximum(targets, 1 - targets)
    power = 1 if kind == "slopes" else 2

    def fitness(weights: LossWeights) -> float:
        values = np.array([weights[TERM_NAMES[i]] for i in which])
        return BASE + float(gains @ (1 - (np.abs(values - targets) / reach) ** power))

    return fitness


def search(settings: Search, kind: str, *, seed: int, noise: float) -> dict[str, Any]:
    """One search: true fitness of the best-looking member, wherever that one changes, and of the search's outcome."""
    truth = landscape(kind, seed)
    study = SearchStudy(settings, storage=None, name="landscape", seed=seed, recipe_hash="")
    steps: list[tuple[int, float]] = []
    centre: dict[int, float] = {}
    outcome: dict[int, float] = {}
    best, count, last = -np.inf, 0, []
    while not study.finished:
        for proposal in study.ask():
            true = truth(proposal.weights)
            seen = true + noise * np.random.default_rng([seed, 2, proposal.number]).normal()
            study.tell(proposal.number, fitness=seen, attributes={})
            count += 1
            last = [*last, list(proposal.weights.values())][-LAST:]
            if seen > best:
                best = seen
                steps.append((count, round(true, 5)))
            if count in MARKS:
                mean = dict(zip(TERM_NAMES, np.mean(last, axis=0).tolist(), strict=True))
                centre[count] = round(truth(mean), 5)
                outcome[count] = round(truth(study.best().weights), 5)
    return {"steps": steps, "centre": centre, "outcome": outcome, "seen": round(best, 5)}


def curve(row: dict[str, Any]) -> NDArray[np.float64]:
    """True fitness of the best-looking member after 1, 2, ... members."""
    values = np.empty(row["members"])
    for count, value in row["steps"]:
        values[count - 1 :] = value
    return values


def summary(rows: Sequence[dict[str, Any]]) -> Iterable[tuple[str, ...]]:
    """A line of the table a label."""
    for label in dict.fromkeys(row["label"] for row in rows):
        own = [row for row in rows if row["label"] == label]
        curves = np.array([curve(row) for row in own])
        cells = []
        for mark in MARKS:
            at = curves[:, mark - 1] if mark <= curves.shape[1] else None
            if at is not None and all("outcome" in row for row in own):
                at = np.array(
                    [{str(k): v for k, v in r["outcome"].items()}[str(mark)] for r in own]
                )
            cells.append("" if at is None else f"{at.mean():.4f} ({at.std(ddof=1):.4f})")
        end = str(max(int(k) for k in own[0]["centre"]))
        centre = np.mean([{str(k): v for k, v in row["centre"].items()}[end] for row in own])
        seen = np.mean([row["seen"] for row in own])
        yield label, *cells, f"{centre:.4f}", f"{seen:.4f}"


@themed
def draw(rows: Sequence[dict[str, Any]], members: int, marks: Sequence[int]) -> str:
    """Mean curves with a band of one sd over the seeds, as SVG."""
    figure = sheet(WIDE, 390)
    axes = place(figure, 48, 34, WIDE - 188, 300, xlabel="members")
    title = "true fitness of the best-looking member: mean and sd over seeds"
    note(figure, 8, 12, title)
    for mark in marks:
        axes.axvline(mark, color=COLOR["muted"], lw=1, ls="--", alpha=0.5)
    labels, bounds = [], []
    at = np.arange(1, members + 1)
    for i, name in enumerate(dict.fromkeys(row["label"] for row in rows)):
        curves = np.array([curve(row)[:members] for row in rows if row["label"] == name])
        mean, sd = curves.mean(0), curves.std(0, ddof=1)
        axes.fill_between(at, mean - sd, mean + sd, color=COLOR[color(i)], alpha=0.13)
        axes.plot(at, mean, color=COLOR[color(i)], lw=2.2)
        labels.append((float(mean[-1]), f"{name} {mean[-1]:.3f}", color(i)))
        bounds += [(mean - sd)[9:].min(), (mean + sd).max()]
    axes.set(xlim=(0, members), ylim=(min(bounds) - 0.003, max(bounds) + 0.003))
    axes.yaxis.set_major_locator(rounded(6))
    ends(axes, labels, gap=16, weight="bold", size=12)
    said = ", ".join(text for _, text, _ in sorted(labels, reverse=True))
    return svg(figure, label=f"{title}, after {members} members: {said}")


@click.command()
@click.option("--seeds", default=20, show_default=True, help="Landscapes, each searched once.")
@click.option("--members", default=250, show_default=True)
@click.option("--kind", type=click.Choice(["peaks", "slopes"]), default="peaks", show_default=True)
@click.option("--noise", default=NOISE, show_default=True, help="Standard deviation.")
@click.option("--variants", is_flag=True, help="Other settings, rather than the methods.")
@click.option("--only", multiple=True, metavar="LABEL", help="These rows alone.")
@JSON
@click.option("--figure", type=PATH, help="Draw the curves as SVG.")
def main(
    seeds: int,
    members: int,
    kind: str,
    noise: float,
    variants: bool,
    only: tuple[str, ...],
    out: Path | None,
    figure: Path | None,
) -> None:
    """Search known landscapes under noise by several methods."""
    rows: list[dict[str, Any]] = []
    for label, chosen in (VARIANTS if variants else METHODS).items():
        if only and label not in only:
            continue
        settings = Search(**chosen)
        settings = msgspec.structs.replace(settings, rounds=members - settings.population)
        began = time.process_time()
        found = [search(settings, kind, seed=seed, noise=noise) for seed in range(seeds)]
        about_all = {
            "benchmark": "search_landscape",
            "label": label,
            "landscape": kind,
            "settings": msgspec.to_builtins(settings),
            "members": members,
            "noise": noise,
        }
        rows += [{**about_all, **each} for each in found]
        lists = {key: [each[key] for each in found] for key in found[0]}  # an entry a seed
        append(out, [{**about_all, **lists}], choose_runtime("cpu"), seed=list(range(seeds)))
        click.echo(f"{label}: {time.process_time() - began:.0f} s", err=True)
    heads = [f"{mark} members" for mark in MARKS]
    columns = ["search", *heads, f"mean of the last {LAST}", "best, as seen"]
    Console(width=140).print(table(f"true fitness, {kind}", columns, list(summary(rows))))
    if figure is not None:
        marks = [mark for mark in MARKS if mark < members]
        figure.write_text(draw(rows, members, marks) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
