"""``engine reproduce`` end to end at a tiny scale: kills, failing rows, held-out clips, wrong use."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from engine.cli.main import main
from engine.core.display import Display
from engine.core.run import RunFolder
from engine.core.runtime import choose_runtime
from engine.core.tensors import load_tensors
from engine.data.library import open_library
from engine.data.views import Views
from engine.evaluate.datasets import Dataset, open_dataset
from engine.evaluate.paper import judging, run, training
from engine.evaluate.paper.rows import Column, Inputs
from engine.evaluate.paper.scale import load_scale
from engine.objective.lossfile import load_loss
from engine.train.member import Member
from engine.train.trainer import Trainer

TINY = Path(__file__).with_name("tiny.toml")
GROUPS = ("--folds", "group", "--group-pattern", r"^\d+")


def reproduce(shards: Path, where: Path, table: str, *more: object) -> tuple[int, str, str]:
    """Run the command: exit code, stdout, stderr."""
    data = ("--videos", shards / "unlabelled", "--root", shards / "labelled", *GROUPS)
    arguments = (table, "--scale", TINY, *data, "--run", where, "--device", "cpu", *more)
    result = CliRunner().invoke(main, ["reproduce", *map(str, arguments)])
    told = result.exit_code, result.stdout, result.stderr
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exc_info
    del result
    gc.collect()  # the traceback holds the run, and the run its lock
    return told


def one_line(told: tuple[int, str, str], *, code: int) -> str:
    assert told[0] == code, told
    lines = told[2].splitlines()
    assert len(lines) == 1 and lines[0].startswith("engine: "), told[2]
    return lines[0]


TWO = ("--rows", "scratch,rgb_to_flow")


@pytest.fixture(scope="module")
def finished(tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("runs") / "finished"
    code, out, err = reproduce(tiny_shards, where, "table1", *TWO)
    assert (code, err) == (0, ""), (out, err)
    assert "8 of 8 cells to do, 2 networks to train" in out and "RGB to flow" in out
    return where


def interrupt(patched: pytest.MonkeyPatch, place: str, *, step: int) -> None:
    """Raise KeyboardInterrupt at a training step, or at the second network that is fine-tuned."""
    original, tune, tuned = Trainer.step, judging.Finetuning, []

    def stepped(self: Trainer, member: Member, views: Views) -> float:
        if member.step == step:
            raise KeyboardInterrupt
        return original(self, member, views)

    def once(*args: object, **more: object) -> object:
        tuned.append(args)
        if len(tuned) == 2:
            raise KeyboardInterrupt
        return tune(*args, **more)  # type: ignore[arg-type]

    if place == "training":
        patched.setattr(Trainer, "step", stepped)
    else:
        patched.setattr(judging, "Finetuning", once)


@pytest.mark.parametrize("place", ["training", "fine-tuning"])
def test_a_killed_run_goes_on_to_the_same_table(
    finished: Path, tiny_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    with monkeypatch.context() as patched:
        interrupt(patched, place, step=2)
        told = reproduce(tiny_shards, tmp_path / "run", "table1", *TWO)
    assert "interrupted" in one_line(told, code=130)
    assert not (tmp_path / "run" / "table1.csv").exists()
    code, out, _ = reproduce(tiny_shards, tmp_path / "run", "table1", *TWO)
    assert code == 0
    left = {"training": "8 of 8 cells to do, 1 networks", "fine-tuning": "1 of 8 cells to do, 0"}
    assert left[place] in out
    for name in ("table1.csv", "table1.md"):
        assert (tmp_path / "run" / name).read_text() == (finished / name).read_text()
    assert (
        "0 of 8 cells to do, 0 networks"
        in reproduce(tiny_shards, tmp_path / "run", "table1", *TWO)[1]
    )


def test_training_goes_on_from_a_checkpoint(
    finished: Path, tiny_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = ("--rows", "rgb_to_flow", "--protocols", "kmeans", "--set", "checkpoint_every=2")
    with monkeypatch.context() as patched:
        interrupt(patched, "training", step=3)
        assert reproduce(tiny_shards, tmp_path / "run", "table1", *more)[0] == 130
    code, out, _ = reproduce(tiny_shards, tmp_path / "run", "table1", *more)
    assert code == 0 and "going on from step 2" in out
    name = "networks/rgb_to_flow/0.safetensors"
    expected, card = load_tensors(finished / name)
    found, _ = load_tensors(tmp_path / "run" / name)
    assert all(torch.equal(expected[key], found[key]) for key in expected)
    assert card["loss"] == load_loss("rgb_to_flow") and card["labels_used"] is False
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


def test_cells_say_where_their_numbers_come_from(finished: Path) -> None:
    told = json.loads((finished / "cells/rgb_to_flow/0/linear-unseen.json").read_text())
    assert told["labels_used"] is False and told["protocol"] == "linear"
    assert "test on 1 groups that no training saw" in told["protocol_string"]
    assert [(f["train"], f["test"]) for f in told["folds"]] == [(16, 8)]
    assert 0 <= told["value"] <= 1 and told["provenance"]["versions"]["torch"]
    assert told["num_clips"] == 8 + 16
    assert json.loads((finished / "cells/scratch/0/kmeans.json").read_text())["num_clips"] == 0


def test_a_failing_row_is_shown_and_ends_nothing(tiny_shards: Path, tmp_path: Path) -> None:
    (tmp_path / "none.toml").write_text('[weights]\n"rgb/shuffle" = 0.0\n')
    more = ("--loss", f"bad={tmp_path / 'none.toml'}", "--rows", "bad,rgb_to_flow")
    columns = ("--protocols", "kmeans")
    code, out, _ = reproduce(tiny_shards, tmp_path / "run", "table1", *more, *columns)
    assert code == 0
    assert "1 of 1 failed: training failed: the loss has no weight above 0" in out
    lines = (tmp_path / "run" / "table1.csv").read_text().splitlines()
    assert any(line.startswith("table1,tiny,rgb_to_flow") and ",1,31.5," in line for line in lines)
    again = reproduce(tiny_shards, tmp_path / "run", "table1", *more, *columns)
    assert "0 of 2 cells to do" in again[1]
    retried = (*more, *columns, "--retry-failed")
    assert (
        "1 of 2 cells to do, 1 networks"
        in reproduce(tiny_shards, tmp_path / "run", "table1", *retried)[1]
    )


def test_a_network_that_can_not_be_used_is_its_row_s_alone(
    tiny_shards: Path, tmp_path: Path
) -> None:
    (tmp_path / "bad.pt").write_bytes(b"nothing")
    more = ("--imagenet", tmp_path / "bad.pt", "--rows", "imagenet,scratch")
    code, out, _ = reproduce(
        tiny_shards, tmp_path / "run", "table1", *more, "--protocols", "kmeans"
    )
    assert code == 0 and "bad.pt" in out and "1 of 1 failed" in out
    assert "value" in json.loads((tmp_path / "run/cells/scratch/0/kmeans.json").read_text())


@pytest.mark.parametrize(("table", "cells"), [("fig4", 4), ("fig5", 4)])
def test_figures_have_all_their_points(
    tiny_shards: Path, tmp_path: Path, table: str, cells: int
) -> None:
    code, _, err = reproduce(tiny_shards, tmp_path / "run", table, "--loss", "rgb_to_flow")
    assert (code, err) == (0, "")
    told = json.loads((tmp_path / "run" / f"{table}.json").read_text())
    found = {row["row"]: next(iter(row["cells"].values())) for row in told["rows"]}
    assert len(found) == cells and all(cell["n"] == 1 for cell in found.values())
    assert (tmp_path / "run" / f"{table}.svg").read_text().startswith("<svg")
    if table == "fig4":
        assert (
            found["evolved-50"]["train_videos"] == 8 and found["evolved-100"]["train_videos"] == 16
        )
    else:
        assert found["iterations-100"] == found["epochs-100"]
        _, card = load_tensors(tmp_path / "run/networks/epochs-50/0.safetensors")
        assert card["num_clips"] == 12


def test_a_dry_run_lists_what_is_left(finished: Path, tiny_shards: Path, tmp_path: Path) -> None:
    asked = ("table1", *TWO, "--seeds", "0,1", "--dry-run")
    code, out, _ = reproduce(tiny_shards, finished, *asked)
    assert code == 0 and "8 of 16 cells done" in out
    assert "train  rgb_to_flow, seed 1  about" in out and "to do: about" in out
    assert "judge  scratch, seed 1, linear-unseen  about" in out and "seed 0" not in out
    assert "no estimate yet" in reproduce(tiny_shards, tmp_path / "new", *asked)[1]
    assert not (tmp_path / "new").exists()


def wrong(*more: object) -> Callable[[Path, Path], tuple[int, str, str]]:
    return lambda shards, where: reproduce(shards, where, "table1", *more)


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (wrong("--rows", "scrach"), "--rows scrach: unknown"),
        (wrong("--seeds", "a"), "whole numbers"),
        (wrong("--set", "seen_groups=3"), "none is left to test on"),
        (
            wrong("--set", "pretrain.optim.stepz=3"),
            "pretrain: unknown key optim.stepz; did you mean optim.steps",
        ),
        (wrong("--set", "seeen=3"), "unknown field `seeen`"),
        (wrong("--loss", "nothing"), "neither a file nor a preset"),
        (wrong("--loss", "scratch=equal"), "of its own"),
    ],
)
def test_wrong_use_is_one_line(
    tiny_shards: Path, tmp_path: Path, command: Callable[..., tuple[int, str, str]], said: str
) -> None:
    line = one_line(command(tiny_shards, tmp_path / "run"), code=2)
    assert said in line and not (tmp_path / "run").exists()


def test_a_run_goes_on_with_what_it_began(finished: Path, tiny_shards: Path) -> None:
    line = one_line(reproduce(tiny_shards, finished, "table1", "--set", "seen_groups=1"), code=2)
    assert "began with another seen_groups" in line
    other = ("--set", "pretrain.optim.steps=5")
    assert "was made with recipe" in one_line(
        reproduce(tiny_shards, finished, "table1", *other), code=2
    )
    assert "began with another table" in one_line(reproduce(tiny_shards, finished, "fig4"), code=2)


def test_the_same_folder_is_not_both(tiny_shards: Path, tmp_path: Path) -> None:
    folder = ("--videos", tiny_shards / "labelled")
    line = one_line(reproduce(tiny_shards, tmp_path / "run", "table1", *folder), code=2)
    assert "share videos" in line


@pytest.fixture
def labelled(tiny_shards: Path, tmp_path: Path) -> Dataset:
    return open_dataset(
        tiny_shards / "labelled",
        name="folders",
        folds="group",
        group_pattern=r"^\d+",
        cache=tmp_path,
        report=lambda *told: None,
    )


def test_no_clip_of_an_unseen_group_is_trained_on(
    tiny_shards: Path, labelled: Dataset, tmp_path: Path
) -> None:
    scale = load_scale(TINY)
    library = open_library([tiny_shards / "unlabelled"], cache=tmp_path, report=lambda *told: None)
    todo = run.Reproduction(
        "table1",
        scale,
        Inputs(),
        library,
        [labelled],
        RunFolder.create(tmp_path / "run", scale.pretrain),
        choose_runtime("cpu"),
        Display(),
    )
    index = todo._unlabelled()
    sources = [index.facts(i)["source"] for i in range(len(index))]
    names = [s.rsplit("/", 1)[-1] for s in sources if "/" in s]
    assert len(index) == 24 and sorted(names) == sorted(["000.mp4", "001.mp4"] * 8)
    unseen = judging.dataset_for(Column("linear-unseen", "", "linear", 0, True), labelled, scale)
    (fold,) = unseen.folds
    tested = {labelled.index.facts(int(i))["source"] for i in fold.test}
    assert len(tested) == 8 and not tested & set(sources)
    assert not set(fold.train.tolist()) & set(fold.test.tolist())


def test_fewer_labels_are_spread_over_classes(labelled: Dataset) -> None:
    half = judging.with_fewer_labels(labelled, 0.5, seed=1)
    for fold, whole in zip(half.folds, labelled.folds, strict=True):
        assert np.array_equal(fold.test, whole.test)
        assert set(fold.train) <= set(whole.train)
        assert np.bincount(labelled.label[fold.train]).tolist() == [1] * 8
    other = judging.with_fewer_labels(labelled, 0.5, seed=2)
    assert any(
        not np.array_equal(a.train, b.train) for a, b in zip(half.folds, other.folds, strict=True)
    )
    assert "50 % of the train labels" in half.folds_by


def test_whether_labels_chose_a_loss(tmp_path: Path) -> None:
    assert not training.labels_chose("sec4") and not training.labels_chose("random:3")
    (tmp_path / "best.toml").write_text('[weights]\n"rgb/to_flow" = 1.0\n')
    assert training.labels_chose(str(tmp_path / "best.toml"))
    (tmp_path / "recipe.toml").write_text('[fitness]\nmetric = "nmi"\n')
    assert training.labels_chose(str(tmp_path / "best.toml"))
