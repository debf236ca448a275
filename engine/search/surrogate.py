"""A model of fitness over losses, learnt from all members seen: what each term adds, and how sure that is.

Additive Bayesian regression with independent normal noise, over one of two bases:

    levels  f(w) = f0 + sum over terms j with w_j > 0 of a_j + b_j w_j + c_j (2 w_j - 1)^2
    shares  f(w) = f0 + sum over j of a_j sqrt(w_j / sum of the weights that train the same network)

An optimizer that normalises its steps follows the terms in proportion to their shares, and each new term takes from
the others; by levels, fitness is a function of the weights themselves. What a teacher's task (of the grey, flow or
sound network alone) is worth depends on how much of the RGB network's training is tied to that network, by
distillation, a joint embedding or alignment: by shares, its summand is multiplied by the root of that share. The
coefficients are normal a priori, those of terms of one group (a task over modalities, a modality's distillation)
correlated, with a scale for each term, so that a few may stand out. Which basis, and how large coefficients, groups and
noise are, is chosen by the evidence (MacKay, "Bayesian Interpolation", 1992).

Shape letters: N members, J terms, B coefficients: 3 J by levels, J by shares.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from engine.objective.terms import MODALITIES, TERM_NAMES, TERMS, present, reaching

Array = NDArray[np.float64]
FEWEST = 8
"""Members from which on a model of them is asked."""
OWN = 0.5
"""Share of one training's difference from the model that is the loss' own, not noise, where nothing is known."""
LEAST = 0.02
"""Weights below are 0."""
LEVELS = np.linspace(0.0, 1.0, 9)
"""Weights among which a term's best is looked for."""
SIGNALS = (0.02, 0.1, 0.3, 1.0, 3.0, 10.0)
"""Variance of fitness over losses, as a multiple of the noise's, to choose from."""
SHARED = (0.0, 0.5)
"""Share of a coefficient's variance that its group's terms have in common, to choose from."""
DEGREES = 2.0
"""Degrees of freedom of the t prior of effects: the fewer, the more a few terms may stand out."""
ROUNDS = 8
"""Of expectation maximisation."""
DRAWS = 64
"""Draws from the posterior for the loss to bet on."""
BENDS = 0.1
"""Least odds of bends, by the evidence, for the bet to be what draws agree on."""
KINDS: dict[str, tuple[tuple[float, ...], ...]] = {
    "levels": ((0.05, 1.0, 0.05), (1.0, 0.05, 0.05), (0.3, 1.0, 1.0)),
    "shares": ((1.0,),),
}
"""By basis: variances of presence, weight and curvature relative to one another, to choose from."""


def group_of(term: int) -> str:
    """A task over modalities, or what is distilled from one modality."""
    row = TERMS[term]
    return f"{row.task} {row.modality}" if row.task == "distill" else row.task


GROUPS: tuple[str, ...] = tuple(group_of(j) for j in range(len(TERMS)))
_OWN = np.eye(len(TERMS))
_SAME = np.array([[a == b for b in GROUPS] for a in GROUPS], np.float64)


def levels(weights: Array) -> Array:
    """(..., J) to (..., 3, J): presence, weight and curvature, each 0 for an absent term."""
    present = (weights > 0).astype(np.float64)
    return np.stack([present, weights, present * (2 * weights - 1) ** 2], axis=-2)


TRAINS_RGB: NDArray[np.bool_] = np.array(["rgb" in term.networks for term in TERMS])
_TRAINED = ["rgb" if "rgb" in term.networks else term.networks[0] for term in TERMS]
_TOGETHER = np.array([[a == b for b in _TRAINED] for a in _TRAINED], np.float64)
"""1 for two terms that train the same network."""
TEACHERS = MODALITIES[1:]
TIES = np.array([TRAINS_RGB & [m in term.networks for term in TERMS] for m in TEACHERS])
"""(3, J) the terms that tie the RGB network to each teacher."""
DISTILLS: NDArray[np.bool_] = TIES & np.array([term.task == "distill" for term in TERMS])
"""(3, J) those that do so by distillation."""
TASKS = np.array([[own == m for own in _TRAINED] for m in TEACHERS])
"""(3, J) those that train a teacher alone."""
ROLES = np.select([*TIES, *TASKS], [*range(2 * len(TEACHERS))], 2 * len(TEACHERS))
"""(J,) what terms do, as a number: tie RGB to one teacher, train that teacher, or train the RGB network alone."""
OF_RGB: NDArray[np.bool_] = TRAINS_RGB & ~TIES.any(0)
"""(J,) those that train the RGB network alone."""
ANY_TERM: NDArray[np.bool_] = np.ones(len(TERMS), np.bool_)
SILENT: NDArray[np.bool_] = np.array(["audio" not in term.networks for term in TERMS])
"""(J,) those that videos without sound suffice for."""
NEVER = -1e6
"""Stands for the effect of a term that no loss may have."""


