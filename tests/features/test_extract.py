"""Outputs for every view of every clip: whose row is whose, by whose normalisation, and nothing changed by it."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from engine.core.recipe import Audio
from engine.core.runtime import choose_runtime
from engine.data.pipeline import InputPipeline
from engine.data.plan import plan_views
from engine.evaluate.datasets import Dataset
from engine.features import extract
from engine.features.extract import Cuts, Extractor, check_undamaged, clip_of
from engine.model.network_file import Card
from tests.labelled import INPUT, network

RUNTIME = choose_runtime("cpu")
PLAIN = Card(arch="r3d_18", input=INPUT, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))


class Colours(nn.Module):
    """The mean colour of each half of the frames: which clip, which view, which crop."""

    def forward(self, rgb: Tensor) -> Tensor:
        n, c, t, h, w = rgb.shape
        return rgb.reshape(n, c, t, h, 2, w // 2).mean((3, 5)).flatten(1)


def extractor(dataset: Dataset, clips: np.ndarray, **more: Any) -> Extractor:
    cuts = {"views": 2, "crops": 1, "batch_size": 7, **more}
    bank = cuts.pop("bank", None)
    return Extractor(dataset.index, clips, cuts=Cuts(INPUT, **cuts), runtime=RUNTIME, bank=bank)


def decoded(dataset: Dataset, clip: int, view: int, place: float | None) -> Tensor:
    """One clip's view, uint8 (1, T, H, W, 3), decoded by itself."""
    shape = clip_of(INPUT)
    settings: dict[str, Any] = {"audio": Audio(), "device": RUNTIME.device, "batch_size": 1}
    pipeline = InputPipeline(
        dataset.index, shape, num_frames=4, threads=1, flow=False, sound=False, **settings
    )
    plan = plan_views(dataset.index, shape, clips=np.array([clip]), view=view, num_views=2)
    if place is not None:
        plan = replace(plan, box=np.array([[place, place, 1.0, 1.0]], np.float32))
    return pipeline.load(plan).rgb


def test_rows_are_the_clips_own_whatever_the_batches(colour_set: Dataset) -> None:
    clips = np.arange(0, 60, 7)
    (found,) = extractor(colour_set, clips, batch_size=4).outputs([Colours()], [PLAIN])
    assert found.shape == (9, 2, 24) and found.dtype == torch.float32
    for row, clip in enumerate(clips):
        for view in range(2):
            frames = decoded(colour_set, int(clip), view, None).permute(0, 4, 1, 2, 3) / 255
            torch.testing.assert_close(found[row, view], Colours()(frames)[0], atol=1e-5, rtol=1e-4)


def test_three_crops_are_the_middle_and_both_ends(colour_set: Dataset) -> None:
    (found,) = extractor(colour_set, np.array([5]), crops=3).outputs([Colours()], [PLAIN])
    places = [None, 0.0, 1.0]
    for view in range(2):
        for crop, place in enumerate(places):
            frames = decoded(colour_set, 5, view, place).permute(0, 4, 1, 2, 3) / 255
            torch.testing.assert_close(
                found[0, 3 * view + crop], Colours()(frames)[0], atol=1e-5, rtol=1e-4
            )
    assert len({tuple(row.tolist()) for row in found[0]}) == 6


def test_each_network_is_normalised_by_its_card(colour_set: Dataset) -> None:
    other = msgspec.structs.replace(PLAIN, mean=(0.5, 0.25, 0.0), std=(0.5, 0.1, 2.0))
    first, second = extractor(colour_set, np.arange(9)).outputs([Colours()] * 2, [PLAIN, other])
    mean, std = (torch.tensor(v).repeat_interleave(8) for v in (other.mean, other.std))
    torch.testing.assert_close(second, (first - mean) / std, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("batch_norm", ["running", "batch"])
def test_networks_are_as_before_and_as_in_any_company(colour_set: Dataset, batch_norm: str) -> None:
    nets = [network(seed)[0].train(seed == 0) for seed in range(3)]
    before = [copy.deepcopy(net.state_dict()) for net in nets]
    cards = [network()[1]] * 3
    make = extractor(colour_set, np.arange(20))
    together = make.outputs(nets, cards, batch_norm=batch_norm)
    (alone,) = make.outputs(nets[1:2], cards[:1], batch_norm=batch_norm)
    torch.testing.assert_close(alone, together[1])
    for net, state in zip(nets, before, strict=True):
        assert all(torch.equal(state[name], tensor) for name, tensor in net.state_dict().items())
    assert [net.training for net in nets] == [True, False, False]


def test_running_statistics_make_a_clip_independent_of_the_others(colour_set: Dataset) -> None:
    net, card = network()
    (many,) = extractor(colour_set, np.arange(20)).outputs([net], [card])
    (few,) = extractor(colour_set, np.arange(2)).outputs([net], [card])
    torch.testing.assert_close(few, many[:2], atol=1e-5, rtol=1e-4)
    settings = {"batch_norm": "batch"}
    (many,) = extractor(colour_set, np.arange(20)).outputs([net], [card], **settings)
    (few,) = extractor(colour_set, np.arange(2)).outputs([net], [card], **settings)
    assert (few - many[:2]).abs().max() > 1e-2


def test_a_bank_is_decoded_once(colour_set: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    bank: dict[Any, Any] = {}
    (first,) = extractor(colour_set, np.arange(9), bank=bank).outputs([Colours()], [PLAIN])
    assert len(bank) == 1
    monkeypatch.setattr(extract, "InputPipeline", None)
    (again,) = extractor(colour_set, np.arange(9), bank=bank).outputs([Colours()], [PLAIN])
    assert torch.equal(first, again)
    monkeypatch.undo()
    (other,) = extractor(colour_set, np.arange(8), bank=bank).outputs([Colours()], [PLAIN])
    assert torch.equal(other, first[:8])


def test_classes_are_mixed_in_batches(colour_set: Dataset) -> None:
    """So that batch statistics don't tell them apart."""
    make = extractor(colour_set, np.arange(60), batch_size=12, views=1)
    for part in np.split(make._order, 5):
        assert len(set(colour_set.label[part])) >= 3


def test_damage_is_an_error_and_not_another_clip(colour_set: Dataset) -> None:
    check_undamaged(colour_set.index)
    colour_set.index.substituted[3] += 1
    try:
        with pytest.raises(ValueError, match="damaged"):
            extractor(colour_set, np.arange(4)).outputs([Colours()], [PLAIN])
    finally:
        colour_set.index.substituted.clear()
