"""Trivial baselines on colours, and against what was measured for the real set."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.core.runtime import choose_runtime
from engine.evaluate.baselines import baselines
from engine.evaluate.datasets import Dataset, open_dataset

RUNTIME = choose_runtime("cpu")


def test_colours_are_found_by_the_mean_frame_alone(colour_set: Dataset) -> None:
    found = baselines(colour_set, runtime=RUNTIME)
    assert found["ridge on the mean 16x16 frame"].mean == 1.0
    assert found["5 nearest neighbours by file facts"].mean < 0.5  # all files are alike
    assert all(spread.n == 3 for spread in found.values())


@pytest.mark.data
@pytest.mark.slow
def test_on_weizmann_they_are_where_they_were_measured(real_data: Path, tmp_path: Path) -> None:
    """43.3, 55.6 and 13.3 % by another program, on whole frames at one strength, and with the files' sizes."""
    dataset = open_dataset(
        real_data / "weizmann",
        name="folders",
        group_pattern="^[^_]+",
        cache=tmp_path,
        report=lambda *_: None,
    )
    assert len(dataset.folds) == 9 and len(dataset.classes) == 10
    mean, change, facts = (s.mean for s in baselines(dataset, runtime=RUNTIME).values())
    assert abs(mean - 0.433) < 0.08 and abs(change - 0.556) < 0.08 and facts < 0.3
