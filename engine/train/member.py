"""A member, and its whole state in one stretch of memory, so that members can take turns at fixed addresses."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from engine.objective.loss import Branches, EvolvedLoss
from engine.train.optim import start_moments

ALIGNMENT = 256
"""Bytes between which tensors start: what allocators give, and what kernels with wide loads assume."""


@dataclass
class Member:
    """One loss being trained: its networks, optimizer, weights and place in the schedule."""

    loss: EvolvedLoss
    optimizer: torch.optim.Optimizer
    weights: Tensor
    """float32 (39,) in TERM_NAMES' order."""
    active: tuple[str, ...]
    """Terms with a weight above 0 that the data allows."""
    computed: tuple[str, ...]
    """Terms that its steps evaluate, in their order: the active ones, or all that share their graph."""
    ordered: Tensor
    """float32 (computed,) the weights of these."""
    alive: Branches
    state: FlatState | None = None
    """All of its state in one stretch of memory, where steps are compiled."""
    step: int = 0
    first: int = 0
    """The step that it started from, above 0 with networks that are trained already."""
    values: Tensor | None = None
    """Running mean of the computed terms' values, float32 (computed,)."""

    def term_values(self) -> dict[str, float]:
        """Each active term's running mean, unweighted."""
        if self.values is None:
            return {}
        every = zip(self.computed, self.values.tolist(), strict=True)
        return {name: value for name, value in every if name in self.active}


class FlatState:
    """Weights, batch-norm statistics and optimizer moments, laid one behind the other in memory.

    The tensors of ``loss`` and ``optimizer`` become views of it, in their own strides; so one copy of each dtype
    brings a member's state to another member's place. Two states fit where networks and optimizer were built alike.
    """

    def __init__(self, loss: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Creates the moments that the optimizer would create at its first step, as zeros."""
        start_moments(optimizer)
        tensors = list(tensors_of(loss, optimizer))
        ends: dict[torch.dtype, int] = {}
        places = []
        for tensor in tensors:
            step = ALIGNMENT // tensor.element_size()
            start = ends.get(tensor.dtype, 0)
            places.append(start)
            ends[tensor.dtype] = start + -(-tensor.numel() // step) * step
        device = tensors[0].device
        self.blocks: dict[torch.dtype, Tensor] = {
            dtype: torch.zeros(end, dtype=dtype, device=device) for dtype, end in ends.items()
        }
        for tensor, place in zip(tensors, places, strict=True):
            home = self.blocks[tensor.dtype].as_strided(tensor.shape, tensor.stride(), place)
            tensor.data = home.copy_(tensor.data)

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return sum(block.nbytes for block in self.blocks.values())

    def copy_from(self, other: FlatState) -> None:
        """Take over another member's state, if it is another's, without waiting for a GPU."""
        if other is self:
            return
        for dtype, block in self.blocks.items():
            block.copy_(other.blocks[dtype], non_blocking=True)


def tensors_of(loss: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    """Weights, buffers and the moments that there are, in an order that is theirs."""
    yield from loss.parameters()
    yield from loss.buffers()
    for group in optimizer.param_groups:
        for p in group["params"]:
            state = optimizer.state[p]
            yield from (state[key] for key in sorted(state))
