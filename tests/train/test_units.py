"""Gradient units: what weights are divided by."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from engine.core.recipe import load_recipe, override
from engine.core.runtime import choose_runtime, make_deterministic
from engine.data.shards.index import ClipIndex
from engine.objective.lossfile import load_loss
from engine.objective.terms import TERM_NAMES
from engine.train.trainer import Trainer

TINY = Path(__file__).parents[1] / "tiny.toml"


def trainer_of(shards: Path, *more: str) -> Trainer:
    recipe = override(load_recipe(TINY), ["objective.units=gradient", *more])
    runtime = choose_runtime("cpu")
    make_deterministic(runtime)
    return Trainer(recipe, ClipIndex([shards / "labelled", shards / "unlabelled"]), runtime)


def test_equal_weights_pull_equally(tiny_shards: Path) -> None:
    """Each term alone, weighted as a member would, has a gradient of size 1 in its networks, on the clips measured."""
    trainer = trainer_of(tiny_shards)
    sizes = trainer.gradient_sizes()
    assert sizes.shape == (39,) and bool((sizes > 0).all()) and sizes.max() / sizes.min() > 5
    loss = trainer.initial_loss(trainer.recipe.seed)
    networks = [p for network in loss.networks.values() for p in network.parameters()]
    batches = list(trainer.first_views(2))
    for name in ("rgb/to_flow", "rgb/shuffle", "distill/flow@2", "distill/audio@4"):
        weights = torch.zeros(39)
        weights[TERM_NAMES.index(name)] = 1.0
        weights /= sizes
        squares = []
        for views in batches:
            grads = torch.autograd.grad(
                loss(views, weights, (name,)).total, networks, allow_unused=True
            )
            squares.append(sum(float(g.square().sum()) for g in grads if g is not None))
        assert (sum(squares) / 2) ** 0.5 == pytest.approx(1.0, rel=1e-3)


def test_members_have_weights_over_sizes_and_the_loss_keeps_its_own(tiny_shards: Path) -> None:
    trainer = trainer_of(tiny_shards)
    member = trainer.member(load_loss("equal"), seed=3)
    places = [TERM_NAMES.index(name) for name in member.computed]
    torch.testing.assert_close(member.ordered, 1.0 / trainer.gradient_sizes()[places])
    assert bool((member.weights == 1).all())


def test_sizes_follow_from_recipe_and_clips_alone(tiny_shards: Path) -> None:
    one, two = trainer_of(tiny_shards), trainer_of(tiny_shards)
    two.member(load_loss("equal"), seed=9)
    assert torch.equal(one.gradient_sizes(), two.gradient_sizes())


def test_other_units_divide_by_nothing(tiny_shards: Path) -> None:
    trainer = trainer_of(tiny_shards, "objective.units=chance")
    assert bool((trainer.gradient_sizes() == 1).all())
