"""What TensorBoard gets of a search, read back."""

from __future__ import annotations

from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from engine.objective.terms import TERM_NAMES
from engine.search.members import State, Trial
from engine.search.records import Board


def trial(number: int, fitness: float | None, state: State = "complete") -> Trial:
    return Trial(
        number,
        {name: (number + i) % 7 / 7 for i, name in enumerate(TERM_NAMES)},
        state=state,
        fitness=fitness if state == "complete" else None,
        rungs=((2, fitness),) if state == "pruned" and fitness is not None else (),
        attributes={
            "metrics": {"nmi": 0.1 * number},
            "terms": {"rgb/predict": 1.0 + number},
            "seconds": 2.0,
            "clips_per_second": 50.0 + number,
        },
    )


def points(folder: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(folder))
    events.Reload()
    tags = events.Tags()["scalars"]
    return {t: [(p.step, pytest.approx(p.value)) for p in events.Scalars(t)] for t in tags}


def test_points_of_a_search(tmp_path: Path) -> None:
    before = Trial(0, {}, state="complete", fitness=0.3)
    lost = Trial(1, {}, state="failed")
    board = Board(tmp_path, before=[before, lost])
    board.member(trial(2, 0.25))
    board.member(trial(3, None, "failed"))
    board.member(trial(4, 0.4))
    board.member(trial(5, 0.2, "pruned"))
    board.close()
    curves = points(tmp_path)
    assert curves["search/fitness"] == [(2, 0.25), (4, 0.4)]
    assert curves["search/best_so_far"] == [(2, 0.3), (3, 0.3), (4, 0.4), (5, 0.4)]
    assert curves["search/failed"] == [(2, 1), (3, 2), (4, 2), (5, 2)]
    assert curves["search/pruned"][-1] == (5, 1)
    assert curves["terms/rgb/predict"] == [(2, 3.0), (4, 5.0)]
    assert curves["metrics/nmi"] == [(2, 0.2), (4, 0.4)]
    assert curves["throughput/clips_per_second"] == [(2, 52.0), (4, 54.0)]
    assert curves["throughput/seconds_per_member"] == [(2, 2.0), (4, 2.0)]
    weights = {name: curves[f"best/{name}"] for name in TERM_NAMES}
    assert weights == {name: [(4, (4 + i) % 7 / 7)] for i, name in enumerate(TERM_NAMES)}
