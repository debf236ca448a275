"""The surrogate's sampler: a balanced design, then what a model of all members so far promises, then a race."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from engine.core.recipe import Search
from engine.objective.lossfile import draw_weights
from engine.objective.terms import TERM_NAMES
from engine.search.members import Proposal, Trial
from engine.search.samplers.base import RandomSampler, generation_of
from engine.search.samplers.design import design, halves, neighbour
from engine.search.surrogate import (
    ANY_TERM,
    FEWEST,
    OF_RGB,
    OWN,
    SILENT,
    TRAINS_RGB,
    Surrogate,
    computed,
    computed_vectors,
    shares,
    untaught,
    vectors,
)

MOST = 400
"""Members that it learns from: its time grows with their cube."""
ALIKE = 0.05
"""Losses whose roots of shares differ by less are one loss, which the same seed need not train again."""
PARENTS = 2
"""Fittest members whose neighbours are proposed."""
NEIGHBOURS = 4
"""Of one such member, of which a draw from the model chooses."""
RACE = 4
"""Last members, which race the model's best loss and the fittest, where no generation is larger: a third at most."""
TRIES = 20
"""Draws for a loss that is unlike all others, each wider than the one before; then comes a random one."""
Array = npt.NDArray[np.float64]


class SurrogateSampler(RandomSampler):
    """Thompson sampling (1933): each member is the best loss under coefficients drawn from ``Surrogate``'s posterior.

    The initial population is a design (``design``): every task is in as many of its members, give or take one, and a
    network that teaches is always distilled. After a sparse one, two members share the tasks of its fittest
    (``halves``), since several tasks at once do not tell which of them it was. Then come the weights that one draw of
    all effects promises most of, in at most 1 - ``search.sparsity`` of the terms. Where an effect is unsure, draws
    differ, and so it is looked into; where it is known to harm, none has it. Every other sparse loss is a neighbour of
    one of the fittest members instead, since few terms are more than the sum of their effects. No loss is proposed
    twice, but by the last members where ``search.seeds`` is "generation", a third of ``search.rounds`` in whole
    generations, RACE or one of these at most: with other seeds, these train the model's bet and, again, the fittest. No
    sparse proposal distils a network that it has no task for, and without ``sound`` none has a term that needs it.
    Generations are waited for as in evolution.
    """

    def __init__(self, settings: Search, *, seed: int, sound: bool = True) -> None:
        super().__init__(settings, seed=seed, sound=sound)
        self.usable = ANY_TERM if sound else SILENT
        self._known: tuple[int, tuple[Surrogate, Array, Array]] | None = None
        self._proposed: dict[tuple[int, int], Array] = {}
        """What was proposed, by number and the number of complete members."""

    def generation(self, number: int) -> range | None:
        """``generation_of``; None in the asynchronous mode."""
        return generation_of(number, settings=self.settings) if self.settings.synchronous else None

    def propose(self, number: int, *, done: Sequence[Trial]) -> Proposal:
        """The design's member, the best under a draw, a neighbour of one of the fittest, or a loss of the race."""
        complete = [member for member in done if member.fitness is not None]
        if number < self.settings.population or len(complete) < FEWEST:
            return self._designed(number)
        weights = dict(zip(TERM_NAMES, self._next(number, complete).tolist(), strict=True))
        return Proposal(number, weights, round=self.round_of(number))

    def _next(self, number: int, complete: Sequence[Trial]) -> Array:
        """(terms,) weights of a member that is not in the design."""
        key = (number, len(complete))
        if key in self._proposed:
            return self._proposed[key]
        together = self.generation(number) or range(number, number)
        first = max(together.start, self.settings.population)
        beside = np.array([self._next(n, complete) for n in range(first, number)])
        beside = beside.reshape(number - first, len(TERM_NAMES))
        if number >= self.race:
            values = self._raced(number, complete, beside)
        else:
            values = self._unlike(number, complete, beside)
        self._proposed[key] = values
        return values

    def _unlike(self, number: int, complete: Sequence[Trial], beside: Array) -> Array:
        """(terms,) weights unlike those of any member: the best under a draw, or a neighbour of one of the fittest.

        Those that begin the last generation before the race, or the end, are the model's bet.
        """
        bet = generation_of(self.race - 1, settings=self.settings).start
        surest = number == bet
        model, known, fitness = self._learnt(complete)
        others, rng = np.concatenate([known, beside]), self.stream(number)
        sparse, turn = self.settings.sparsity > 0, number - self.settings.population
        near = sparse and turn % 2 == 1 and not surest
        if sparse and turn < 2 and bet > self.settings.population + 1:
            half = self._half(turn, complete)
            if half.any() and not _alike(others, half).any():
                return half
        for tried in range(TRIES):
            if near:
                parent = known[rng.choice(np.argsort(-fitness, kind="stable")[:PARENTS])]
                how: dict[str, Any] = {"most": self._most, "rng": rng, "usable": self.usable}
                drawn = [neighbour(parent, **how) for _ in range(NEIGHBOURS)]
                nearby = [each for each in drawn if not untaught(each > 0).any()] or drawn
                values = computed(model.best_of(nearby, model.draw(rng, width=1 + tried)))
            elif surest and not tried:
                values = computed(model.surest(rng, most=self._most))
            else:
                effects = model.draw(rng, width=1 + tried)
                values = computed(model.best_weights(effects, most=self._most))
            if sparse:
                values = np.where(untaught(values > 0), 0.0, values)
            if not values.any():
                expected = [model.effect(j)[0] for j in range(len(values))]
                values[int(np.where(OF_RGB & self.usable, expected, -np.inf).argmax())] = 1.0
            if not _alike(others, values).any():
                return values
        last = np.zeros(len(TERM_NAMES))
        while not last @ TRAINS_RGB:
            drawn_anew = draw_weights(rng, sparsity=self.settings.sparsity)
            last = np.where(self.usable, vectors([drawn_anew])[0], 0.0)
        kept = np.where(sparse & untaught(last > 0), 0.0, last)
        return kept if kept @ TRAINS_RGB else last

    def _half(self, turn: int, complete: Sequence[Trial]) -> Array:
        """(terms,) one of the two halves of the fittest in the design; all 0 where too few of it are complete."""
        designed = [member for member in complete if member.number < self.settings.population]
        if len(designed) < FEWEST:
            return np.zeros(len(TERM_NAMES))
        weights = computed_vectors([RandomSampler.fittest(self, designed).weights])[0]
        return halves(weights, self.stream(self.settings.population))[turn]

    @property
    def _most(self) -> int:
        """Terms of a proposal at most."""
        return max(round((1 - self.settings.sparsity) * len(TERM_NAMES)), 1)

    @property
    def race(self) -> int:
        """The number of the first member of the race."""
        rounds, size = self.settings.rounds, self.settings.generation
        most = min(max(RACE, size), rounds // 3)
        # the first of a generation, which has seeds of its own
        start = -(-(rounds - most) // size) * size
        again = rounds - start >= 2 and self.settings.seeds == "generation"
        return self.settings.population + (start if again else rounds)

    def _raced(self, number: int, complete: Sequence[Trial], beside: Array) -> Array:
        """(terms,) weights of a loss not trained beside this member: the model's bet at first, then the fittest.

        None is raced more than twice. Asynchronous members take turns, since those at work are unknown.
        """
        model, known, fitness = self._learnt(complete)
        if number == self.race:
            values = computed(model.surest(self.stream(number), most=self._most))
            if values.any() and not _alike(beside, values).any():
                return values
        same = _same(known)
        raced = same @ self._in_race(complete[-len(known) :])
        best = np.argsort(-(same @ fitness / same.sum(1)), kind="stable")
        first = [i for i in best if not same[i, :i].any()]  # each loss once
        free = [i for i in first if raced[i] < 2 and not _alike(beside, known[i]).any()] or first
        turn = 0 if self.settings.synchronous else max(number - self.race - 1, 0)
        return np.asarray(known[free[turn % len(free)]])

    def _in_race(self, members: Sequence[Trial]) -> npt.NDArray[np.bool_]:
        return np.array([member.number >= self.race for member in members])

    def fittest(self, done: Sequence[Trial]) -> Trial:
        """The member that the model and its loss' own trainings speak for most: one that was lucky is not enough.

        After a race, one of those that were in it, by what they were worth there: the trainings for which they were
        chosen flatter.
        """
        complete = [member for member in done if member.fitness is not None]
        if len(complete) < FEWEST:
            return super().fittest(done)
        model, weights, fitness = self._learnt(complete)
        latest = complete[-len(weights) :]
        counted = self._in_race(latest)
        counted |= not counted.any()
        same = _same(weights)
        trainings = same @ counted
        means = same @ (counted * fitness) / np.maximum(trainings, 1)
        own = model.own(same, fitness)
        worth = model.smoothed(weights, means, trainings=trainings, own=own)
        if own < OWN and model.agrees(self._most):
            # the mean effects can't judge what draws agree on, nor can trainings that agree no better than the model
            bet = np.array([member.number == self.race for member in latest])
            bet &= means > model.predict(weights) - 2 * model.noise
            worth[same @ bet > 0] = np.inf
        # of trainings of one loss that count, the fittest
        order = np.lexsort((fitness, counted, worth, trainings > 0))
        return latest[int(order[-1])]

    def _learnt(self, complete: Sequence[Trial]) -> tuple[Surrogate, Array, Array]:
        """What the latest MOST members taught, with their weights and fitness; kept for the whole generation."""
        if self._known is None or self._known[0] != len(complete):
            latest = complete[-MOST:]
            fitness = np.array([member.fitness for member in latest], np.float64)
            weights = computed_vectors([member.weights for member in latest])
            self._known = (
                len(complete),
                (Surrogate.fit(weights, fitness, usable=self.usable), weights, fitness),
            )
        return self._known[1]

    def _designed(self, number: int) -> Proposal:
        size = self.settings.population
        key = np.random.SeedSequence(self.seed, spawn_key=(0xDE516, number // size))
        rng = np.random.Generator(np.random.Philox(key))
        planned = design(size, 1 - self.settings.sparsity, rng, usable=self.usable)
        weights = dict(zip(TERM_NAMES, planned[number % size].tolist(), strict=True))
        return Proposal(number, weights, round=self.round_of(number))


def _alike(weights: Array, loss: Array) -> npt.NDArray[np.bool_]:
    """(N,) which of weights (N, terms) are one loss with ``loss`` (terms,), but for less than ALIKE."""
    apart: Array = np.abs(shares(weights) - shares(loss)).max((-2, -1), initial=0.0)
    return apart <= ALIKE


def _same(weights: Array) -> Array:
    """(N, N) 1 where two of weights (N, terms) are equal, else 0."""
    return np.asarray((weights[:, None] == weights).all(-1), np.float64)
