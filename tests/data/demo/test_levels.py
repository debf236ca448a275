"""The level of training with labels: shown where it was measured, and still about what training reaches."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from engine.core.recipe import load_recipe, override
from engine.core.runtime import choose_runtime, make_deterministic
from engine.data.demo.demo import make_demo
from engine.data.demo.levels import FITNESS, WITH_LABELS, levels

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def deterministic() -> Iterator[None]:
    make_deterministic(choose_runtime("cpu"))
    yield
    torch.use_deterministic_algorithms(False)


def test_levels_are_for_the_network_and_the_judge_that_they_were_measured_with() -> None:
    """Where this fails, benchmarks/with_labels.py prints the new numbers, and the setting that goes with them."""
    recipe = load_recipe("demo")
    assert levels(recipe) == {WITH_LABELS: FITNESS}
    assert levels(override(recipe, ["optim.steps=20", "search.rounds=3", "seed=7"]))
    for change in ("clip.size=32", "model.width=0.25", "fitness.readout=raw", "fitness.metric=nmi"):
        assert not levels(override(recipe, [change]))


@pytest.mark.slow
def test_training_with_labels_is_on_its_way_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, deterministic: None
) -> None:
    """On a quarter of the clips, for a quarter of the steps: .56 and .60, .30 and .19 with shuffled labels."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    bench = importlib.import_module("with_labels")
    train, judged = (
        make_demo(tmp_path / str(seed), seed=seed, clips_per_class=count, unlabelled_clips=0)
        for seed, count in ((1, 12), (0, 6))
    )
    dataset = bench.dataset_of([train.labelled], [judged.labelled], cache=tmp_path)
    recipe = override(load_recipe("demo"), [*bench.SCRATCH, "optim.steps=160"])
    fitness, accuracy, _ = bench.measure(dataset, recipe, choose_runtime("cpu"), seed=0)
    assert 0.4 < fitness < max(FITNESS) and accuracy > 0.35
