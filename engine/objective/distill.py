"""Distillation (D): the RGB network's activations are drawn to another modality's, layer by layer."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from engine.data.views import Views
from engine.objective.task import Activations, Pair, Task, TermValue, batch_mean
from engine.objective.terms import NUM_LAYERS

Way = Literal["l2", "standardised", "projected"]


class DistillTask(Task):
    """L2 difference between activation k of the RGB network (student) and of another (teacher), k in 0..4.

    Where shapes differ (audio has no place in the frame) their global averages are compared. By default the
    teacher's gradient is stopped; ``stop_gradient=False`` lets both sides move. ``way``: "l2" compares
    activations as they are (the paper); "standardised" both with each channel's mean taken off and of unit
    variance over the batch, which a student can't come nearer to by shrinking; "projected" a linear map of the
    student's channels, trained along, with the standardised teacher.
    """

    def __init__(
        self, other: str, channels: Sequence[int], *, stop_gradient: bool, way: Way
    ) -> None:
        """``channels`` of the networks' activations."""
        super().__init__()
        self.other, self.stop_gradient, self.way = other, stop_gradient, way
        self.terms = tuple(f"distill/{other}@{layer}" for layer in range(NUM_LAYERS))
        heads = [nn.Linear(c, c) for c in channels[:NUM_LAYERS]] if way == "projected" else []
        self.project = nn.ModuleList(heads)

    def forward(
        self, views: Views, activations: Activations, active: Collection[str]
    ) -> list[TermValue]:
        """One pair for each active layer."""
        mask = views.has_audio if self.other == "audio" else None
        pairs: list[TermValue] = []
        for layer, name in enumerate(self.terms):
            if name not in active:
                continue
            student, teacher = activations.clip["rgb"][layer], activations.clip[self.other][layer]
            if student.shape != teacher.shape:
                student, teacher = global_average(student), global_average(teacher)
            if self.stop_gradient:
                teacher = teacher.detach()
            mean, variance = moments(teacher, mask, views)
            chance = variance.mean()
            if self.way != "l2":
                teacher = standardised(teacher, mean, variance)
                chance = torch.ones_like(chance)
            if self.way == "standardised":
                student = standardised(student, *moments(student, mask, views, grad=True))
                chance = 2.0 * chance
            elif self.way == "projected":
                student = self._projected(layer, student)
            pairs.append(Pair(name, student, teacher, chance, mask))
        return pairs

    def _projected(self, layer: int, student: Tensor) -> Tensor:
        head = self.project[layer]
        assert isinstance(head, nn.Linear)
        weight = head.weight.view(*head.weight.shape, *[1] * (student.dim() - 2))
        if student.dim() == 2:
            return functional.linear(student, weight, head.bias)
        return functional.conv3d(student, weight, head.bias)


def global_average(activation: Tensor) -> Tensor:
    """(N, C, ...) to (N, C)."""
    return activation.flatten(2).mean(2)


def moments(
    activation: Tensor, mask: Tensor | None, views: Views, *, grad: bool = False
) -> tuple[Tensor, Tensor]:
    """Mean and variance (C,) of each channel of (N, C, ...) over the whole batch's clips and positions."""
    wide = activation if grad else activation.detach()
    wide = wide.to(torch.promote_types(wide.dtype, torch.float32))
    wide = wide.flatten(2) if wide.dim() > 2 else wide[:, :, None]
    mean = batch_mean(wide.mean(2), mask, views, grad=grad)
    away = (wide - mean[None, :, None]).square().mean(2)
    return mean, batch_mean(away, mask, views, grad=grad)


def standardised(activation: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """Channels of (N, C, ...) less their means, over their standard deviations; at least float32."""
    shape = (1, -1, *[1] * (activation.dim() - 2))
    scale = (variance + 1e-6).rsqrt()
    return (activation.to(mean.dtype) - mean.view(shape)) * scale.view(shape)
