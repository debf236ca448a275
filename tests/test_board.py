"""What TensorBoard gets of a search, read back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from engine.board import Board
from engine.objective.terms import TERM_NAMES
from engine.search import MemberRecord


def record(trial: int, fitness: float | None, state: str = "complete") -> dict[str, Any]:
    return {
        "trial": trial,
        "state": state,
        "fitness": fitness,
        "weights": {name: (trial + i) % 7 / 7 for i, name in enumerate(TERM_NAMES)},
        "metrics": {"nmi": 0.1 * trial},
        "terms": {"rgb/predict": 1.0 + trial},
        "seconds": 2.0,
        "clips_per_second": 50.0 + trial,
    }


def points(folder: Path) -> dict[str, list[tuple[int, float]]]:
    found = EventAccumulator(str(folder))
    found.Reload()
    tags = found.Tags()["scalars"]
    return {t: [(p.step, pytest.approx(p.value)) for p in found.Scalars(t)] for t in tags}


def test_points_of_a_search(tmp_path: Path) -> None:
    before = MemberRecord(0, {}, None, None, 0, state="complete", fitness=0.3, attributes={})
    lost = MemberRecord(1, {}, None, None, 0, state="failed", fitness=None, attributes={})
    board = Board(tmp_path, before=[before, lost])
    board.member(record(2, 0.25))
    board.member(record(3, None, "failed"))
    board.member(record(4, 0.4))
    board.member(record(5, 0.2, "pruned"))
    board.close()
    found = points(tmp_path)
    assert found["search/fitness"] == [(2, 0.25), (4, 0.4)]
    assert found["search/best_so_far"] == [(2, 0.3), (3, 0.3), (4, 0.4), (5, 0.4)]
    assert found["search/failed"] == [(2, 1), (3, 2), (4, 2), (5, 2)]
    assert found["search/pruned"][-1] == (5, 1)
    assert found["terms/rgb/predict"] == [(2, 3.0), (4, 5.0)]
    assert found["metrics/nmi"] == [(2, 0.2), (4, 0.4)]
    assert found["throughput/clips_per_second"] == [(2, 52.0), (4, 54.0)]
    assert found["throughput/seconds_per_member"] == [(2, 2.0), (4, 2.0)]
    weights = {name: found[f"best/{name}"] for name in TERM_NAMES}
    assert weights == {name: [(4, (4 + i) % 7 / 7)] for i, name in enumerate(TERM_NAMES)}
