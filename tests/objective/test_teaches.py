"""Every kind of term, alone, on the built-in videos: it falls below its trivial predictor and moves the networks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from engine.core.recipe import Recipe, load_recipe, override
from engine.core.runtime import choose_runtime, make_deterministic
from engine.data.clip_bank import ClipBank
from engine.data.shards.index import ClipIndex
from engine.data.views import Views
from engine.objective.terms import BY_NAME, TERMS, check_weights
from engine.train.member import Member
from engine.train.trainer import Trainer

CHANGES = (
    "clip.size=24",
    "clip.num_frames=8",
    "clip.min_area=0.8",
    "model.width=0.125",
    "model.pool=false",
    "model.depths=[1, 1, 1, 1]",
    "model.time_strides=[1, 1, 1, 1, 2]",
    "model.space_strides=[2, 1, 2, 1, 2]",
    "objective.decoder_width=16",
    "objective.order_share=1.0",
    "optim.name=muon",
    "optim.momentum=0.8",
    "optim.lr=5e-3",
    "optim.batch_size=16",
    "optim.warmup_steps=8",
)
"""Small clips, of which stage 4 sees 4 x 3 x 3 positions: time and space are kept."""
STEPS = {
    "rgb/reconstruct": 30,
    "audio/reconstruct": 30,
    "grey/colorize": 30,
    "rgb/to_flow": 40,
    "flow/to_rgb": 40,
    "rgb/predict": 70,
    "audio/predict": 80,
    "rgb/shuffle": 30,
    "rgb/align_audio": 50,
    "rgb+flow/embed": 30,
    "distill/audio@4": 30,
}
"""Steps after which a term, alone, is below TAUGHT: one term of each kind and, of decoders, each kind of target."""
TAUGHT = 0.9
"""In units of chance."""


def recipe(steps: int) -> Recipe:
    return override(load_recipe("demo"), [*CHANGES, f"optim.steps={steps}"])


def trainer_of(videos: ClipIndex, steps: int) -> Trainer:
    runtime = choose_runtime("cpu")
    make_deterministic(runtime)
    return Trainer(recipe(steps), videos, runtime, warn=lambda _: None)


Videos = tuple[ClipIndex, ClipBank]


@pytest.fixture(scope="module")
def videos(tiny_shards: Path) -> Videos:
    """All 32 clips, and these decoded once."""
    index = ClipIndex([tiny_shards / "unlabelled", tiny_shards / "labelled"])
    return index, trainer_of(index, steps=10).open_bank("200MB")


def trained(videos: Videos, name: str, steps: int) -> tuple[Member, Views, list[Tensor]]:
    """A member of this term alone, the last batch, and each trained network's features of it before training."""
    trainer = trainer_of(videos[0], steps)
    trainer.bank = videos[1]
    member = trainer.member(check_weights({name: 1.0}), seed=0)
    for _, views in trainer.rounds([member], seed=0):
        trainer.step(member, views)
    return member, views, features(trainer.initial_loss(0), views, name)


def features(loss: torch.nn.Module, views: Views, name: str) -> list[Tensor]:
    """Of the networks that the term trains: for distillation the student alone."""
    term = BY_NAME[name]
    networks = ("rgb",) if term.task == "distill" else term.networks
    with torch.no_grad():
        return [loss.networks[m](views.clip[m]) for m in networks]


def gradient(network: torch.nn.Module) -> float:
    """The norm of the last step's, over the layers that the term reaches."""
    found = [p.grad.norm() for p in network.parameters() if p.grad is not None]
    return torch.stack(found).norm().item() if found else 0.0


@pytest.mark.slow
@pytest.mark.parametrize("name", STEPS)
def test_a_term_alone_teaches(name: str, videos: Videos) -> None:
    member, views, before = trained(videos, name, STEPS[name])
    assert member.term_values()[name] < TAUGHT
    for network, was, now in zip(
        [member.loss.networks[m] for m in BY_NAME[name].networks],
        before,
        features(member.loss, views, name),
        strict=False,
    ):
        assert gradient(network) > 0.02, "the gradient that reaches the network has vanished"
        assert (now - was).norm() > 0.1 * (was - was.mean(0)).norm(), "its features have not moved"


def test_every_kind_is_tried() -> None:
    kinds = {BY_NAME[name].task for name in STEPS}
    assert kinds | {"backward"} == {term.task for term in TERMS}


@pytest.mark.slow
def test_backward_can_not_teach_here(videos: Videos) -> None:
    """Each built-in motion, reversed, is another clip's: growing is shrinking, rising is falling, an orbit mirrored.

    So nothing but memory tells the direction of time, and the term stays at ln 2. Its gradient arrives all the same.
    """
    member, _, _ = trained(videos, "rgb/backward", 30)
    assert member.term_values()["rgb/backward"] > TAUGHT
    assert gradient(member.loss.networks["rgb"]) > 0.02
