"""Search: asks for loss weights and is told their fitness; knows nothing of videos or training.

The paper's evolution: an initial population is drawn uniformly; then, round by round, a top
performer (the winner of a tournament) is copied and one of its weights is drawn anew. Members are
numbered as the study's trials. A proposal depends on the seed, its number and the results of
earlier generations alone: a search that was killed and opened again proposes what it would have.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, FloatDistribution, distribution_to_json
from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
from optuna.samplers import BaseSampler
from optuna.storages import BaseStorage, InMemoryStorage, RDBStorage
from optuna.storages._rdb.models import TrialParamModel
from optuna.trial import FrozenTrial, TrialState, create_trial
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import SQLAlchemyError

from engine.objective.terms import TERM_NAMES, LossWeights
from engine.recipe import Search

if TYPE_CHECKING:
    from sqlalchemy.orm import Session

SPACE: dict[str, BaseDistribution] = {name: FloatDistribution(0.0, 1.0) for name in TERM_NAMES}
"""What Optuna draws from: every term's weight in [0, 1]."""

BUSY_SECONDS = 5.0
"""How long a write waits for another process that holds the SQLite file."""


@dataclass(frozen=True)
class Proposal:
    """A member to train."""

    trial: int
    """Its number in the study, from 0."""
    weights: LossWeights
    parent: int | None
    """The trial whose weights were copied; None for weights that were all drawn."""
    mutated: str | None
    """The term whose weight differs from the parent's."""
    round: int
    """0 in the initial population, then 1 up to ``settings.rounds``: one member a round."""


@dataclass(frozen=True)
class MemberRecord(Proposal):
    """A member that is done."""

    state: Literal["complete", "failed"]
    fitness: float | None
    """None for a member that failed."""
    attributes: Mapping[str, Any]
    """What was told with it; for a member that failed, ``reason`` too."""


def generation_of(number: int, *, settings: Search) -> range:
    """The numbers of the trials proposed together with trial ``number``.

    Chunks of ``settings.generation``, first of the initial population and then of its descendants;
    the last chunk of either may be shorter.
    """
    first, stop = 0, settings.population
    if number >= settings.population:
        first, stop = settings.population, settings.population + settings.rounds
    start = number - (number - first) % settings.generation
    return range(start, min(start + settings.generation, stop))


class RandomSampler(BaseSampler):
    """Every weight uniform in [0, 1), from a random stream keyed by (seed, trial number)."""

    def __init__(self, settings: Search, *, seed: int) -> None:
        self.settings = settings
        self.seed = seed

    def stream(self, number: int) -> np.random.Generator:
        """The random numbers of one trial: the same in any process, whatever was drawn before."""
        key = np.random.SeedSequence(self.seed, spawn_key=(number,))
        return np.random.Generator(np.random.Philox(key))

    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """All weights: they are drawn together."""
        return SPACE

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> LossWeights:
        """Draw a trial's weights; only its number counts."""
        values = self.stream(trial.number).random(len(TERM_NAMES))
        return dict(zip(TERM_NAMES, values.tolist(), strict=True))

    def sample_independent(self, *args: Any, **kwargs: Any) -> Any:
        """Raises ValueError: the study holds no parameters but the weights."""
        raise ValueError("search: only loss weights are drawn")


class EvolutionSampler(RandomSampler):
    """Tournament selection, then a mutation of one weight (the paper).

    Parents come from the population that replacement has left of the members completed in earlier
    generations: the ``settings.population`` fittest ("worst" leaves; of equals, the older one) or
    latest ("oldest" leaves; regularised evolution, Real et al. 2019). Where none has completed, a
    child is drawn uniformly. Parent and mutated term go into the trial's user attributes.
    """

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> LossWeights:
        """Draw an initial member, or copy a tournament's winner and draw one weight anew."""
        population = self.population(study, number=trial.number)
        if trial.number < self.settings.population or not population:
            return super().sample_relative(study, trial, search_space)
        rng = self.stream(trial.number)
        order = np.argsort(rng.random(len(population)))
        contestants = [population[i] for i in order[: self.settings.tournament]]
        parent = max(contestants, key=_by_fitness)
        weights = {name: float(parent.params[name]) for name in TERM_NAMES}
        mutated = TERM_NAMES[int(rng.random() * len(TERM_NAMES))]
        while weights[mutated] == parent.params[mutated]:
            weights[mutated] = float(rng.random())
        trial.user_attrs.update(parent=parent.number, mutated=mutated)
        return weights

    def population(self, study: optuna.Study, *, number: int) -> list[FrozenTrial]:
        """The members that may be parents of trial ``number``, the fittest or the latest first."""
        start = generation_of(number, settings=self.settings).start
        complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        earlier = [trial for trial in reversed(complete) if trial.number < start]
        if self.settings.replace == "worst":
            earlier.sort(key=_by_fitness, reverse=True)
        return earlier[: self.settings.population]


