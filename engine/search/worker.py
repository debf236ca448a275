"""A search's worker: keeps videos, networks and compiled steps at hand, and trains one cohort after another.

Cohorts and their results are small and can be sent: a network worth keeping is left in the run's folder.
"""

from __future__ import annotations

import socket
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from engine.core.pool import Tell
from engine.core.recipe import Recipe, recipe_hash
from engine.core.runtime import Runtime, choose_runtime, make_deterministic
from engine.data.shards.index import ClipIndex, data_digest
from engine.features.extract import LabelledClips, with_statistics
from engine.features.kmeans import kmeans_backend
from engine.model.network_file import card_of, save_network
from engine.search.cohort import (
    MemberResult,
    evaluate_cohort,
    trivial_features,
    trivial_fitness,
    untrained_fitness,
)
from engine.search.members import Proposal
from engine.train.memory import CohortMemory
from engine.train.trainer import Trainer


@dataclass(frozen=True)
class Cohort:
    """Members that share their batches: one worker's job."""

    members: tuple[Proposal, ...]
    seeds: tuple[int, ...]
    """Each member is trained once with each."""
    keep_from: float | None = None
    """Leave the fittest member's RGB network in the run's folder if it is at least as fit; None: never."""
    keep_all: bool = False
    """Leave every member's."""
    confirm: bool = False
    """Train to the end and on all clips, whatever the search leaves out, and judge the untrained network too."""

    @property
    def numbers(self) -> tuple[int, ...]:
        """The members'."""
        return tuple(member.number for member in self.members)


@dataclass(frozen=True)
class CohortResult:
    """Outcome of a cohort's training."""

    results: tuple[MemberResult, ...]
    """One a member, without networks."""
    untrained: float | None = None
    trivial: Mapping[str, float] = field(default_factory=dict)
    """Fitness of features that take no learning."""
    stages: Mapping[str, float] = field(default_factory=dict)
    """Seconds by stage."""
    warnings: tuple[str, ...] = ()
    substituted: tuple[Counter[int], Counter[int]] = (Counter(), Counter())
    """Damaged clips, and how often others took their places: of the videos, of the labelled clips."""


@dataclass(frozen=True)
class Progress:
    """Progress of a cohort at work."""

    members: float
    """Members' worth of steps that are done."""
    clips: int
    """Clips that members were trained on."""


