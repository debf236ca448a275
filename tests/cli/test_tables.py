"""Tables of results on the terminal."""

from __future__ import annotations

import pytest

from engine.cli.tables import print_outcome
from engine.objective.terms import TERM_NAMES


def lines_of(weights: dict[str, float], capsys: pytest.CaptureFixture[str]) -> list[str]:
    spread = {"values": [0.5], "mean": 0.5, "sd": 0.0, "n": 1}
    kinds = dict.fromkeys(("untrained", "initial_population", "random", "best"), spread)
    found = {"best_trial": 3, "best_search_fitness": 0.5, "compared": {}, "failures": 0}
    kinds["random"], found["luckiest_random"] = {**spread, "each": 2}, {**spread, "of": 2}
    print_outcome({"weights": dict.fromkeys(TERM_NAMES, 0.0) | weights, **kinds, **found})
    losses, _, fitness = capsys.readouterr().out.partition("Fitness")
    assert "random losses, fresh seeds, means of 2" in fitness
    assert "luckiest of 2 random losses" in fitness
    return losses.splitlines()


def test_a_loss_of_few_terms_is_shown_without_the_others(
    capsys: pytest.CaptureFixture[str],
) -> None:
    _, _, *rows, last = lines_of({"rgb/shuffle": 0.25, "flow/predict": 0.75}, capsys)
    assert last == "the other 37 terms have weight 0"
    assert [row.split()[1:] for row in rows] == [["flow/predict", "0.75"], ["rgb/shuffle", "0.25"]]


def test_a_loss_of_many_terms_is_shown_by_its_ends(capsys: pytest.CaptureFixture[str]) -> None:
    weights = {name: (i + 1) / 100 for i, name in enumerate(TERM_NAMES)}
    _, heading, *rows = lines_of(weights, capsys)
    assert "ten highest" in heading and len(rows) == 10
    assert rows[0].split()[1:3] == [TERM_NAMES[-1], "0.39"] and rows[0].split()[-1] == "0.01"
