"""Samplers, which propose weights from the seed, a member's number and the members done before it.

evolution (the paper): an initial population is drawn uniformly; then, round by round, a top performer (the winner of
a tournament) is copied and one of its weights is drawn anew. cmaes (the follow-up): a normal distribution over all
weights, moved and reshaped by each generation's ranks. surrogate: a balanced design first, then what a model of all
members so far promises (Thompson sampling). random and grid are controls that learn nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations, product
from pathlib import Path
from typing import Any, Literal

import cmaes
import numpy as np
import numpy.typing as npt

from engine.core.recipe import Search
from engine.objective.lossfile import draw_weights
from engine.objective.terms import TERM_NAMES, LossWeights, present, reaching
from engine.search.surrogate import (
    DISTILLS,
    OF_RGB,
    OWN,
    ROLES,
    TASKS,
    TIES,
    TRAINS_RGB,
    Surrogate,
    computed,
    computed_vectors,
    shares,
    untaught,
    vectors,
)

State = Literal["complete", "failed", "pruned"]
FEWEST = 8
"""Members from which on a model of them is asked."""
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
LAYERS_EACH = 3
"""Least layers distilled of each network that teaches, in a design's members: of five, one of the last two at least."""
TRIES = 20
"""Draws for a loss that is unlike all others, each wider than the one before; then comes a random one."""
Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Proposal:
    """A member to train."""

    number: int
    """Its place in the study, from 0."""
    weights: LossWeights
    parent: int | None = None
    """The member whose weights were copied; None for weights that were all drawn."""
    mutated: str | None = None
    """The term whose weight differs from the parent's."""
    round: int = 0
    """0 for the initial population, then one member a round up to ``settings.rounds``; for cmaes, the generation."""
    start: Path | None = field(default=None, compare=False)
    """Its parent's end state, from which its networks start, for the last ``search.warm_start_steps``."""
    keep: Path | None = field(default=None, compare=False)
    """The file for its end state, from which its children start; None: none."""

    @property
    def trial(self) -> int:
        """The same as ``number``: the name that scripts know."""
        return self.number


@dataclass(frozen=True, kw_only=True)
class Trial(Proposal):
    """A member that is done, as the study keeps it: what was proposed, and what training and judging gave."""

    state: State = "complete"
    fitness: float | None = None
    """None for a member that failed or was pruned."""
    rungs: tuple[tuple[int, float], ...] = ()
    """(step, fitness) of a pruned member at each rung."""
    attributes: Mapping[str, Any] = field(default_factory=dict)
    """All else that was noted of it; other programs may have written it."""

    @property
    def proposal(self) -> Proposal:
        """The member as it was proposed."""
        return Proposal(self.number, self.weights, self.parent, self.mutated, self.round)

    @property
    def partial(self) -> float | None:
        """A pruned member's fitness at its last rung."""
        return self.rungs[-1][1] if self.rungs else None

    @property
    def reason(self) -> str:
        """Why it failed or was pruned."""
        missing = "no reason recorded" if self.state == "failed" else ""
        return str(self.attributes.get("reason") or missing)

    @property
    def seconds(self) -> float | None:
        """Its share of its cohort's time."""
        return finite(self.attributes.get("seconds"))

    @property
    def clips_per_second(self) -> float | None:
        """Training clips a second while it was trained; its share where a cohort took turns."""
        return finite(self.attributes.get("clips_per_second"))

    @property
    def metrics(self) -> dict[str, float]:
        """Every measure of its features, by name: means over its trainings."""
        return finite_values(self.attributes.get("metrics"))

    @property
    def terms(self) -> dict[str, float]:
        """The last mean value of each loss term."""
        return finite_values(self.attributes.get("terms"))


