"""Damage that a decoder stumbles over does not end a run."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.data.shards.damage import substitutes
from engine.data.pipeline import InputPipeline
from engine.data.plan import ClipPlan, plan_views
from engine.data.shards.index import ClipIndex
from engine.core.recipe import Audio, Clip

CLIP = Clip(num_frames=4, num_future_frames=2, size=32)


@pytest.fixture
def shards(tiny_shards: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_shards / "labelled", tmp_path / "set")


def pipeline(index: ClipIndex) -> InputPipeline:
    return InputPipeline(
        index,
        CLIP,
        audio=Audio(),
        device=torch.device("cpu"),
        batch_size=3,
        num_frames=4,
        threads=1,
    )


def plan(index: ClipIndex, *clips: int) -> ClipPlan:
    return plan_views(index, CLIP, clips=np.array(clips), view=0, num_views=1)


@pytest.mark.parametrize("what", ["JPEG's tables", "FLAC's header"])
def test_a_batch_with_a_clip_that_cant_be_decoded(shards: Path, what: str) -> None:
    index = ClipIndex([shards])
    whole = plan(index, 0, 7, 12)
    before = pipeline(index).load(whole)
    (tar,) = shards.glob("*.tar")
    encoded = index.read(7, whole.frames[1].tolist())
    assert encoded.sound is not None
    part = (encoded.frames[1] if "JPEG" in what else encoded.sound).tobytes()
    data = tar.read_bytes()
    at = data.index(part) + (20 if "JPEG" in what else 8)
    tar.write_bytes(data[:at] + b"\xff" * 200 + data[at + 200 :])
    told: list[str] = []
    index = ClipIndex([shards], warn=told.append)
    working = pipeline(index)
    after = working.load(whole)
    stand_in = next(substitutes(7, index.label))
    assert index.label[stand_in] == index.label[7] and index.substituted == {7: 1}
    assert len(told) == 1 and str(tar) in told[0]
    expected = pipeline(index).load(plan(index, 0, stand_in, 12))
    for i in (0, 2):
        assert torch.equal(after.rgb[i], before.rgb[i])
    assert after.rgb[1].shape == expected.rgb[1].shape
    assert not torch.equal(after.rgb[1], before.rgb[1])
    again = working.load(plan(index, 3, 4, 5))  # and it goes on
    assert torch.equal(again.rgb, pipeline(index).load(plan(index, 3, 4, 5)).rgb)


def test_an_error_that_no_damage_explains_is_raised(
    shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = ClipIndex([shards])
    working = pipeline(index)

    def fail(*_: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(working, "_compute_flow", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        working.load(plan(index, 0, 1, 2))
    assert not index.substituted


def test_substitutes_are_others_of_the_label_in_an_order_of_their_own() -> None:
    label = np.array([0, 1] * 40, np.int32)
    for clip in (4, 5):
        order = list(substitutes(clip, label))
        assert order == list(substitutes(clip, label))
        assert clip not in order and len(order) == len(set(order)) > 20
        assert {int(label[i]) for i in order} == {int(label[clip])}
    assert list(substitutes(4, label)) != list(substitutes(6, label))
    assert list(substitutes(0, np.array([3, 4], np.int32))) == []
