"""Run folders made up for tests, and what a reader gets of their pages."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from matplotlib.figure import Figure

from engine.objective.terms import BY_NAME, TERM_NAMES
from engine.report import page
from engine.search.members import Trial
from engine.search.storage import StudyStorage

GOOD = {"align_audio": 0.12, "predict": 0.1, "cross": 0.1, "distill": 0.05, "shuffle": -0.1}


def draw_only(patched: pytest.MonkeyPatch, *keys: str) -> None:
    """Leave the figures of other keys empty: their data and text alternatives are as always, and no time is spent."""

    def empty(data: object, width: float) -> Figure:
        return Figure(figsize=(1.0, 1.0))

    figures = tuple(k if k.key in keys else replace(k, draw=empty) for k in page.FIGURES)
    patched.setattr(page, "FIGURES", figures)


def worth(weights: dict[str, float]) -> float:
    """A made-up fitness without noise: audio alignment, prediction and late distillation pay."""
    total = 0.26
    for name, weight in weights.items():
        term = BY_NAME[name]
        gain = GOOD.get(term.task, -0.02)
        if term.layer is not None:
            late = (term.layer - 2) / 2
            gain = 0.05 * (-late if term.modality == "grey" else late)
        total += gain * (weight - 0.3) / 4
    return total


def make_run(
    folder: Path,
    *,
    members: int = 24,
    population: int = 12,
    failed: dict[int, str] | None = None,
    summary: bool = True,
    seed: int = 1,
    method: str = "evolution",
    pruned: tuple[int, ...] = (),
) -> dict[str, Any]:
    """Write a plausible run and return what was written, by file."""
    draw = random.Random(seed)
    rows: list[dict[str, Any]] = []
    alive: list[dict[str, Any]] = []
    for trial in range(members):
        row: dict[str, Any] = {"trial": trial, "state": "complete", "reason": None, "mutated": None}
        if trial < population or not alive or method != "evolution":
            row |= {"weights": {n: draw.random() for n in TERM_NAMES}, "parent": None}
            row["round"] = max(0, trial - population + 1)
        else:
            parent = max(draw.sample(alive, min(4, len(alive))), key=lambda r: r["fitness"])
            term = draw.choice(TERM_NAMES)
            row |= {
                "weights": {**parent["weights"], term: draw.random()},
                "parent": parent["trial"],
            }
            row |= {"mutated": term, "round": trial - population + 1}
        row["fitness"] = worth(row["weights"]) + draw.gauss(0, 0.012)
        row["metrics"] = {
            "hungarian": row["fitness"],
            "zipf": 0.5 * row["fitness"] + draw.gauss(0, 0.01),
            "nmi": 0.3,
            "ari": 0.2,
            "effective_rank": 41.5,
        }
        row |= {"seed": seed, "seconds": 20.5, "clips_per_second": 120.0}
        row["terms"] = {n: 1.5 * draw.random() for n in TERM_NAMES}
        row["terms_at_start"] = dict.fromkeys(TERM_NAMES, 1.25)
        row["feature_ranks"] = {"rgb": [3.0, 1.2], "grey": [3.0, 3.5]}
        if failed and trial in failed:
            row |= {"state": "failed", "reason": failed[trial], "fitness": None, "metrics": {}}
        elif trial in pruned:
            row["state"] = "pruned"
        else:
            alive = sorted([*alive, row], key=lambda r: -r["fitness"])[:population]
        rows.append(row)
    folder.mkdir(parents=True, exist_ok=True)
    store(folder, *map(trial_of, rows))
    recipe = {
        "name": "weizmann-demo",
        "seed": seed,
        "optim": {"lr": 0.001, "steps": 150},
        "fitness": {"metric": "hungarian"},
        "search": {"method": method, "population": population, "rounds": members - population},
    }
    (folder / "recipe.toml").write_text(tomli_w.dumps(recipe))
    provenance = {
        "command": "engine evolve --videos clips --labelled weizmann --out runs/weizmann-demo",
        "seed": seed,
        "recipe_hash": "3f9a2c51d07e",
        "git_sha": "8c1d2e4",
        "engine_version": "0.1.0",
        "device": "cpu",
        "cpu_count": 2,
        "versions": {"python": "3.11.2", "torch": "2.13.0", "nvidia-dali": "2.4.0"},
        "started": "2026-11-03T09:12:44+00:00",
        "videos": ["clips/ucf101", "clips/av"],
        "labelled": ["weizmann"],
        "num_clips": 221,
        "num_labelled": 90,
        "num_classes": 10,
        "hours_of_video": 0.31,
        "labels_used": True,
    }
    (folder / "provenance.json").write_text(json.dumps(provenance))
    out: dict[str, Any] = {"members": rows, "recipe": recipe, "provenance": provenance}
    if summary:
        out["summary"] = make_summary(rows, failures=len(failed or {}))
        (folder / "summary.json").write_text(json.dumps(out["summary"]))
    return out


def trial_of(row: dict[str, Any]) -> Trial:
    """A made-up member as the study keeps it."""
    attributes = ("metrics", "seconds", "clips_per_second", "terms", "reason")
    attributes += ("terms_at_start", "feature_ranks")
    return Trial(
        number=row["trial"],
        weights=row["weights"],
        parent=row["parent"],
        mutated=row["mutated"],
        round=row["round"],
        state=row["state"],
        fitness=row["fitness"] if row["state"] == "complete" else None,
        rungs=((75, row["fitness"]),) if row["state"] == "pruned" else (),
        attributes={key: row[key] for key in attributes},
    )


def store(folder: Path, *trials: Trial) -> None:
    """Put members into a run's study."""
    storage = StudyStorage(folder / "study.jsonl", name="evolve")
    storage.load()
    for trial in trials:
        storage.add(trial)


