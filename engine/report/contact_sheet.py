"""A picture of random clips of a data set, to look at: frames, flow as colours, and log-mel."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from engine.core.recipe import Audio, Clip
from engine.data.audio import LogMel
from engine.data.pipeline import InputPipeline
from engine.data.plan import plan_views
from engine.data.shards.index import ClipIndex
from engine.report.figures.clips import clips

CLIP = Clip(num_frames=6, frame_stride=5, size=112)


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
