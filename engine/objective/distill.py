"""Distillation (D): the RGB network's activations are drawn to another modality's, layer by layer."""

from __future__ import annotations

from collections.abc import Collection

from torch import Tensor

from engine.data.views import Views
from engine.objective.task import Activations, Pair, Task, TermValue
from engine.objective.terms import NUM_LAYERS


class DistillTask(Task):
    """L2 difference between activation k of the RGB network (student) and of another (teacher), k in 0..4.

    Where shapes differ (audio has no place in the frame) their global averages are compared. By default the
    teacher's gradient is stopped; ``stop_gradient=False`` lets both sides move.
    """

    def __init__(self, other: str, *, stop_gradient: bool) -> None:
        super().__init__()
        self.other, self.stop_gradient = other, stop_gradient
        self.terms = tuple(f"distill/{other}@{layer}" for layer in range(NUM_LAYERS))

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
            pairs.append(Pair(name, student, teacher, mask))
        return pairs


def global_average(activation: Tensor) -> Tensor:
    """(N, C, ...) to (N, C)."""
    return activation.flatten(2).mean(2)
