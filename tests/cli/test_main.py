"""The command line: what a user can get wrong is told in one line, with an exit code, and never a traceback."""

from __future__ import annotations

import errno
import gc
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tomli_w
import torch
from click.testing import CliRunner
from safetensors import SafetensorError

import engine
import kernels
from engine.cli.evolve import _say_if_unequal
from engine.cli.main import main
from engine.core import tensors
from engine.core.recipe import Recipe, load_recipe, override, preset_names
from engine.model.network_file import load_network
from engine.report.run import read_run

TINY = Path(__file__).parents[1] / "tiny.toml"
SHORT = ("--set", "optim.steps=2", "--set", "search.rounds=0", "--set", "search.confirm_seeds=0")


pytestmark = pytest.mark.usefixtures("undrawn")


@pytest.fixture(autouse=True)
def user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working folder and a cache of the test's own."""
    threads = torch.get_num_threads()
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield tmp_path / "work"
    torch.set_num_threads(threads)


def call(*arguments: object) -> tuple[int, str, str]:
    """Run the command: exit code, stdout, stderr."""
    result = CliRunner().invoke(main, [str(a) for a in arguments])
    told = result.exit_code, result.stdout, result.stderr
    assert result.exception is None or isinstance(result.exception, SystemExit), told
    del result
    gc.collect()
    return told


def refused(*arguments: object, code: int = 2) -> str:
    """The one line that a failing command says."""
    found, out, err = call(*arguments)
    lines = err.splitlines()
    assert found == code and len(lines) == 1 and lines[0].startswith("engine: "), (found, err)
    assert "Traceback" not in out
    return lines[0]


def evolve_on(videos: Path, labelled: Path, *more: object) -> tuple[object, ...]:
    data = ("--videos", videos, "--labelled", labelled, "--recipe", TINY, *SHORT)
    return ("evolve", *data, "--run", "run", "--device", "cpu", *more)


def some(source: Path, target: Path, *, classes: int, clips: int) -> Path:
    """A folder of the first clips of the first classes."""
    for folder in sorted(source.iterdir())[:classes]:
        (target / folder.name).mkdir(parents=True)
        for clip in sorted(folder.iterdir())[:clips]:
            shutil.copy(clip, target / folder.name)
    return target


def test_version_and_help() -> None:
    assert engine.__version__ in call("--version")[1]
    text = call("--help")[1]
    assert all(name in text for name in ("evolve", "pretrain", "ingest", "report", "doctor"))
    for name in ("evolve", "pretrain", "ingest", "report", "doctor"):
        code, out, err = call(name, "--help")
        assert code == 0 and "Usage" in out and err == ""


def test_a_folder_without_videos(user: Path, tiny_shards: Path) -> None:
    (user / "empty").mkdir()
    (user / "empty" / "notes.txt").write_text("no video")
    line = refused(*evolve_on(user / "empty", tiny_shards / "labelled"))
    assert "no videos found in" in line and str(user / "empty") in line
    assert "no videos found" in refused("ingest", user / "empty", "--out", user / "out")


def test_a_path_that_is_not_there(user: Path, tiny_shards: Path) -> None:
    line = refused(*evolve_on(tiny_shards / "unlabelled", user / "none"))
    assert "no such file or folder" in line and str(user / "none") in line
    line = refused("pretrain", "--loss", "random:1", "--videos", user / "none", "--run", "p")
    assert "no such file or folder" in line
    assert "none" in refused("ingest", user / "none", "--out", user / "out")
    assert "no run there" in refused("report", user / "none")


def test_bad_files_among_good_ones_are_shown_and_the_run_goes_on(
    user: Path, tiny_demo: Path, tiny_shards: Path
) -> None:
    videos = user / "videos"
    videos.mkdir()
    for clip in sorted((tiny_demo / "unlabelled").iterdir())[:3]:
        shutil.copy(clip, videos)
    (videos / "empty.mp4").touch()
    (videos / "noise.mp4").write_bytes(os.urandom(5000))
    code, out, err = call(*evolve_on(videos, tiny_shards / "labelled"))
    assert (code, err) == (0, "")
    rejects = [line for line in out.splitlines() if line.startswith("rejected ")]
    assert len(rejects) == 2 and all(": " in line for line in rejects)
    assert any("empty.mp4" in line for line in rejects)
    assert any("noise.mp4" in line for line in rejects)
    facts = json.loads((user / "run" / "provenance.json").read_text())
    assert facts["num_clips"] == 3 and len(facts["rejected"]) == 2


def test_only_bad_files(user: Path, tiny_shards: Path) -> None:
    (user / "videos").mkdir()
    (user / "videos" / "empty.mp4").touch()
    line = refused(*evolve_on(user / "videos", tiny_shards / "labelled"))
    assert "all 1 files were rejected; the first, empty.mp4: " in line


def test_labels_that_are_missing(user: Path, tiny_shards: Path) -> None:
    line = refused(*evolve_on(tiny_shards / "unlabelled", tiny_shards / "unlabelled"))
    assert "no labelled clips: labels come from class folders" in line


