"""A picture of random clips of a data set, to look at: frames, flow as colours, and log-mel."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import hsv_to_rgb
from matplotlib.figure import Figure
from numpy.typing import NDArray

from engine.core.recipe import Audio, Clip
from engine.data.audio import LogMel
from engine.data.pipeline import InputPipeline
from engine.data.plan import plan_views
from engine.data.shards.index import ClipIndex
from engine.report.figures.theme import themed

CLIP = Clip(num_frames=6, frame_stride=5, size=112)
FASTEST = 8.0
"""Pixels from one frame to the next that are drawn in full colour, at least."""
COLUMNS = 2


def contact_sheet(shards: Path, png: Path, *, num_clips: int = 12, seed: int = 0) -> list[int]:
    """Draw random clips of a data set, and give their numbers: a row of frames, one of flow, and sound below.

    Frames are the largest central squares of the clip's middle, 0.2 s apart at 25 frames/s; flow's hue is its
    direction and its strength its speed. Raises ValueError for no clips and a file that can't be written.
    """
    if png.suffix.lower() != ".png":
        raise ValueError(f"{png}: name a picture that ends in .png")
    index = ClipIndex([shards])
    if not len(index):
        raise ValueError(f"{shards} holds no clips")
    random = np.random.Generator(np.random.Philox(key=[seed, 0x5EE7]))
    chosen = np.sort(random.permutation(len(index))[:num_clips])
    audio = Audio(sample_rate=index.sample_rate)
    pipeline = InputPipeline(
        index,
        CLIP,
        audio=audio,
        device=torch.device("cpu"),
        batch_size=len(chosen),
        num_frames=CLIP.num_frames,
    )
    batch = pipeline.load(plan_views(index, CLIP, clips=chosen, view=0, num_views=1))
    assert batch.wave is not None and batch.flow is not None
    sounds = LogMel(audio)(batch.wave)[:, 0].numpy()
    figure = clips(
        [_title(int(clip), index.facts(int(clip))) for clip in batch.clip],
        batch.rgb.numpy(),
        batch.flow.numpy(),
        [mel if heard else None for mel, heard in zip(sounds, batch.has_audio, strict=True)],
    )
    try:
        figure.savefig(png, dpi=100)
    except OSError as error:
        raise ValueError(f"can't write {png}: {error.strerror}") from error
    return [int(clip) for clip in chosen]


def _title(clip: int, facts: dict[str, Any]) -> str:
    """A clip's number, source, class and place in its video, on two lines."""
    name = facts["source"] if len(facts["source"]) < 60 else f"...{facts['source'][-57:]}"
    where = f"{facts['duration']:.1f} s from {facts['start']:.1f} s"
    size = f"{facts['width']}x{facts['height']}"
    title = f"{clip}: {name}\n{facts['class'] or 'no class'}, {where}, {size}"
    return title.encode(errors="replace").decode()


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
