"""Sizes of the terms' gradients at the start, by which ``objective.units = "gradient"`` divides.

An optimizer that normalises its steps, such as AdamW, follows a sum of losses in proportion to their gradients,
whatever their values. At the start those differ by a factor of 80 between terms that are all at 1 in units of chance.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from engine.data.views import Views
from engine.objective.loss import EvolvedLoss, active_terms, branches
from engine.objective.terms import TERM_NAMES

CLIPS, BATCHES = 16, 2
"""Clips of a batch, and batches, over which the mean square is taken."""


def gradient_sizes(
    loss: EvolvedLoss,
    batches: Sequence[Views],
    *,
    sound: bool,
    apart: Callable[[Callable[[Views], Tensor], Sequence[Views]], Iterable[Tensor]] = map,
) -> Tensor:
    """float32 (39,) in TERM_NAMES' order: norm of each term's gradient in the networks' weights.

    Root of the mean square over the batches; 1 for a term that these batches can't compute. ``loss`` is left as it is.
    ``apart`` maps over the batches, as ``Runtime.map``, which takes them side by side on a CPU.
    """

    def squares(views: Views) -> Tensor:
        own = copy.deepcopy(loss)
        networks = [p for network in own.networks.values() for p in network.parameters()]
        found = torch.zeros(len(TERM_NAMES), device=networks[0].device)
        for name in active_terms(dict.fromkeys(TERM_NAMES, 1.0), sound=sound):
            place = TERM_NAMES.index(name)
            alone = torch.zeros_like(found)
            alone[place] = 1.0
            total = own(branches((name,)).views(views), alone, (name,)).total
            grads = torch.autograd.grad(total, networks, allow_unused=True)
            found[place] = torch.stack(
                [g.float().square().sum() for g in grads if g is not None]
            ).sum()
        return found / len(batches)

    sizes = torch.stack(list(apart(squares, batches))).sum(0).sqrt()
    return torch.where(sizes.isfinite() & (sizes > 0), sizes, torch.ones_like(sizes))
