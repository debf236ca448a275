"""Features that take no learning: what a network's fitness has to be above."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

SIZE = 6
"""Cells along each side of a picture."""


class MeanFrame(nn.Module):
    """A clip's mean frame: (N, 3, T, H, W) to (N, 3 SIZE^2)."""

    def forward(self, x: Tensor) -> Tensor:
        """How a clip looks, and nothing of how it moves."""
        return functional.adaptive_avg_pool2d(x.float().mean(2), SIZE).flatten(1)


class FrameDifferences(nn.Module):
    """Mean absolute difference of neighbouring frames: (N, 3, T, H, W) to (N, SIZE^2)."""

    def forward(self, x: Tensor) -> Tensor:
        """Where a clip moves and how much, and nothing of which way."""
        change = x.float().diff(dim=2).abs().mean((1, 2))
        return functional.adaptive_avg_pool2d(change[:, None], SIZE).flatten(1)


TRIVIAL: dict[str, type[nn.Module]] = {
    "mean frame": MeanFrame,
    "frame differences": FrameDifferences,
}
