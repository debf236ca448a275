"""Checkpoints: exact resume, files that do not fit, and writes that are cut short."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from engine.core.recipe import load_recipe, override, recipe_hash
from engine.core.runtime import choose_runtime, make_deterministic
from engine.core.tensors import CheckpointError, load_tensors, save_tensors
from engine.data.shards.index import ClipIndex
from engine.objective.lossfile import random_weights
from engine.train.checkpoint import load_last, load_member, save_last, save_member
from engine.train.member import Member
from engine.train.trainer import Trainer

TINY = Path(__file__).parents[1] / "tiny.toml"
STEPS = 6


def make_trainer(shards: Path, optimizer: str = "adamw") -> Trainer:
    changes = [f"optim.steps={STEPS}", f"optim.name={optimizer}", "optim.lr=0.01"]
    runtime = choose_runtime("cpu")
    make_deterministic(runtime)
    recipe = override(load_recipe(TINY), changes)
    return Trainer(recipe, ClipIndex([shards / "unlabelled"]), runtime)


@pytest.fixture(scope="module")
def trainer(tiny_shards: Path) -> Trainer:
    return make_trainer(tiny_shards)


def member_of(trainer: Trainer) -> Member:
    return trainer.member(random_weights(2), seed=0)


def train(trainer: Trainer, member: Member, *, until: int = STEPS) -> Member:
    for step, views in trainer.rounds([member], seed=0):
        trainer.step(member, views)
        if step + 1 == until:
            break
    return member


def save(path: Path, trainer: Trainer, member: Member) -> None:
    save_member(path, member, facts={"recipe_hash": recipe_hash(trainer.recipe), "seed": 0})


def load(path: Path, trainer: Trainer, member: Member | None = None) -> Member:
    member = member or member_of(trainer)
    load_member(path, member, recipe_hash=recipe_hash(trainer.recipe))
    return member


def state_of(member: Member) -> dict[str, Tensor]:
    """Everything that decides a member's next steps."""
    state = dict(member.loss.state_dict())
    names = {p: name for name, p in member.loss.named_parameters()}
    for parameter, entry in member.optimizer.state.items():
        for key, value in entry.items():
            state[f"{key} of {names[parameter]}"] = torch.as_tensor(value)
    assert member.values is not None
    state["term means"] = member.values
    return state


@pytest.fixture(scope="module")
def saved(trainer: Trainer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint") / "last.safetensors"
    save(path, trainer, train(trainer, member_of(trainer), until=1))
    return path


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "sgd"])
def test_six_steps_equal_three_and_three(tiny_shards: Path, tmp_path: Path, optimizer: str) -> None:
    trainer = make_trainer(tiny_shards, optimizer)
    whole = train(trainer, member_of(trainer))
    path = tmp_path / "last.safetensors"
    save(path, trainer, train(trainer, member_of(trainer), until=3))
    another = make_trainer(tiny_shards, optimizer)
    resumed = load(path, another)
    assert resumed.step == 3
    train(another, resumed)
    expected, loaded = state_of(whole), state_of(resumed)
    assert expected.keys() == loaded.keys()
    assert [name for name in expected if not torch.equal(expected[name], loaded[name])] == []
    assert resumed.step == whole.step == STEPS
    assert resumed.term_values() == whole.term_values()
    assert resumed.learnt() == whole.learnt()


def test_facts_come_back(trainer: Trainer, saved: Path) -> None:
    member = member_of(trainer)
    facts = load_member(saved, member, recipe_hash=recipe_hash(trainer.recipe))
    assert facts["seed"] == 0 and facts["step"] == member.step == 1
    assert tuple(facts["active"]) == member.active


def refused(path: Path, trainer: Trainer, match: str) -> None:
    before = {name: t.clone() for name, t in member_of(trainer).loss.state_dict().items()}
    member = member_of(trainer)
    with pytest.raises(CheckpointError, match=match) as caught:
        load(path, trainer, member)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    after = member.loss.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_another_recipe_is_refused(trainer: Trainer, saved: Path) -> None:
    member = member_of(trainer)
    with pytest.raises(CheckpointError, match="this run's is 0123456789ab; resume with") as caught:
        load_member(saved, member, recipe_hash="0123456789ab")
    assert recipe_hash(trainer.recipe) in str(caught.value)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999])
