"""The benchmark of cheaper members: what it compares, what it counts, and that it goes on where it stopped."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest

from engine.core.recipe import load_recipe, override
from engine.data.library import Library
from engine.data.shards.index import ClipIndex

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def bench(request: pytest.FixtureRequest) -> ModuleType:
    patch = pytest.MonkeyPatch()
    patch.syspath_prepend(str(ROOT / "benchmarks"))
    request.addfinalizer(patch.undo)
    return importlib.import_module("cheaper_members")


def test_children_differ_from_their_parents_by_one_weight(bench: ModuleType) -> None:
    losses = bench.losses_of(7)
    assert [loss.parent is None for loss in losses] == [True, False] * 3 + [True]
    for parent, child in zip(losses[0::2], losses[1::2], strict=False):
        assert child.parent == parent.name
        assert sum(child.weights[n] != parent.weights[n] for n in parent.weights) == 1


def test_the_comparison_counts_what_both_have(bench: ModuleType) -> None:
    def row(score: float, cpu: float, state: str = "complete") -> dict[str, object]:
        return {"score": score, "cpu": cpu, "seconds": 2 * cpu, "steps": 10 * cpu, "state": state}

    full = {str(i): row(0.1 * i, 4.0) for i in range(8)}
    same = bench.comparison("same", full, full)
    ones = ("spearman", "kendall", "top_quarter_recall", "cpu_share", "steps_share")
    assert [same[name] for name in ones] == pytest.approx([1.0] * 5)
    half = {n: row(-each["score"], 1.0, "pruned") for n, each in full.items() if n != "3"}
    found = bench.comparison("half", half, full)
    assert found["losses"] == 7 and found["spearman"] == pytest.approx(-1.0)
    assert found["cpu_share"] == found["seconds_share"] == 0.25
    assert found["top_quarter_recall"] == 0.0 and found["states"] == {"pruned": 7}


def test_noise_is_told_from_losses(bench: ModuleType) -> None:
    full = {str(i): {"score": s} for i, s in enumerate([0.1, 0.2, 0.4])}
    again = {str(i): {"score": s} for i, s in enumerate([0.3, 0.2, 0.4])}
    halved = {str(i): {"rungs": [[5, -s]]} for i, s in enumerate([0.1, 0.2, 0.4])}
    found = bench.noise(full, again, halved)
    assert found["mean"] == pytest.approx(0.7 / 3) and found["spearman_first_rung"] == -1.0
    # differences -0.2, 0, 0: sd 0.11547, over the root of 2
    assert found["sd_of_a_seed"] == pytest.approx(0.0816497, rel=1e-5)
    assert bench.noise(full, {}, halved) == {}


def test_rows_are_written_once(bench: ModuleType, tiny_shards: Path, tmp_path: Path) -> None:
    def library(name: str) -> Library:
        return Library(ClipIndex([tiny_shards / name]), (tiny_shards / name,), ())

    recipe = override(load_recipe(ROOT / "tests" / "tiny.toml"), ["optim.steps=2"])
    data = library("unlabelled"), library("labelled")
    losses = bench.losses_of(2)
    ways = bench.ways_of(collapse_rank=1.0, bank=4)
    chosen = [ways[0], *(way for way in ways if way.name in ("warm start", "clip bank"))]
    for _ in range(2):
        run = bench.Bench(recipe, data, rows=tmp_path / "rows.jsonl")
        for way in bench.pending(run, chosen, losses):
            run.evaluate(way, losses)
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [(row["way"], row["loss"]) for row in rows] == [
        ("full", "random 0"),
        ("full", "child 0"),
        ("warm start", "child 0"),
        ("bank", ""),
        ("clip bank", "random 0"),
        ("clip bank", "child 0"),
    ]
    assert [row.get("steps") for row in rows] == [2, 2, 1, None, 2, 2]
    assert all(row["cpu"] > 0 and row["seconds"] > 0 for row in rows)
    told = bench.summary(run, chosen)
    assert [row["way"] for row in told] == [
        "warm start",
        "clip bank",
        "scores",
        "zipf beside agreement",
        "bank",
    ]