def test_fewer_labelled_clips_than_classes_need(
    user: Path, tiny_demo: Path, tiny_shards: Path
) -> None:
    few = some(tiny_demo / "labelled", user / "few", classes=3, clips=1)
    line = refused(*evolve_on(tiny_shards / "unlabelled", few))
    assert "3 labelled clips for 3 classes" in line
    one = some(tiny_demo / "labelled", user / "one", classes=1, clips=2)
    line = refused(*evolve_on(tiny_shards / "unlabelled", one, "--run", "other"))
    assert "all of one class" in line


def test_videos_come_with_labelled(tiny_shards: Path) -> None:
    assert "--labelled is missing" in refused("evolve", "--videos", tiny_shards / "unlabelled")
    assert "fitness.metric=zipf" in refused("evolve", "--videos", tiny_shards / "unlabelled")
    assert "--videos is missing" in refused("evolve", "--labelled", tiny_shards / "labelled")


def test_a_search_without_labels(user: Path, tiny_shards: Path) -> None:
    videos = ("evolve", "--videos", tiny_shards / "unlabelled", "--recipe", TINY, "--run", "run")
    zipf = ("--set", "fitness.metric=zipf", "--set", "fitness.num_clusters=3")
    small = ("--set", "search.population=2", "--rounds", 1, "--clip-bank", 4, "--device", "cpu")
    assert call(*videos, *zipf, *small)[0] == 0
    run = user / "run"
    assert json.loads((run / "provenance.json").read_text())["labels_used"] is False
    member = read_run(run).trials[0]
    assert member.attributes["labels_used"] is False
    assert member.fitness == member.metrics["zipf"]
    assert load_network(run)[1].labels_used is False
    assert load_recipe(run / "recipe.toml").search.clip_bank == 4


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("[optim]\nstep = 3\n", "unknown key optim.step; did you mean optim.steps?"),
        ("[optim]\nsteps = 'many'\n", "optim.steps"),
        ("[optim]\nsteps = 0\n", "optim.steps"),
        ("[search]\nmethod = 'magic'\n", "search.method"),
        ("optim = 3\n", "optim"),
        ("[optim\n", "not valid TOML"),
    ],
    ids=["unknown", "type", "range", "choice", "section", "syntax"],
)
def test_recipes_that_can_not_be_used(user: Path, text: str, match: str) -> None:
    (user / "bad.toml").write_text(text)
    for command in (("evolve",), ("pretrain", "--loss", "random:1", "--videos", user)):
        line = refused(*command, "--recipe", "bad.toml", "--run", "run")
        assert "bad.toml" in line and match in line
    assert not (user / "run").exists()


def test_recipes_that_are_not_there() -> None:
    assert "none.toml: no such file" in refused("evolve", "--recipe", "none.toml")
    assert "did you mean 'demo'" in refused("evolve", "--recipe", "demmo")


@pytest.mark.parametrize(
    ("assignment", "match"),
    [
        ("optim.steps", "write section.key=value"),
        ("optim.setps=3", "did you mean optim.steps?"),
        ("optim.steps=fast", "optim.steps"),
        ("seed.x=3", "not a section"),
        ("optim.steps=5", "of 5: set it too, such as optim.warmup_steps=0"),
    ],
)
def test_overrides_that_can_not_be_used(assignment: str, match: str) -> None:
    assert match in refused("evolve", "--recipe", "cpu/evolve", "--set", assignment)


@pytest.mark.parametrize(
    ("weights", "match"),
    [
        ({"rgb/to_flow": 1.5}, "'rgb/to_flow' is 1.5, outside [0, 1]"),
        ({"rgb/to_flow": -0.1}, "outside [0, 1]"),
        ({"rgb/to_flow": float("nan")}, "outside [0, 1]"),
        ({"rgb/to_flow": "high"}, "must be a number"),
        ({"rgb/toflow": 0.5}, "unknown loss term 'rgb/toflow'; did you mean 'rgb/to_flow'?"),
    ],
)
def test_losses_that_can_not_be_used(
    user: Path, tiny_shards: Path, weights: dict[str, object], match: str
) -> None:
    (user / "bad.toml").write_text(tomli_w.dumps({"weights": weights}))
    data = ("--videos", tiny_shards / "unlabelled", "--run", "run")
    line = refused("pretrain", "--loss", "bad.toml", *data)
    assert "bad.toml" in line and match in line
    assert not (user / "run").exists()


def test_losses_that_are_not_there(user: Path, tiny_shards: Path) -> None:
    data = ("--videos", tiny_shards / "unlabelled", "--run", "run")
    assert "did you mean 'equal'" in refused("pretrain", "--loss", "equall", *data)
    assert "none.toml: no such file" in refused("pretrain", "--loss", "none.toml", *data)
    assert "random:SEED" in refused("pretrain", "--loss", "random:x", *data)
    (user / "table.toml").write_text("weights = 3\n")
    assert "no [weights] table" in refused("pretrain", "--loss", "table.toml", *data)