def shares(weights: Array) -> Array:
    """(..., J) to (..., 1, J): root of each weight's share among those that train the same network.

    A teacher's are multiplied by the root of the share of the RGB network's training that is tied to it.
    """
    total = weights @ _TOGETHER
    share = weights / np.where(total > 0, total, 1.0)
    tied = (share @ TIES.T.astype(np.float64)) @ TASKS
    return np.sqrt(np.where(TRAINS_RGB, share, share * tied))[..., None, :]


BASES: dict[str, Callable[[Array], Array]] = {"levels": levels, "shares": shares}


def vectors(losses: Sequence[Mapping[str, float]]) -> Array:
    """(N, J) weights in TERM_NAMES' order."""
    return np.array([[loss[name] for name in TERM_NAMES] for loss in losses], np.float64)


def computed(weights: Array) -> Array:
    """(J,) weights, 0 for terms that can't change the RGB network beside the others, whichever these are."""
    reach = reaching(present(dict(zip(TERM_NAMES, weights.tolist(), strict=True))))
    return np.where([name in reach for name in TERM_NAMES], weights, 0.0)


def computed_rows(weights: Array) -> Array:
    """(N, J) ``computed`` weights of each loss: what a model of fitness learns from."""
    return np.array([computed(row) for row in weights], np.float64)


def computed_vectors(losses: Sequence[Mapping[str, float]]) -> Array:
    """(N, J) the same of losses by name, in TERM_NAMES' order."""
    return computed_rows(vectors(losses))


