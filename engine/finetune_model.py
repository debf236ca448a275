"""The network that is fine-tuned: a trunk, dropout and a new layer, and its optimizer."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from engine.model.resnet3d import ResNet3D, video_network
from engine.network_file import Card, card_of
from engine.recipe import Optim, Recipe
from engine.runtime import Runtime, set_seed

HEAD_SD = 0.01
"""Standard deviation of the new layer's first weights."""


class Classifier(nn.Module):
    """A network, dropout and a new fully connected layer: clips (N, 3, T, H, W) to logits (N, K)."""

    def __init__(self, network: ResNet3D, num_classes: int, *, dropout: float) -> None:
        super().__init__()
        self.network = network
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(network.feature_dim, num_classes)
        nn.init.normal_(self.fc.weight, std=HEAD_SD)
        nn.init.zeros_(self.fc.bias)

    def forward(self, clips: Tensor) -> Tensor:
        """Logits."""
        return cast(Tensor, self.fc(self.dropout(self.network(clips))))


def make_optimizer(model: Classifier, settings: Optim, *, head_lr: float) -> torch.optim.Optimizer:
    """AdamW or SGD, the new layer at ``head_lr`` times the rate; norms and biases are not decayed."""
    groups = []
    for module, factor in ((model.network, 1.0), (model.fc, head_lr)):
        for decayed in (True, False):
            params = [p for p in module.parameters() if (p.dim() > 1) == decayed]
            decay = settings.weight_decay if decayed else 0.0
            groups.append({"params": params, "weight_decay": decay, "factor": factor})
    if settings.name == "adamw":
        return torch.optim.AdamW(groups, lr=settings.lr)
    return torch.optim.SGD(groups, lr=settings.lr, momentum=settings.momentum)


def from_scratch(recipe: Recipe, runtime: Runtime) -> tuple[ResNet3D, Card]:
    """A network with initial weights, by the recipe's model, and its card."""
    set_seed(recipe.seed)
    network = video_network(recipe.model)
    return network.to(runtime.device), card_of(recipe)
