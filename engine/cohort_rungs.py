"""Looks at members on the way: when, and who is dropped.

A member is looked at once it has been trained for 1/4, and for 1/2, of its own steps (``rungs``). At 1/4 one whose
features have collapsed is dropped. Under successive halving (Jamieson & Talwalkar 2016), by the rule of Optuna's
``SuccessiveHalvingPruner`` with a reduction factor of 2, the worse half is dropped at both (``promoted``).
"""

from __future__ import annotations

from collections.abc import Sequence

from engine.recipe import Search

SHARES = (4, 2)
"""Rungs, as what a member's steps are divided by."""


def rungs(settings: Search, *, first: int, steps: int) -> tuple[int, ...]:
    """Steps, counted from the schedule's start, after which a member trained from ``first`` to ``steps`` is looked at.

    Rounded up, and before the end; none where nothing is looked for.
    """
    looks = SHARES if settings.halving else SHARES[:1] if settings.collapse_rank else ()
    found = {first - -(steps - first) // share for share in looks}
    return tuple(sorted(found - {steps}))


def first_step(settings: Search, steps: int) -> int:
    """The step that a member with its parent's networks starts from, to be trained for the last share of the steps."""
    return steps - max(1, round(settings.warm_start_steps * steps))


def promoted(fitnesses: Sequence[float]) -> list[bool]:
    """Whether each goes on: the better half, of an odd number the smaller one, and always the best.

    All that are equal to the worst of those go on too.
    """
    if not fitnesses:
        return []
    least = sorted(fitnesses, reverse=True)[max(len(fitnesses) // 2, 1) - 1]
    return [fitness >= least for fitness in fitnesses]
