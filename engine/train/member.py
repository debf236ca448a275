"""A member, and its whole state in one stretch of memory, so that members can take turns at fixed addresses."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from engine.objective.loss import Branches, EvolvedLoss
from engine.train.optim import start_moments

ALIGNMENT = 256
"""Bytes between which tensors start: what allocators give, and what kernels with wide loads assume."""
START_STEPS = 5
"""A member's terms at the start are their running means after so many steps."""


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
    """Running mean of what ``EvolvedLoss.evaluate`` gives beside the total: the computed terms, the networks' ranks."""
    start: Tensor | None = None
    """The same after START_STEPS steps."""

    def note(self, values: Tensor) -> None:
        """Take a step's values into the running mean."""
        # a copy: a CUDA graph writes the next member's values to the same place
        self.values = values.clone() if self.values is None else values.lerp(self.values, 0.9)
        self.step += 1
        if self.step - self.first <= START_STEPS:
            self.start = self.values

    def term_values(self, *, at_start: bool = False) -> dict[str, float]:
        """Each active term's running mean, unweighted."""
        values = zip(self.computed, self._numbers(at_start=at_start), strict=False)
        return {name: value for name, value in values if name in self.active}

    def learnt(self) -> dict[str, Any]:
        """Facts that a run keeps of it: ``terms_at_start``, ``terms``, and ``feature_ranks`` at the start and now."""
        began, now = self.ranks(at_start=True), self.ranks()
        return {
            "terms_at_start": self.term_values(at_start=True),
            "terms": self.term_values(),
            "feature_ranks": {m: (began[m], now[m]) for m in now},
        }

    def ranks(self, *, at_start: bool = False) -> dict[str, float]:
        """The running mean of how many directions each network's features spread in, in a batch."""
        numbers = self._numbers(at_start=at_start)[len(self.computed) :]
        return dict(zip(self.alive.networks, numbers, strict=False))

    def _numbers(self, *, at_start: bool) -> list[float]:
        values = self.start if at_start else self.values
        return [] if values is None else values.tolist()


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
