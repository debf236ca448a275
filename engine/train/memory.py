"""The memory that cohorts of one process share: decoded clips, and as many members as it holds beside them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from engine.core.runtime import Runtime, free_memory, is_device_error, is_out_of_memory
from engine.data.clip_bank import ClipBank
from engine.objective.loss import active_terms, branches
from engine.objective.terms import LossWeights
from engine.train.trainer import Trainer, device_failed

SHARE = 0.85
"""Share of the free memory that members may take: allocators lose some to gaps."""
CPU_STEP = 4
"""On a CPU, a step's activations are taken for this many times a member's own state."""


@dataclass
class CohortMemory:
    """A process's memory for cohorts, kept from one to the next: decoded clips, and the number of members that fit."""

    members_at_once: int | None = None
    """Most members in memory; None: as many as it turns out to hold."""
    bank: ClipBank | None = None

    def clips(self, trainer: Trainer, size: int | str) -> ClipBank | None:
        """The bank that ``search.clip_bank`` asks for, decoded at the first call; None for a size of 0."""
        if size and self.bank is None:
            self.bank = trainer.open_bank(size)
        return self.bank if size else None

    def members_that_fit(
        self,
        trainer: Trainer,
        losses: Sequence[LossWeights],
        *,
        seed: int,
        bank: ClipBank | None = None,
    ) -> int:
        """The number of ``losses`` that can be trained at once, at least 1.

        On a GPU one member is trained for a step, which shows what a member holds and what a step needs on top;
        on a CPU the members' state is counted, with an allowance for the step. The first answer that memory
        gives is kept. A loss that can't be trained says so when its turn comes, not here.
        """
        if self.members_at_once is not None:
            return self.members_at_once
        if len(losses) <= 1:
            return 1
        try:
            largest = _largest(trainer, losses)
            per_member, per_step = memory_needed(trainer, largest, seed=seed, bank=bank)
        except (ValueError, RuntimeError, MemoryError) as error:
            too_large = is_out_of_memory(error)
            if is_device_error(error) and not too_large:
                raise device_failed(error) from error
        else:
            fits = that_many_fit(trainer.runtime, per_member=per_member, per_step=per_step)
            if fits < len(losses):
                self.members_at_once = fits
            return min(fits, len(losses))
        trainer.free_memory()  # only here does no traceback hold the member's tensors any more
        return 1 if too_large else len(losses)


def memory_needed(
    trainer: Trainer, weights: LossWeights, *, seed: int, bank: ClipBank | None = None
) -> tuple[int, int]:
    """Bytes that a member takes, and those that its step takes beside: measured on a GPU, counted on a CPU."""
    if trainer.runtime.device.type == "cuda":
        return _measured(trainer, weights, seed=seed, bank=bank)
    per_member = 4 * trainer.weight_bytes(seed)  # weights, gradients, two moments
    return per_member, CPU_STEP * per_member * trainer.runtime.threads


def that_many_fit(runtime: Runtime, *, per_member: int, per_step: int) -> int:
    """Members that this process's share of the memory that is free holds, at least 1."""
    shared_by = runtime.processes if runtime.device.type == "cpu" else 1
    room = SHARE * free_memory(runtime.device) / shared_by - per_step
    return max(int(room // max(per_member, 1)), 1)


def _largest(trainer: Trainer, losses: Sequence[LossWeights]) -> LossWeights:
    """The loss whose networks' branches suffice for most terms: no other one's step needs more."""

    def size(weights: LossWeights) -> int:
        active = active_terms(weights, sound=trainer.sound)
        return len(branches(active).terms(sound=trainer.sound))

    return max(losses, key=size)


def _measured(
    trainer: Trainer, weights: LossWeights, *, seed: int, bank: ClipBank | None = None
) -> tuple[int, int]:
    """Bytes of a member on the GPU, and those that a step needs beside."""
    device = trainer.runtime.device
    member = trainer.member(weights, seed=seed, bank=bank)
    _, views = next(trainer.rounds([member], seed=seed, bank=bank))
    # the first step makes what all members share: compiled code, checks, moments
    for _ in range(2):
        trainer.free_memory()  # what the one before left is the step's too
        torch.cuda.reset_peak_memory_stats(device)
        held = torch.cuda.memory_allocated(device)
        trainer.step(member, views)
    per_step = torch.cuda.max_memory_allocated(device) - held
    before = torch.cuda.memory_allocated(device)
    second = trainer.member(weights, seed=seed, bank=bank)
    per_member = torch.cuda.memory_allocated(device) - before
    if second.state is None:  # its moments and gradients come with its first step
        per_member *= 4
    del member, second, views
    trainer.free_memory()
    # A CUDA graph's memory is no part of a replay's peak, and free_memory counts it as free: it is what stays idle.
    idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return per_member, max(per_step, idle)