def test_a_loss_of_nothing(user: Path, tiny_shards: Path) -> None:
    (user / "zero.toml").write_text("[weights]\n")
    data = ("--videos", tiny_shards / "unlabelled", "--recipe", TINY, "--run", "run")
    assert "no weight above 0" in refused("pretrain", "--loss", "zero.toml", *data)


def test_a_gpu_that_is_not_there(tiny_shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    shards = tiny_shards / "unlabelled"
    line = refused(*evolve_on(shards, tiny_shards / "labelled", "--device", "cuda"))
    assert "no CUDA GPU is visible; use --device cpu" in line


def test_another_kernels_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(kernels, "__engine_kernels__")
    assert "pip uninstall kernels" in refused("evolve", code=1)


def test_a_damaged_shard(user: Path, tiny_shards: Path) -> None:
    shutil.copytree(tiny_shards / "unlabelled", user / "shards")
    shard = next((user / "shards").glob("*.tar"))
    shard.write_bytes(shard.read_bytes()[:-1000])
    line = refused(*evolve_on(user / "shards", tiny_shards / "labelled"))
    assert str(shard) in line and "truncated" in line and "ingest the videos again" in line


def full_disk(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "here")


def test_a_full_disk(
    user: Path, tiny_demo: Path, tiny_shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", full_disk)
    shards = tiny_shards / "unlabelled"
    line = refused(*evolve_on(shards, tiny_shards / "labelled"), code=1)
    assert "No space left on device" in line
    assert "make room; what was finished is kept, and the same command goes on" in line
    data = ("--videos", shards, "--recipe", TINY, "--run", "p")
    line = refused("pretrain", "--loss", "random:1", *data, code=1)
    assert "No space left on device" in line
    line = refused("ingest", tiny_demo / "unlabelled", "--out", "out", "--workers", 1, code=1)
    assert "No space left on device" in line and "--resume" not in line
    assert not (user / "out" / "dataset.json").exists()


def test_a_disk_that_fills_up_while_a_network_is_saved(
    user: Path, tiny_shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left (os error 28)")

    arguments = evolve_on(tiny_shards / "unlabelled", tiny_shards / "labelled")
    with monkeypatch.context() as patched:
        patched.setattr(tensors, "save_file", full)
        line = refused(*arguments, code=1)
    assert "No space left on device" in line and "run/checkpoints/" in line
    assert "make room; what was finished is kept, and --resume goes on" in line
    assert call("evolve", "--resume", "--run", "run", "--device", "cpu")[0] == 0


def test_a_run_folder_that_can_not_be_made(user: Path, tiny_shards: Path) -> None:
    (user / "run").write_text("a file")
    line = refused(*evolve_on(tiny_shards / "unlabelled", tiny_shards / "labelled"), code=1)
    assert str(Path("run")) in line


def test_a_mistake_is_one_line_of_the_real_program(user: Path, tiny_shards: Path) -> None:
    (user / "empty").mkdir()
    arguments = map(str, evolve_on(user / "empty", tiny_shards / "labelled"))
    program = [sys.executable, "-c", "from engine.cli.main import main; main()", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(TINY.parents[1])}
    done = subprocess.run(program, capture_output=True, text=True, env=environment)
    assert done.returncode == 2 and "no videos found in" in done.stderr
    assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith("engine: ")


def test_ingest_and_report(user: Path, tiny_demo: Path) -> None:
    videos = some(tiny_demo / "labelled", user / "videos", classes=2, clips=1)
    (videos / "broken.mp4").write_bytes(b"no video")
    out = user / "shards"
    code, said, err = call("ingest", videos, "--out", out, "--short-side", 32, "--workers", 1)
    assert (code, err) == (0, "")
    assert "3 files: 2 clips" in said and "1 rejected" in said and "broken.mp4" in said
    again = call("ingest", videos, "--out", out, "--short-side", 32, "--workers", 1)
    assert again[0] == 0 and "3 files: 2 clips" in again[1]


def test_every_recipe_that_comes_along_loads() -> None:
    for name in preset_names():
        assert load_recipe(name).name == name


@pytest.mark.parametrize(
    ("counts", "said"),
    [
        ((95, 5), True),
        ((60, 40), False),
        ((70, 20, 10), True),
        ((50, 30, 20), False),
        ((31, *[8] * 9), True),
        ((25, *[8] * 9), False),
    ],
)
def test_a_class_with_much_of_the_clips_is_told(counts: tuple[int, ...], said: bool) -> None:
    """Features that tell nothing apart may then be as fit as those that do, but by mutual information."""
    lines: list[str] = []
    display: Any = SimpleNamespace(say=lines.append)
    by_class = Counter({str(number): count for number, count in enumerate(counts)})
    _say_if_unequal(display, Recipe(), by_class)
    _say_if_unequal(display, override(Recipe(), ["fitness.metric=nmi"]), by_class)
    assert len(lines) == said
