"""A small decoder from a network's last activations to frames, flow maps or log-mel.

Shape letters: N clips, C channels, T frames, H W pixels, F audio frames.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

NUM_STEPS = 2
"""Upsampling steps, each followed by a convolution, before the last one to the full size."""


class Decoder(nn.Module):
    """Decode stage-4 activations to ``out_size``: (T, H, W) frames or, of two numbers, (F, mels).

    Input (N, in_channels, t, h, w) or (N, in_channels, f, m), output (N, out_channels, *out_size),
    of the compute dtype. A 1x1 projection to ``hidden`` channels, then upsampling to a quarter and
    to half of ``out_size``, each followed by a convolution of 3 per axis and ReLU, then upsampling
    to ``out_size`` and a convolution to the outputs. An axis is never shrunk on the way, unless the
    input is longer than ``out_size`` there. The cost is that of one hidden-to-hidden convolution at
    half the size and little more: no step works in ``hidden`` channels at the full size.

    Upsampling repeats the nearest value, whose backward gathers in a fixed order on every device;
    that of linear interpolation adds atomically on CUDA and differs from run to run. Raises
    ValueError for sizes that can't be.
    """

    def __init__(
        self, in_channels: int, out_channels: int, out_size: tuple[int, ...], *, hidden: int
    ) -> None:
        super().__init__()
        if len(out_size) not in (2, 3) or min(out_size) < 1:
            raise ValueError(
                f"decoder: out_size is {out_size}; give (T, H, W), or (F, mels) for audio, all >= 1"
            )
        if min(in_channels, out_channels, hidden) < 1:
            raise ValueError(
                f"decoder: in_channels is {in_channels}, out_channels {out_channels}, hidden"
                f" {hidden}; each must be at least 1"
            )
        conv: type[nn.Conv2d] | type[nn.Conv3d] = nn.Conv3d if len(out_size) == 3 else nn.Conv2d
        self.out_size = tuple(out_size)
        self.project = conv(in_channels, hidden, 1)
        self.steps = nn.ModuleList(conv(hidden, hidden, 3, padding=1) for _ in range(NUM_STEPS))
        self.output = conv(hidden, out_channels, 3, padding=1)
        for module in (self.project, *self.steps):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            nn.init.zeros_(module.bias)
        nn.init.xavier_normal_(self.output.weight)
        nn.init.zeros_(self.output.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """What stage-4 activations decode to, (N, out_channels, *out_size)."""
        out: Tensor = torch.relu(self.project(x))
        for left, conv in zip(range(NUM_STEPS, 0, -1), self.steps, strict=True):
            sizes = zip(out.shape[2:], self.out_size, strict=True)
            size = [max(min(now, end), -(-end // 2**left)) for now, end in sizes]
            out = torch.relu(conv(_resize(out, size)))
        decoded: Tensor = self.output(_resize(out, list(self.out_size)))
        return decoded


def _resize(x: Tensor, size: list[int]) -> Tensor:
    return functional.interpolate(x, size=size, mode="nearest-exact")
