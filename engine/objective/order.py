"""Order tasks: are the frames in order, or shuffled (S)? does time run forward, or back (B)?"""

from __future__ import annotations

import math
from collections.abc import Collection

import torch
from torch import Tensor, nn
from torch.nn import functional

from engine.data.views import Views
from engine.objective.task import Activations, Scalar, Task, TermValue

CHANCE = math.log(2)


class OrderTask(Task):
    """Two-way cross-entropies on pooled features, a clip against its shuffled and its reversed copy.

    Shuffle after Misra et al., ECCV 2016, and Lee et al., ICCV 2017; direction of time after Wei et al., 2018.
    """

    def __init__(self, modality: str, feature_dim: int) -> None:
        super().__init__()
        self.modality = modality
        self.terms = (f"{modality}/shuffle", f"{modality}/backward")
        self.shuffle = nn.Linear(feature_dim, 2)
        self.backward_time = nn.Linear(feature_dim, 2)

    def forward(
        self, views: Views, activations: Activations, active: Collection[str]
    ) -> list[TermValue]:
        """Cross-entropy of each active term; chance is log 2."""
        pooled, m = activations.clip[self.modality][-1], self.modality
        values: list[TermValue] = []
        if self.terms[0] in active:
            copies = activations.shuffled[m]
            value = _two_way(self.shuffle, pooled[: len(copies)], copies)
            values.append(Scalar(self.terms[0], value, CHANCE))
        if self.terms[1] in active:
            copies = activations.reversed[m]
            value = _two_way(self.backward_time, pooled[-len(copies) :], copies)
            values.append(Scalar(self.terms[1], value, CHANCE))
        return values


def _two_way(head: nn.Linear, real: Tensor, changed: Tensor) -> Tensor:
    logits = head(torch.cat([real, changed])).float()
    labels = torch.zeros(len(logits), dtype=torch.long, device=logits.device)
    labels[len(real) :] = 1
    return functional.cross_entropy(logits, labels)