def make_summary(rows: list[dict[str, Any]], *, failures: int) -> dict[str, Any]:
    """A summary whose best loss was trained again with three seeds."""
    done = [r for r in rows if r["state"] == "complete"]
    best = max(done, key=lambda r: r["fitness"])
    again = [worth(best["weights"]) + d for d in (-0.009, 0.002, 0.007)]
    mean = sum(again) / 3
    first = [r["fitness"] for r in done if r["round"] == 0]
    centre = sum(first) / len(first)
    sd = (sum((f - centre) ** 2 for f in first) / max(1, len(first) - 1)) ** 0.5
    return {
        "untrained": {"mean": 0.2213, "sd": 0.0067, "n": 3},
        "initial_population": {"mean": centre, "sd": sd, "n": len(first)},
        "best_trial": best["trial"],
        "best": {"mean": mean, "sd": 0.0082, "n": 3, "values": again},
        "random": {
            "mean": 0.2571,
            "sd": 0.0114,
            "n": 3,
            "values": [0.2461, 0.2563, 0.2689],
            "each": 2,
        },
        "luckiest_random": {"mean": 0.2813, "sd": 0.0, "n": 1, "values": [0.2813], "of": 6},
        "best_search_fitness": best["fitness"],
        "weights": best["weights"],
        "seconds": {
            "total": 1284.0,
            "input": 96.2,
            "views": 61.8,
            "train": 905.4,
            "fitness": 141.9,
            "search": 0.6,
            "logging": 4.1,
            "report": 3.2,
            "other": 70.8,
        },
        "failures": failures,
        "members": len(rows),
    }


class Page(HTMLParser):
    """What a reader gets of a page: table rows by id, text by id, figures' alternatives and every tag."""

    VOID = frozenset({"meta", "br", "link", "img", "input"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[tuple[str, str]] = []
        self.text: dict[str, str] = {}
        self.rows: dict[str, list[list[str]]] = {}
        self.labels: dict[str, list[str]] = {}
        self.feed(text)
        assert not self.open, "a tag was left open"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.tags.append((tag, found))
        if tag in self.VOID:
            return
        self.open.append((tag, found.get("id") or ""))
        table = self.inside("table")
        if tag == "tr" and table:
            self.rows.setdefault(table, []).append([])
        if tag in ("td", "th") and table:
            self.rows[table][-1].append("")
        if tag == "svg":
            assert found.get("role") == "img"
            self.labels.setdefault(self.inside("figure"), []).append(found.get("aria-label") or "")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open[-1][0] == tag, f"{tag} closes {self.open[-1]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        for _, name in self.open:
            if name:
                self.text[name] = self.text.get(name, "") + data
        table = self.inside("table")
        if table and self.rows.get(table) and any(t in ("td", "th") for t, _ in self.open):
            self.rows[table][-1][-1] += " ".join(data.split()) + " " if data.strip() else ""

    def inside(self, tag: str) -> str:
        """The id of the innermost open ``tag``."""
        return next((name for t, name in reversed(self.open) if t == tag), "")
