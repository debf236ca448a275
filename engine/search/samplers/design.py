"""Losses laid out by hand of a plan: a balanced first population, the halves of a loss, and a loss' neighbours."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from engine.objective.terms import TERM_NAMES
from engine.search.surrogate import ANY_TERM, DISTILLS, OF_RGB, ROLES, TASKS, TIES, computed

LAYERS_EACH = 3
"""Least layers distilled of each network that teaches, in a design's members: of five, one of the last two at least."""
Array = npt.NDArray[np.float64]
Terms = npt.NDArray[np.bool_]


def design(
    size: int, density: float, rng: np.random.Generator, *, usable: Terms = ANY_TERM
) -> Array:
    """(size, terms) weights of a design in which every task can show what it is worth.

    Tasks are dealt out, each as often as the others, in hands of one teacher's, between which the RGB network's own
    stand: two teachers in one loss get into each other's way. A member with a teacher's tasks then distils LAYERS_EACH
    of its layers or more, early and late ones, since not every layer carries what a teacher learns. Joint embedding,
    which holds back what distillation carries, and alignment are dealt out as tasks are. Weights are spread evenly,
    those of sparse losses over the upper half, so that none drowns the others. ``usable`` (terms,): those to have.
    """
    members, span = np.zeros((size, len(TERM_NAMES))), max(density, 0.5)

    def weights(count: int) -> Array:
        places: Array = (rng.permutation(count) + rng.random(count)) / count
        return 1 - span * places

    cards = int(np.count_nonzero(~DISTILLS.any(0) & usable))
    copies = max(round(density * size), -(-size // cards))
    own = rng.permutation(np.flatnonzero(OF_RGB & usable))
    deck: list[int] = []
    for _ in range(copies):
        # the shortest part first: later ones keep what joins RGB to a teacher from the tasks of the one before
        parts = reversed(np.array_split(own, len(TASKS)))
        for teacher, part in zip(rng.permutation(len(TASKS)), parts, strict=True):
            joined = TIES[teacher] & ~DISTILLS[teacher] & usable
            tasks = TASKS[teacher] & usable
            deck += [*part, *rng.permutation(np.flatnonzero(joined))]
            deck += [*rng.permutation(np.flatnonzero(tasks))]
    seats = rng.permutation(size)
    for seat, hand in zip(seats, np.array_split(deck, size), strict=True):
        members[seat, hand] = 1.0
    for task in np.flatnonzero(members.any(0)):
        holders = np.flatnonzero(members[:, task])
        members[holders, task] = weights(len(holders))
    for ties, tasks in zip(DISTILLS, TASKS, strict=True):
        deep, taught = np.flatnonzero(ties & usable), np.flatnonzero(members[:, tasks].any(1))
        if not len(deep):
            continue
        each = max(round(density * len(deep)), LAYERS_EACH)
        apart = np.arange(each) * len(deep) // each
        for turn, member in enumerate(taught, start=int(rng.integers(len(deep)))):
            members[member, deep[(turn + apart) % len(deep)]] = weights(each)
    return members


def halves(weights: Array, rng: np.random.Generator) -> tuple[Array, Array]:
    """The tasks of a loss (terms,) in two losses, with the layers of those networks that one trains; 0 for none.

    The RGB network's own in one, a teacher's and what joins RGB to it in the other; of one kind alone, at random.
    """
    tasks = (weights > 0) & ~DISTILLS.any(0)
    first = tasks & OF_RGB
    if not first.any() or not (tasks & ~OF_RGB).any():
        drawn = rng.permutation(np.flatnonzero(tasks))
        first = np.isin(np.arange(len(weights)), drawn[: len(drawn) // 2])
    both = []
    for chosen in (first, tasks & ~first):
        taught = np.any(TASKS & chosen, axis=1, keepdims=True)
        layers = np.any(DISTILLS & taught, axis=0)
        both.append(computed(np.where(chosen | layers, weights, 0.0)))
    return both[0], both[1]


def neighbour(
    weights: Array, *, most: int, rng: np.random.Generator, usable: Terms = ANY_TERM
) -> Array:
    """(terms,) weights with one term weighed anew, left out, exchanged for one of the same role, or added.

    A role is to tie the RGB network to one teacher, to train that teacher, or to train the RGB network alone. At most
    ``most`` terms, all of them ``usable`` (terms,). A loss may become one that a member has already.
    """
    near, held = weights.copy(), np.flatnonzero(weights)
    absent, term = np.flatnonzero((weights == 0) & usable), int(rng.choice(held))
    moves = {
        "weigh": np.array([term]),
        "leave out": held if len(held) > 1 else absent[:0],
        "exchange": absent[ROLES[absent] == ROLES[term]],
        "add": absent if len(held) < most else absent[:0],
    }
    move = str(rng.choice([name for name, terms in moves.items() if len(terms)]))
    other = int(rng.choice(moves[move]))
    if move == "exchange":
        near[other], near[term] = near[term], 0.0
    else:
        near[other] = 0.0 if move == "leave out" else 1 - rng.random()
    return near
