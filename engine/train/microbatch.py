"""A step in several microbatches, on one rank or many: the share of each term's mean that a microbatch has.

Eq. 1's terms are means over the clips (or pairs of clips) that count. A microbatch's mean, times its share of what
counts in the whole batch, adds up to the batch's mean over all of them; so weights times shares, which enter compiled
code as the tensor that weights are anyway, make the microbatches' gradients add up to the batch's. Contrastive terms
are computed by every rank for all ranks (see ``engine.objective.align``): their gradients add up as they are, and their
values count once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor

from engine.core.ranks import Ranks
from engine.core.recipe import Optim
from engine.core.runtime import Runtime
from engine.data.views import Views, WholeBatch
from engine.objective.loss import EvolvedLoss
from engine.objective.terms import BY_NAME
from engine.train.compiled import StepBuffers, evaluate
from engine.train.member import Member

PLAIN, SOUND, CONTRAST, SOUND_PAIRS, ALIGN = range(5)
"""Kinds of terms by what they are a mean over: clips, clips with sound, pairs of clips, pairs with sound, both kinds
of negatives of the audio alignment."""


def kind_of(name: str) -> int:
    """One of the kinds above."""
    term = BY_NAME[name]
    if term.task == "align_audio":
        return ALIGN
    if term.task == "embed":
        return SOUND_PAIRS if "audio" in term.networks else CONTRAST
    return SOUND if "audio" in term.networks else PLAIN


def split(
    views: Views, names: Sequence[str], *, count: int, ranks: Ranks
) -> tuple[list[Views], Tensor, Tensor]:
    """A rank's share of the batch as ``count`` microbatches, and the share of each in the terms ``names``.

    Returns the microbatches' views, and float32 (count, terms) twice: the factors of weights for the gradient, and
    those of values, so that both add up over microbatches and ranks. Waits for no GPU.
    """
    own = torch.stack([views.has_audio, views.has_shift]).to(torch.uint8)
    everywhere = ranks.gather(own).bool()  # (world, 2, n)
    microbatches, gradient = [], []
    for number in range(count):
        # one process's order: clip i of rank r is its clip i * world + r
        audio, shift = everywhere[:, :, number::count].permute(1, 2, 0).flatten(1)
        micro = views.microbatch(number, count) if count > 1 else views
        if ranks.world > 1:
            micro = replace(micro, whole=WholeBatch(ranks, audio, shift))
        microbatches.append(micro)
        heard = audio.sum()
        counts = [
            torch.ones_like(heard),
            micro.has_audio.sum(),
            torch.ones_like(heard),
            heard * (heard - 1),
            shift.sum() + (audio & audio.roll(1, 0)).sum(),
        ]
        gradient.append(torch.stack(counts).float())
    counted = torch.stack(gradient)  # (count, kinds)
    every = counted.sum(0)
    every[PLAIN] = count * ranks.world
    every[SOUND] = everywhere[:, 0].sum()
    shares = counted / every.clamp(min=1)
    kinds, computing = _facts(tuple(names), ranks.world, shares.device)
    chosen = shares[:, kinds]
    return microbatches, chosen, chosen / computing


@lru_cache(maxsize=8)
def _facts(names: tuple[str, ...], world: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Each term's kind, and how many ranks compute its value for the same clips."""
    kinds = [kind_of(name) for name in names]
    computing = [float(world if kind in (CONTRAST, SOUND_PAIRS, ALIGN) else 1) for kind in kinds]
    return torch.tensor(kinds, device=device), torch.tensor(computing, device=device)


def differentiate(
    member: Member,
    views: Views,
    *,
    loss: EvolvedLoss,
    buffers: StepBuffers | None,
    runtime: Runtime,
    settings: Optim,
    ranks: Ranks,
) -> tuple[Tensor, Tensor]:
    """``EvolvedLoss.evaluate`` of the whole batch, whose total's gradient is then in ``loss``'s parameters.

    ``views`` are this rank's share of the batch. Running statistics become their mean over ranks, so that all ranks
    keep equal networks.
    """
    if ranks.world == settings.accumulate == 1:
        total, values = evaluate(member, views, buffers=buffers, runtime=runtime)
        total.backward()
        return total, values
    count = settings.accumulate
    microbatches, gradient, once = split(views, member.computed, count=count, ranks=ranks)
    terms, networks = len(member.computed), len(member.alive.networks)
    even = once.new_full((count, networks), 1.0 / (count * ranks.world))
    once = torch.cat([once, even], 1)  # ranks of the networks' features are averaged
    sums = once.new_zeros(terms + networks)
    for micro, of_gradient, of_value in zip(microbatches, gradient, once, strict=True):
        weights = member.ordered * of_gradient
        total, values = evaluate(member, micro, buffers=buffers, runtime=runtime, weights=weights)
        total.backward()
        sums += torch.where(of_value > 0, of_value * values, 0.0)
    if ranks.world > 1:
        exchanged = [p.grad for p in loss.parameters() if p.grad is not None]
        if settings.batch_norm == "local":
            statistics = [b for b in loss.buffers() if b.is_floating_point()]
            torch._foreach_div_(statistics, ranks.world)
            exchanged += statistics
        ranks.sum_([*exchanged, sums])
    total = torch.where(member.ordered > 0, member.ordered * sums[:terms], 0.0).sum()
    return total, sums
