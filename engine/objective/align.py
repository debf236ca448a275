"""Contrastive tasks: audio alignment (A) and joint embedding (E), with a margin on cosine similarity.

Embeddings that are all the same get the margin itself; unrelated ones get no less on average, since the loss is convex
in the difference of two similarities whose mean is zero.

Where ranks hold parts of a batch, negatives come from all of it: every rank computes the whole batch's value and
differentiates it by its own clips' embeddings, so that the sum of their gradients is the batch's.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, nn
from torch.nn import functional

from engine.core.ranks import gathered
from engine.data.views import Views
from engine.objective.task import Activations, Scalar, Task, TermValue, masked_mean


class AlignAudioTask(Task):
    """Is the sound this clip's? Negatives: the same clip's sound, shifted in time, and another clip's.

    Max-margin: mean of max(0, margin - s(v, a) + s(v, a')) over the negatives a' there are, s the cosine of
    projected features; after Korbar et al., NeurIPS 2018. Clips without sound take no part.
    """

    def __init__(self, modality: str, feature_dim: int, *, embed_dim: int, margin: float) -> None:
        super().__init__()
        self.modality, self.margin = modality, margin
        self.terms = (f"{modality}/align_audio",)
        self.video = nn.Linear(feature_dim, embed_dim)
        self.audio = nn.Linear(feature_dim, embed_dim)

    def forward(
        self, views: Views, activations: Activations, active: Collection[str]
    ) -> list[TermValue]:
        """The margin loss; 0 where no clip of the batch has sound."""
        if self.terms[0] not in active:
            return []
        assert activations.shifted_audio is not None
        video, sound, shifted = of_all_ranks(
            views,
            embedded(self.video, activations.clip[self.modality][-1]),
            embedded(self.audio, activations.clip["audio"][-1]),
            embedded(self.audio, activations.shifted_audio),
        )
        batch = views.whole or views
        aligned = (video * sound).sum(1)
        in_time = self.margin - aligned + (video * shifted).sum(1)
        of_clip = self.margin - aligned + (video * sound.roll(1, 0)).sum(1)
        mask = torch.cat([batch.has_shift, batch.has_audio & batch.has_audio.roll(1, 0)])
        value = masked_mean(torch.cat([in_time, of_clip]).relu(), mask)
        return [Scalar(self.terms[0], value, self.margin)]


class EmbedTask(Task):
    """Are RGB and another modality of one clip nearer than those of different clips?

    Max-margin over all other clips of the batch, both ways: mean over i != j of
    max(0, margin - s(i, i) + s(i, j)), s the cosine of projected features.
    """

    def __init__(self, other: str, feature_dim: int, *, embed_dim: int, margin: float) -> None:
        super().__init__()
        self.other, self.margin = other, margin
        self.terms = (f"rgb+{other}/embed",)
        self.rgb = nn.Linear(feature_dim, embed_dim)
        self.with_rgb = nn.Linear(feature_dim, embed_dim)

    def forward(
        self, views: Views, activations: Activations, active: Collection[str]
    ) -> list[TermValue]:
        """The margin loss; where sound is involved, over clips that have it."""
        if self.terms[0] not in active:
            return []
        rgb, other = of_all_ranks(
            views,
            embedded(self.rgb, activations.clip["rgb"][-1]),
            embedded(self.with_rgb, activations.clip[self.other][-1]),
        )
        batch = views.whole or views
        with torch.autocast(rgb.device.type, enabled=False):  # it would take the product to bf16
            similarity = rgb @ other.T
        own = similarity.diagonal()
        n = len(own)
        mask = ~torch.eye(n, dtype=torch.bool, device=own.device)
        if self.other == "audio":
            mask = mask & batch.has_audio[:, None] & batch.has_audio[None, :]
        to_other = self.margin - own[:, None] + similarity
        to_rgb = self.margin - own[None, :] + similarity
        value = masked_mean(torch.stack([to_other, to_rgb]).relu(), mask.expand(2, n, n))
        return [Scalar(self.terms[0], value, self.margin)]


def of_all_ranks(views: Views, *embeddings: Tensor) -> tuple[Tensor, ...]:
    """Each (N, D) of the whole batch, in the order of one process; as they are where this rank is alone."""
    if views.whole is None:
        return embeddings
    ranks = views.whole.ranks
    parts = gathered(torch.cat(embeddings, dim=1), ranks)
    whole = parts.transpose(0, 1).flatten(0, 1)
    return whole.split([e.shape[1] for e in embeddings], dim=1)  # type: ignore[no-any-return]


def embedded(project: nn.Linear, features: Tensor) -> Tensor:
    """Project features (N, D) and bring them to unit length, in float32."""
    return functional.normalize(project(features).float(), dim=1)
