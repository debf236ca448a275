"""``engine bench signal`` on sizes that take seconds: its lines, that it goes on, and what a user can get wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from click.testing import CliRunner

from engine.bench.signal import UNTRAINED, Look, Plan, Score, Training, plan_of, summary
from engine.cli.main import main
from engine.core.recipe import Search, load_recipe
from engine.data.demo.demo import make_demo
from engine.features.extract import Extractor
from engine.features.readout import READOUTS
from engine.search.members import Proposal
from engine.search.study import SearchStudy

TINY = Path(__file__).parents[1] / "tiny.toml"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two labelled clips a class, and four without labels."""
    made = make_demo(
        tmp_path_factory.mktemp("signal") / "demo", clips_per_class=2, unlabelled_clips=4
    )
    return made.unlabelled, made.labelled


def call(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(main, ["bench", "signal", *map(str, arguments)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == code, (result.output, result.stderr)
    return result.stderr if code else result.output


def test_lines_and_going_on(
    folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    rows, kept = tmp_path / "rows.jsonl", tmp_path / "features"
    options = [
        "--videos",
        folders[0],
        "--labelled",
        folders[1],
        "--recipe",
        TINY,
        "--device",
        "cpu",
    ]
    options += ["--no-presets", "--looks", 2, "--json", rows, "--features", kept]
    call(*options, "--losses", 2)
    first = rows.read_bytes()
    found = [msgspec.json.decode(line, type=Training) for line in first.splitlines()]
    names = [(row.loss, row.seed) for row in found]
    drawn = [(f"drawn:0:{i}", seed) for seed in (0, 1) for i in (0, 1)]
    assert names == [(UNTRAINED, 0), (UNTRAINED, 1), *drawn]
    for row in found[2:]:
        assert [look.step for look in row.looks] == [2, 3] and row.failed is None and row.terms
        assert 0 < row.looks[0].core_seconds < row.looks[1].core_seconds and row.judging > 0
        assert set(READOUTS) < set(row.looks[0].scores)
        assert {"git_sha", "device", "versions"} <= set(row.about)
    assert np.load(kept / "drawn-0-1-0-3.npy").shape == (16, 1, 64)
    rows.write_bytes(first + b'{"key": "cut off by a ki')
    out = call(*options, "--losses", 3)
    again = rows.read_bytes()
    assert again.startswith(first) and len(again.splitlines()) == len(found) + 1 + 2
    assert "drawn:0:2" in out and "Spearman" in out
    # the same numbers, whatever the company
    alone = tmp_path / "alone.jsonl"
    call(*options[:-4], "--json", alone, "--losses", 1)
    (line,) = [row for row in alone.read_text().splitlines() if '"drawn:0:0","seed":0' in row]
    scores = [json.loads(x)["looks"][1]["scores"] for x in (line, first.splitlines()[2])]
    assert scores[0] == scores[1]


def test_what_a_user_can_get_wrong(folders: tuple[Path, Path]) -> None:
    assert "--looks 9" in call("--recipe", TINY, "--looks", 9, code=2)
    assert "neither" in call("--recipe", TINY, "--videos", folders[0], code=2)


def test_drawn_losses_are_those_that_a_search_begins_with() -> None:
    for method in ("surrogate", "evolution", "cmaes", "random", "grid"):
        settings = Search(method=method, population=4, rounds=4, generation=2, sparsity=0.9)
        recipe = msgspec.structs.replace(load_recipe(TINY), search=settings, seed=3)
        plan = plan_of(recipe, losses=6, repeats=1, looks=(), presets=False)
        study = SearchStudy(settings, storage=None, name="s", seed=3, recipe_hash="")
        begun = [proposal.weights for _ in range(2) for proposal in asked(study)][:4]
        assert list(plan.drawn.values())[:4] == begun and len(plan.drawn) == 6
        assert plan.losses == dict(plan.drawn) and plan.seeds == (3, 4)


def asked(study: SearchStudy) -> list[Proposal]:
    """What a search proposes next, all told to be of no use."""
    proposals = study.ask()
    for proposal in proposals:
        study.tell(proposal.number, fitness=0.1, attributes={})
    return proposals


def test_summary_of_made_up_trainings() -> None:
    rng = np.random.default_rng(0)
    plan = Plan({f"drawn:0:{i}": {} for i in range(12)}, {}, (0, 1), (5, 10))
    truth = rng.normal(size=12)

    def look(step: int, value: float) -> Look:
        return Look(step, step * 1.0, 3.0, {"raw": Score(value, value, value)})

    rows = [Training(key="", loss=UNTRAINED, seed=s, looks=[look(0, 0.1)]) for s in (0, 1)]
    for i, loss in enumerate(plan.losses):
        for seed in plan.seeds:
            looks = [look(5, rng.normal()), look(10, truth[i] + 0.01 * rng.normal())]
            rows.append(Training(key="", loss=loss, seed=seed, looks=looks, judging=2.0))
    early, late = summary(rows, plan)
    assert (early.step, late.step) == (5, 10) and early.untrained == pytest.approx(0.1)
    assert late.best == pytest.approx(truth.max(), abs=0.05) and late.core_seconds == 12.0
    assert early.figures is not None and late.figures is not None
    assert late.figures.spearman is not None and late.figures.spearman > 0.9
    assert late.figures.ratio > 20 > early.figures.ratio
    rows[-1] = msgspec.structs.replace(rows[-1], failed="loss is nan")
    assert summary(rows, plan)[1].figures.losses == 11  # type: ignore[union-attr]
    # half of the clips may hold every class under one seed alone, and features may not be finite
    seen = rows[2].looks[1]
    more = msgspec.structs.replace(seen, scores={**seen.scores, "half": Score(1.0, 1.0, 1.0)})
    rows[2] = msgspec.structs.replace(rows[2], looks=[rows[2].looks[0], more])
    gone = msgspec.structs.replace(rows[4].looks[1], scores={})
    rows[4] = msgspec.structs.replace(rows[4], looks=[rows[4].looks[0], gone], failed="nan")
    (early, late) = summary(rows, plan)
    assert early.readout == late.readout == "raw"
    assert late.figures is not None and late.figures.losses == 10


def test_features_that_are_not_finite_fail_their_training_alone(
    folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    taken, rows = Extractor.outputs, tmp_path / "rows.jsonl"

    def outputs(self: Extractor, networks: Any, cards: Any, **how: Any) -> Any:
        features = taken(self, networks, cards, **how)
        if len(features) > 1:
            features[-1][0] = float("nan")
        return features

    monkeypatch.setattr(Extractor, "outputs", outputs)
    data = ("--videos", folders[0], "--labelled", folders[1])
    how = ("--recipe", TINY, "--device", "cpu", "--no-presets", "--losses", 2, "--json", rows)
    out = call(*data, *how)
    assert "can't be judged" in out and "how well fitness ranks" in out
    found = [msgspec.json.decode(line, type=Training) for line in rows.read_bytes().splitlines()]
    assert [row.failed is None for row in found] == [True, True, True, False, True, False]
