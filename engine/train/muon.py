"""Muon: each convolution's step is orthogonalised, all else is AdamW's (Jordan 2024; Liu et al., arXiv 2502.16982).

A convolution's gradient has a few strong directions, and steps that follow its size learn these first. Muon gives all
directions the same size: in the few steps of a search's member, most of what there is to learn.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of Jordan's quintic a x + b x^3 + c x^5, whose fifth iterate brings [0.003, 1] to about [0.7, 1.2]."""
ITERATIONS = 5
TINY = 1e-7
"""Least Frobenius norm that a matrix is divided by."""


class Muon(torch.optim.AdamW):
    """AdamW, but for groups with ``momentum``: their weights (O, ...) are matrices (O, product of the rest).

    With gradient G, momentum M and decay d:

        B <- M B + (1 - M) G,    W <- (1 - lr d) W - lr sqrt(max(rows, columns)) orthogonal(M B + (1 - M) G)

    so that each entry moves by about lr, as in AdamW's first step. That is torch.optim.Muon for matrices, with rates of
    "match_rms_adamw" five times as large.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step with the gradients that there are; ``closure`` as in torch's optimizers."""
        groups = self.param_groups
        self.param_groups = [group for group in groups if "momentum" not in group]
        try:
            result = super().step(closure)
        finally:
            self.param_groups = groups
        for group in groups:
            if "momentum" in group:
                self._orthogonal_steps(group)
        return result

    def _orthogonal_steps(self, group: dict[str, Any]) -> None:
        momentum: float = group["momentum"]
        for weight in group["params"]:
            if weight.grad is None:
                continue
            state = self.state[weight]
            if not state:
                state["momentum_buffer"] = torch.zeros_like(weight)
            average = state["momentum_buffer"].lerp_(weight.grad, 1.0 - momentum)
            ahead = weight.grad.lerp(average, momentum).flatten(1)
            step = orthogonal(ahead).mul_(max(ahead.shape) ** 0.5)
            weight.mul_(1.0 - group["lr"] * group["weight_decay"])
            weight.add_(step.view(weight.shape), alpha=-group["lr"])


def orthogonal(matrix: Tensor) -> Tensor:
    """U V^T of a matrix U S V^T (rows, columns), with singular values of 0.7 to 1.2 instead of 1; float32 at least.

    Five Newton-Schulz iterations. They are polynomials in the smaller Gram matrix, and run on it: two products with
    the matrix itself instead of ten.
    """
    wide = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
    if len(wide) > wide.shape[1]:
        return orthogonal(wide.T).T
    wide = wide / wide.norm().clamp(min=TINY)
    a, b, c = COEFFICIENTS
    gram = wide @ wide.T
    one = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    whole = one
    for _ in range(ITERATIONS):
        factor = torch.addmm(gram, gram, gram, beta=b, alpha=c).add_(one, alpha=a)
        whole = factor @ whole
        gram = factor @ gram @ factor
    result: Tensor = whole @ wide
    return result


def convolutions(module: nn.Module) -> list[Tensor]:
    """The weights that Muon takes as matrices: those of convolutions, but not of the transposed ones that decode."""
    return [m.weight for m in module.modules() if isinstance(m, nn.Conv2d | nn.Conv3d)]
