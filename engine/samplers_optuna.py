"""Optuna's own samplers, as peers of ours: they see a copy of the study in memory, and each trial a seed of its own."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import optuna
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.exceptions import ExperimentalWarning
from optuna.samplers import (
    BaseSampler,
    CmaEsSampler,
    GPSampler,
    NSGAIISampler,
    QMCSampler,
    TPESampler,
)
from optuna.trial import FrozenTrial, TrialState, create_trial

from engine.objective.terms import TERM_NAMES
from engine.recipe import Search
from engine.samplers import MemberRecord, Proposal, RandomSampler, State, generation_of

SPACE: dict[str, BaseDistribution] = {name: FloatDistribution(0.0, 1.0) for name in TERM_NAMES}
"""What Optuna draws from: every term's weight in [0, 1]."""

STATES: dict[State, TrialState] = {
    "complete": TrialState.COMPLETE,
    "failed": TrialState.FAIL,
    "pruned": TrialState.PRUNED,
}


class OptunaSampler(RandomSampler):
    """One of Optuna's samplers, with its defaults: tpe, gp, qmc, nsgaii (of ``settings.population``) or optuna_cmaes.

    It is made anew for each trial, seeded by (seed, trial number); what it keeps in trials goes into
    ``Proposal.notes``. qmc is a scrambled Sobol sequence of which trial n is point n; it waits for nothing. The others
    learn by generations as evolution does, or from whatever is done where ``settings.synchronous`` is false.

    Raises ValueError where a library that the sampler needs is absent.
    """

    def __init__(self, settings: Search, *, seed: int) -> None:
        super().__init__(settings, seed=seed)
        optuna.logging.set_verbosity(optuna.logging.ERROR)  # it warns of what is only slower
        try:
            sampler = self._sampler(0)
        except ImportError as error:
            raise ValueError(f"search.method = {settings.method}: {error}") from error
        self._begin(sampler)

    def _begin(self, sampler: BaseSampler) -> None:
        self._study = optuna.create_study(direction="maximize", sampler=sampler)
        self._finished: set[int] = set()
        """Numbers of the trials that Optuna knows to be done."""

    def generation(self, number: int) -> range | None:
        """``generation_of``; None for qmc and in the asynchronous mode."""
        waits = self.settings.synchronous and self.settings.method != "qmc"
        return generation_of(number, settings=self.settings) if waits else None

    def propose(
        self, number: int, *, done: Sequence[MemberRecord], pending: Sequence[Proposal]
    ) -> Proposal:
        """Show Optuna what became of the trials before, and ask it for the next."""
        known = len(self._study.get_trials(deepcopy=False))
        if known > number:  # what was proposed before could not be stored
            self._begin(self._sampler(number))
            known = 0
        for other in sorted([*done, *pending], key=lambda proposal: proposal.trial):
            if other.trial >= known:
                self._study.add_trial(_running(other))
        for member in done:
            if member.trial not in self._finished:
                self._finish(member)
        self._study.sampler = self._sampler(number)
        trial = self._study.ask(SPACE)
        assert trial.number == number, "trials are proposed by number"
        frozen = self._study.get_trials(deepcopy=False)[number]
        weights = {name: float(frozen.params[name]) for name in TERM_NAMES}
        notes = dict(frozen.system_attrs)
        return Proposal(number, weights, None, None, self.round_of(number), notes=notes)

    def _sampler(self, number: int) -> BaseSampler:
        seed = self.seed_of(number)
        makers: dict[str, Callable[[], BaseSampler]] = {
            "tpe": lambda: TPESampler(seed=seed),
            "gp": lambda: GPSampler(seed=seed),
            "qmc": lambda: _Sobol(seed=self.seed, scramble=True),  # one sequence for all trials
            "nsgaii": lambda: _Nsga(population_size=self.settings.population, seed=seed),
            "optuna_cmaes": lambda: CmaEsSampler(seed=seed, warn_independent_sampling=False),
        }
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            return makers[self.settings.method]()

    def _finish(self, member: MemberRecord) -> None:
        self._finished.add(member.trial)
        storage, trial = (
            self._study._storage,
            member.trial,
        )  # trials of one study in memory count from 0
        for step, fitness in member.rungs:
            storage.set_trial_intermediate_value(trial, step, fitness)
        self._study.tell(trial, member.fitness, state=STATES[member.state])


class _Nsga(NSGAIISampler):
    """Optuna's, with each generation's parents by number, whether they were chosen now or are read from its notes."""

    def get_parent_population(self, study: optuna.Study, generation: int) -> list[FrozenTrial]:
        return sorted(super().get_parent_population(study, generation), key=lambda t: t.number)


class _Sobol(QMCSampler):
    """Optuna's sequence from its first point on, at a trial's own number rather than at a counter in the study."""

    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        return SPACE

    def _find_sample_id(
        self, study: optuna.Study, search_space: dict[str, BaseDistribution]
    ) -> int:
        return len(study.get_trials(deepcopy=False)) - 1


def _running(proposal: Proposal) -> FrozenTrial:
    """A trial as Optuna left it after asking."""
    return create_trial(
        state=TrialState.RUNNING,
        params=proposal.weights,
        distributions=SPACE,
        system_attrs=dict(proposal.notes),
    )
