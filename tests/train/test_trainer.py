"""One step and one loop: the schedule, equal starts, what a step changes, and what ends a member."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch

from engine.core.recipe import Recipe, load_recipe, override
from engine.core.runtime import choose_runtime, make_deterministic
from engine.data.shards.index import ClipIndex
from engine.objective.lossfile import random_weights
from engine.objective.terms import check_weights
from engine.train.member import Member
from engine.train.optim import learning_rate
from engine.train.trainer import (
    DeviceFailed,
    MemberFailed,
    NonFiniteLoss,
    Trainer,
)

TINY = Path(__file__).parents[1] / "tiny.toml"
CROSS = check_weights({"rgb/to_flow": 1.0, "rgb/reconstruct": 0.5})


def make_trainer(shards: Path, *changes: str) -> Trainer:
    recipe: Recipe = override(load_recipe(TINY), list(changes))
    runtime = choose_runtime("cpu")
    make_deterministic(runtime)
    return Trainer(recipe, ClipIndex([shards / "labelled", shards / "unlabelled"]), runtime)


@pytest.fixture(scope="module")
def trainer(tiny_shards: Path) -> Trainer:
    return make_trainer(tiny_shards)


def weights_of(member: Member) -> dict[str, torch.Tensor]:
    return {name: t.clone() for name, t in member.loss.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    assert one.keys() == other.keys()
    return all(torch.equal(one[name], other[name]) for name in one)


def trained(trainer: Trainer, *, seed: int = 0) -> Member:
    member = trainer.member(random_weights(1), seed=seed)
    for _, views in trainer.rounds([member], seed=seed):
        (outcome,) = trainer.step_all([member], views)
        assert isinstance(outcome, float) and math.isfinite(outcome)
    return member


def test_steps_follow_the_schedule(trainer: Trainer) -> None:
    member = trainer.member(CROSS, seed=0)
    seen = []
    for step, views in trainer.rounds([member], seed=0):
        trainer.step(member, views)
        seen.append({group["lr"] for group in member.optimizer.param_groups})
        assert member.step == step + 1
    assert seen == [{learning_rate(trainer.recipe.optim, step)} for step in range(3)]


def test_one_seed_gives_equal_bits_and_another_does_not(tiny_shards: Path) -> None:
    one, again = (trained(make_trainer(tiny_shards)) for _ in range(2))
    assert same(weights_of(one), weights_of(again))
    assert one.term_values() == again.term_values()
    assert set(one.term_values()) == set(one.active)
    other = trained(make_trainer(tiny_shards), seed=1)
    assert not same(weights_of(one), weights_of(other))


def test_members_of_a_seed_start_equal_and_apart(trainer: Trainer) -> None:
    first = trainer.member(random_weights(1), seed=5)
    start = weights_of(first)
    _, views = next(trainer.rounds([first], seed=5))
    trainer.step(first, views)
    second = trainer.member(CROSS, seed=5)
    assert same(weights_of(second), start)
    assert not same(weights_of(first), start)
    assert not same(weights_of(trainer.member(CROSS, seed=6)), start)


@pytest.mark.parametrize(
    "changes", [("optim.lr=3e-3",), ("optim.name=sgd", "optim.lr=0.1")], ids=["adamw", "sgd"]
)
def test_loss_falls_on_one_batch(tiny_shards: Path, changes: tuple[str, ...]) -> None:
    trainer = make_trainer(tiny_shards, "optim.steps=20", "optim.grad_clip=10.0", *changes)
    member = trainer.member(CROSS, seed=0)
    _, views = next(trainer.rounds([member], seed=0))
    losses = [trainer.step(member, views) for _ in range(10)]
    assert losses[-1] < 0.9 * losses[0]


def test_what_no_term_needs_is_untouched(trainer: Trainer) -> None:
    member = trainer.member(check_weights({"rgb/to_flow": 1.0}), seed=0)
    start = weights_of(member)
    for _, views in trainer.rounds([member], seed=0):
        assert set(views.clip) == {"rgb", "flow"}
        trainer.step(member, views)
    end = weights_of(member)
    (task,) = (
        i for i, task in enumerate(member.loss.tasks) if "rgb/to_flow" in getattr(task, "terms", ())
    )
    changed = {name for name in end if not torch.equal(start[name], end[name])}
    used = re.compile(rf"networks\.rgb\.|tasks\.{task}\.")
    assert changed and all(used.match(name) for name in changed)
    trainable = {name for name, _ in member.loss.named_parameters() if used.match(name)}
    assert trainable <= changed


def poison(member: Member, term: str) -> None:
    """Make one term NaN, and no other."""
    (task,) = (task for task in member.loss.tasks if term in getattr(task, "terms", ()))
    with torch.no_grad():
        next(task.parameters()).fill_(float("nan"))


def test_a_loss_that_is_not_finite_names_step_and_term(trainer: Trainer) -> None:
    member = trainer.member(CROSS, seed=0)
    for step, views in trainer.rounds([member], seed=0):
        if step == 1:
            poison(member, "rgb/to_flow")
            before = weights_of(member)
            with pytest.raises(NonFiniteLoss, match=r"nan at step 1; terms: rgb/to_flow$"):
                trainer.step(member, views)
            break
        trainer.step(member, views)
    after = weights_of(member)
    parameters = dict(member.loss.named_parameters())
    for name in parameters:
        assert torch.equal(torch.nan_to_num(before[name]), torch.nan_to_num(after[name]))


def test_a_member_that_ends_leaves_the_others_their_step(trainer: Trainer) -> None:
    healthy, ill = (trainer.member(CROSS, seed=0) for _ in range(2))
    alone = trainer.member(CROSS, seed=0)
    poison(ill, "rgb/reconstruct")
    _, views = next(trainer.rounds([healthy, ill], seed=0))
    outcomes = trainer.step_all([healthy, ill], views)
    assert outcomes[0] == trainer.step_all([alone], views)[0]
    assert isinstance(outcomes[1], NonFiniteLoss) and "rgb/reconstruct" in str(outcomes[1])
    assert same(weights_of(healthy), weights_of(alone))


@pytest.mark.parametrize(
    "error",
    [
        torch.AcceleratorError("CUDA error: device-side assert triggered\nmore", 710),
        RuntimeError("CUDA error: an illegal memory access was encountered\nmore"),
        RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"),
    ],
    ids=["new torch", "old torch", "triton"],
)
def test_an_error_of_the_gpu_itself_is_no_members_fault(
    error: Exception, trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def step(*_: object) -> float:
        raise error

    member = trainer.member(CROSS, seed=0)
    _, views = next(trainer.rounds([member], seed=0))
    monkeypatch.setattr(trainer, "step", step)
    with pytest.raises(
        DeviceFailed, match=r"GPU is in an error state \(.*\); continue with --resume"
    ):
        trainer.step_all([member], views)
    error = RuntimeError("shape mismatch")
    (outcome,) = trainer.step_all([member], views)
    assert isinstance(outcome, MemberFailed), "other errors are"


def test_a_loss_without_a_term_that_can_be_computed_is_refused(
    trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match=r"no weight above 0$"):
        trainer.member(check_weights({}), seed=0)
    heard = check_weights({"rgb/align_audio": 1.0})
    assert trainer.member(heard, seed=0).active == ("rgb/align_audio",)
    monkeypatch.setattr(trainer, "sound", False)
    with pytest.raises(ValueError, match=r"videos have none$"):
        trainer.member(heard, seed=0)
    assert trainer.member(heard | {"rgb/shuffle": 1.0}, seed=0).active == ("rgb/shuffle",)