def test_a_truncated_file_is_refused(
    trainer: Trainer, saved: Path, tmp_path: Path, share: float
) -> None:
    whole = saved.read_bytes()
    path = tmp_path / "cut.safetensors"
    path.write_bytes(whole[: int(share * len(whole))])
    refused(path, trainer, "not a readable safetensors file")


def test_an_absent_file_is_refused(trainer: Trainer, tmp_path: Path) -> None:
    refused(tmp_path / "none.safetensors", trainer, "no such checkpoint")


Change = Callable[[dict[str, Tensor]], object]
WEIGHT = "module.networks.rgb.stem.0.weight"


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda t: t.pop(WEIGHT), r"has no tensor networks\.rgb\.stem\.0\.weight"),
        (lambda t: t.update({"module.more": torch.ones(1)}), "has an unknown tensor more"),
        (lambda t: t.update({WEIGHT: t[WEIGHT][:-1]}), r"stem\.0\.weight has shape \(7, 3"),
        (lambda t: t.pop(next(n for n in t if n.startswith("optim."))), "optimizer's"),
    ],
    ids=["missing", "unknown", "shape", "optimizer"],
)
def test_tensors_that_do_not_fit_are_refused(
    trainer: Trainer, saved: Path, tmp_path: Path, change: Change, match: str
) -> None:
    tensors, facts = load_tensors(saved)
    change(tensors)
    path = tmp_path / "changed.safetensors"
    save_tensors(path, tensors, facts=facts)
    refused(path, trainer, match)


def kept(folder: Path, trainer: Trainer, member: Member, *, keep: bool = False) -> None:
    facts = {"recipe_hash": recipe_hash(trainer.recipe), "seed": 0}
    extra = {"average": torch.full((3,), float(member.step))}
    save_last(folder, member, facts=facts, extra=extra, keep=keep)


def restored(folder: Path, trainer: Trainer) -> tuple[Member, list[str], float]:
    """The member, what was warned of, and the extra tensor."""
    member, warnings, extra = member_of(trainer), list[str](), {"average": torch.zeros(3)}
    digest = recipe_hash(trainer.recipe)
    loaded = load_last(folder, member, recipe_hash=digest, extra=extra, warn=warnings.append)
    assert loaded == (member.step > 0)
    return member, warnings, extra["average"][0].item()


def test_a_damaged_checkpoint_gives_way_to_the_one_before(trainer: Trainer, tmp_path: Path) -> None:
    assert restored(tmp_path, trainer)[0].step == 0
    member = member_of(trainer)
    for step in (1, 2, 3):
        member.step = step
        member.loss.rgb.stem[0].weight.data.fill_(step)
        kept(tmp_path, trainer, member, keep=step == 1)
    last, previous = tmp_path / "last.safetensors", tmp_path / "previous.safetensors"
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "last.safetensors", "previous.safetensors", "step-00000001.safetensors"
    ]  # fmt: skip
    member, warnings, extra = restored(tmp_path, trainer)
    assert (member.step, warnings, extra) == (3, [], 3.0)
    whole = bytearray(last.read_bytes())
    whole[-1] ^= 1  # a bit of a tensor, which leaves a file that safetensors reads
    last.write_bytes(whole)
    member, warnings, extra = restored(tmp_path, trainer)
    assert member.step == 2 and extra == 2.0 and member.loss.rgb.stem[0].weight.mean() == 2.0
    assert len(warnings) == 1 and str(last) in warnings[0] and "checksum" in warnings[0]
    last.unlink()  # as after a kill between two renames
    assert restored(tmp_path, trainer)[0].step == 2
    previous.write_bytes(previous.read_bytes()[:100])
    member, warnings, extra = restored(tmp_path, trainer)
    assert member.step == 1 and extra == 1.0 and "previous" in warnings[0]
    (tmp_path / "step-00000001.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"no whole one before it: start a new run"):
        restored(tmp_path, trainer)


def test_an_extra_tensor_must_be_there(trainer: Trainer, saved: Path) -> None:
    with pytest.raises(CheckpointError, match="has no tensor average"):
        load_member(
            saved,
            member_of(trainer),
            recipe_hash=recipe_hash(trainer.recipe),
            extra={"average": torch.zeros(3)},
        )
