"""Cohorts: company changes nothing, and a member that fails leaves alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from engine.core.recipe import load_recipe
from engine.core.runtime import choose_runtime, make_deterministic
from engine.data.shards.index import ClipIndex
from engine.data.views import Views
from engine.features.extract import LabelledClips
from engine.objective.lossfile import random_weights
from engine.objective.terms import LossWeights, check_weights
from engine.search.cohort import MemberResult, evaluate_cohort, untrained_fitness
from engine.search.members import Proposal
from engine.train.member import Member
from engine.train.trainer import Trainer

TINY = Path(__file__).parents[1] / "tiny.toml"
LOSSES = (
    random_weights(1),
    check_weights({"rgb/to_flow": 1.0, "rgb/predict": 0.3}),
    check_weights({"grey/colorize": 0.7, "distill/grey@2": 1.0, "rgb+audio/embed": 0.5}),
)
"""One that needs everything, and two that need less."""
JOBS = [Proposal(0, loss) for loss in LOSSES]


@pytest.fixture(scope="module")
def trainer(tiny_shards: Path) -> Trainer:
    runtime = choose_runtime("cpu")
    make_deterministic(runtime)
    return Trainer(load_recipe(TINY), ClipIndex([tiny_shards / "unlabelled"]), runtime)


@pytest.fixture(scope="module")
def labelled(trainer: Trainer, tiny_shards: Path) -> LabelledClips:
    index = ClipIndex([tiny_shards / "labelled"])
    return LabelledClips(index, trainer.recipe, runtime=trainer.runtime)


@pytest.fixture(scope="module")
def alone(trainer: Trainer, labelled: LabelledClips) -> list[MemberResult]:
    """Each loss in a run of its own."""
    return [evaluate_cohort(trainer, labelled, members=[job], seeds=[3])[0] for job in JOBS]


def same(one: MemberResult, other: MemberResult) -> bool:
    assert one.rgb is not None and other.rgb is not None
    assert one.rgb.keys() == other.rgb.keys()
    numbers = ("fitness", "reason", "results", "seeds", "learnt")
    return all(getattr(one, name) == getattr(other, name) for name in numbers) and all(
        torch.equal(one.rgb[name], other.rgb[name]) for name in one.rgb
    )


def test_a_cohort_equals_runs_of_one_member(
    trainer: Trainer, labelled: LabelledClips, alone: list[MemberResult]
) -> None:
    steps: list[tuple[int, list[float]]] = []
    together = evaluate_cohort(
        trainer,
        labelled,
        members=JOBS,
        seeds=[3],
        on_step=lambda step, values: steps.append((step, list(values))),
    )
    assert all(same(one, other) for one, other in zip(together, alone, strict=True))
    assert not same(together[0], together[1])
    assert all(0.0 <= result.fitness <= 1.0 for result in together)
    assert all(result.clips_per_second > 0 < result.seconds for result in together)
    assert [step for step, _ in steps] == [0, 1, 2]
    assert all(math.isfinite(value) for _, values in steps for value in values)


def poison_at(
    monkeypatch: pytest.MonkeyPatch, *, loss: LossWeights, step: int, term: str | None
) -> None:
    """Before a member's step, make a term's head NaN (None: the RGB network, after the step)."""
    chosen = torch.tensor(list(loss.values()))
    original = Trainer.step

    def stepped(self: Trainer, member: Member, views: Views) -> float:
        hit = torch.equal(member.weights, chosen) and member.step == step
        if hit and term is not None:
            (task,) = (t for t in member.loss.tasks if term in getattr(t, "terms", ()))
            next(task.parameters()).data.fill_(float("nan"))
        total = original(self, member, views)
        if hit and term is None:
            next(member.loss.rgb.parameters()).data.fill_(float("nan"))
        return total

    monkeypatch.setattr(Trainer, "step", stepped)


def test_a_member_that_diverges_leaves_alone(
    trainer: Trainer,
    labelled: LabelledClips,
    alone: list[MemberResult],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    poison_at(monkeypatch, loss=LOSSES[0], step=1, term="rgb/to_flow")
    losses: list[Sequence[float]] = []
    results = evaluate_cohort(
        trainer,
        labelled,
        members=JOBS,
        seeds=[3],
        on_step=lambda _, values: losses.append(list(values)),
    )
    assert results[0].fitness is None and results[0].rgb is None
    assert results[0].reason == "loss is nan at step 1; terms: rgb/to_flow"
    assert same(results[1], alone[1]) and same(results[2], alone[2])
    assert [math.isnan(values[0]) for values in losses] == [False, True, True]
    assert all(math.isfinite(value) for values in losses for value in values[1:])


def test_features_that_are_not_finite_fail_their_member_alone(
    trainer: Trainer,
    labelled: LabelledClips,
    alone: list[MemberResult],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    poison_at(monkeypatch, loss=LOSSES[1], step=2, term=None)
    results = evaluate_cohort(trainer, labelled, members=JOBS[:2], seeds=[3])
    assert results[1].fitness is None and "not finite" in str(results[1].reason)
    assert same(results[0], alone[0])


def test_losses_that_can_not_be_trained_fail_and_others_do_not(
    trainer: Trainer, labelled: LabelledClips, alone: list[MemberResult]
) -> None:
    nothing = check_weights({})
    results = evaluate_cohort(trainer, labelled, members=[Proposal(0, nothing), JOBS[1]], seeds=[3])
    assert results[0].fitness is None and "no weight above 0" in str(results[0].reason)
    assert same(results[1], alone[1])
    (failed,) = evaluate_cohort(trainer, labelled, members=[Proposal(0, nothing)], seeds=[3])
    assert failed.fitness is None and failed.seeds == (3,)


def test_repeats_are_averaged(
    trainer: Trainer, labelled: LabelledClips, alone: list[MemberResult]
) -> None:
    (both,) = evaluate_cohort(trainer, labelled, members=JOBS[1:2], seeds=[3, 4])
    (other,) = evaluate_cohort(trainer, labelled, members=JOBS[1:2], seeds=[4])
    assert alone[1].fitness is not None and other.fitness is not None
    assert both.fitness == pytest.approx((alone[1].fitness + other.fitness) / 2)
    assert both.seeds == (3, 4) and both.results == alone[1].results + other.results
    learnt = both.learnt
    assert learnt["terms"] == other.learnt["terms"]
    assert learnt["terms_at_start"].keys() == learnt["terms"].keys()
    assert "rgb" in learnt["feature_ranks"]
    assert all(0 < rank < 4 for pair in learnt["feature_ranks"].values() for rank in pair)


def test_a_repeat_that_fails_fails_its_member(
    trainer: Trainer, labelled: LabelledClips, monkeypatch: pytest.MonkeyPatch
) -> None:
    def diverging(self: Trainer, seed: int) -> object:
        loss = original(self, seed)
        if seed == 4:
            for parameter in loss.parameters():
                parameter.data.fill_(float("nan"))
        return loss

    original = Trainer.initial_loss
    monkeypatch.setattr(Trainer, "initial_loss", diverging)
    (result,) = evaluate_cohort(trainer, labelled, members=JOBS[1:2], seeds=[3, 4])
    assert result.fitness is None and result.seeds == (3, 4)
    assert str(result.reason).startswith("loss is nan at step 0")


def test_untrained_fitness_is_that_of_the_initial_network(
    trainer: Trainer, labelled: LabelledClips
) -> None:
    result = untrained_fitness(trainer, labelled, seed=3)
    assert 1 / 8 <= result.value <= 1.0
    assert untrained_fitness(trainer, labelled, seed=3) == result