def finite(value: object) -> float | None:
    """``value`` as a finite number, else None."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if math.isfinite(value) else None


def finite_values(table: object) -> dict[str, float]:
    """The entries of ``table`` that are finite numbers; none where it is no table."""
    items = table.items() if isinstance(table, Mapping) else ()
    return {str(k): number for k, v in items if (number := finite(v)) is not None}


def generation_of(number: int, *, settings: Search) -> range:
    """The numbers of the members proposed together with member ``number``.

    Chunks of ``settings.generation``, first of the initial population and then of its descendants;
    the last chunk of either may be shorter.
    """
    first, stop = 0, settings.population
    if number >= settings.population:
        first, stop = settings.population, settings.population + settings.rounds
    start = number - (number - first) % settings.generation
    return range(start, min(start + settings.generation, stop))


class RandomSampler:
    """Weights by ``draw_weights``, from a random stream keyed by (seed, number)."""

    def __init__(self, settings: Search, *, seed: int) -> None:
        self.settings = settings
        self.seed = seed

    def stream(self, number: int) -> np.random.Generator:
        """The random numbers of one member: the same in any process, whatever was drawn before."""
        key = np.random.SeedSequence(self.seed, spawn_key=(number,))
        return np.random.Generator(np.random.Philox(key))

    def seed_of(self, number: int) -> int:
        """A seed below 2**32 for a library's own random numbers of one member."""
        return int(np.random.SeedSequence(self.seed, spawn_key=(number,)).generate_state(1)[0])

    def round_of(self, number: int) -> int:
        """0 for the first ``settings.population`` members, then one a round."""
        return max(0, number + 1 - self.settings.population)

    @property
    def race(self) -> int:
        """The number of the first of the last members, one of which is to be the outcome; that after the last: none."""
        return self.settings.population + self.settings.rounds

    def generation(self, number: int) -> range | None:
        """The numbers proposed together with ``number``, once all before them are done; None: no need to wait."""
        return None

    def propose(self, number: int, *, done: Sequence[Trial]) -> Proposal:
        """Draw member ``number``'s weights; other samplers look at ``done``, those that it may know of, by number."""
        weights = draw_weights(self.stream(number), sparsity=self.settings.sparsity)
        return Proposal(number, weights, round=self.round_of(number))

    def first(self, number: int) -> LossWeights:
        """The loss of a member ``number`` that is proposed before any is done."""
        return self.propose(number, done=()).weights

    def fittest(self, done: Sequence[Trial]) -> Trial:
        """The search's outcome: the member of highest fitness, the earliest among equals; one at least is complete."""
        complete = [member for member in done if member.fitness is not None]
        return max(complete, key=lambda member: (_by_fitness(member)[0], -member.number))


class EvolutionSampler(RandomSampler):
    """Tournament selection, then a mutation of one weight (the paper).

    Parents come from the population that replacement has left of the members known to be complete: the
    ``settings.population`` fittest ("worst" leaves; of equals, the older one) or latest ("oldest" leaves; regularised
    evolution, Real et al. 2019). Where none is complete, a child is drawn uniformly.

    ``settings.synchronous`` (the default) waits for a generation's last member before the next is proposed. A child
    then depends on (seed, number, earlier generations) alone: on 1 worker or 64, killed or not, a search proposes the
    same members. Otherwise no worker waits, and a search can't be repeated where members overtake one another.
    """

    def generation(self, number: int) -> range | None:
        """``generation_of``; None in the asynchronous mode."""
        return generation_of(number, settings=self.settings) if self.settings.synchronous else None

    def propose(self, number: int, *, done: Sequence[Trial]) -> Proposal:
        """Draw an initial member, or copy a tournament's winner and draw one weight anew."""
        population = self.population(done)
        if number < self.settings.population or not population:
            return super().propose(number, done=done)
        rng = self.stream(number)
        order = np.argsort(rng.random(len(population)))
        parent = max((population[i] for i in order[: self.settings.tournament]), key=_by_fitness)
        weights = dict(parent.weights)
        mutated = TERM_NAMES[int(rng.random() * len(TERM_NAMES))]
        sparsity = self.settings.sparsity
        while weights[mutated] == parent.weights[mutated] or not reaching(present(weights)):
            weights[mutated] = float(rng.random())
            if sparsity and rng.random() < sparsity:
                weights[mutated] = 0.0
        return Proposal(number, weights, parent.number, mutated, self.round_of(number))

    def population(self, done: Sequence[Trial]) -> list[Trial]:
        """The members that may be parents, the fittest or the latest first; ``done`` goes by number."""
        complete = [member for member in reversed(done) if member.fitness is not None]
        if self.settings.replace == "worst":
            complete.sort(key=_by_fitness, reverse=True)
        return complete[: self.settings.population]


