"""Muon: each convolution's step is orthogonalised, all else is AdamW's (Jordan 2024; Liu et al., arXiv 2502.16982).

A convolution's gradient has a few strong directions, and steps that follow its size learn these first. Muon gives all
directions the same size: in the few steps of a search's member, most of what there is to learn.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
        weights = [weight for weight in group["params"] if weight.grad is not None]
        if not weights:
            return
        momentum: float = group["momentum"]
        for weight in weights:
            if not self.state[weight]:
                self.state[weight]["momentum_buffer"] = torch.zeros_like(weight)
        grads = [weight.grad for weight in weights]
        averages = [self.state[weight]["momentum_buffer"] for weight in weights]
        torch._foreach_lerp_(averages, grads, 1.0 - momentum)
        ahead = torch._foreach_lerp(grads, averages, momentum)
        orders = [_by_stride(weight) for weight in weights]
        steps = [step.permute(order).flatten(1) for step, order in zip(ahead, orders, strict=True)]
        by_size: dict[int, tuple[list[Tensor], list[Tensor]]] = {}
        for weight, order, step in zip(weights, orders, orthogonal(steps), strict=True):
            inner = weight.permute(order)
            moved, by = by_size.setdefault(max(step.shape), ([], []))
            moved.append(inner)
            by.append(step.view(inner.shape))
        torch._foreach_mul_(weights, 1.0 - group["lr"] * group["weight_decay"])
        for size, (moved, by) in by_size.items():
            torch._foreach_add_(moved, by, alpha=-group["lr"] * size**0.5)


def _by_stride(weight: Tensor) -> list[int]:
    """Axes in the order of memory after the first, so that a matrix of them is no copy; U V^T goes with its columns."""
    return [0, *sorted(range(1, weight.dim()), key=weight.stride, reverse=True)]


def orthogonal(matrices: Sequence[Tensor]) -> list[Tensor]:
    """U V^T of each matrix U S V^T (rows, columns), with singular values of 0.7 to 1.2 instead of 1; float32 at least.

    Five Newton-Schulz iterations. They are polynomials in the smaller Gram matrix, and run on it: two products with
    the matrix itself instead of ten. Gram matrices of one size go together.
    """
    wide = [m.to(torch.promote_types(m.dtype, torch.float32)) for m in matrices]
    wide = [m if len(m) <= m.shape[1] else m.T for m in wide]
    alike: dict[tuple[int, torch.dtype], list[int]] = {}
    for place, each in enumerate(wide):
        alike.setdefault((len(each), each.dtype), []).append(place)
    for places in alike.values():
        factors = _towards_orthogonal(torch.stack([wide[i] @ wide[i].T for i in places]))
        for place, factor in zip(places, factors, strict=True):
            wide[place] = factor @ wide[place]
    pairs = zip(wide, matrices, strict=True)
    return [w if w.shape == matrix.shape else w.T for w, matrix in pairs]


def _towards_orthogonal(gram: Tensor) -> Tensor:
    """(B, n, n) what matrices of these Gram matrices (B, n, n) are multiplied by."""
    a, b, c = COEFFICIENTS
    norm = gram.diagonal(dim1=-2, dim2=-1).sum(-1).sqrt().clamp(min=TINY)[:, None, None]
    gram = gram / norm.square()
    one = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    whole = one / norm
    for _ in range(ITERATIONS):
        factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c).add_(one, alpha=a)
        whole = factor @ whole
        gram = factor @ gram @ factor
    return whole


def convolutions(module: nn.Module) -> list[Tensor]:
    """The weights that Muon takes as matrices: those of convolutions, but not of the transposed ones that decode."""
    return [m.weight for m in module.modules() if isinstance(m, nn.Conv2d | nn.Conv3d)]
