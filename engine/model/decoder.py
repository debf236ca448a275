"""Decoders from a network's last activations to frames, flow maps or log-mel.

Shape letters: N clips, C channels, T frames, H W pixels, F audio frames.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

LINEAR_START = 0.03
"""Standard deviation of a linear decoder's first output, for features of unit size."""


class Decoder(nn.Module):
    """Decode stage-4 activations to ``out_size``: (T, H, W) frames or, of two numbers, (F, mels).

    Input (N, in_channels, t, h, w) or (N, in_channels, f, m), output (N, out_channels, *out_size),
    of the compute dtype or float32. A 1x1 projection to ``hidden`` channels is spread over all T frames
    and a quarter of H and W (of both axes for audio), where each channel gets a gain and a shift of its
    own at each position: without these, frames that come from one time step could not differ. Then come
    a convolution of 3 per axis, another at half the size, over space alone where there is time, and the
    one to the outputs at the full size; group norm and GELU after all but the last. That one starts at
    zero, and with it the output. An axis is never shrunk on the way, unless the input is longer than
    ``out_size`` there.

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
        video = len(out_size) == 3
        conv: type[nn.Conv2d] | type[nn.Conv3d] = nn.Conv3d if video else nn.Conv2d
        self.out_size = tuple(out_size)
        self.coarse_grid, self.fine_grid = self._grid(4), self._grid(2)
        self.project = conv(in_channels, hidden, 1)
        self.gain = nn.Parameter(1.0 + 0.5 * torch.randn(1, hidden, *self.coarse_grid))
        self.shift = nn.Parameter(0.5 * torch.randn(1, hidden, *self.coarse_grid))
        self.mix = conv(hidden, hidden, 3, padding=1)
        space = ((1, 3, 3), (0, 1, 1)) if video else (3, 1)
        self.refine = conv(hidden, hidden, space[0], padding=space[1])  # type: ignore[arg-type]
        self.norms = nn.ModuleList(nn.GroupNorm(1, hidden) for _ in range(3))
        self.output = conv(hidden, out_channels, 3, padding=1)
        for module in (self.project, self.mix, self.refine):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            nn.init.zeros_(module.bias)  # type: ignore[arg-type]
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)  # type: ignore[arg-type]

    def _grid(self, part: int) -> tuple[int, ...]:
        """All frames and a ``part``-th of each other axis, rounded up."""
        time = self.out_size[:1] if len(self.out_size) == 3 else ()
        return (*time, *(-(-n // part) for n in self.out_size[len(time) :]))

    def forward(self, x: Tensor) -> Tensor:
        """Decode stage-4 activations to (N, out_channels, *out_size)."""
        first, second, third = self.norms
        sizes = zip(x.shape[2:], self.out_size, self.coarse_grid, strict=True)
        grid = [max(min(now, end), coarse) for now, end, coarse in sizes]
        out = first(_resize(self.project(x), grid))
        out = functional.gelu(out * _resize(self.gain, grid) + _resize(self.shift, grid))
        out = functional.gelu(second(self.mix(out)))
        grid = [max(now, fine) for now, fine in zip(grid, self.fine_grid, strict=True)]
        out = functional.gelu(third(self.refine(_resize(out, grid))))
        decoded: Tensor = self.output(_resize(out, self.out_size))
        return decoded


def _resize(x: Tensor, size: list[int] | tuple[int, ...]) -> Tensor:
    return functional.interpolate(x, size=list(size), mode="nearest-exact")


class LinearDecoder(nn.Module):
    """Decode each position of stage 4 to its block of the output by one linear map, as masked autoencoders do.

    Input (N, in_channels, *grid), output (N, out_channels, *out_size). All that is decoded can then be read out
    of the features linearly, and no layer of its own has to learn before the network does (He et al., "Masked
    Autoencoders", predict patches likewise). ``future``: what comes next is decoded from the last time step alone.
    The weights start small, so that the first output is about zero and the gradient reaches the network at once.

    Blocks are of equal size; where the output is no multiple of the grid, or smaller, the nearest of their
    values are taken. Raises ValueError for sizes that can't be.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        out_size: tuple[int, ...],
        *,
        grid: tuple[int, ...],
        future: bool = False,
    ) -> None:
        super().__init__()
        if len(out_size) not in (2, 3) or len(grid) != len(out_size) or min(*out_size, *grid) < 1:
            raise ValueError(
                f"decoder: grid is {grid}, out_size {out_size}; give (T, H, W) or, for audio, (F, mels), all >= 1"
            )
        if min(in_channels, out_channels) < 1:
            raise ValueError(
                f"decoder: in_channels is {in_channels}, out_channels {out_channels}; each must be at least 1"
            )
        self.out_size, self.future = tuple(out_size), future
        used = (1, *grid[1:]) if future else grid
        block = tuple(-(-out // now) for out, now in zip(out_size, used, strict=True))
        conv: type[nn.ConvTranspose2d] | type[nn.ConvTranspose3d]
        conv = nn.ConvTranspose3d if len(out_size) == 3 else nn.ConvTranspose2d
        self.output = conv(in_channels, out_channels, block, stride=block)  # type: ignore[arg-type]
        nn.init.normal_(self.output.weight, std=LINEAR_START * in_channels**-0.5)
        nn.init.zeros_(self.output.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """What stage-4 activations decode to, (N, out_channels, *out_size)."""
        decoded: Tensor = self.output(x[:, :, -1:] if self.future else x)
        return decoded if decoded.shape[2:] == self.out_size else _resize(decoded, self.out_size)
