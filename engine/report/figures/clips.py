"""Clips to look at: frames, flow as colours, and log-mel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import hsv_to_rgb
from matplotlib.figure import Figure
from numpy.typing import NDArray

from engine.report.figures.theme import themed

FASTEST = 8.0
"""Pixels from one frame to the next that are drawn in full colour, at least."""
COLUMNS = 2


def flow_colours(flow: NDArray[np.float32]) -> NDArray[np.float64]:
    """Flow (..., 2) in pixels as RGB (..., 3) in [0, 1]: hue is direction (red to the right), saturation speed."""
    speed = np.linalg.norm(flow, axis=-1)
    hue = np.arctan2(flow[..., 1], flow[..., 0]) / (2 * np.pi) % 1.0
    strength = speed / max(FASTEST, float(speed.max(initial=0.0)))
    colours: NDArray[np.float64] = hsv_to_rgb(np.stack([hue, strength, np.ones_like(hue)], axis=-1))
    return colours


@themed
def clips(
    titles: Sequence[str],
    rgb: NDArray[np.uint8],
    flow: NDArray[np.float32],
    sounds: Sequence[NDArray[np.float32] | None],
) -> Figure:
    """Frames (N, T, H, W, 3) of each clip, under them flow (N, T - 1, H, W, 2) and log-mel (frames, mels)."""
    rows = -(-len(titles) // COLUMNS)
    figure = Figure(figsize=(6.2 * COLUMNS, 2.9 * rows), layout="constrained")
    cells = figure.subfigures(rows, COLUMNS, squeeze=False).ravel()
    for cell, title, frames, moved, sound in zip(cells, titles, rgb, flow, sounds, strict=False):
        cell.suptitle(title, fontsize=8)
        axes = cell.subplots(3, 1, height_ratios=[1.0, 1.0, 0.6])
        _show(axes[0], _strip(frames))
        _show(axes[1], _strip(flow_colours(moved), last=1.0))
        axes[2].set(xticks=[], yticks=[])
        if sound is None:
            axes[2].text(0.5, 0.5, "no sound", ha="center", va="center", fontsize=8)
        else:
            axes[2].imshow(sound.T, origin="lower", aspect="auto", cmap="magma", vmin=-2, vmax=2)
    return figure


def _strip(frames: NDArray[Any], *, last: float | None = None) -> NDArray[Any]:
    """Frames (T, H, W, 3) side by side; ``last`` adds an empty one of this shade."""
    if last is not None:
        frames = np.concatenate([frames, np.full_like(frames[:1], last)])
    return np.concatenate(list(frames), axis=1)


def _show(axes: Axes, picture: NDArray[Any]) -> None:
    axes.imshow(picture)
    axes.set_axis_off()
