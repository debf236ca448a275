"""Pretraining with a given loss: exact resume, where the loss comes from, and what the file says of itself."""

from __future__ import annotations

import gc
import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from engine.checkpoint import load_tensors
from engine.cli import main
from engine.data.views import Views
from engine.lossfile import load_loss, random_weights, save_loss
from engine.model.resnet3d import ResNet3D
from engine.objective.terms import check_weights
from engine.recipe import load_recipe, override, recipe_hash
from engine.train import Trainer
from engine.train_state import Member

TINY = Path(__file__).with_name("tiny.toml")
STEPS = ("--set", "optim.steps=5")


def pretrain(shards: Path, run: Path, *more: object) -> tuple[int, str, str]:
    """Run the command: exit code, stdout, stderr."""
    arguments = ("--videos", shards / "unlabelled", "--run", run, "--device", "cpu", *more)
    result = CliRunner().invoke(main, ["pretrain", *map(str, arguments)])
    told = result.exit_code, result.stdout, result.stderr
    assert result.exception is None or isinstance(result.exception, SystemExit), told
    del result
    gc.collect()  # the traceback holds the run, and the run its lock
    return told


def one_line(told: tuple[int, str, str], *, code: int) -> str:
    assert told[0] == code, told
    lines = told[2].splitlines()
    assert len(lines) == 1 and lines[0].startswith("engine: "), told[2]
    return lines[0]


@pytest.fixture(scope="module")
def finished(tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "finished"
    told = pretrain(tiny_shards, run, "--recipe", TINY, *STEPS, "--loss", "random:3")
    assert (told[0], told[2]) == (0, ""), told
    assert f"RGB network: {run / 'rgb.safetensors'}" in told[1]
    return run


def interrupt_at(patched: pytest.MonkeyPatch, *, step: int) -> None:
    original = Trainer.step

    def stepped(self: Trainer, member: Member, views: Views) -> float:
        if member.step == step:
            raise KeyboardInterrupt
        return original(self, member, views)

    patched.setattr(Trainer, "step", stepped)


@pytest.mark.parametrize("step", [1, 4], ids=["before-a-checkpoint", "after-two"])
def test_an_interrupted_run_ends_as_one_that_was_not(
    finished: Path, tiny_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    run = tmp_path / "run"
    every = ("--checkpoint-every", 2)
    with monkeypatch.context() as patched:
        interrupt_at(patched, step=step)
        told = pretrain(tiny_shards, run, "--recipe", TINY, *STEPS, "--loss", "random:3", *every)
    assert "interrupted" in one_line(told, code=1)
    assert not (run / "rgb.safetensors").exists()
    assert (run / "checkpoints" / "last.safetensors").exists() == (step == 4)
    code, out, err = pretrain(tiny_shards, run, "--resume", *every)
    assert (code, err) == (0, "")
    assert ("going on from step 4" in out) == (step == 4)
    for name in ("rgb.safetensors", "checkpoints/last.safetensors"):
        expected, _ = load_tensors(finished / name)
        found, _ = load_tensors(run / name)
        assert expected.keys() == found.keys()
        assert [n for n in expected if not torch.equal(expected[n], found[n])] == []


def test_resuming_a_finished_run_changes_no_weight(finished: Path, tiny_shards: Path) -> None:
    before, _ = load_tensors(finished / "rgb.safetensors")
    assert pretrain(tiny_shards, finished, "--resume")[0] == 0
    after, _ = load_tensors(finished / "rgb.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_network_file_says_what_it_is(finished: Path) -> None:
    tensors, card = load_tensors(finished / "rgb.safetensors")
    network = ResNet3D(card["arch"], 3, width=card["width"], pool=card["pool"])
    network.load_state_dict(tensors)
    recipe = override(load_recipe(TINY), ["optim.steps=5"])
    assert card["recipe_hash"] == recipe_hash(recipe) and card["seed"] == recipe.seed
    assert card["loss"] == random_weights(3)
    assert card["input"] == {"num_frames": 4, "frame_stride": 2, "size": 32}
    assert len(card["mean"]) == len(card["std"]) == 3
    facts = json.loads((finished / "provenance.json").read_text())
    assert card["versions"] == facts["versions"] and facts["num_clips"] == 8
    assert [p for p in (finished / "tensorboard").iterdir() if "tfevents" in p.name]


def test_the_loss_may_be_a_preset_a_file_or_random(
    finished: Path, tiny_shards: Path, tmp_path: Path
) -> None:
    own = check_weights({"rgb/shuffle": 0.25, "rgb/predict": 1.0})
    save_loss(own, tmp_path / "own.toml", name="own", about="by hand")
    names = {"rgb_to_flow": load_loss("rgb_to_flow"), tmp_path / "own.toml": own}
    networks = []
    for number, (name, weights) in enumerate(names.items()):
        run = tmp_path / f"run{number}"
        assert pretrain(tiny_shards, run, "--recipe", TINY, *STEPS, "--loss", name)[0] == 0
        tensors, card = load_tensors(run / "rgb.safetensors")
        assert card["loss"] == weights == load_loss(run / "loss.toml")
        networks.append(tensors["stem.0.weight"])
    assert load_loss(finished / "loss.toml") == random_weights(3)
    assert not torch.equal(*networks)


def test_a_run_keeps_its_loss(finished: Path, tiny_shards: Path) -> None:
    told = pretrain(tiny_shards, finished, "--resume", "--loss", "random:4")
    assert "trains with another loss" in one_line(told, code=2)
    assert load_loss(finished / "loss.toml") == random_weights(3)
    assert pretrain(tiny_shards, finished, "--resume", "--loss", "random:3")[0] == 0


def test_a_damaged_checkpoint_is_named(finished: Path, tiny_shards: Path) -> None:
    last = finished / "checkpoints" / "last.safetensors"
    whole = last.read_bytes()
    last.write_bytes(whole[:1000])
    try:
        line = one_line(pretrain(tiny_shards, finished, "--resume"), code=2)
    finally:
        last.write_bytes(whole)
    assert str(last) in line and "not a readable safetensors file" in line


def test_a_loss_must_be_given(tiny_shards: Path, tmp_path: Path) -> None:
    line = one_line(pretrain(tiny_shards, tmp_path / "run"), code=2)
    assert "--loss is missing" in line and not (tmp_path / "run").exists()


def test_training_that_diverges_names_step_and_term(
    tiny_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Trainer.member

    def poisoned(self: Trainer, *args: object, **kwargs: object) -> Member:
        member = original(self, *args, **kwargs)  # type: ignore[arg-type]
        for parameter in member.loss.rgb.parameters():
            parameter.data.fill_(float("nan"))
        return member

    monkeypatch.setattr(Trainer, "member", poisoned)
    told = pretrain(tiny_shards, tmp_path / "run", "--recipe", TINY, "--loss", "rgb_to_flow")
    assert one_line(told, code=1) == "engine: loss is nan at step 0; terms: rgb/to_flow"
