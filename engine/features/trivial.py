"""Features that take no learning: what a network's fitness has to be above."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from math import pi

import torch
from torch import Tensor, nn
from torch.nn import functional

from engine.data.flow import FlowPreset, dis_flow
from engine.data.views import RGB_MEAN, RGB_STD

SIZE = 6
"""Cells along each side of a picture."""
DIRECTIONS = 8
"""Bins of a histogram of directions: to the right, right and down, down, and so on."""
STRETCHES = 4
"""Parts of a clip's time, each with a histogram of its own."""


class MeanFrame(nn.Module):
    """A clip's mean frame: (N, 3, T, H, W) to (N, 3 size^2)."""

    def __init__(self, size: int = SIZE) -> None:
        super().__init__()
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        """How a clip looks, and nothing of how it moves."""
        return functional.adaptive_avg_pool2d(x.float().mean(2), self.size).flatten(1)


class FrameDifferences(nn.Module):
    """Mean absolute difference of neighbouring frames: (N, 3, T, H, W) to (N, size^2), or 3 size^2 in ``colour``."""

    def __init__(self, size: int = SIZE, *, colour: bool = False) -> None:
        super().__init__()
        self.size, self.colour = size, colour

    def forward(self, x: Tensor) -> Tensor:
        """Where a clip moves and how much, and nothing of which way."""
        change = x.float().diff(dim=2).abs().mean(2)
        if not self.colour:
            change = change.mean(1, keepdim=True)
        return functional.adaptive_avg_pool2d(change, self.size).flatten(1)


class FlowDirections(nn.Module):
    """A clip's directions of flow over time: RGB clips (N, 3, T, H, W) to (N, STRETCHES DIRECTIONS).

    Flow is OpenCV's, on the CPU, whatever the device. Clips are normalised by Kinetics' statistics.
    """

    def __init__(self, preset: FlowPreset = "fine", *, threads: int = 1) -> None:
        super().__init__()
        self.preset, self.threads = preset, threads

    def forward(self, x: Tensor) -> Tensor:
        """Which way a clip moves and when, and nothing of where or of what."""
        mean, std = torch.tensor(RGB_MEAN), torch.tensor(RGB_STD)
        levels = (x.float().cpu().permute(0, 2, 3, 4, 1) * std + mean) * 255
        frames = levels.round().clamp(0, 255).to(torch.uint8).numpy()
        with ThreadPoolExecutor(self.threads, "flow") as pool:
            flow = dis_flow(frames, preset=self.preset, pool=pool)
        return direction_histograms(torch.from_numpy(flow)).to(x.device, torch.float32)


def direction_histograms(flow: Tensor) -> Tensor:
    """Histograms of the directions of flow (N, T, H, W, 2): float64 (N, STRETCHES DIRECTIONS) of sum 1.

    A pixel counts by how far it moves, in the nearest of DIRECTIONS bins and in the stretch of time that its map is
    in. All zeros where nothing moves.
    """
    u, v = flow.double().unbind(-1)
    way = (torch.atan2(v, u) * (DIRECTIONS / (2 * pi))).round().long() % DIRECTIONS
    stretch = torch.arange(flow.shape[1], device=flow.device) * STRETCHES // flow.shape[1]
    bins = way + DIRECTIONS * stretch.view(-1, 1, 1)
    counts = u.new_zeros(len(flow), STRETCHES * DIRECTIONS)
    counts.scatter_add_(1, bins.flatten(1), torch.hypot(u, v).flatten(1))
    total = counts.sum(1, keepdim=True)
    return counts / torch.where(total > 0, total, 1.0)


TRIVIAL = ("mean frame", "frame differences", "flow directions")


def trivial_networks(preset: FlowPreset, *, threads: int) -> dict[str, nn.Module]:
    """What computes each of these features, by its name in TRIVIAL."""
    made = (MeanFrame(), FrameDifferences(), FlowDirections(preset, threads=threads))
    return dict(zip(TRIVIAL, made, strict=True))
