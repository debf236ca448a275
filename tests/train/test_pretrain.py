"""Pretraining with a given loss: exact resume, where the loss comes from, and what the file says of itself."""

from __future__ import annotations

import gc
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from engine.cli.main import main
from engine.core.recipe import Recipe, load_recipe, override, recipe_hash
from engine.core.run import RunFolder
from engine.core.runtime import choose_runtime
from engine.core.tensors import load_tensors
from engine.data.views import Views
from engine.features.embed import embed
from engine.features.parquet import read_features
from engine.model.network_file import load_network
from engine.model.resnet3d import ResNet3D
from engine.objective.lossfile import load_loss, loss_objective, random_weights, save_loss
from engine.objective.terms import check_weights
from engine.train.member import Member
from engine.train.trainer import Trainer

TINY = Path(__file__).parents[1] / "tiny.toml"
STEPS = ("--set", "optim.steps=5")


def pretrain(shards: Path, run: Path, *more: object) -> tuple[int, str, str]:
    """Run the command: exit code, stdout, stderr."""
    arguments = ("--videos", shards / "unlabelled", "--run", run, "--device", "cpu", *more)
    result = CliRunner().invoke(main, ["pretrain", *map(str, arguments)])
    done = result.exit_code, result.stdout, result.stderr
    assert result.exception is None or isinstance(result.exception, SystemExit), done
    del result
    gc.collect()  # the traceback holds the run, and the run its lock
    return done


def one_line(done: tuple[int, str, str], *, code: int) -> str:
    assert done[0] == code, done
    lines = done[2].splitlines()
    assert len(lines) == 1 and lines[0].startswith("engine: "), done[2]
    return lines[0]


