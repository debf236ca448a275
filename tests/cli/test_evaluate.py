"""``engine evaluate`` and ``engine finetune``: what they print and write, and one line for what is wrong."""

from __future__ import annotations

import csv
import gc
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from engine.cli.main import main
from engine.core.tensors import load_tensors, save_tensors
from tests.labelled import make_lists, save

TINY = Path(__file__).parents[1] / "evaluate" / "finetune_tiny.toml"
FEW = (
    "--set",
    "evaluation.views=1",
    "--set",
    "evaluation.kmeans_seeds=2",
    "--set",
    "evaluation.kmeans_init=2",
)
STEPS = ("--set", "optim.steps=3", "--set", "optim.warmup_steps=1", "--set", "finetune.views=1")


@pytest.fixture(autouse=True, scope="module")
def user(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A working folder and a cache of these tests' own."""
    root = tmp_path_factory.mktemp("cli")
    (root / "work").mkdir()
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root / "work")
        patch.setenv("XDG_CACHE_HOME", str(root / "cache"))
        yield root / "work"
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="module")
def net(user: Path) -> Path:
    return save(user / "net.safetensors")


def call(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(main, [str(a) for a in arguments])
    told = result.exit_code, result.stdout, result.stderr
    assert result.exception is None or isinstance(result.exception, SystemExit), told
    return told


def refused(*arguments: object) -> str:
    code, out, err = call(*arguments)
    lines = err.splitlines()
    assert code == 2 and len(lines) == 1 and lines[0].startswith("engine: "), (code, out, err)
    return lines[0]


def on(colours: Path, net: Path, *more: object) -> tuple[object, ...]:
    return ("--checkpoint", net, "--dataset", "ucf101", "--root", colours, "--device", "cpu", *more)


def test_evaluate_from_the_folder_as_it_unpacks(colours: Path, net: Path, user: Path) -> None:
    out_path = user / "rows.jsonl"
    code, out, err = call(
        "evaluate", *on(colours, net, *FEW, "--baselines", "--json", out_path, "--seeds", 2)
    )
    assert (code, err) == (0, "")
    assert out.count("ucf101: 3 official splits, 1 view of 4x32x32 stride 2") == 3
    assert out.count("labels not used before") == 3
    for name in ("test_v_measure", "assigned_accuracy", "video_top5", "r@50", "ridge on the mean"):
        assert name in out
    rows = [json.loads(line) for line in out_path.read_text().splitlines()]
    assert [row["protocol"] for row in rows] == ["kmeans", "linear", "retrieval"]
    assert [len(row["baselines"]) for row in rows] == [2, 6, 2]
    (path,) = user.glob("rows-*-confusion.csv")
    table = list(csv.reader(path.open()))
    assert table[0] == ["class", *rows[1]["classes"]] and sum(map(int, table[1][1:])) == 24
    assert [list(map(int, row[1:])) for row in table[1:]] == rows[1]["confusion"]


def test_evaluate_several_networks_with_folders(colours: Path, net: Path, user: Path) -> None:
    other = save(user / "other.safetensors", seed=1)
    args = ("--checkpoint", net, "--checkpoint", other, "--dataset", "folders", *FEW)
    where = ("--root", colours / "UCF-101", "--group-pattern", r"_g(\d+)", "--protocol", "linear")
    code, out, err = call("evaluate", *args, *where, "--device", "cpu")
    assert (code, err) == (0, "")
    assert out.count("leave one group out, 6 folds") == 2
    assert "labels: 60 clips of 5 classes, 12 each: " in out
    assert "groups: 6: 01, 02, 03, 04, 05, 06\n" in out
    assert f"checkpoint: {net}" in out and f"checkpoint: {other}" in out


def test_class_folders_need_no_name(colours: Path, net: Path) -> None:
    args = ("--checkpoint", net, "--group-pattern", r"_g(\d+)", "--device", "cpu")
    classes = ("--root", colours / "UCF-101")
    code, out, err = call("evaluate", *args, *classes, *FEW, "--protocol", "linear", "--seed", 3)
    assert (code, err) == (0, "") and "folders: leave one group out, 6 folds" in out
    assert "--dataset is missing" in refused("evaluate", *args, "--root", colours)
    assert "--dataset is missing" in refused("evaluate", *args)
    line = refused("finetune", "ucf101", *args, *classes, "--dataset", "folders")
    assert "is for ucf101, not for folders" in line
    assert "folders has 5" in refused(
        "finetune", TINY, *args, *classes, "--set", "finetune.num_classes=9"
    )


def test_both_commands_take_a_data_set_or_class_folders_alike(
    colours: Path, net: Path, user: Path
) -> None:
    rows = user / "tuned.jsonl"
    own = ("--checkpoint", net, "--device", "cpu", "--baselines", "--json", rows)
    lists = ("ucf101", "--root", colours, *own)
    code, out, err = call("evaluate", *lists, *FEW, "--protocol", "linear")
    assert (code, err) == (0, "") and "ucf101: 3 official splits" in out
    few = (*STEPS, "--set", "finetune.crops=1", "--set", "optim.batch_size=4")
    folders = ("--root", colours / "UCF-101", "--group-pattern", r"_g0?(\d)")
    code, out, err = call("finetune", *folders, *own, *few, "--run", user / "folders")
    assert (code, err) == (
        0,
        "",
    ) and "4x32x32 stride 2" in out  # clips as the network was trained on
    assert "ridge on the mean 16x16 frame" in out
    found = [json.loads(line) for line in rows.read_text().splitlines()]
    assert [row["protocol"] for row in found] == ["linear", "finetune"]
    assert all(len(row["baselines"]) == 6 for row in found)
    assert "--checkpoint is missing" in refused("evaluate", "ucf101", "--root", colours)


def test_finetune_and_resume(colours: Path, net: Path, user: Path) -> None:
    run = user / "tuned"
    args = (TINY, *on(colours, net, *STEPS, "--run", run))
    code, out, err = call("finetune", *args)
    assert (code, err) == (0, "") and out.count("% of 20 videos") == 3
    found = json.loads((run / "results.json").read_text())
    assert found["metrics"]["video_top1"]["n"] == 3 and (run / "confusion.csv").exists()
    assert any((run / "tensorboard").rglob("events*")) and (run / "log.txt").exists()
    assert json.loads(call("runs", run, "--json")[1])["state"] == "finished"
    (run / "folds" / "split3-seed0.json").unlink()
    (run / "results.json").unlink()
    assert json.loads(call("runs", run, "--json")[1])["state"] == "interrupted"
    code, out, err = call("finetune", "--resume", "--run", run, "--device", "cpu")
    assert (code, err) == (0, "") and "split3-seed0: going on from step 3" in out
    assert json.loads((run / "results.json").read_text())["folds"] == found["folds"]
    assert "holds a run already" in refused("finetune", *args)
    other = save(user / "again.safetensors", seed=2)
    line = refused("finetune", "--resume", "--run", run, "--checkpoint", other)
    assert "began with" in line and "again.safetensors" in line
    line = refused("finetune", "--resume", "--run", run, "--group-pattern", "^x")
    assert "began with no --group-pattern, not ^x; resume without --group-pattern" in line
    assert "began with --dataset ucf101, not hmdb51" in refused(
        "finetune", "--resume", "--run", run, "--dataset", "hmdb51"
    )
    code, out, err = call("finetune", "--resume", "--run", run, "--seeds", 2, "--device", "cpu")
    assert (code, err) == (0, "")
    seeds = [fold["seed"] for fold in json.loads((run / "results.json").read_text())["folds"]]
    assert seeds == [0, 0, 0, 1, 1, 1]
    noted = json.loads((run / "finetune.json").read_text())
    for key, changed in (
        ("checkpoint", "/gone.safetensors"),
        ("data", {**noted["data"], "root": ["/gone"]}),
    ):
        (run / "finetune.json").write_text(json.dumps({**noted, key: changed}))
        gc.collect()  # the last one's traceback holds the run, and the run its lock
        line = refused("finetune", "--resume", "--run", run)
        assert "the run began with /gone" in line and ("--root" in line) == (key == "data")


def test_finetune_with_the_layer_alone_and_from_scratch(
    colours: Path, net: Path, user: Path
) -> None:
    args = on(colours, net, *STEPS, "--set", "finetune.protocol=linear", "--run", user / "layer")
    code, out, err = call("finetune", TINY, *args)
    assert (code, err) == (0, "") and "one layer on standardised views" in out
    assert json.loads((user / "layer" / "results.json").read_text())["protocol"] == "linear"
    scratch = ("--dataset", "ucf101", "--root", colours, "--set", "finetune.init=scratch", *STEPS)
    code, out, err = call("finetune", TINY, *scratch, "--run", user / "none", "--device", "cpu")
    assert (code, err) == (0, "") and "from scratch" in out


def test_half_the_files_missing(colours: Path, net: Path, user: Path) -> None:
    for label in ("Archery", "Biking", "Diving"):
        shutil.copytree(colours / "UCF-101" / label, user / "half" / "UCF-101" / label)
    make_lists(user / "half" / "ucfTrainTestlist")
    line = refused("evaluate", *on(user / "half", net, *FEW))
    assert "24 of 60 listed videos are missing" in line and "--allow-missing" in line
    args = on(user / "half", net, *FEW, "--protocol", "linear", "--allow-missing")
    code, out, err = call("evaluate", *args)
    assert (code, err) == (0, "") and out.count("incomplete: 36 of 60 videos") == 2


def test_what_is_wrong_with_a_checkpoint_is_one_line(colours: Path, net: Path, user: Path) -> None:
    state, facts = load_tensors(net)
    missing = {n: t for n, t in state.items() if n != "layer2.0.conv1.0.weight"}
    for name, tensors, told in (
        ("missing", missing, facts),
        ("extra", {**state, "layer9.weight": torch.zeros(2)}, facts),
        ("wider", state, {**facts, "width": 0.25}),
        ("deeper", state, {**facts, "arch": "r3d_34"}),
        ("text", {"bert.embeddings": torch.zeros(2)}, {}),
    ):
        save_tensors(user / f"{name}.safetensors", tensors, facts=told)
    (user / "corrupt.safetensors").write_bytes(net.read_bytes()[:5000])
    for name, reason in {
        "missing": "1 weights are missing: layer2.0.conv1.0.weight",
        "extra": "1 weights have no place: layer9.weight",
        "wider": "weights of other shapes",
        "deeper": "weights are missing",
        "text": "not the weights of a ResNet",
        "corrupt": "not a readable safetensors file",
        "none": "no such checkpoint",
    }.items():
        path = user / f"{name}.safetensors"
        assert reason in refused("evaluate", *on(colours, path)), name
        assert reason in refused("finetune", TINY, *on(colours, path, "--run", user / "r")), name
        assert not (user / "r").exists()


def test_what_is_wrong_with_a_recipe_is_one_line(colours: Path, net: Path, user: Path) -> None:
    run = ("--run", user / "r", "--device", "cpu")
    given = ("--root", colours, "--checkpoint", net, *run)
    for arguments, reason in (
        (("ucf101", *given), "is for 101 classes, and ucf101 has 5"),
        (("ucf101_linear", *given), "is for 101 classes, and ucf101 has 5"),
        (("hmdb51", *given, "--dataset", "ucf101"), "is for hmdb51, not for ucf101"),
        (
            ("ucf101_linear", "--root", colours / "UCF-101", *given[2:]),
            "is for 101 classes, and ucf101 has 5",
        ),
        (("ucf101_fine", *given), "did you mean 'ucf101_finetune'"),
        ((TINY, *given), "names no data set: give --dataset"),
        ((), "name a file or one of hmdb51_finetune, hmdb51_linear, ucf101_finetune"),
        (("ucf101", "--root", colours, *run), "--checkpoint is missing"),
        (("ucf101", "--checkpoint", net, *run), "--root is missing"),
        (("ucf101", *given, "--set", "finetune.dropuot=0.1"), "did you mean finetune.dropout"),
        (("ucf101", *given, "--set", "evaluation.crops=2"), "evaluation.crops"),
    ):
        assert reason in refused("finetune", *arguments), reason
        assert not (user / "r").exists()
