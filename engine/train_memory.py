"""How many members of a cohort memory holds at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from engine.objective.terms import LossWeights
from engine.runtime import free_memory
from engine.train import Trainer

SHARE = 0.85
"""Of the memory that is free, what members may take: allocators lose some to gaps."""
CPU_STEP = 4
"""On a CPU, a step's activations are taken for this many times a member's own state."""


def members_that_fit(trainer: Trainer, losses: Sequence[LossWeights], *, seed: int) -> int:
    """As many of ``losses`` as can be trained at once, at least 1.

    On a GPU one member is trained for a step, which shows what a member holds and what a step needs on top;
    on a CPU the members' state is counted, with an allowance for the step. The first answer that memory
    gives is kept as ``trainer.members_at_once``.
    """
    if len(losses) <= 1:
        return 1
    try:
        per_member, per_step = (
            _measured(trainer, losses[0], seed=seed)
            if trainer.runtime.device.type == "cuda"
            else _counted(trainer, seed=seed)
        )
    except ValueError:  # a loss that can't be trained says so when its turn comes
        return len(losses)
    room = SHARE * free_memory(trainer.runtime.device) - per_step
    fits = max(int(room // max(per_member, 1)), 1)
    if fits < len(losses):
        trainer.members_at_once = fits
    return min(fits, len(losses))


def _measured(trainer: Trainer, weights: LossWeights, *, seed: int) -> tuple[int, int]:
    """Bytes of a member on the GPU, and those that a step needs beside."""
    device = trainer.runtime.device
    member = trainer.member(weights, seed=seed)
    _, views = next(trainer.rounds([member], seed=seed))
    for _ in range(
        2
    ):  # the first step makes what all members share: compiled code, checks, moments
        torch.cuda.reset_peak_memory_stats(device)
        held = torch.cuda.memory_allocated(device)
        trainer.step(member, views)
    per_step = torch.cuda.max_memory_allocated(device) - held
    before = torch.cuda.memory_allocated(device)
    second = trainer.member(weights, seed=seed)
    per_member = torch.cuda.memory_allocated(device) - before
    if second.state is None:  # its moments and gradients come with its first step
        per_member *= 4
    del member, second, views
    trainer.free_memory()
    return per_member, per_step


def _counted(trainer: Trainer, *, seed: int) -> tuple[int, int]:
    parameters = sum(p.nbytes for p in trainer.initial_loss(seed).parameters())
    per_member = 4 * parameters  # weights, gradients, two moments
    return per_member, CPU_STEP * per_member * trainer.runtime.threads
