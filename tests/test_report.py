"""The report: its numbers against the run's files, figures, escaping, missing parts and equal bytes."""

from __future__ import annotations

import json
import random
import re
import statistics
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import tomli_w

from engine.objective.terms import BY_NAME, TERM_NAMES, TERMS
from engine.report import write_report
from engine.reporting import facts
from engine.reporting.sketch import PALETTE, RAMP
from engine.reporting.words import duration

FIGURES = ("fitness", "loss", "search", "tasks", "layers", "time")
GOOD = {"align_audio": 0.12, "predict": 0.1, "cross": 0.1, "distill": 0.05, "shuffle": -0.1}


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
) -> dict[str, Any]:
    """Write a plausible run and return what was written, by file."""
    draw = random.Random(seed)
    rows: list[dict[str, Any]] = []
    alive: list[dict[str, Any]] = []
    for trial in range(members):
        row: dict[str, Any] = {"trial": trial, "state": "complete", "reason": None, "mutated": None}
        if trial < population or not alive:
            row |= {"weights": {n: draw.random() for n in TERM_NAMES}, "parent": None, "round": 0}
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
            "nmi": 0.3,
            "ari": 0.2,
            "effective_rank": 41.5,
        }
        row |= {"seed": seed, "seconds": 20.5, "clips_per_second": 120.0}
        row["terms"] = {n: 1.5 * draw.random() for n in TERM_NAMES}
        if failed and trial in failed:
            row |= {"state": "failed", "reason": failed[trial], "fitness": None, "metrics": {}}
        else:
            alive = sorted([*alive, row], key=lambda r: -r["fitness"])[:population]
        rows.append(row)
    (folder / "members").mkdir(parents=True)
    for row in rows:
        (folder / "members" / f"{row['trial']:05d}.json").write_text(json.dumps(row))
    recipe = {
        "name": "weizmann-demo",
        "seed": seed,
        "optim": {"lr": 0.001, "steps": 150},
        "fitness": {"metric": "hungarian"},
        "search": {"method": "evolution", "population": population, "rounds": members - population},
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


def make_summary(rows: list[dict[str, Any]], *, failures: int) -> dict[str, Any]:
    """A summary whose best loss was trained again with three seeds."""
    done = [r for r in rows if r["fitness"] is not None]
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
        "random": {"mean": 0.2571, "sd": 0.0114, "n": 3, "values": [0.2461, 0.2563, 0.2689]},
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

    VOID = frozenset({"meta", "br", "link", "img"})

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


def read(folder: Path) -> tuple[str, Page]:
    """The page of a run, written and parsed."""
    text = write_report(folder).read_text(encoding="utf-8")
    return text, Page(text)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], str, Page]:
    folder = tmp_path_factory.mktemp("runs") / "finished"
    failed = {
        7: "non-finite loss in rgb/predict",
        9: "non-finite loss in rgb/predict",
        19: "killed",
    }
    run = make_run(folder, failed=failed, members=30)
    return folder, run, *read(folder)