class CohortEvaluator:
    """Trains and judges cohorts, on one device."""

    def __init__(
        self, factory: CohortFactory, videos: ClipIndex, labelled: ClipIndex, runtime: Runtime
    ) -> None:
        """``videos`` and ``labelled`` are the factory's, open. Raises ValueError as ``LabelledClips``."""
        recipe = factory.recipe
        make_deterministic(runtime)
        kmeans_backend(runtime.device.type, recipe.fitness.kmeans)  # an absent one raises now
        self._warnings: list[str] = []
        self.trainer = Trainer(recipe, videos, runtime, warn=self._warnings.append)
        self._memory = CohortMemory(factory.members_at_once)
        self.labelled = LabelledClips(labelled, recipe, runtime=runtime)
        self._indices = (videos, labelled)
        self._checkpoints = factory.checkpoints
        self._trivial: dict[str, Tensor] | None = None

    def __call__(self, cohort: Cohort, tell: Tell) -> CohortResult:
        """Train and judge a cohort, and leave the networks worth keeping. Raises DeviceFailed and OSError."""
        trainer = self.trainer
        if trainer.runtime.device.type == "cpu":
            # members take the cores (see Runtime.map), unless a compiled step does
            torch.set_num_threads(1 if trainer.mode == "off" else trainer.runtime.cores)
        trainer.clock.seconds.clear()
        optim, steps = trainer.recipe.optim, 0

        def on_step(step: int, losses: Sequence[float]) -> None:
            nonlocal steps
            steps += len(losses)
            done = min(steps / (optim.steps * len(cohort.seeds)), len(cohort.members))
            tell(Progress(done, steps * optim.batch_size))

        results = evaluate_cohort(
            trainer,
            self.labelled,
            members=cohort.members,
            seeds=cohort.seeds,
            memory=self._memory,
            on_step=on_step,
            full=cohort.confirm,
        )
        self._keep_networks(cohort, results)
        untrained, trivial = None, dict[str, float]()
        if cohort.confirm:
            untrained = untrained_fitness(trainer, self.labelled, seed=cohort.seeds[0]).value
            if self._trivial is None:  # no seed has a part in them
                self._trivial = trivial_features(trainer, self.labelled)
            trivial = trivial_fitness(trainer, self.labelled, self._trivial, seed=cohort.seeds[0])
        warnings, self._warnings[:] = tuple(self._warnings), []
        videos, labelled = (Counter(index.substituted) for index in self._indices)
        for index in self._indices:
            index.substituted.clear()
        return CohortResult(
            tuple(replace(result, rgb=None) for result in results),
            untrained,
            trivial,
            dict(trainer.clock.seconds),
            warnings,
            (videos, labelled),
        )

    def _keep_networks(self, cohort: Cohort, results: Sequence[MemberResult]) -> None:
        if cohort.keep_from is None:
            return
        ranked = [
            (result.fitness, -member.number, member, result.rgb)
            for member, result in zip(cohort.members, results, strict=True)
            if result.fitness is not None and result.rgb is not None
        ]
        if not cohort.keep_all:
            fittest = max(ranked, key=lambda row: row[:2], default=None)
            ranked = [fittest] if fittest is not None and fittest[0] >= cohort.keep_from else []
        recipe = self.trainer.recipe
        # a confirmation uses no bank that holds some of the clips
        bank = None if cohort.confirm else self._memory.bank
        for fitness, _, member, network in ranked:
            card = card_of(
                recipe,
                labels_used=recipe.fitness.uses_labels,
                loss=member.weights,
                recipe_hash=recipe_hash(recipe),
                seed=recipe.seed,
                num_clips=len(self.trainer.index if bank is None else bank),
            )
            videos, runtime = self.trainer.index, self.trainer.runtime
            card = with_statistics(card, network, videos, runtime=runtime)
            path = candidate(self._checkpoints, member.number)
            save_network(path, network, card, trial=member.number, fitness=fitness)


def candidate(checkpoints: Path, number: int) -> Path:
    """The file in which a worker leaves the network of a member that may turn out the best."""
    return checkpoints / f".candidate-{number:05d}.safetensors"


@dataclass(frozen=True)
class CohortFactory:
    """Makes a worker's evaluator, in the worker's process, which may be on another machine."""

    recipe: Recipe
    videos: tuple[Path, ...]
    """Shards, absolute."""
    labelled: tuple[Path, ...]
    data: str
    """``data_digest`` of both, which they must have."""
    checkpoints: Path
    """Absolute."""
    device: str
    members_at_once: int | None
    """Most members of a cohort that are trained at once; None: as many as memory holds."""

    def __call__(self, workers_here: int) -> CohortEvaluator:
        """Raises ValueError where this machine doesn't see the data, other data, or no run's folder."""
        here = socket.gethostname()
        for path in (*self.videos, *self.labelled, self.checkpoints):
            if not path.is_dir():
                raise ValueError(
                    f"{path} is not there on {here}: videos and run must lie where all nodes see them,"
                    " under the same paths"
                )
        videos, labelled = ClipIndex(self.videos), ClipIndex(self.labelled)
        if data_digest((*self.videos, *self.labelled)) != self.data:
            raise ValueError(f"{self.videos[0]} holds other videos on {here} than at the start")
        runtime = choose_runtime(self.device, amp=self.recipe.optim.amp)
        runtime = replace(runtime, processes=workers_here)
        return CohortEvaluator(self, videos, labelled, runtime)
