"""Decoding tasks: reconstruction (R), prediction (P), colorization (C) and other modalities (X)."""

from __future__ import annotations

from collections.abc import Collection

from torch import Tensor
from torch.nn import functional

from engine.data.views import Views
from engine.model.decoder import Decoder
from engine.objective.task import Activations, Pair, Task, TermValue


class DecodeTask(Task):
    """L2 between what stage 4 of ``modality`` decodes to and a target, at the decoder's low resolution.

    ``target`` is the modality aimed at; ``future`` aims at what comes after the clip instead of the clip.
    """

    def __init__(
        self, name: str, modality: str, *, target: str, future: bool, decoder: Decoder
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
        decoded = self.decoder(activations.clip[self.modality][4])
        target = (views.future if self.future else views.clip)[self.target]
        mask = views.has_audio if self.target == "audio" else None
        return [Pair(name, decoded, shrunk(target, self.decoder.out_size), mask)]


def shrunk(target: Tensor, size: tuple[int, ...]) -> Tensor:
    """Average a target (N, C, T, H, W), or sound (N, 1, F, mels), down to a decoder's size."""
    if target.dim() == 5:
        return functional.adaptive_avg_pool3d(target, size)  # type: ignore[arg-type]
    return functional.adaptive_avg_pool2d(target, size)  # type: ignore[arg-type]
