"""A picture of random clips of a data set, to look at: frames, flow as colours, and log-mel."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import hsv_to_rgb
from matplotlib.figure import Figure
from numpy.typing import NDArray

from engine.data.audio import LogMel
from engine.data.pipeline import ClipBatch, InputPipeline
from engine.data.plan import plan_views
from engine.data.shards import ClipIndex
from engine.recipe import Audio, Clip

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
    assert batch.wave is not None
    mels = LogMel(audio)(batch.wave)[:, 0].numpy()
    _draw(index, batch, mels, png)
    return [int(clip) for clip in chosen]


def flow_colours(flow: NDArray[np.float32]) -> NDArray[np.float64]:
    """Flow (..., 2) in pixels as RGB (..., 3) in [0, 1]: hue is direction (red to the right), saturation speed."""
    speed = np.linalg.norm(flow, axis=-1)
    hue = np.arctan2(flow[..., 1], flow[..., 0]) / (2 * np.pi) % 1.0
    strength = speed / max(FASTEST, float(speed.max(initial=0.0)))
    colours: NDArray[np.float64] = hsv_to_rgb(np.stack([hue, strength, np.ones_like(hue)], axis=-1))
    return colours


def _draw(index: ClipIndex, batch: ClipBatch, mels: NDArray[np.float32], png: Path) -> None:
    assert batch.flow is not None
    rows = -(-len(batch) // COLUMNS)
    figure = Figure(figsize=(6.2 * COLUMNS, 2.9 * rows), dpi=100, layout="constrained")
    cells = figure.subfigures(rows, COLUMNS, squeeze=False).ravel()
    for i, (cell, clip) in enumerate(zip(cells, batch.clip, strict=False)):
        facts = index.facts(int(clip))
        name = facts["source"] if len(facts["source"]) < 60 else f"...{facts['source'][-57:]}"
        told = f"{clip}: {name}".encode(errors="replace").decode().replace("$", r"\$")
        more = (
            f"{facts['class'] or 'no class'}, {facts['duration']:.1f} s from {facts['start']:.1f} s"
        )
        cell.suptitle(f"{told}\n{more}, {facts['width']}x{facts['height']}", fontsize=8)
        axes = cell.subplots(3, 1, height_ratios=[1.0, 1.0, 0.6])
        _show(axes[0], _strip(batch.rgb[i].numpy()))
        _show(axes[1], _strip(flow_colours(batch.flow[i].numpy()), last=1.0))
        if bool(batch.has_audio[i]):
            axes[2].imshow(mels[i].T, origin="lower", aspect="auto", cmap="magma", vmin=-2, vmax=2)
        else:
            axes[2].text(0.5, 0.5, "no sound", ha="center", va="center", fontsize=8)
        axes[2].set_xticks([])
        axes[2].set_yticks([])
    try:
        FigureCanvasAgg(figure).print_figure(str(png), format="png")
    except OSError as error:
        raise ValueError(f"can't write {png}: {error.strerror}") from error


def _strip(frames: NDArray[Any], *, last: float | None = None) -> NDArray[Any]:
    """Frames (T, H, W, 3) side by side; ``last`` adds an empty one of this shade."""
    if last is not None:
        frames = np.concatenate([frames, np.full_like(frames[:1], last)])
    return np.concatenate(list(frames), axis=1)


def _show(axes: Any, picture: NDArray[Any]) -> None:
    axes.imshow(picture)
    axes.set_axis_off()