class SearchStudy:
    """An Optuna study of loss weights, behind ask and tell; fitness is maximised.

    Creates the study ``name`` in ``storage``, or opens it if it exists: a Path is an SQLite file, a
    string any storage URL of Optuna's, None keeps it in memory. One process at a time may ask.

    Raises ValueError where the study belongs to another recipe, and, as every method does, OSError
    where the storage can't be read or written.
    """

    def __init__(
        self,
        settings: Search,
        *,
        storage: str | Path | None,
        name: str,
        seed: int,
        recipe_hash: str,
    ) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.settings = settings
        samplers = {"random": RandomSampler, "evolution": EvolutionSampler}
        self._sampler = samplers[settings.method](settings, seed=seed)
        self._where = re.sub("://[^/]*@", "://", str(storage or "memory"))  # without a password
        with self._storage_errors():
            self._storage = _open(storage)
            self._study = optuna.create_study(
                storage=self._storage,
                sampler=self._sampler,
                study_name=name,
                direction="maximize",
                load_if_exists=True,
            )
            self._id = self._storage.get_study_id_from_name(name)
            self._check_recipe(recipe_hash)

    @property
    def total(self) -> int:
        """Members of the whole search: the initial population and one a round."""
        return self.settings.population + self.settings.rounds

    def ask(self) -> list[Proposal]:
        """The members to train next: those of the current generation that are not done.

        A generation is proposed once all members of earlier ones are done, by whichever process;
        asking again before telling gives the same again. Empty when ``total`` members are done.
        """
        with self._storage_errors():
            trials = self._trials()
            current = next((t.number for t in trials if not t.state.is_finished()), len(trials))
            if current >= self.total:
                return []
            generation = generation_of(current, settings=self.settings)
            if len(trials) < generation.stop:
                for draft in [self._draw(n) for n in range(len(trials), generation.stop)]:
                    self._study.add_trial(draft)
                trials = self._trials()
        if len(trials) != generation.stop:
            raise RuntimeError(f"{self._where}: another process is proposing members in this study")
        open_trials = [trials[i] for i in generation if not trials[i].state.is_finished()]
        return [Proposal(**_asked(trial)) for trial in open_trials]

    def tell(self, trial: int, *, fitness: float, attributes: Mapping[str, Any]) -> None:
        """Complete a member: its fitness, to be maximised, and facts to keep that JSON can hold.

        Raises ValueError for a fitness that is not finite, and for a trial that is unknown or done.
        """
        if not np.isfinite(fitness):
            raise ValueError(f"search: trial {trial}'s fitness is {fitness}: fail it instead")
        self._finish(trial, TrialState.COMPLETE, value=float(fitness), attributes=attributes)

    def fail(self, trial: int, *, reason: str, attributes: Mapping[str, Any] | None = None) -> None:
        """End a member without fitness: it counts as done, is never a parent, and keeps the reason.

        Raises ValueError for a trial that is unknown or done.
        """
        told = {**(attributes or {}), "reason": reason}
        self._finish(trial, TrialState.FAIL, value=None, attributes=told)

    def members(self) -> list[MemberRecord]:
        """All members that are done, by trial number."""
        with self._storage_errors():
            return [_record(trial) for trial in self._trials() if trial.state.is_finished()]

    def best(self) -> MemberRecord:
        """The fittest member, the earliest among equals; raises ValueError where none completed."""
        complete = [member for member in self.members() if member.fitness is not None]
        if not complete:
            raise ValueError(f"{self._where}: no member of this study completed")
        return max(complete, key=lambda member: (member.fitness, -member.trial))

    def _trials(self) -> list[FrozenTrial]:
        """All trials by number; Optuna reads only those anew that were not finished."""
        return self._study.get_trials(deepcopy=False)

    def _draw(self, number: int) -> FrozenTrial:
        """A running trial with weights and lineage, which one transaction stores as a whole.

        ``Study.ask`` stores a trial and then each weight by itself, which takes ten times as long
        and, after a kill, leaves a trial without all its weights.
        """
        trial = create_trial(state=TrialState.RUNNING)
        trial.number = number
        trial.user_attrs["round"] = max(0, number + 1 - self.settings.population)
        trial.params = self._sampler.sample_relative(self._study, trial, SPACE)
        trial.distributions = SPACE
        return trial

    def _finish(
        self, number: int, state: TrialState, *, value: float | None, attributes: Mapping[str, Any]
    ) -> None:
        with self._storage_errors():
            try:
                trial = self._storage.get_trial_id_from_study_id_trial_number(self._id, number)
                # One attribute for all: a member that was killed between this and the next write
                # is told again, and must keep nothing of what it was told first.
                self._storage.set_trial_user_attr(trial, "told", dict(attributes))
            except KeyError:
                raise ValueError(f"{self._where}: no trial {number} was asked for") from None
            except UpdateFinishedTrialError:
                raise ValueError(f"{self._where}: trial {number} is done already") from None
            # Study.tell would read the trial twice more.
            self._storage.set_trial_state_values(trial, state, None if value is None else [value])

    def _check_recipe(self, recipe_hash: str) -> None:
        found = self._study.user_attrs.get("recipe_hash")
        if found is None and not self._trials():  # new, or killed before the next line
            self._study.set_user_attr("recipe_hash", recipe_hash)
        elif found != recipe_hash:
            raise ValueError(
                f"{self._where}: study {self._study.study_name!r} belongs to recipe {found}, not to"
                f" {recipe_hash}: resume it with its own recipe, or start a new run"
            )

    @contextmanager
    def _storage_errors(self) -> Iterator[None]:
        try:
            yield
        except (StorageInternalError, SQLAlchemyError) as error:
            cause = error.__cause__ if isinstance(error, StorageInternalError) else error
            reason = getattr(cause, "orig", None) or cause or error
            raise OSError(
                f"{self._where}: the study can't be read or written ({reason}): check the folder,"
                " its permissions, the free space, and that no other process holds the study"
            ) from error