@dataclass(frozen=True)
class Surrogate:
    """What members have taught about fitness."""

    basis: str
    """Of BASES."""
    mean: Array
    """(B,) coefficients' posterior mean, in the order of ``basis``."""
    root: Array
    """(B, B): the posterior covariance is root @ root.T."""
    centre: Array
    """(B,) the members' mean basis, where the model gives ``offset``."""
    offset: float
    noise: float
    """Standard deviation of one evaluation around the model."""
    usable: NDArray[np.bool_] = field(default_factory=lambda: ANY_TERM)
    """(J,) the terms that a loss may have."""
    bent: Surrogate | None = None
    """The likeliest model in which fitness bends in the weights, where its kind has odds of BENDS or more."""

    @classmethod
    def fit(
        cls, weights: Array, fitness: Array, *, usable: NDArray[np.bool_] = ANY_TERM
    ) -> Surrogate:
        """Learn from N >= 2 members' weights (N, J) and fitness (N,)."""
        offset, fits = float(fitness.mean()), list(_fits(weights, fitness))
        odds = _odds(fits)
        bending = [k for k, (name, kinds, *_) in enumerate(fits) if _bends(name, kinds)]
        bent = None
        if odds[bending].sum() >= BENDS:
            bent = cls._of(fits[max(bending, key=lambda k: odds[k])], offset, usable)
        likeliest = max(fits, key=lambda each: each[-1].evidence)
        return replace(cls._of(likeliest, offset, usable), bent=bent)

    @classmethod
    def _of(
        cls,
        choice: tuple[str, tuple[float, ...], Array, _Fit],
        offset: float,
        usable: NDArray[np.bool_],
    ) -> Surrogate:
        name, _, centre, fit = choice
        values, axes = np.linalg.eigh((fit.covariance + fit.covariance.T) / 2)
        root = axes * np.sqrt(np.maximum(values, 0))
        return cls(name, fit.mean, root, centre, offset, fit.noise, usable)

    def predict(self, weights: Array) -> Array:
        """(N,) expected fitness."""
        x = BASES[self.basis](weights).reshape(len(weights), -1) - self.centre
        return np.asarray(self.offset + x @ self.mean, np.float64)

    def own(self, same: Array, fitness: Array) -> float:
        """Share of the variance around the model that is the losses' own, and not noise.

        What trainings of one loss differ by is noise alone: ``same`` (N, N) is 1 for two of one loss, and ``fitness``
        (N,) theirs. Without such, OWN, which counts as one of them.
        """
        degrees = float(len(same) - (1 / same.sum(1)).sum())
        spread = float(((fitness - same @ fitness / same.sum(1)) ** 2).sum())
        noise = spread / (max(degrees, 1.0) * self.noise**2)
        return (OWN + degrees * max(1 - noise, 0.0)) / (1 + degrees)

    def smoothed(
        self, weights: Array, fitness: Array, *, trainings: Array, own: float = OWN
    ) -> Array:
        """(N,) what losses are worth: the model's word, and of what evaluations differ from it their own.

        ``fitness`` (N,) is the mean of so many ``trainings`` (N,) each, of which one counts ``own``.
        """
        share = own * trainings / (1 + own * (trainings - 1))
        expected = self.predict(weights)
        return np.asarray(expected + share * (fitness - expected), np.float64)

    def draw(self, rng: np.random.Generator, *, width: float = 1.0) -> Array:
        """(B,) coefficients from the posterior, or from one that is ``width`` times as wide."""
        away = self.root @ rng.standard_normal(len(self.mean))
        return np.asarray(self.mean + width * away, np.float64)

    def effect(self, term: int, weight: float = 1.0) -> tuple[float, float]:
        """Mean and standard deviation of what ``term`` adds to fitness against its absence.

        By levels at ``weight``; by shares alone, which is nothing for a teacher's task.
        """
        one = np.zeros(len(TERMS))
        one[term] = weight
        x = BASES[self.basis](one).reshape(-1)
        return float(x @ self.mean), float(np.linalg.norm(x @ self.root))

    def surest(self, rng: np.random.Generator, *, most: int) -> Array:
        """(J,) the loss to bet on, with at most ``most`` terms: the best under the mean effects.

        Where fitness may bend, and a loss may have all terms, it is the mean of what DRAWS draws have as their best:
        those of the mean effects, which are drawn towards a line, lie too far out.
        """
        if self.bent is None or not self.agrees(most):
            return self.best_weights(self.mean, most=most)
        bent = self.bent
        draws = [bent.best_weights(bent.draw(rng), most=most) for _ in range(DRAWS)]
        agreed = np.mean(draws, axis=0)
        return np.where(agreed < LEAST, 0.0, agreed)

    def agrees(self, most: int) -> bool:
        """Whether ``surest`` is what draws agree on, and not the best under the mean effects."""
        return self.bent is not None and most == len(TERMS)

    def best_of(self, losses: Sequence[Array], coefficients: Array) -> Array:
        """(J,) the loss of highest f among those given, each (J,), under given coefficients."""
        x = BASES[self.basis](computed_rows(np.array(losses))).reshape(len(losses), -1)
        return losses[int((x @ coefficients).argmax())]

    def best_weights(self, coefficients: Array, *, most: int) -> Array:
        """(J,) the weights of highest f under given coefficients, with at most ``most`` of the usable terms above 0."""
        usable = np.tile(self.usable, len(coefficients) // len(self.usable))
        coefficients = np.where(usable, coefficients, NEVER)
        if self.basis == "shares":
            return _best_shares(coefficients, most)
        return _best_levels(coefficients, most)


def _best_levels(coefficients: Array, most: int) -> Array:
    grid = np.broadcast_to(LEVELS[:, None], (len(LEVELS), len(TERMS)))
    value = (levels(grid) * coefficients.reshape(3, -1)).sum(1)  # levels x terms
    weights: Array = LEVELS[value.argmax(0)]
    gains = value.max(0)
    weights[np.argsort(-gains, kind="stable")[most:]] = 0.0
    sparse = most < len(TERMS)
    if sparse:
        weights = np.where(untaught(weights > 0), 0.0, weights)
    if not weights.any():  # a loss needs a term
        alone = OF_RGB if sparse else np.ones_like(OF_RGB)
        weights[int(np.where(alone, value[-1], -np.inf).argmax())] = 1.0
    return weights


def untaught(among: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """(J,) which of the terms ``among`` (J,) distil a network that none of them trains by itself: it teaches little."""
    taught = np.any(TASKS & among, axis=1, keepdims=True)
    return np.asarray((DISTILLS & among & ~taught).any(0), np.bool_)


def _best_shares(coefficients: Array, most: int) -> Array:
    """The loss that ``_shared_out`` makes of the best terms, at most ``most``.

    Terms are added one by one, or a teacher's task and a tie to it at once, whichever helps most, as long as one does.
    No network is distilled that has no task.
    """
    everything = np.ones(len(TERMS), np.bool_)
    _, best = _shared_out(coefficients, everything)
    if np.count_nonzero(best) <= most:
        return best
    singles = list(_OWN.astype(np.bool_))
    pairs = [
        _OWN[[tie, task]].any(0)
        for ties, tasks in zip(TIES, TASKS, strict=True)
        for tie in np.flatnonzero(ties)
        for task in np.flatnonzero(tasks)
    ]
    chosen, value = ~everything, -np.inf
    while True:
        left = most - np.count_nonzero(chosen)
        more = [chosen | each for each in (*singles, *pairs[: len(pairs) * (left > 1)])]
        tried = [(_shared_out(coefficients, each), each) for each in more if left]
        (found, _), each = max(tried, key=lambda one: one[0][0], default=((-np.inf, 0), chosen))
        if found <= value:
            return _shared_out(coefficients, chosen)[1]
        chosen, value = each, found


def _shared_out(coefficients: Array, among: NDArray[np.bool_]) -> tuple[float, Array]:
    """How high f - f0 can be with some terms, by shares, and the weights (J,) that reach it.

    A network's shares are in proportion to the squares of what helps (Cauchy-Schwarz), the largest at weight 1; terms
    that tie RGB to a teacher help together with what the teacher's own tasks then do.
    """
    among = among & ~untaught(among)
    if not (TRAINS_RGB & among).any():
        return -np.inf, np.zeros(len(TERMS))
    helps = np.where(among, np.maximum(coefficients, 0.0), 0.0)
    of_rgb, weights = np.where(OF_RGB, helps, 0.0), np.zeros(len(TERMS))
    for ties, tasks, distils in zip(TIES & among, TASKS & among, DISTILLS, strict=True):
        # with its tasks, of which distillation needs one, or by joint embedding and alignment alone
        ways = (
            _taught(coefficients, ties, tasks),
            _taught(coefficients, ties & ~distils, np.zeros_like(tasks)),
        )
        _, way, own = max(ways, key=lambda each: each[0])
        of_rgb, weights = of_rgb + way, weights + own
    value = float(np.linalg.norm(of_rgb))
    if not value:  # nothing helps
        alone = TRAINS_RGB & ~DISTILLS.any(0) & among
        if not alone.any():
            return -np.inf, weights
        least = int(np.where(alone, coefficients, -np.inf).argmax())
        value, of_rgb = float(coefficients[least]), _OWN[least]
    weights = np.where(TRAINS_RGB, of_rgb**2, weights)
    largest = (_TOGETHER * weights).max(1)
    weights /= np.where(largest > 0, largest, 1.0)
    weights = np.where(weights < LEAST, 0.0, weights)
    tied = (TIES & (weights > 0)).any(1) @ TASKS
    return value, np.where(TRAINS_RGB | tied, weights, 0.0)


def _taught(
    coefficients: Array, ties: NDArray[np.bool_], tasks: NDArray[np.bool_]
) -> tuple[float, Array, Array]:
    """What a teacher is worth with given ties and tasks, and what ties (J,) and tasks (J,) are in proportion to.

    Ties' squares are their weights, tasks are weights. Where no tie helps by itself, or no task, the least harmful.
    """
    own, way = np.where(tasks, np.maximum(coefficients, 0.0) ** 2, 0.0), np.zeros(len(TERMS))
    if not ties.any():
        return 0.0, way, way
    worth = math.sqrt(own.sum())
    if tasks.any() and not worth:
        least = int(np.where(tasks, coefficients, -np.inf).argmax())
        own[least], worth = 1.0, float(coefficients[least])
    way = np.where(ties, np.maximum(coefficients, 0.0), 0.0)
    length = float(np.linalg.norm(way))
    if length:
        worth += length
    else:
        least = int(np.where(ties, coefficients, -np.inf).argmax())
        way[least], length, worth = 1.0, 1.0, worth + float(coefficients[least])
    worth = max(worth, 0.0)
    return worth, worth / length * way, own


def _related(shared: float) -> Array:
    """(J, J): prior correlation of the terms, given the share of their variance that a group has in common."""
    return np.asarray((1 - shared) * _OWN + shared * _SAME, np.float64)


def main_effects(weights: Array, fitness: Array) -> tuple[Array, Array]:
    """What more of each term adds to fitness: posterior mean (J,) and covariance (J, J), in the units of fitness.

    From N >= 2 members' weights (N, J) and fitness (N,). Every basis and prior counts by its evidence, since few
    members can't tell them apart. The noise is estimated: intervals are Student's t with N - 1 degrees of freedom. Both
    are 0 for a term whose weight never varies.
    """
    by_basis = {name: _more(weights, of) for name, of in BASES.items()}
    fits, means, covariances = list(_fits(weights, fitness)), [], []
    for name, _, _, fit in fits:
        more = by_basis[name]
        means.append(more @ fit.mean)
        covariances.append(more @ fit.covariance @ more.T)
    odds, each = _odds(fits), np.array(means)
    mean = odds @ each
    apart = each - mean
    within = np.tensordot(odds, np.array(covariances), 1) * len(weights) / (len(weights) - 1)
    return mean, within + (odds * apart.T) @ apart


def _more(weights: Array, basis: Callable[[Array], Array]) -> Array:
    """(J, B) what more of each term changes in the basis, the mean over the members as they are otherwise.

    More is the median weight of the members with more of it than the average, less that of the rest: for sparse losses
    presence against absence.
    """
    rows = []
    for term, own in enumerate(weights.T):
        above = own > own.mean()
        high, low = weights.copy(), weights.copy()
        if above.any():
            high[:, term], low[:, term] = np.median(own[above]), np.median(own[~above])
        rows.append((basis(high) - basis(low)).reshape(len(weights), -1).mean(0))
    return np.array(rows)


def _odds(fits: Sequence[tuple[str, tuple[float, ...], Array, _Fit]]) -> Array:
    """(choices,) how likely each choice is by its evidence; bases are equally likely beforehand."""
    evidence = np.array([fit.evidence - math.log(len(KINDS[name])) for name, _, _, fit in fits])
    odds: Array = np.exp(evidence - evidence.max())
    return np.asarray(odds / odds.sum(), np.float64)


def _bends(basis: str, kinds: Sequence[float]) -> bool:
    """Whether curvature varies as much as anything a priori."""
    return basis == "levels" and kinds[2] == max(kinds) > kinds[0]


def _fits(weights: Array, fitness: Array) -> Iterator[tuple[str, tuple[float, ...], Array, _Fit]]:
    """Basis, its variances, its mean over the members, and the fit, of every choice."""
    for name, of in BASES.items():
        x = of(weights).reshape(len(weights), -1)
        centre = x.mean(0)
        x, y, count = x - centre, fitness - fitness.mean(), len(weights)
        scale = max(float((x**2).sum(1).mean()), 1e-9)
        rest = 0.0
        if count > x.shape[1]:  # as many rows as coefficients say all that more members do
            turn, x = np.linalg.qr(x)
            seen, y = y, turn.T @ y
            rest = float(((seen - turn @ y) ** 2).sum())
        for signal, shared, kinds in product(SIGNALS, SHARED, KINDS[name]):
            prior = np.kron(np.diag(kinds), _related(shared)).astype(np.float64)
            yield name, kinds, centre, _fit(x, y, signal / scale * prior, rest=rest, count=count)


class _Fit(NamedTuple):
    evidence: float
    mean: Array
    covariance: Array
    noise: float


def _fit(x: Array, y: Array, prior: Array, *, rest: float, count: int) -> _Fit:
    """Posterior under a prior covariance (B, B) in units of the noise's variance, which is the likeliest one.

    ``rest`` is the sum of squares of ``count`` fitnesses that rows of ``x`` can't explain and ``y`` leaves out.

    Each term's own scale then follows its effect (expectation maximisation of a t prior of DEGREES degrees of freedom):
    few terms may matter much, and most little.
    """
    own, each = np.ones(len(TERMS)), len(prior) // len(TERMS)
    for _ in range(ROUNDS):
        stretch = np.tile(np.sqrt(own), each)
        scaled = prior * np.outer(stretch, stretch)
        cover = x @ scaled @ x.T + np.eye(len(y))
        half = np.linalg.cholesky(cover)
        white = np.linalg.solve(half, y)
        variance = max((float(white @ white) + rest) / count, 1e-12)
        evidence = -0.5 * count * math.log(variance) - float(np.log(np.diag(half)).sum())
        evidence -= float((0.5 * DEGREES * (np.log(own) + 1 / own - 1)).sum())
        pull = np.linalg.solve(half, x @ scaled)
        mean, covariance = pull.T @ white, variance * (scaled - pull.T @ pull)
        size = (mean**2 + np.diag(covariance)) / (variance * np.maximum(np.diag(prior), 1e-12))
        own = (size.reshape(each, -1).sum(0) + DEGREES) / (each + DEGREES)
    return _Fit(evidence, mean, covariance, math.sqrt(variance))
