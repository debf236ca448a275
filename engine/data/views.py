"""ClipBatch to each modality's clips: what the networks see and what the decoders aim at.

Shape letters: N clips, T input frames, P future frames, H W pixels, F audio frames.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

import kernels
from engine.core.ranks import Ranks
from engine.core.recipe import Audio, Clip
from engine.data.audio import LogMel
from engine.data.pipeline import ClipBatch

RGB_MEAN = (0.43216, 0.394666, 0.37645)
RGB_STD = (0.22803, 0.22145, 0.216989)
"""Kinetics' statistics, so that networks trained on it fit."""
FLOW_SCALE = 20.0
"""Flow in shares of the frame's side is multiplied by this: a twentieth of the frame becomes 1."""


@dataclass(frozen=True)
class WholeBatch:
    """The batch that several ranks hold parts of, in the order in which one process would."""

    ranks: Ranks
    has_audio: Tensor
    """bool (world N,)."""
    has_shift: Tensor
    """bool (world N,)."""


@dataclass(frozen=True)
class Views:
    """A batch as the networks take it; only the modalities asked for are there."""

    clip: dict[str, Tensor]
    """rgb (N,3,T,H,W), grey (N,1,T,H,W), flow (N,2,T,H,W) channels-last; audio (N,1,F,mels)."""
    future: dict[str, Tensor]
    """The clips' continuation: rgb and grey P frames, flow the P-1 maps that there are, audio the next stretch."""
    shifted_audio: Tensor | None
    """(N,1,F,mels) the misaligned sound."""
    has_audio: Tensor
    """bool (N,)."""
    has_shift: Tensor
    """bool (N,)."""
    order: Tensor
    """int64 (N, T)."""
    whole: WholeBatch | None = None
    """Where other ranks hold parts of this batch: what contrastive terms must know of it."""

    def __len__(self) -> int:
        return len(self.order)

    def microbatch(self, number: int, of: int) -> Views:
        """Every ``of``-th clip from ``number`` on, in memory of its own; ``whole`` is left out."""

        def cut(x: Tensor) -> Tensor:
            layout = torch.channels_last_3d if x.dim() == 5 else torch.contiguous_format
            return x[number::of].contiguous(memory_format=layout)

        return replace(
            self,
            clip={m: cut(x) for m, x in self.clip.items()},
            future={m: cut(x) for m, x in self.future.items()},
            shifted_audio=None if self.shifted_audio is None else cut(self.shifted_audio),
            has_audio=cut(self.has_audio),
            has_shift=cut(self.has_shift),
            order=cut(self.order),
            whole=None,
        )


class ViewMaker(nn.Module):
    """Turns batches into views: normalised RGB and grey in one pass, scaled flow, log-mel."""

    def __init__(self, clip: Clip, audio: Audio) -> None:
        super().__init__()
        self.mean: Tensor
        self.std: Tensor
        self.num_frames, self.num_future = clip.num_frames, clip.num_future_frames
        self.flow_scale = FLOW_SCALE / clip.size
        self.log_mel = LogMel(audio)
        self.register_buffer("mean", torch.tensor(RGB_MEAN), persistent=False)
        self.register_buffer("std", torch.tensor(RGB_STD), persistent=False)

    @torch.no_grad()
    def forward(
        self, batch: ClipBatch, modalities: Collection[str], *, misaligned: bool = True
    ) -> Views:
        """Make the views of ``modalities``; flow and audio need a batch that carries them.

        ``misaligned``: with audio, the misaligned sound too.
        """
        t = self.num_frames
        rgb, grey = kernels.clip_views(batch.rgb, self.mean, self.std)
        whole = {"rgb": rgb, "grey": grey}
        if "flow" in modalities:
            assert batch.flow is not None
            flow = batch.flow.permute(0, 4, 1, 2, 3) * self.flow_scale
            whole["flow"] = flow.contiguous(memory_format=torch.channels_last_3d)
        clip = {m: whole[m][:, :, :t] for m in whole if m in modalities}
        future = {m: whole[m][:, :, t:] for m in whole if m in modalities}
        shifted = None
        if "audio" in modalities:
            assert batch.wave is not None
            mel = self.log_mel(batch.wave)
            heard = round(mel.shape[2] * t / (t + self.num_future))
            clip["audio"], future["audio"] = mel[:, :, :heard], mel[:, :, heard:]
            if misaligned:
                assert batch.wave_shifted is not None
                shifted = self.log_mel(batch.wave_shifted)[:, :, :heard]
        return Views(clip, future, shifted, batch.has_audio, batch.has_shift, batch.order)

    def audio_frames(self, samples: int, hop: int) -> tuple[int, int]:
        """Log-mel frames of the clip and of its future, for a window of ``samples``."""
        total = samples // hop + 1
        heard = round(total * self.num_frames / (self.num_frames + self.num_future))
        return heard, total - heard


def shuffled(clip: Tensor, order: Tensor) -> Tensor:
    """Frames of (N, C, T, H, W) in the order (N, T); for flow, its maps in that order."""
    index = order[:, None, :, None, None].expand(-1, clip.shape[1], -1, *clip.shape[3:])
    return clip.gather(2, index)


def backward(clip: Tensor, modality: str) -> Tensor:
    """A clip (N, C, T, H, W) with time reversed; flow comes in reverse order, negated."""
    return -clip.flip(2) if modality == "flow" else clip.flip(2)