class _Storage(RDBStorage):
    """Optuna's storage without a look-up, for each weight, of the range that it had before.

    The ranges never change here, and the look-ups take three quarters of the time of a proposal.
    """

    def _set_trial_param_without_commit(
        self,
        session: Session,
        trial_id: int,
        param_name: str,
        param_value_internal: float,
        distribution: BaseDistribution,
        previous_distribution: BaseDistribution | None = None,
    ) -> None:
        row = TrialParamModel(
            trial_id=trial_id,
            param_name=param_name,
            param_value=param_value_internal,
            distribution_json=distribution_to_json(distribution),
        )
        session.add(row)


def _open(storage: str | Path | None) -> BaseStorage:
    if storage is None:
        return InMemoryStorage()
    if isinstance(storage, Path):
        url = URL.create("sqlite", database=str(storage.absolute()))
    else:
        url = make_url(storage)
    sqlite = url.get_backend_name() == "sqlite"
    options = {"connect_args": {"timeout": BUSY_SECONDS}} if sqlite else {}
    return _Storage(url.render_as_string(hide_password=False), engine_kwargs=options)


def _by_fitness(trial: FrozenTrial) -> tuple[float, int]:
    assert trial.value is not None
    return trial.value, trial.number


def _asked(trial: FrozenTrial) -> dict[str, Any]:
    """The fields of a trial's Proposal."""
    weights = {name: float(trial.params[name]) for name in TERM_NAMES}
    lineage = {key: trial.user_attrs.get(key) for key in ("parent", "mutated", "round")}
    return {"trial": trial.number, "weights": weights, **lineage}


def _record(trial: FrozenTrial) -> MemberRecord:
    complete = trial.state == TrialState.COMPLETE
    return MemberRecord(
        **_asked(trial),
        state="complete" if complete else "failed",
        fitness=trial.value if complete else None,
        attributes=trial.user_attrs.get("told", {}),
    )