def test_every_figure_is_there_with_a_text_alternative(
    finished: tuple[Path, dict[str, Any], str, Page],
) -> None:
    folder, _, text, page = finished
    for key in FIGURES:
        wide, narrow = page.labels[f"figure-{key}"]
        assert wide == narrow
        assert len(wide.split()) >= 8
        assert wide in re.sub(r"\s+", " ", page.text[f"figure-{key}"])  # shown to everyone, too
        root = ElementTree.parse(folder / "figures" / f"{key}.svg").getroot()
        assert root.attrib["aria-label"] == wide
        assert len(list(root)) > 10
        assert (folder / "figures" / f"{key}.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    for number in (3, 6, 7, 8):
        assert f"Fig. {number} of the paper" in text


def test_results_equal_the_summary(finished: tuple[Path, dict[str, Any], str, Page]) -> None:
    _, run, _, page = finished
    summary = run["summary"]
    keys = ("untrained", "initial_population", "random", "best")
    for row, key in zip(page.rows["results"][1:], keys, strict=True):
        given = summary[key]
        assert row[1].split() == [f"{given['mean']:.3f}", "±", f"{given['sd']:.3f}"]
        assert int(row[2]) == given["n"]


def test_verdict_states_the_gain_in_pooled_standard_deviations(
    finished: tuple[Path, dict[str, Any], str, Page],
) -> None:
    _, run, _, page = finished
    best, rand = run["summary"]["best"], run["summary"]["random"]
    pooled = statistics.mean([best["sd"] ** 2, rand["sd"] ** 2]) ** 0.5  # equal n: a plain mean
    gain = best["mean"] - rand["mean"]
    assert "beats random losses" in page.text["verdict"]
    assert f"{gain:.3f} higher, {gain / pooled:.1f} pooled" in page.text["verdict"]
    assert f"{run['summary']['best_search_fitness']:.3f}" in page.text["caution"]
    assert "flatters" in page.text["caution"]


@pytest.mark.parametrize(
    ("mean", "words"),
    [(0.30, "beats random"), (0.265, "not clearly"), (0.24, "does not beat random")],
)
def test_verdict_claims_no_more_than_the_numbers(tmp_path: Path, mean: float, words: str) -> None:
    run = make_run(tmp_path, members=4)
    summary = run["summary"] | {"best": {"mean": mean, "sd": 0.01, "n": 3}}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    _, page = read(tmp_path)
    assert words in page.text["verdict"]


def test_ranked_weights_and_the_squares_of_fig_7(
    finished: tuple[Path, dict[str, Any], str, Page],
) -> None:
    folder, run, _, page = finished
    weights = run["summary"]["weights"]
    order = sorted(TERM_NAMES, key=lambda n: -weights[n])
    for table, names in (("highest", order[:10]), ("lowest", order[::-1][:10])):
        shown = [(row[0].split(), row[1].strip()) for row in page.rows[table][1:]]
        assert shown == [([BY_NAME[n].code, n], f"{weights[n]:.3f}") for n in names]
    svg = (folder / "figures" / "loss.svg").read_text()
    for term in TERMS:
        level = round(weights[term.name] * (len(RAMP) - 1))
        title = f"<title>{term.name} {weights[term.name]:.3f}</title>"
        assert f'fill="{RAMP[level][0]}">{title}' in svg
        assert f">{term.code}</text>" in svg


def test_lineage_walks_from_the_initial_population_to_the_best(
    finished: tuple[Path, dict[str, Any], str, Page],
) -> None:
    _, run, _, page = finished
    rows = {r["trial"]: r for r in run["members"]}
    child, expected = rows[run["summary"]["best_trial"]], []
    while child["parent"] is not None:
        parent, term = rows[child["parent"]], child["mutated"]
        weights = f"{parent['weights'][term]:.2f} → {child['weights'][term]:.2f}"
        fitness = f"{parent['fitness']:.3f} → {child['fitness']:.3f}"
        code = f"{BY_NAME[term].code} {term}"
        expected.append([str(child["trial"]), code, weights, fitness])
        child = parent
    assert expected, "the made-up search should have improved on its initial population"
    shown = [[cell.strip() for cell in row] for row in page.rows["lineage"][1:]]
    assert shown == expected[::-1]


def test_failures_are_counted_by_reason(finished: tuple[Path, dict[str, Any], str, Page]) -> None:
    _, _, _, page = finished
    shown = [[cell.strip() for cell in row] for row in page.rows["failures"][1:]]
    assert shown == [["non-finite loss in rgb/predict", "2", "7, 9"], ["killed", "1", "19"]]


def test_facts_and_time(finished: tuple[Path, dict[str, Any], str, Page]) -> None:
    _, run, _, page = finished
    for value in ("3f9a2c51d07e", "8c1d2e4", "engine evolve", "0.31", "clips/ucf101, clips/av"):
        assert value in page.text["facts"]
    assert "torch\xa02.13.0" in page.text["versions"]
    for part, seconds in run["summary"]["seconds"].items():
        if part != "total":
            assert duration(seconds) in page.text["figure-time"]
    assert "0.001" in page.text["recipe"]


def test_page_stands_alone(finished: tuple[Path, dict[str, Any], str, Page]) -> None:
    _, _, text, page = finished
    assert not {tag for tag, _ in page.tags} & {"script", "link", "img", "iframe", "object"}
    for _, attrs in page.tags:
        assert not {"src", "href", "onload", "onclick"} & set(attrs)
    assert "url(" not in text and "@import" not in text
    assert set(re.findall(r"var\(--([\w-]+)\)", text)) <= {*PALETTE, "panel", "c"}
    assert len(text) < 2_000_000


def test_text_of_users_is_escaped(tmp_path: Path) -> None:
    nasty = "<script>alert('&')</script>"
    run = make_run(tmp_path, members=6, failed={2: f"no such file {nasty}"})
    provenance = run["provenance"] | {"videos": [nasty], "versions": {nasty: nasty}, nasty: 1}
    (tmp_path / "provenance.json").write_text(json.dumps(provenance))
    (tmp_path / "recipe.toml").write_text(tomli_w.dumps({"name": nasty, nasty: {nasty: nasty}}))
    (tmp_path / "members" / "00099.json").write_text('{"trial": ')
    text, page = read(tmp_path)
    assert "<script" not in text
    assert not any(tag == "script" for tag, _ in page.tags)
    assert nasty in page.rows["failures"][1][0]
    assert nasty in page.text["facts"] and nasty in page.text["recipe"]
    assert "00099.json" in page.text["unread"]


def test_equal_runs_give_equal_bytes(tmp_path: Path) -> None:
    outputs = []
    for name in ("one", "two"):
        folder = tmp_path / name / "run"
        make_run(folder, members=14)
        page = write_report(folder)
        parts = {p.name: p.read_bytes() for p in sorted((folder / "figures").iterdir())}
        outputs.append({"page": page.read_bytes(), **parts})
    assert outputs[0] == outputs[1]
    assert len(outputs[0]) == 1 + 2 * len(FIGURES)  # no half-written file is left


def test_run_that_goes_on(tmp_path: Path) -> None:
    make_run(tmp_path, members=9, summary=False)
    _, page = read(tmp_path)
    assert "has not ended" in page.text["going"]
    assert "has not been compared" in page.text["verdict"]
    assert "Left out" in page.text["figure-time"]
    assert set(page.labels) == {f"figure-{k}" for k in FIGURES if k != "time"}
    assert [row[0].split()[0] for row in page.rows["results"][1:]] == ["Initial"]
    assert not (tmp_path / "figures" / "time.png").exists()


def test_initial_population_before_the_summary(tmp_path: Path) -> None:
    run = make_run(tmp_path, members=9, summary=False)
    values = [r["fitness"] for r in run["members"]]
    _, page = read(tmp_path)
    shown = page.rows["results"][1][1].split()
    assert shown == [f"{statistics.mean(values):.3f}", "±", f"{statistics.stdev(values):.3f}"]


@pytest.mark.parametrize("summary", [True, False])
def test_one_member(tmp_path: Path, summary: bool) -> None:
    make_run(tmp_path, members=1, summary=summary)
    _, page = read(tmp_path)
    assert "Trial 0 is the best member" in page.text["lineage"]
    assert "no parent" in page.text["lineage"]
    assert page.labels["figure-fitness"][0].startswith("Fitness of 1 member ")


def test_nothing_but_failures(tmp_path: Path) -> None:
    make_run(tmp_path, members=3, failed=dict.fromkeys(range(3), "boom"), summary=False)
    _, page = read(tmp_path)
    assert not page.labels
    assert "No member is complete" in page.text["verdict"]
    assert page.rows["failures"][1][0].strip() == "boom"


@pytest.mark.parametrize("missing", ["provenance.json", "recipe.toml", "summary.json", "members"])
def test_each_part_may_be_missing(tmp_path: Path, missing: str) -> None:
    make_run(tmp_path, members=5)
    if missing == "members":
        for path in (tmp_path / "members").iterdir():
            path.unlink()
    else:
        (tmp_path / missing).unlink()
    text, _ = read(tmp_path)
    assert re.search("left out|Left out|has not ended", text)


def test_members_with_odd_values(tmp_path: Path) -> None:
    make_run(tmp_path, members=5, summary=False)
    odd = {"trial": 5, "state": "complete", "fitness": float("nan"), "weights": {"rgb/x": "?"}}
    (tmp_path / "members" / "00005.json").write_text(json.dumps(odd))
    (tmp_path / "members" / "00006.json").write_text('{"trial": 6, "fitness": 0.9}')
    run = facts.read_run(tmp_path)
    assert [t.number for t in run.failed] == [5]
    assert run.best is not None and run.best.number == 6
    read(tmp_path)


def test_a_folder_that_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not a run folder"):
        write_report(tmp_path)
    with pytest.raises(ValueError, match="no such folder"):
        write_report(tmp_path / "absent")


def test_fittest_means_against_sorting_every_prefix(tmp_path: Path) -> None:
    make_run(tmp_path, members=40, population=16, failed={3: "boom"}, summary=False)
    run = facts.read_run(tmp_path)
    assert run.num_fittest == 4
    at, means = facts.fittest_means(run)
    for i, trial in enumerate(run.complete):
        prefix = run.complete[: i + 1]
        top = sorted(prefix, key=lambda t: -facts.fitness_of(t))[:4]
        held = means[int((at <= trial.number).sum()) - 1]
        for k, name in enumerate(TERM_NAMES):
            assert held[k] == pytest.approx(statistics.mean(t.weights[name] for t in top))


@pytest.mark.slow
def test_two_thousand_members(tmp_path: Path) -> None:
    failed = {k: f"non-finite loss at step {k}" for k in range(5, 2000, 37)}
    make_run(tmp_path, members=2000, population=100, failed=failed)
    began = time.perf_counter()
    text, page = read(tmp_path)
    assert time.perf_counter() - began < 15
    assert len(text) < 3_000_000
    assert "1,946 members" in page.labels["figure-fitness"][0]
