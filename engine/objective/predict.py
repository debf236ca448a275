"""Decoding tasks: reconstruction (R), prediction (P), colorization (C) and other modalities (X).

A decoder gives the difference from a prediction that takes no learning, and its error is measured by that one's.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor
from torch.nn import functional

from engine.data.views import Views
from engine.model.decoder import Decoder, LinearDecoder
from engine.objective.task import Activations, Pair, Task, TermValue, batch_mean


class DecodeTask(Task):
    """L2 between what stage 4 of ``modality`` decodes to and a target, at the decoder's low resolution.

    ``target`` is the modality aimed at; ``future`` aims at what comes after the clip instead of the clip.
    """

    def __init__(
        self,
        name: str,
        modality: str,
        *,
        target: str,
        future: bool,
        decoder: Decoder | LinearDecoder,
    ) -> None:
        super().__init__()
        self.terms = (name,)
        self.modality, self.target, self.future = modality, target, future
        self.decoder = decoder

    def forward(
        self, views: Views, activations: Activations, active: Collection[str]
    ) -> list[TermValue]:
        """The decoded clip beside its target; where sound is involved, over clips that have it."""
        (name,) = self.terms
        if name not in active:
            return []
        mask = views.has_audio if self.target == "audio" else None
        aim = (views.future if self.future else views.clip)[self.target]
        target = shrunk(aim, self.decoder.out_size)
        trivial = self._trivial(views, target, mask)
        error = (trivial - target).square().flatten(1).mean(1)
        decoded = trivial + self.decoder(activations.clip[self.modality][4])
        return [Pair(name, decoded, target, batch_mean(error, mask, views), mask)]

    def _trivial(self, views: Views, target: Tensor, mask: Tensor | None) -> Tensor:
        """The prediction that takes no learning, of a shape that broadcasts to the target's.

        No motion for flow; for what comes next, the clip's last frame or the mean spectrum of its sound; else the
        mean over the batch and its frames.
        """
        if self.target == "flow":
            return torch.zeros_like(target)
        if self.future and self.target == "audio":
            seen = views.clip["audio"]
            return shrunk(seen, (1, *self.decoder.out_size[1:]))
        if self.future:
            return shrunk(views.clip[self.target][:, :, -1:], (1, *self.decoder.out_size[1:]))
        return batch_mean(target.mean(2, keepdim=True), mask, views)[None]


def shrunk(target: Tensor, size: tuple[int, ...]) -> Tensor:
    """Average a target (N, C, T, H, W), or sound (N, 1, F, mels), down to a decoder's size."""
    if target.dim() == 5:
        return functional.adaptive_avg_pool3d(target, size)  # type: ignore[arg-type]
    return functional.adaptive_avg_pool2d(target, size)  # type: ignore[arg-type]
