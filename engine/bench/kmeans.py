"""K-means fitness of a cohort: every backend, and the batched one both member by member and all at once.

Features are drawn as overlapping clouds, one a class. FLOPs are those of the matrix products alone, with the
iterations that the batched backend takes: candidates' distances in k-means++, then distances and centres of each
of Lloyd's iterations. They stand beside the product's peak, though at such sizes launches and small
operations take most of the time. Backends draw their starts differently, so that their fitnesses differ a little.

Beside a GPU scikit-learn takes minutes: it gets one member, once, after a few clips to warm up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from statistics import fmean
from typing import Any

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray

from engine.bench.base import Bench, Step, shape, timed
from engine.bench.rows import Row, measured
from engine.core.recipe import Fitness
from engine.features.fitness import FitnessResult, cohort_fitness
from engine.features.kmeans import draws, kmeans
from engine.model.resnet3d import video_network

Features = list[NDArray[np.float32]]
Call = Callable[[], list[FitnessResult | str]]
ONE_BY_ONE, AT_ONCE, SKLEARN = "batched, one by one", "batched, all at once", "scikit-learn"


@dataclass(frozen=True)
class Problem:
    """Sizes: M members, N clips, D features, K classes."""

    members: int
    clips: int
    features: int
    classes: int


def problem(bench: Bench) -> Problem:
    """HMDB51's train split on a GPU; on a CPU the built-in labelled clips, and the recipe's network."""
    if bench.gpu:
        return Problem(members=8, clips=3570, features=2048, classes=51)
    model = bench.recipe.model
    with torch.device("meta"):
        width = video_network(model).feature_dim
    return Problem(members=bench.recipe.search.generation, clips=400, features=width, classes=8)


def draw(problem: Problem, *, seed: int) -> tuple[Features, NDArray[np.int64]]:
    """Features (N, D) of each member, and the clips' classes (N,)."""
    rng = np.random.Generator(np.random.Philox(key=[seed, 0xBE7C]))
    labels = np.arange(problem.clips) % problem.classes
    rows = []
    for _ in range(problem.members):
        centres = rng.standard_normal((problem.classes, problem.features)) * 0.5
        noise = rng.standard_normal((problem.clips, problem.features))
        rows.append((centres[labels] + noise).astype(np.float32))
    return rows, labels


def product_flops(problem: Problem, *, starts: int, iterations: int) -> int:
    """FLOPs of the products of one member: of k-means++ in each start, and of Lloyd's iterations in all of them.

    One product of all clips with all centres is 2NKD; k-means++ makes one of K x C candidates, C = 2 + log K,
    and an iteration two: distances, and the new centres.
    """
    once = 2 * problem.clips * problem.classes * problem.features
    candidates = 2 + int(np.log(problem.classes))
    return once * (starts * candidates + 2 * iterations)


def run(bench: Bench) -> Iterator[Row]:
    """Rows of each backend that is there."""
    sizes, settings = problem(bench), bench.recipe.fitness
    if bench.gpu:
        settings = msgspec.structs.replace(settings, kmeans_seeds=1)
    features, labels = draw(sizes, seed=bench.recipe.seed)
    fitness: dict[str, float] = {}
    calls = _calls(bench, features, labels, settings, sizes)
    steps = {name: _step(call, fitness, name) for name, call in calls.items()}
    flops = _counted(bench, features, settings, sizes) // sizes.members
    slow = bench.gpu and bool(steps.pop(SKLEARN))
    times = [(name, sizes, samples) for name, samples in bench.time(steps).items()]
    if slow:
        one = replace(sizes, members=1)
        few = slice(4 * sizes.classes)
        _calls(bench, [features[0][few]], labels[few], settings, one)[SKLEARN]()
        call = _calls(bench, features[:1], labels, settings, one)[SKLEARN]
        times.append((SKLEARN, one, [timed(_step(call, fitness, SKLEARN), bench.device)]))
    for name, its, samples in times:
        size = f"{its.members} x {shape(its.clips, its.features)}, k {its.classes}"
        yield measured(
            samples,
            count=its.members,
            unit="members/s",
            part="kmeans",
            name=name,
            shape=f"{size}, {settings.kmeans_seeds} x {settings.kmeans_init} starts",
            limit=bench.matrix_peak(torch.float32 if bench.gpu else torch.float64, ieee=True),
            flops=flops * its.members,
            peer=name != AT_ONCE,
            figures={"fitness": fitness[name]},
        )


def _step(call: Call, kept: dict[str, float], name: str) -> Step:
    """The call, which leaves the mean fitness of its members behind."""

    def step() -> None:
        kept[name] = fmean(r.value for r in call() if not isinstance(r, str))

    return step


def _calls(
    bench: Bench, features: Features, labels: NDArray[np.int64], settings: Fitness, sizes: Problem
) -> dict[str, Call]:
    fixed: dict[str, Any] = {"num_classes": sizes.classes, "seed": bench.recipe.seed}
    fixed["device"] = bench.device.type

    def backend(name: str) -> Callable[[Features], list[FitnessResult | str]]:
        chosen = msgspec.structs.replace(settings, kmeans=name)
        return lambda rows: list(cohort_fitness(rows, labels, settings=chosen, **fixed))

    batched = backend("batched")
    calls: dict[str, Call] = {
        AT_ONCE: partial(batched, features),
        ONE_BY_ONE: lambda: [result for rows in features for result in batched([rows])],
        SKLEARN: partial(backend("sklearn"), features),
    }
    if bench.gpu and find_spec("cuml") is not None:
        calls["cuML"] = partial(backend("cuml"), features)
    return calls


def _counted(bench: Bench, features: Features, settings: Fitness, sizes: Problem) -> int:
    """FLOPs of all members' products, in all runs and from all starts."""
    runs, starts = settings.kmeans_seeds, settings.kmeans_init
    luck = draws(bench.recipe.seed, runs=runs, restarts=starts, num_clusters=sizes.classes)
    result = kmeans([torch.from_numpy(rows).to(bench.device) for rows in features], luck)
    iterations = int(result.iterations.sum())
    seeding = product_flops(sizes, starts=runs * starts, iterations=0) * sizes.members
    return seeding + product_flops(sizes, starts=0, iterations=iterations)
