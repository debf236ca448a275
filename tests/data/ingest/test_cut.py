from __future__ import annotations

import numpy as np

from engine.data.ingest.cut import Settings, plan_starts

SETTINGS = Settings(
    fps=25, short_side=32, clip_seconds=10, clips_per_video=None, min_seconds=1, quality=85, seed=0
)


def test_starts_depend_on_seed_and_path_alone() -> None:
    assert plan_starts(9.0, SETTINGS, "a") == plan_starts(10.03, SETTINGS, "a") == [0.0]
    starts = plan_starts(605.0, SETTINGS, "a")
    assert len(starts) == 11
    assert starts == sorted(set(starts))
    assert 0 <= starts[0] and starts[-1] <= 595.0
    assert starts == plan_starts(605.0, SETTINGS, "a")
    assert starts != plan_starts(605.0, SETTINGS, "b")
    assert starts != plan_starts(605.0, Settings(**{**vars(SETTINGS), "seed": 1}), "a")
    drawn = [plan_starts(30.0, SETTINGS, str(i))[0] for i in range(400)]
    assert 9.0 < np.mean(drawn) < 11.0  # uniform over [0, 20]


def test_starts_at_equal_distances_leave_no_end_that_is_long_enough() -> None:
    every = Settings(**{**vars(SETTINGS), "every": 10.0})
    assert plan_starts(0.5, every, "a") == [0.0]
    assert plan_starts(10.9, every, "a") == [0.0]
    assert plan_starts(11.0, every, "a", begin=3.0) == [3.0, 13.0]
    assert plan_starts(35.0, every, "a") == plan_starts(35.0, every, "b") == [0.0, 10.0, 20.0, 30.0]


def test_settings_of_later_versions_leave_old_data_sets_as_they_are() -> None:
    assert "every" not in SETTINGS.told() and SETTINGS.told()["clips_per_video"] is None
    assert Settings(**{**vars(SETTINGS), "every": 10.0}).told()["every"] == 10.0
