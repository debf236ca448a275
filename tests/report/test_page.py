"""The report: its numbers against the run's files, figures, escaping, missing parts and equal bytes."""

from __future__ import annotations

import json
import math
import re
import statistics
import time
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import tomli_w

from engine.objective.terms import BY_NAME, TERM_NAMES, TERMS
from engine.report import measures, write_report
from engine.report import run as facts
from engine.report.figures.theme import PALETTE, RAMP
from engine.report.words import duration
from engine.search.effects import as_json, effects_of
from engine.search.members import Trial
from tests.made_run import Page, draw_only, make_run, store, trial_of

FIGURES = (
    "fitness",
    "loss",
    "effects",
    "rounds",
    "search",
    "tasks",
    "modalities",
    "lineage",
    "layers",
    "zipf",
    "time",
    "rates",
)


def read(folder: Path) -> tuple[str, Page]:
    """The page of a run, written and parsed."""
    text = write_report(folder).read_text(encoding="utf-8")
    return text, Page(text)


FAILED = {
    7: "non-finite loss in rgb/predict",
    9: "non-finite loss in rgb/predict",
    19: "killed",
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], str, Page]:
    folder = tmp_path_factory.mktemp("runs") / "finished"
    run = make_run(folder, failed=FAILED, members=30)
    return folder, run, *read(folder)


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """For what the page says, where its figures are drawn elsewhere."""
    draw_only(monkeypatch)


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
        assert len(list(root.iter())) > 10
        assert (folder / "figures" / f"{key}.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    for number in (3, 6, 7, 8):
        assert f"Fig. {number} of the paper" in text


def test_results_equal_the_summary(finished: tuple[Path, dict[str, Any], str, Page]) -> None:
    _, run, _, page = finished
    summary = run["summary"]
    keys = ("untrained", "initial_population", "random", "luckiest_random", "best")
    for row, key in zip(page.rows["results"][1:], keys, strict=True):
        given = summary[key]
        spread = ["±", f"{given['sd']:.3f}"] if given["n"] > 1 else []
        assert row[1].split() == [f"{given['mean']:.3f}", *spread]
        assert int(row[2]) == given["n"]
    assert "means of 2" in page.rows["results"][3][0] and "of 6" in page.rows["results"][4][0]
    assert "the luckiest of 6 random losses reached 0.281" in page.text["verdict"]


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


def test_trust_is_computed_from_the_population_and_the_confirmations(
    finished: tuple[Path, dict[str, Any], str, Page],
) -> None:
    _, run, _, page = finished
    noise = statistics.variance(run["summary"]["best"]["values"])
    first = [r["fitness"] for r in run["members"] if r["round"] == 0 and r["state"] == "complete"]
    losses, seeds = (statistics.variance(first) - noise) ** 0.5, noise**0.5
    assert f"{losses:.3f}, {seeds:.3f} (sd)" in page.text["trust"]
    assert f"differ {losses / seeds:.1f} times as much as seeds" in page.text["verdict"]
    assert f"{losses**2 / (losses**2 + noise):.2f}" in page.text["trust"]
    told = math.ceil(2 * (2.8016 * seeds / losses) ** 2)  # z(.975) + z(.8)
    assert f"trainings of each: {told}" in page.text["trust"]


def test_effects_and_the_papers_claims_are_the_same_as_in_the_summary(
    finished: tuple[Path, dict[str, Any], str, Page],
) -> None:
    folder, run, _, page = finished
    told = as_json(effects_of([trial_of(row) for row in run["members"]]))
    rows = [[cell.strip() for cell in row] for row in page.rows["claims"][1:]]
    assert rows == [
        [c["claim"], f"{c['mean']:+.3f} {c['low']:+.3f} to {c['high']:+.3f}", c["verdict"]]
        for c in told["claims"]
    ]
    svg = (folder / "figures" / "effects.svg").read_text()
    for name, effect in told["effects"]["terms"].items():
        assert f"{name}: {effect['mean']:+.3f}, {effect['low']:+.3f} to" in svg


def test_what_each_task_learnt_is_the_best_members(
    finished: tuple[Path, dict[str, Any], str, Page],
) -> None:
    _, run, _, page = finished
    best = run["members"][run["summary"]["best_trial"]]
    shown = [(*row[0].split()[1:], *map(float, row[1:])) for row in page.rows["learnt"][1:]]
    assert shown == [(n, 1.25, round(best["terms"][n], 3)) for n in TERM_NAMES]
    words = page.text["learnt-words"]
    near = [n for n in TERM_NAMES if best["terms"][n] >= 0.95]
    assert near and f"next to nothing: {', '.join(near)}." in words
    assert "collapse: rgb." in words


def test_runs_that_noted_no_ranks_or_bad_ones_have_a_page(tmp_path: Path, undrawn: None) -> None:
    make_run(tmp_path, members=3)
    bad = {"terms_at_start": [1], "feature_ranks": {"rgb": [1.0], "grey": ["a", 2]}}
    weights = dict.fromkeys(TERM_NAMES, 0.5)
    store(tmp_path, Trial(3, weights, None, None, 1, fitness=9.0, attributes=bad))
    (tmp_path / "summary.json").unlink()
    assert "learnt" not in read(tmp_path)[1].rows


@pytest.mark.parametrize(
    ("mean", "words"),
    [(0.30, "beats random"), (0.265, "not clearly"), (0.24, "does not beat random")],
)
def test_verdict_claims_no_more_than_the_numbers(
    tmp_path: Path, undrawn: None, mean: float, words: str
) -> None:
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
        title = re.escape(f"<title>{term.name} {weights[term.name]:.3f}</title>")
        assert re.search(rf'{title}\s*<path [^>]*fill: {RAMP[level][0]}"', svg)
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
        gain = f"{child['fitness'] - parent['fitness']:+.3f}"
        expected.append([str(child["trial"]), code, weights, fitness, gain])
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
    assert not {tag for tag, _ in page.tags} & {"img", "iframe", "object"}
    links = [attrs for tag, attrs in page.tags if tag == "link"]
    assert links == [{"rel": "icon", "href": "data:,"}]  # a browser would ask for one otherwise
    for tag, attrs in page.tags:
        assert tag == "link" or not {"src", "href", "onload", "onclick"} & set(attrs)
    assert "url(" not in text and "@import" not in text
    assert set(re.findall(r"var\(--([\w-]+)\)", text)) <= {*PALETTE, "panel", "c"}
    assert len(text) < 2_000_000


def test_text_of_users_is_escaped(tmp_path: Path, undrawn: None) -> None:
    nasty = "<script>alert('&')</script>"
    run = make_run(tmp_path, members=6, failed={2: f"no such file {nasty}"})
    provenance = run["provenance"] | {"videos": [nasty], "versions": {nasty: nasty}, nasty: 1}
    (tmp_path / "provenance.json").write_text(json.dumps(provenance))
    (tmp_path / "recipe.toml").write_text(tomli_w.dumps({"name": nasty, nasty: {nasty: nasty}}))
    (tmp_path / "events.jsonl").write_text('{"kind": \n')
    text, page = read(tmp_path)
    assert "<script>alert" not in text
    assert sum(tag == "script" for tag, _ in page.tags) <= 2  # our own
    assert nasty in page.rows["failures"][1][0]
    assert nasty in page.text["facts"] and nasty in page.text["recipe"]
    assert "events.jsonl" in page.text["unread"]


def test_equal_runs_give_equal_bytes(
    finished: tuple[Path, dict[str, Any], str, Page], tmp_path: Path
) -> None:
    again = tmp_path / finished[0].name
    make_run(again, failed=FAILED, members=30)
    page, outputs = write_report(again), []
    for folder in (finished[0], again):
        parts = {p.name: p.read_bytes() for p in sorted((folder / "figures").iterdir())}
        outputs.append({"page": (folder / page.name).read_bytes(), **parts})
    one, other = outputs
    assert one.keys() == other.keys()
    assert [name for name in one if one[name] != other[name]] == []
    assert len(outputs[0]) == 1 + 2 * sum(
        f"figure-{k}" in Page(page.read_text()).labels for k in FIGURES
    )  # no half-written file is left


def test_run_that_goes_on(tmp_path: Path, undrawn: None) -> None:
    make_run(tmp_path, members=9, summary=False)
    _, page = read(tmp_path)
    assert "has not ended" in page.text["going"]
    assert "has not been compared" in page.text["verdict"]
    assert "Left out" in page.text["figure-time"]
    assert set(page.labels) == {f"figure-{k}" for k in FIGURES if k not in ("time", "lineage")}
    assert [row[0].split()[0] for row in page.rows["results"][1:]] == ["Initial"]
    assert not (tmp_path / "figures" / "time.png").exists()
    (tmp_path / "timing.json").write_text('{"train": 30.0, "total": 90.0}')
    _, page = read(tmp_path)
    assert "training 33 %" in page.labels["figure-time"][0]
    assert "360.0" in page.text["speed"]  # nine members in 90 s


def test_initial_population_before_the_summary(tmp_path: Path, undrawn: None) -> None:
    run = make_run(tmp_path, members=9, summary=False)
    values = [r["fitness"] for r in run["members"]]
    _, page = read(tmp_path)
    shown = page.rows["results"][1][1].split()
    assert shown == [f"{statistics.mean(values):.3f}", "±", f"{statistics.stdev(values):.3f}"]


@pytest.mark.parametrize("summary", [True, False])
def test_one_member(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, summary: bool) -> None:
    draw_only(monkeypatch, *(FIGURES if summary else ("time",)))
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


@pytest.mark.parametrize(
    "missing", ["provenance.json", "recipe.toml", "summary.json", "study.jsonl"]
)
def test_each_part_may_be_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    draw_only(monkeypatch, *(FIGURES if missing == "recipe.toml" else ()))  # which figures read too
    make_run(tmp_path, members=5)
    (tmp_path / missing).unlink()
    text, _ = read(tmp_path)
    assert re.search("left out|Left out|has not ended", text)


def test_members_with_odd_values(tmp_path: Path) -> None:
    make_run(tmp_path, members=5, summary=False)
    weights = dict.fromkeys(TERM_NAMES, 0.5)
    odd = {"seconds": float("nan"), "metrics": "?", "terms": {"rgb/x": None}, "reason": 3}
    store(
        tmp_path,
        Trial(5, weights, parent=99, mutated="rgb/x", state="failed", attributes=odd),
        Trial(6, weights, state="complete", fitness=0.9),
    )
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
    at, means = measures.fittest_means(run)
    for i, trial in enumerate(run.complete):
        prefix = run.complete[: i + 1]
        top = sorted(prefix, key=lambda t: -facts.fitness_of(t))[:4]
        held = means[int((at <= trial.number).sum()) - 1]
        for k, name in enumerate(TERM_NAMES):
            assert held[k] == pytest.approx(statistics.mean(t.weights[name] for t in top))


@pytest.mark.slow
def test_a_thousand_members(tmp_path: Path) -> None:
    failed = {k: f"non-finite loss at step {k}" for k in range(5, 1000, 37)}
    make_run(tmp_path, members=1000, population=100, failed=failed)
    began = time.process_time()
    text, page = read(tmp_path)
    assert time.process_time() - began < 40
    assert len(text) < 4_500_000
    assert "973 members" in page.labels["figure-fitness"][0]


@pytest.mark.parametrize(
    ("units", "in_chance"), [("chance", True), ("gradient", True), ("raw", False)]
)
def test_what_was_learnt_is_in_units_of_chance_unless_terms_are_raw(
    units: str, in_chance: bool, tmp_path: Path, undrawn: None
) -> None:
    """Gradient units divide weights by gradients' sizes, and terms by chance as ever."""
    recipe = make_run(tmp_path, members=12)["recipe"] | {"objective": {"units": units}}
    (tmp_path / "recipe.toml").write_text(tomli_w.dumps(recipe))
    assert ("a trivial prediction's error" in read(tmp_path)[0]) == in_chance


def test_events_retries_and_pruned_members(tmp_path: Path) -> None:
    make_run(tmp_path, members=20, failed={7: "worker died twice"}, pruned=(13, 15))
    lines = [
        {"time": 1.0, "kind": "worker_died", "trials": [5, 7], "worker": 1, "detail": "<killed>"},
        {"time": 2.0, "kind": "retry", "trials": [5, 7], "worker": 0, "detail": "attempt 2 of 3"},
        {"time": 3.0, "kind": "worker_died", "trials": [7], "worker": 0, "detail": "<killed>"},
        {"time": 4.0, "kind": "made_up_kind", "trials": [], "detail": ""},
    ]
    text = "\n".join(json.dumps(line) for line in lines)
    (tmp_path / "events.jsonl").write_text(f'{text}\nnonsense\n{{"time": 5.0, "ki')
    _, page = read(tmp_path)
    rows = [[cell.strip() for cell in row] for row in page.rows["incidents"][1:]]
    assert rows[0] == ["a worker died", "2", "5, 7", "<killed>"]
    assert rows[1] == ["evaluated again", "1", "5, 7", "attempt 2 of 3"]
    assert rows[2][:3] == ["made_up_kind", "1", ""]
    assert (
        "1 member that something happened to ended with a fitness all the same: 5."
        in (page.text["recovered"])
    )
    assert "line 5: not an event" in page.text["unread"]
    assert "line 6: not an event" in page.text["unread"]
    assert "2 members pruned" in page.text["pruned"]
    assert "100 % of a whole member's time" in page.text["pruned"]
    assert "Fitness of 17 members" in page.labels["figure-fitness"][0]
    assert facts.read_run(tmp_path).best not in facts.read_run(tmp_path).pruned


@pytest.mark.parametrize("method", ["random", "cmaes"])
def test_searches_without_parents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    draw_only(monkeypatch, "fitness", "rounds", "search", "lineage")
    make_run(tmp_path, members=16, population=8, method=method)
    text, page = read(tmp_path)
    shown = page.text["figure-fitness"]
    assert ("initial population" in shown) == (method != "random")
    assert "child" not in shown
    assert "proposed whole by cmaes" in text if method == "cmaes" else "a random draw" in text
    assert "figure-lineage" not in page.labels
