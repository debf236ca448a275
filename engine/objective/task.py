"""The base of all tasks: a module that owns its head and turns activations into terms of Eq. 1."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from engine.core.ranks import gathered
from engine.data.views import Views


@dataclass
class Activations:
    """Activations of the networks on one batch."""

    clip: dict[str, list[Tensor]]
    """Per modality the stem, the four stages and the pooled features of the N clips."""
    shuffled: dict[str, Tensor] = field(default_factory=dict)
    """Pooled features (n, D) of the shuffled copies of the first n clips."""
    reversed: dict[str, Tensor] = field(default_factory=dict)
    """Pooled features (n, D) of the reversed copies of the last n clips."""
    shifted_audio: Tensor | None = None
    """Pooled features (N, D) of the misaligned sound."""


@dataclass(frozen=True)
class Pair:
    """An L2 term: the mean squared difference of two tensors (N, ...), over the clips that the mask keeps."""

    name: str
    student: Tensor
    teacher: Tensor
    chance: Tensor
    """float32 (): the term's value had nothing been learnt, without gradient."""
    mask: Tensor | None = None
    """bool (N,); None keeps every clip."""


@dataclass(frozen=True)
class Scalar:
    """A term that is a number already: a cross-entropy or a margin."""

    name: str
    value: Tensor
    chance: float
    """Its value had nothing been learnt."""


TermValue = Pair | Scalar


class Task(nn.Module):
    """A self-supervised task; its ``terms`` are rows of the term table."""

    terms: tuple[str, ...]

    def forward(
        self, views: Views, activations: Activations, active: Collection[str]
    ) -> list[TermValue]:
        """The values of those of its terms that are in ``active``."""
        raise NotImplementedError


def batch_mean(values: Tensor, mask: Tensor | None, views: Views, *, grad: bool = False) -> Tensor:
    """Mean (...) over the whole batch's clips of values (N, ...).

    Where ranks hold parts of the batch it is over all of them; ``mask`` (N,) leaves clips out, None keeps all. Without
    ``grad`` no gradient passes.
    """
    values = values if grad else values.detach()
    kept = values.new_ones(len(values)) if mask is None else mask.to(values.dtype)
    each = kept.view(-1, *[1] * (values.dim() - 1))
    total = torch.cat([torch.where(each > 0, values, 0.0).sum(0).flatten(), kept.sum()[None]])
    if views.whole is not None:
        total = gathered(total, views.whole.ranks, summed=True).sum(0)
    return (total[:-1] / total[-1].clamp(min=1)).view(values.shape[1:])


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of float values where a mask of their shape holds, whatever the others are; 0 where it never does."""
    return torch.where(mask, values, 0.0).sum() / mask.sum().clamp(min=1)
