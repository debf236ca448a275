"""Trivial baselines on colours, and against what was measured for the real set."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import msgspec
import numpy as np
import pytest

from engine.core.recipe import Evaluation, Recipe, override
from engine.core.runtime import choose_runtime
from engine.data.media.encode import write_video
from engine.evaluate import baselines as module
from engine.evaluate.baselines import baselines
from engine.evaluate.datasets import Dataset, open_dataset
from engine.evaluate.protocols import Judge, take_features, videos_of
from engine.features.extract import Cuts
from engine.features.trivial import FrameDifferences, MeanFrame
from engine.model.network_file import Card, ClipInput

RUNTIME = choose_runtime("cpu")
SETTINGS = Evaluation(views=2, kmeans_init=2, kmeans_seeds=3, strengths=(1e-2, 0.1))
RECIPE = msgspec.structs.replace(
    override(Recipe(), ["clip.num_frames=4", "clip.size=32"]), evaluation=SETTINGS
)
HOW: dict[str, Any] = {"shape": ClipInput(4, 2, 32), "recipe": RECIPE, "runtime": RUNTIME}


def test_colours_are_found_by_the_mean_frame_alone(colour_set: Dataset) -> None:
    by_protocol = baselines(colour_set, protocols=["kmeans", "finetune"], **HOW)
    assert list(by_protocol) == ["kmeans", "finetune"]
    found = by_protocol["finetune"]
    assert found["ridge on the mean 16x16 frame"].mean == 1.0
    assert found["mean frame"].mean == 1.0
    assert found["5 nearest neighbours by file facts"].mean < 0.5  # all files are alike
    assert all(spread.n == 3 for spread in found.values())
    clustered = by_protocol["kmeans"]
    assert list(clustered) == ["mean frame", "frame differences"]
    assert clustered["mean frame"].mean > 0.9 > clustered["frame differences"].mean


def test_pictures_are_judged_as_networks_are(colour_set: Dataset) -> None:
    names = ["kmeans", "linear", "retrieval"]
    found = baselines(colour_set, protocols=names, **HOW)
    card = Card(input=ClipInput(4, 2, 32))
    pictures = {"mean frame": MeanFrame(16), "frame differences": FrameDifferences(16, colour=True)}
    for name, picture in pictures.items():
        how: dict[str, Any] = {"settings": SETTINGS, "runtime": RUNTIME}
        (views,) = take_features([(picture, card)], colour_set, **how)
        judge = Judge(colour_set, videos_of(colour_set, views), SETTINGS, RUNTIME, card)
        assert all(found[each][name] == judge.judged(each, [0], {}).value for each in names)


def test_each_protocol_has_the_views_of_its_networks(
    colour_set: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Frozen networks are judged by views of their own input, tuned ones by what fine-tuning tests on."""
    seen: list[str] = []

    def noted(pairs: Any, dataset: Dataset, *, settings: Evaluation, **how: Any) -> Any:
        seen.append(str(Cuts(pairs[0][1].input, settings.views, settings.crops)))
        return take_features(pairs, dataset, settings=settings, **how)

    monkeypatch.setattr(module, "take_features", noted)
    recipe = override(HOW["recipe"], ["clip.size=24", "finetune.views=1", "finetune.crops=3"])
    baselines(colour_set, protocols=["linear", "finetune"], **{**HOW, "recipe": recipe})
    assert seen == ["2 views of 4x32x32 stride 2", "1 view x 3 crops of 4x24x24 stride 2"]


def test_ways_are_found_by_flow_alone(tmp_path: Path) -> None:
    """A texture that goes left or right, from another place each time: no cell of it tells which way."""
    rng = np.random.default_rng(0)
    for number in range(24):
        noise = rng.uniform(0, 255, (64, 160, 3)).astype(np.float32)
        picture = cv2.normalize(cv2.GaussianBlur(noise, (0, 0), 3), None, 0, 255, cv2.NORM_MINMAX)
        way = ("left", "right")[number % 2]
        starts = range(0, 48, 2) if way == "left" else range(48, 0, -2)
        frames = np.stack([picture[:, x : x + 64] for x in starts]).astype(np.uint8)
        folder = tmp_path / "videos" / way
        folder.mkdir(parents=True, exist_ok=True)
        write_video(folder / f"{number % 4 // 2}_{number:02d}.mp4", frames, fps=25)
    dataset = open_dataset(
        tmp_path / "videos",
        name="folders",
        group_pattern="^[01]",
        cache=tmp_path / "cache",
        report=lambda *_: None,
        short_side=64,
        workers=1,
    )
    found = baselines(dataset, protocols=["linear"], **HOW)["linear"]
    assert found["frame differences"].mean < 0.8
    assert found["ridge on flow's directions over time"].mean == 1.0
    assert found["ridge on mean absolute frame differences"].mean < 0.8


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
    found = baselines(dataset, protocols=["linear"], **HOW)["linear"]
    *_, mean, change, _, facts = (spread.mean for spread in found.values())
    assert abs(mean - 0.433) < 0.08 and abs(change - 0.556) < 0.08 and facts < 0.3
