"""A network's running average over training steps: what ``optim.ema`` asks for."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class RunningAverage:
    """Exponential moving average of a network's weights and of its batch norms' running statistics, in float32.

    After step k (from 0) the average moves by 1 - d towards the network, d = min(decay, (1 + k) / (10 + k)), so that
    the random weights of the beginning are soon forgotten.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.decay = decay
        self.tensors: dict[str, Tensor] = {
            name: tensor.detach().clone() for name, tensor in network.state_dict().items()
        }

    @torch.no_grad()
    def update(self, network: nn.Module, *, step: int) -> None:
        """Take in the network as it is after ``step``."""
        decay = min(self.decay, (1 + step) / (10 + step))
        now = network.state_dict()
        floats = [name for name, tensor in self.tensors.items() if tensor.is_floating_point()]
        torch._foreach_lerp_(
            [self.tensors[name] for name in floats], [now[name] for name in floats], 1.0 - decay
        )
        for name, tensor in self.tensors.items():
            if not tensor.is_floating_point():
                tensor.copy_(now[name])