class SurrogateSampler(RandomSampler):
    """Thompson sampling (1933): each member is the best loss under coefficients drawn from ``Surrogate``'s posterior.

    The initial population is a design (``_design``): every task is in as many of its members, give or take one, and a
    network that teaches is always distilled. After a sparse one, two members share the tasks of its fittest
    (``_halves``), since several tasks at once do not tell which of them it was. Then come the weights that one draw of
    all effects promises most of, in at most 1 - ``search.sparsity`` of the terms. Where an effect is unsure, draws
    differ, and so it is looked into; where it is known to harm, none has it. Every other sparse loss is a neighbour of
    one of the fittest members instead, since few terms are more than the sum of their effects. No loss is proposed
    twice, but by the last members where ``search.seeds`` is "generation", a third of ``search.rounds`` in whole
    generations, RACE or one of these at most: with other seeds, these train the model's bet and, again, the fittest. No
    sparse proposal distils a network that it has no task for. Generations are waited for as in evolution.
    """

    def __init__(self, settings: Search, *, seed: int) -> None:
        super().__init__(settings, seed=seed)
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
                drawn = [neighbour(parent, most=self._most, rng=rng) for _ in range(NEIGHBOURS)]
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
                values[int(np.where(OF_RGB, expected, -np.inf).argmax())] = 1.0
            if not _alike(others, values).any():
                return values
        last = np.asarray(vectors([draw_weights(rng, sparsity=self.settings.sparsity)])[0])
        kept = np.where(sparse & untaught(last > 0), 0.0, last)
        return kept if kept @ TRAINS_RGB else last

    def _half(self, turn: int, complete: Sequence[Trial]) -> Array:
        """(terms,) one of the two halves of the fittest in the design; all 0 where too few of it are complete."""
        designed = [member for member in complete if member.number < self.settings.population]
        if len(designed) < FEWEST:
            return np.zeros(len(TERM_NAMES))
        weights = computed_vectors([RandomSampler.fittest(self, designed).weights])[0]
        return _halves(weights, self.stream(self.settings.population))[turn]

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
            self._known = len(complete), (Surrogate.fit(weights, fitness), weights, fitness)
        return self._known[1]

    def _designed(self, number: int) -> Proposal:
        size = self.settings.population
        key = np.random.SeedSequence(self.seed, spawn_key=(0xDE516, number // size))
        rng = np.random.Generator(np.random.Philox(key))
        design = _design(size, 1 - self.settings.sparsity, rng)
        weights = dict(zip(TERM_NAMES, design[number % size].tolist(), strict=True))
        return Proposal(number, weights, round=self.round_of(number))


def _alike(weights: Array, loss: Array) -> npt.NDArray[np.bool_]:
    """(N,) which of weights (N, terms) are one loss with ``loss`` (terms,), but for less than ALIKE."""
    apart: Array = np.abs(shares(weights) - shares(loss)).max((-2, -1), initial=0.0)
    return apart <= ALIKE


def _same(weights: Array) -> Array:
    """(N, N) 1 where two of weights (N, terms) are equal, else 0."""
    return np.asarray((weights[:, None] == weights).all(-1), np.float64)


def _halves(weights: Array, rng: np.random.Generator) -> tuple[Array, Array]:
    """The tasks of a loss (terms,) in two losses, with the layers of those networks that one trains; 0 for none.

    The RGB network's own in one, a teacher's and what joins RGB to it in the other; of one kind alone, at random.
    """
    tasks = (weights > 0) & ~DISTILLS.any(0)
    first = tasks & OF_RGB
    if not first.any() or not (tasks & ~OF_RGB).any():
        drawn = rng.permutation(np.flatnonzero(tasks))
        first = np.isin(np.arange(len(weights)), drawn[: len(drawn) // 2])
    halves = []
    for chosen in (first, tasks & ~first):
        taught = np.any(TASKS & chosen, axis=1, keepdims=True)
        layers = np.any(DISTILLS & taught, axis=0)
        halves.append(computed(np.where(chosen | layers, weights, 0.0)))
    return halves[0], halves[1]


def neighbour(weights: Array, *, most: int, rng: np.random.Generator) -> Array:
    """(terms,) weights with one term weighed anew, left out, exchanged for one of the same role, or added.

    A role is to tie the RGB network to one teacher, to train that teacher, or to train the RGB network alone. At most
    ``most`` terms, or as many as there are. A loss may become one that a member has already.
    """
    near, held = weights.copy(), np.flatnonzero(weights)
    absent, term = np.flatnonzero(weights == 0), int(rng.choice(held))
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


def _design(size: int, density: float, rng: np.random.Generator) -> Array:
    """(size, terms) weights of a design in which every task can show what it is worth.

    Tasks are dealt out, each as often as the others, in hands of one teacher's, between which the RGB network's own
    stand: two teachers in one loss get into each other's way. A member with a teacher's tasks then distils LAYERS_EACH
    of its layers or more, early and late ones, since not every layer carries what a teacher learns. Joint embedding,
    which holds back what distillation carries, and alignment are dealt out as tasks are. Weights are spread evenly,
    those of sparse losses over the upper half, so that none drowns the others.
    """
    members, span = np.zeros((size, len(TERM_NAMES))), max(density, 0.5)

    def weights(count: int) -> Array:
        places: Array = (rng.permutation(count) + rng.random(count)) / count
        return 1 - span * places

    cards = int(np.count_nonzero(~DISTILLS.any(0)))
    copies = max(round(density * size), -(-size // cards))
    own = rng.permutation(np.flatnonzero(OF_RGB))
    deck: list[int] = []
    for _ in range(copies):
        # the shortest part first: later ones keep what joins RGB to a teacher from the tasks of the one before
        parts = reversed(np.array_split(own, len(TASKS)))
        for teacher, part in zip(rng.permutation(len(TASKS)), parts, strict=True):
            joined, tasks = TIES[teacher] & ~DISTILLS[teacher], TASKS[teacher]
            deck += [*part, *rng.permutation(np.flatnonzero(joined))]
            deck += [*rng.permutation(np.flatnonzero(tasks))]
    seats = rng.permutation(size)
    for seat, hand in zip(seats, np.array_split(deck, size), strict=True):
        members[seat, hand] = 1.0
    for task in np.flatnonzero(members.any(0)):
        holders = np.flatnonzero(members[:, task])
        members[holders, task] = weights(len(holders))
    for ties, tasks in zip(DISTILLS, TASKS, strict=True):
        deep, taught = np.flatnonzero(ties), np.flatnonzero(members[:, tasks].any(1))
        each = max(round(density * len(deep)), LAYERS_EACH)
        apart = np.arange(each) * len(deep) // each
        for turn, member in enumerate(taught, start=int(rng.integers(len(deep)))):
            members[member, deep[(turn + apart) % len(deep)]] = weights(each)
    return members


class CmaSampler(RandomSampler):
    """CMA-ES (Hansen 2016; library ``cmaes``) within [0, 1], from 0.5 in every weight.

    The library learns from a whole generation, so that no parallel member is thrown away; it has ``settings.
    cmaes_population`` members, whatever ``settings.generation``. Each proposal draws from a stream of its own, keyed by
    (seed, number), so the library's state follows from the fitnesses: it is built anew from the study, and no kill can
    lose it. The library wants an outcome for each proposal: members that failed or were pruned count as no better than
    the worst of their generation, so that the search leaves where losses diverge. A generation of which none completed
    ranks nothing: it is left out, and the next comes from the same distribution.

    Raises ValueError for a generation below 4, too small for the library's weights.
    """

    def __init__(self, settings: Search, *, seed: int) -> None:
        super().__init__(settings, seed=seed)
        if 0 < settings.cmaes_population < 4:
            raise ValueError("search.cmaes_population: 0 (for 14), or 4 and more")
        n = len(TERM_NAMES)
        self._library = cmaes.CMA(
            mean=np.full(n, 0.5),
            sigma=settings.sigma,
            bounds=np.tile([0.0, 1.0], (n, 1)),
            population_size=settings.cmaes_population or None,
        )
        self.size: int = self._library.population_size
        self._learnt = 0
        """Members of generations that the library knows."""

    def round_of(self, number: int) -> int:
        """The generation."""
        return number // self.size

    def generation(self, number: int) -> range | None:
        """Chunks of ``size``, the last one cut off at the search's end."""
        start = number - number % self.size
        return range(start, min(start + self.size, self.settings.population + self.settings.rounds))

    def propose(self, number: int, *, done: Sequence[Trial]) -> Proposal:
        """Let the library learn from all generations before this one, and ask it for a member."""
        start = number - number % self.size
        assert self._learnt <= start <= len(done), (
            "generations are asked in order, when all are done"
        )
        for first in range(self._learnt, start, self.size):
            self._learn(done[first : first + self.size])
        self._learnt = start
        return Proposal(number, self._asked(number), round=self.round_of(number))

    def first(self, number: int) -> LossWeights:
        """A member of the distribution that the search begins with, whatever its generation."""
        assert not self._learnt, "the library has learnt of other members"
        return self._asked(number)

    def _asked(self, number: int) -> LossWeights:
        self._library.reseed_rng(self.seed_of(number))
        return dict(zip(TERM_NAMES, self._library.ask().tolist(), strict=True))

    def _learn(self, generation: Sequence[Trial]) -> None:
        known = [(vectors([m.weights])[0], -m.fitness) for m in generation if m.fitness is not None]
        if not known:
            return
        worst = max(loss for _, loss in known)
        # The library sorts them, and among equals keeps this order.
        lost = [(vectors([m.weights])[0], worst) for m in generation if m.fitness is None]
        self._library.tell(known + lost)


class GridSampler(RandomSampler):
    """Losses of one term, then of two, all other weights 0.

    A term in use has one of ``settings.levels`` weights: 1, 1 - 1/levels, ..., 1/levels. Order: single terms at weight
    1 in the table's order, then at each lower level; then pairs of terms at (1, 1), and at each other pair of levels,
    from the highest down. Pairs of one block go by how far apart their terms are in the table, taken as a ring, with
    neighbours first: wherever the search ends inside a block, every term has come as often, give or take two.

    Raises ValueError where the search has more members than the grid.
    """

    def __init__(self, settings: Search, *, seed: int) -> None:
        super().__init__(settings, seed=seed)
        n, levels, total = len(TERM_NAMES), settings.levels, settings.population + settings.rounds
        size = n * levels + n * (n - 1) // 2 * levels**2
        if total > size:
            raise ValueError(
                f"search.method = grid: with search.levels = {levels} the grid has {size} members, and"
                f" search.population + search.rounds asks for {total}: lower search.rounds, or raise"
                " search.levels"
            )
        self._heights = [(levels - i) / levels for i in range(levels)]
        self._pairs = sorted(
            combinations(range(n), 2), key=lambda pair: (_apart(pair[0], pair[1], n), pair)
        )

    def propose(self, number: int, *, done: Sequence[Trial]) -> Proposal:
        """The grid's member ``number``."""
        singles = len(TERM_NAMES) * len(self._heights)
        heights: Sequence[float]
        terms: Sequence[int]
        if number < singles:
            level, term = divmod(number, len(TERM_NAMES))
            heights, terms = [self._heights[level]], [term]
        else:
            block, pair = divmod(number - singles, len(self._pairs))
            heights = list(product(self._heights, repeat=2))[block]
            terms = self._pairs[pair]
        weights = dict.fromkeys(TERM_NAMES, 0.0)
        weights.update({TERM_NAMES[t]: height for t, height in zip(terms, heights, strict=True)})
        return Proposal(number, weights, round=self.round_of(number))


def _apart(one: int, other: int, around: int) -> int:
    """Steps between two places of a ring."""
    return min(other - one, around - other + one)


def _by_fitness(member: Trial) -> tuple[float, int]:
    assert member.fitness is not None
    return member.fitness, member.number


SAMPLERS: dict[str, type[RandomSampler]] = {
    "evolution": EvolutionSampler,
    "cmaes": CmaSampler,
    "surrogate": SurrogateSampler,
    "random": RandomSampler,
    "grid": GridSampler,
}
"""By ``search.method``."""


def first_losses(settings: Search, *, seed: int, count: int) -> list[LossWeights]:
    """The losses that a search begins with; where they are more than its population, those of further populations."""
    sampler = SAMPLERS[settings.method](settings, seed=seed)
    return [sampler.first(number) for number in range(count)]
