"""Features that take no learning, against numpy, and on a picture that moves as it was told to."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor

import kernels
from engine.data.flow import dis_flow
from engine.data.views import RGB_MEAN, RGB_STD
from engine.features.trivial import (
    DIRECTIONS,
    STRETCHES,
    TRIVIAL,
    FlowDirections,
    FrameDifferences,
    MeanFrame,
    direction_histograms,
    trivial_networks,
)


def test_pictures_and_changes_are_cell_means() -> None:
    x = torch.randn(2, 3, 5, 12, 12, generator=torch.Generator().manual_seed(0))
    cells = x.double().numpy().reshape(2, 3, 5, 6, 2, 6, 2).mean((4, 6))
    np.testing.assert_allclose(MeanFrame()(x), cells.mean(2).reshape(2, -1), atol=1e-6)
    change = np.abs(np.diff(x.double().numpy(), axis=2)).mean((1, 2))
    expected = change.reshape(2, 6, 2, 6, 2).mean((2, 4)).reshape(2, -1)
    np.testing.assert_allclose(FrameDifferences()(x), expected, atol=1e-6)
    change = np.abs(np.diff(x.double().numpy(), axis=2)).mean(2)
    expected = change.reshape(2, 3, 4, 3, 4, 3).mean((3, 5)).reshape(2, -1)
    np.testing.assert_allclose(FrameDifferences(4, colour=True)(x), expected, atol=1e-6)


def test_a_still_clip_has_no_differences_and_one_that_moves_has_no_other_mean() -> None:
    still = torch.randn(1, 3, 1, 12, 12).expand(1, 3, 6, 12, 12)
    assert not FrameDifferences()(still).any()
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    moving = torch.randn(1, 3, 6, 12, 12)
    torch.testing.assert_close(MeanFrame()(moving), MeanFrame()(moving[:, :, order]))
    assert list(trivial_networks("fine", threads=1)) == list(TRIVIAL)


@pytest.mark.parametrize("maps", (1, 3, 7, 8))
def test_histograms_of_directions_are_numpys(maps: int) -> None:
    flow = np.random.default_rng(0).normal(size=(3, maps, 5, 4, 2))
    flow[2] = 0  # nothing moves
    expected = np.zeros((3, STRETCHES, DIRECTIONS))
    edges = (np.arange(DIRECTIONS + 1) - 0.5) * 360 / DIRECTIONS
    for clip, stretches in zip(flow, expected, strict=True):
        for k, (u, v) in enumerate(np.moveaxis(clip, -1, 1)):
            degrees = (np.degrees(np.arctan2(v, u)) - edges[0]) % 360 + edges[0]
            counts = np.histogram(degrees, edges, weights=np.sqrt(u * u + v * v))[0]
            stretches[k * STRETCHES // maps] += counts
    expected[:2] /= expected[:2].sum((1, 2), keepdims=True)
    found = direction_histograms(torch.from_numpy(flow))
    np.testing.assert_allclose(found, expected.reshape(3, -1), atol=1e-12)


def moving(turns: list[float], size: int = 32) -> Tensor:
    """A clip of smooth noise that moves by 1.5 pixels a frame, at these angles in turn: uint8 (1, T, H, W, 3)."""
    noise = np.random.default_rng(1).uniform(0, 255, (200, 200, 3)).astype(np.float32)
    picture = cv2.normalize(cv2.GaussianBlur(noise, (0, 0), 2.5), None, 0, 255, cv2.NORM_MINMAX)
    steps = [(0.0, 0.0), *((1.5 * np.cos(turn), 1.5 * np.sin(turn)) for turn in turns)]
    centres = 100 - np.cumsum(steps, axis=0)  # what is seen moves against the window
    frames = [cv2.getRectSubPix(picture, (size, size), tuple(map(float, c))) for c in centres]
    return torch.from_numpy(np.stack(frames).astype(np.uint8))[None]


def test_a_picture_goes_the_way_it_was_moved() -> None:
    """Right, then down, then left, then up, in a stretch each; and flow is that of the frames themselves."""
    ways = [0, 2, 4, 6]
    clip = moving([way * 2 * np.pi / DIRECTIONS for way in ways for _ in range(2)])
    rgb, _ = kernels.clip_views(clip, torch.tensor(RGB_MEAN), torch.tensor(RGB_STD))
    histogram = FlowDirections("best")(rgb)
    assert histogram.view(STRETCHES, DIRECTIONS).argmax(1).tolist() == ways
    assert (histogram.view(STRETCHES, DIRECTIONS).max(1).values > 0.15).all()
    flow = torch.from_numpy(dis_flow(clip.numpy(), preset="best"))
    torch.testing.assert_close(histogram, direction_histograms(flow).float(), rtol=0, atol=0)