@pytest.fixture(scope="module")
def finished(tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "finished"
    done = pretrain(tiny_shards, run, "--recipe", TINY, *STEPS, "--loss", "random:3")
    assert (done[0], done[2]) == (0, ""), done
    assert f"RGB network: {run / 'rgb.safetensors'}" in done[1]
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
        done = pretrain(tiny_shards, run, "--recipe", TINY, *STEPS, "--loss", "random:3", *every)
    assert "interrupted" in one_line(done, code=130)
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


def test_a_loss_that_leaves_the_rgb_network_alone_is_told(
    tiny_shards: Path, tmp_path: Path
) -> None:
    own = check_weights({"flow/shuffle": 0.5, "grey/predict": 1.0})
    save_loss(own, tmp_path / "own.toml", name="own", about="by hand")
    how = ("--recipe", TINY, *STEPS, "--loss", tmp_path / "own.toml")
    code, out, _ = pretrain(tiny_shards, tmp_path / "run", *how)
    assert code == 0 and "no term of this loss can change the RGB network: it stays" in out


def test_a_run_keeps_its_loss(finished: Path, tiny_shards: Path) -> None:
    done = pretrain(tiny_shards, finished, "--resume", "--loss", "random:4")
    assert "trains with another loss" in one_line(done, code=2)
    assert load_loss(finished / "loss.toml") == random_weights(3)
    assert pretrain(tiny_shards, finished, "--resume", "--loss", "random:3")[0] == 0


def test_a_run_goes_on_with_the_videos_that_it_noted(
    tiny_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From any working folder, judged by the same labelled clips; if these have moved, they are named."""

    def call(*arguments: object) -> tuple[int, str, str]:
        result = CliRunner().invoke(main, ["pretrain", *map(str, arguments), "--device", "cpu"])
        done = result.exit_code, result.stdout, result.stderr
        del result
        gc.collect()
        return done

    run, there, moved = tmp_path / "run", tmp_path / "there", tmp_path / "moved"
    shutil.copytree(tiny_shards, there)
    monkeypatch.chdir(there)
    begun = ("--recipe", TINY, *STEPS, "--loss", "random:3", "--videos", "unlabelled")
    with monkeypatch.context() as patched:
        interrupt_at(patched, step=4)
        done = call(*begun, "--labelled", "labelled", "--run", run, "--checkpoint-every", 2)
    assert done[0] == 130, done
    monkeypatch.chdir(tmp_path)
    code, out, err = call("--resume", "--run", run)
    assert (code, err) == (0, "") and "going on from step 4" in out and "k-means fitness" in out
    there.rename(moved)
    for folder, more in (("unlabelled", ()), ("labelled", ("--videos", moved / "unlabelled"))):
        line = one_line(call("--resume", "--run", run, *more), code=2)
        option = "--videos" if folder == "unlabelled" else "--labelled"
        assert f"{there / folder}, which is not there" in line and line.endswith(option)
    named = ("--videos", moved / "unlabelled", "--labelled", moved / "labelled")
    assert call("--resume", "--run", run, *named)[0] == 0
    assert call("--resume", "--run", run)[0] == 0


def test_a_new_run_needs_videos(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["pretrain", "--loss", "equal", "--run", str(tmp_path / "r")])
    assert result.exit_code == 2 and "--videos is missing" in result.stderr


def test_a_damaged_checkpoint_is_named(finished: Path, tiny_shards: Path) -> None:
    last = finished / "checkpoints" / "last.safetensors"
    whole = last.read_bytes()
    last.write_bytes(whole[:1000])
    try:
        line = one_line(pretrain(tiny_shards, finished, "--resume"), code=2)
    finally:
        last.write_bytes(whole)
    assert str(last) in line and "not a readable safetensors file" in line


def test_the_card_knows_mean_and_scale_of_the_features_over_training_clips(
    finished: Path, tiny_shards: Path, tmp_path: Path
) -> None:
    network, card = load_network(finished)
    cpu, out = choose_runtime("cpu"), tmp_path / "f.parquet"
    embed(network, card, videos=[tiny_shards / "unlabelled"], out=out, runtime=cpu, workers=1)
    vectors = read_features(out).vector.astype(np.float64)
    assert len(vectors) == card.num_clips
    np.testing.assert_allclose(card.feature_mean, vectors.mean(0), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(card.feature_scale, vectors.std(0), rtol=1e-3, atol=1e-6)
    assert len((finished / "rgb.json").read_text().splitlines()) < 40


def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(
    finished: Path, tiny_shards: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    every = ("--checkpoint-every", 2, "--keep-every", 3)
    done = pretrain(tiny_shards, run, "--recipe", TINY, *STEPS, "--loss", "random:3", *every)
    assert done[0] == 0, done
    checkpoints = run / "checkpoints"
    assert load_tensors(checkpoints / "step-00000003.safetensors")[1]["step"] == 3
    assert load_tensors(checkpoints / "previous.safetensors")[1]["step"] == 4
    last = checkpoints / "last.safetensors"
    last.write_bytes(last.read_bytes()[:-100])
    code, out, err = pretrain(tiny_shards, run, "--resume", *every)
    assert (code, err) == (0, "")
    assert str(last) in out and "going on from step 4" in out
    for name in ("rgb.safetensors", "checkpoints/last.safetensors"):
        expected, found = load_tensors(finished / name)[0], load_tensors(run / name)[0]
        assert [n for n in expected if not torch.equal(expected[n], found[n])] == []


def test_the_running_average_is_what_is_written(
    finished: Path, tiny_shards: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    options = ("--recipe", TINY, *STEPS, "--set", "optim.ema=0.5", "--loss", "random:3")
    assert pretrain(tiny_shards, run, *options)[0] == 0
    tensors, card = load_tensors(run / "rgb.safetensors")
    assert card["ema"] == 0.5 and load_network(run)[1].ema == 0.5
    assert json.loads((run / "rgb.json").read_text()) == card
    state, _ = load_tensors(run / "checkpoints" / "last.safetensors")
    last, _ = load_tensors(finished / "rgb.safetensors")
    name = "layer1.0.conv1.0.weight"
    assert torch.equal(state[f"module.networks.rgb.{name}"], last[name])  # training is not changed
    assert torch.equal(state[f"extra.{name}"], tensors[name])
    assert not torch.equal(tensors[name], last[name])
    assert load_tensors(finished / "rgb.safetensors")[1]["ema"] == 0.0


def test_labelled_clips_choose_the_best_network_and_change_no_weight(
    finished: Path, tiny_shards: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    judged = ("--labelled", tiny_shards / "labelled", "--judge-every", 2)
    options = ("--recipe", TINY, *STEPS, "--loss", "random:3", *judged)
    code, out, err = pretrain(tiny_shards, run, *options)
    assert (code, err) == (0, ""), err
    expected, _ = load_tensors(finished / "rgb.safetensors")
    found, card = load_tensors(run / "rgb.safetensors")
    assert all(torch.equal(expected[n], found[n]) for n in expected) and not card["labels_used"]
    _, best = load_tensors(run / "checkpoints" / "best.safetensors")
    fitnesses = {
        int(s): float(f) for s, f in re.findall(r"step (\d): k-means fitness (\S+?)[,\n]", out)
    }
    assert sorted(fitnesses) == [2, 4, 5] and best["labels_used"]
    assert best["fitness"] == pytest.approx(max(fitnesses.values()), abs=6e-4)
    assert fitnesses[best["step"]] == max(fitnesses.values())


def test_a_loss_that_labels_chose_says_so_in_the_card(tiny_shards: Path, tmp_path: Path) -> None:
    weights = check_weights({"rgb/shuffle": 0.5})
    found = {"units": "gradient"}
    save_loss(
        weights, tmp_path / "best.toml", name="x", about="y", labels_used=True, objective=found
    )
    options = ("--recipe", TINY, "--set", "optim.steps=2", "--loss", tmp_path / "best.toml")
    code, out, _ = pretrain(tiny_shards, tmp_path / "run", *options)
    assert code == 0 and "found with objective.units = gradient, and is trained with chance" in out
    assert loss_objective(tmp_path / "run" / "loss.toml") == found
    assert load_tensors(tmp_path / "run" / "rgb.safetensors")[1]["labels_used"]
    assert load_loss(tmp_path / "run" / "loss.toml") == weights


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--workers", 3), "optim.batch_size is 4, the whole batch, which 3 processes can't share"),
        (("--workers", 2, "--gpus", 2), "give --gpus or --workers, not both"),
        (("--judge-every", 2), "--judge-every needs --labelled"),
        (("--gpus", 99), "99 processes, one GPU each, but this machine shows"),
        (("--workers", 2, "--device", "cuda"), "--device cuda does not go with --workers"),
    ],
)
def test_processes_that_can_not_be_are_explained(
    tiny_shards: Path, tmp_path: Path, options: tuple[object, ...], said: str
) -> None:
    """In one line, before any process is started or folder made."""
    arguments = [
        "--videos",
        tiny_shards / "unlabelled",
        "--run",
        tmp_path / "run",
        "--recipe",
        TINY,
    ]
    command = ["pretrain", *arguments, "--loss", "equal", *options]
    result = CliRunner().invoke(main, [*map(str, command)])
    assert result.exit_code == 2 and said in result.stderr
    assert len(result.stderr.splitlines()) == 1 and not (tmp_path / "run").exists()


def test_torchrun_needs_a_named_run(tiny_shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    command = ["pretrain", "--videos", str(tiny_shards / "unlabelled"), "--loss", "equal"]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 2 and "name the run's folder with --run" in result.stderr
    result = CliRunner().invoke(main, [*command, "--gpus", "2"])
    assert result.exit_code == 2 and "leave out --gpus" in result.stderr


@pytest.mark.slow
def test_what_ends_all_processes_of_torchrun_is_said_once(tiny_demo: Path, tmp_path: Path) -> None:
    torchrun = "-m torch.distributed.run --standalone --nproc-per-node 2 -m -- engine".split()
    common = ["pretrain", "--run", tmp_path / "run", "--device", "cpu"]
    raw = ["--videos", tiny_demo / "unlabelled", "--loss", "equal"]
    command = [sys.executable, *torchrun, *map(str, [*common, *raw])]
    done = subprocess.run(command, capture_output=True, text=True)
    said = "not shards, which several machines need"
    assert done.returncode != 0 and done.stderr.count(said) == 1, done.stderr


@pytest.mark.slow
def test_processes_of_a_killed_torchrun_end(tiny_shards: Path, tmp_path: Path) -> None:
    """They would train on, unseen, beside those that are started next."""
    run = tmp_path / "run"
    torchrun = "-m torch.distributed.run --standalone --nproc-per-node 2 -m -- engine".split()
    options = ["--recipe", TINY, "--set", "optim.steps=2000", "--loss", "equal", "--device", "cpu"]
    command = ["pretrain", "--videos", tiny_shards / "unlabelled", "--run", run, *options]
    with subprocess.Popen([sys.executable, *torchrun, *map(str, command)]) as launcher:
        until = time.monotonic() + 200
        while not (run / "recipe.toml").exists():
            assert time.monotonic() < until and launcher.poll() is None
            time.sleep(0.05)
        workers = workers_of(launcher.pid)
        launcher.kill()
    until, left = time.monotonic() + 20, set(workers.values())
    while left and time.monotonic() < until:
        time.sleep(0.05)
        left = {pid for pid in left if Path(f"/proc/{pid}/fd/0").exists()}
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert sorted(workers) == ["0", "1"] and not left


@pytest.mark.slow
def test_torchrun_goes_on_with_a_run_that_is_there(
    finished: Path, tiny_shards: Path, tmp_path: Path
) -> None:
    """By the command that the documents give, in two processes, where one process began; only one of them speaks."""
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    torchrun = "-m torch.distributed.run --standalone --nproc-per-node 2 -m -- engine".split()
    options = ["--recipe", TINY, *STEPS, "--loss", "random:3", "--device", "cpu"]
    command = ["pretrain", "--videos", tiny_shards / "unlabelled", "--run", run, *options]
    done = subprocess.run(
        [sys.executable, *torchrun, *map(str, command)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("going on from step 5") == 1
    assert done.stdout.count(f"RGB network: {run / 'rgb.safetensors'}") == 1
    before, after = (load_tensors(path / "rgb.safetensors")[0] for path in (finished, run))
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert load_tensors(run / "rgb.safetensors")[1]["processes"] == 2


def workers_of(launcher: int) -> dict[str, int]:
    """Rank to process, from what the system says of a launcher's children."""
    found = {}
    for task in Path(f"/proc/{launcher}/task").iterdir():
        for child in (task / "children").read_text().split():
            entries = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
            ranks = [e[5:].decode() for e in entries if e.startswith(b"RANK=")]
            found.update({rank: int(child) for rank in ranks})
    return found


@pytest.mark.slow
def test_a_killed_process_is_started_again_and_the_run_ends(
    tiny_shards: Path, tmp_path: Path
) -> None:
    """And one process goes on where two were, as one alone would be."""
    run, changes = tmp_path / "run", ("optim.name=sgd", "optim.lr=1e-3", "optim.batch_norm=frozen")
    options = [x for change in ("optim.steps=12", *changes) for x in ("--set", change)]
    common = ["--videos", tiny_shards / "unlabelled", "--checkpoint-every", 4]
    begun = ["--recipe", TINY, "--loss", "random:3", *options, *common]
    command = [sys.executable, "-m", "engine", "pretrain", *begun, "--run", run, "--workers", 2]
    with subprocess.Popen(
        [*map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as launcher:
        until = time.monotonic() + 200
        while not (run / "checkpoints" / "last.safetensors").exists():
            assert time.monotonic() < until and launcher.poll() is None
            time.sleep(0.02)
        os.kill(workers_of(launcher.pid)["1"], signal.SIGKILL)
        out = launcher.communicate()[0]
    assert launcher.returncode == 0, out
    assert "a process ended: all of them start again (1)" in out and "going on from step" in out
    assert f"RGB network: {run / 'rgb.safetensors'}" in out
    alone = tmp_path / "alone"
    result = CliRunner().invoke(main, [*map(str, ["pretrain", *begun, "--run", alone])])
    assert result.exit_code == 0, result.stderr
    checkpoints = alone / "checkpoints"
    for name in ("last", "previous"):  # two processes' state, for one to go on from
        shutil.copy(run / "checkpoints" / f"{name}.safetensors", checkpoints)
    (checkpoints / "last.safetensors").unlink()
    expected, _ = load_tensors(alone / "rgb.safetensors")
    code, said, _ = pretrain(tiny_shards, alone, "--resume")
    assert code == 0 and "going on from step 8" in said
    for found in (
        load_tensors(alone / "rgb.safetensors")[0],
        load_tensors(run / "rgb.safetensors")[0],
    ):
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5)


def test_a_run_that_was_killed_as_it_began_knows_its_loss(
    finished: Path, tiny_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, save = tmp_path / "run", RunFolder.save_recipe

    def killed(self: RunFolder, recipe: Recipe) -> None:
        save(self, recipe)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(RunFolder, "save_recipe", killed)
        done = pretrain(tiny_shards, run, "--recipe", TINY, *STEPS, "--loss", "random:3")
    assert "--resume goes on from there" in one_line(done, code=130)
    code, _, err = pretrain(tiny_shards, run, "--resume")
    assert (code, err) == (0, "")
    for name, tensor in load_tensors(finished / "rgb.safetensors")[0].items():
        assert torch.equal(load_tensors(run / "rgb.safetensors")[0][name], tensor)


def test_before_there_is_a_run_the_same_command_goes_on(
    tiny_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("engine.train.pretrain.open_library", interrupted)
    done = pretrain(tiny_shards, tmp_path / "run", "--recipe", TINY, "--loss", "random:3")
    assert "the same command goes on from there" in one_line(done, code=130)


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
    done = pretrain(tiny_shards, tmp_path / "run", "--recipe", TINY, "--loss", "rgb_to_flow")
    assert one_line(done, code=1) == "engine: loss is nan at step 0; terms: rgb/to_flow"
