"""``engine embed`` and ``engine export`` as a user types them: what comes out, and mistakes in one line each."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from engine.cli.main import main
from engine.features import embed, export
from engine.features.parquet import read_features
from engine.model.network_file import Card, ClipInput, save_network
from engine.model.resnet3d import ResNet3D


@pytest.fixture(autouse=True)
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a network, ``run/rgb.safetensors``, and a film, ``films/a.mp4``."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    network = ResNet3D("r3d_18", 3, width=0.125, pool=True)
    card = Card(arch="r3d_18", width=0.125, pool=True, input=ClipInput(4, 2, 32))
    (tmp_path / "run").mkdir()
    save_network(tmp_path / "run" / "rgb.safetensors", network.state_dict(), card)
    return tmp_path


@pytest.fixture
def film(work: Path, tiny_demo: Path) -> Path:
    (work / "films").mkdir()
    shutil.copy(tiny_demo / "unlabelled" / "000.mp4", work / "films" / "a.mp4")
    return work / "films"


def call(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(main, [str(a) for a in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.output
    return result.exit_code, result.stdout, result.stderr


def refused(*arguments: object, code: int = 2) -> str:
    found, out, err = call(*arguments)
    lines = err.splitlines()
    assert found == code and len(lines) == 1 and lines[0].startswith("engine: "), (found, err)
    assert "Traceback" not in out
    return lines[0]


EMBED = ("--checkpoint", "run", "--out", "f.parquet", "--workers", 1, "--device", "cpu")


def test_embed(film: Path) -> None:
    (film / "noise.mp4").write_bytes(b"no video")
    code, out, err = call("embed", film, *EMBED, "--per", "video", "--every", 0.4)
    assert (code, err) == (0, "")
    rows = read_features(Path("f.parquet"))
    assert rows.path == [str(film / "a.mp4")] and rows.vector.shape == (1, 64)
    assert f"rejected {film / 'noise.mp4'}: can't be opened as a video" in out
    assert "1 rows, 1 rejected -> f.parquet" in out and "every 0.4 s" in out
    assert call("embed", film, *EMBED, "--per", "video", "--every", 0.4)[0] == 0
    assert "not with these features" in refused("embed", film, *EMBED)


def test_export(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "_write_torch", lambda *_: (b"program", None))
    code, out, err = call("export", "--checkpoint", "run", "--out", "n.pt2")
    assert (code, err) == (0, "") and "torch, 0.0 MB" in out and out.endswith("-> n.pt2\n")
    assert Path("n.pt2").read_bytes() == b"program" and Path("n.pt2.json").exists()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("embed", *EMBED), "no videos given"),
        (("embed", "films", "--out", "f"), "--checkpoint is missing"),
        (("embed", "films", "--checkpoint", "run"), "--out is missing"),
        (("export", "--out", "n.pt2"), "--checkpoint is missing"),
        (("export", "--checkpoint", "run"), "--out is missing"),
        (("export", "--checkpoint", "run", "--out", "n.tflite"), "is no format: use torch"),
        (
            ("export", "--checkpoint", "run", "--out", "n.pt2", "--format", "caffe"),
            "--format caffe is no format: use torch (.pt2) or onnx (.onnx)",
        ),
    ],
)
def test_what_is_missing_or_unknown(arguments: tuple[object, ...], told: str) -> None:
    assert told in refused(*arguments)


def test_checkpoints_that_are_none(work: Path, film: Path) -> None:
    (work / "text.safetensors").write_text("not weights")
    (work / "empty").mkdir()
    whole = (work / "run" / "rgb.safetensors").read_bytes()
    (work / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    torch.save({"weight": torch.zeros(3)}, work / "linear.pt")
    network = ResNet3D("r3d_18", 3, width=0.125)
    save_network(work / "other.safetensors", network.state_dict(), Card(arch="r2plus1d_18"))
    wrong = {
        "none.safetensors": "no such checkpoint",
        "text.safetensors": "not a readable safetensors file",
        "cut.safetensors": "not a readable safetensors file",
        "empty": "no RGB network in this folder",
        "linear.pt": "not the weights of a ResNet",
        "other.safetensors": "weights are missing",
        "films/a.mp4": "not a file of weights",
    }
    for name, told in wrong.items():
        for command in (("embed", film, "--out", "f.parquet"), ("export", "--out", "n.pt2")):
            line = refused(*command, "--checkpoint", name)
            assert told in line and name in line
    assert not Path("f.parquet").exists() and not list(work.glob(".f*"))


def test_videos_that_are_none(work: Path) -> None:
    (work / "empty").mkdir()
    assert "no videos found in empty" in refused("embed", "empty", *EMBED)
    assert "none does not exist" in refused("embed", "none", *EMBED)
    (work / "list.txt").write_text("none.mp4\n")
    line = refused("embed", "list.txt", *EMBED)
    assert "no videos found in list.txt: none.mp4: there is no such file" in line
    (work / "noise.mp4").write_bytes(b"no video")
    assert "no video gave a row: 1 were rejected; the first, noise.mp4" in refused(
        "embed", "noise.mp4", *EMBED
    )
    assert not list(work.glob(".f*")) and not Path("f.parquet").exists()


def test_outputs_that_can_not_be_written(
    work: Path, film: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (work / "file").touch()
    under = ("--checkpoint", "run", "--out", "file/out.pt2")
    assert "file/out.pt2" in refused("export", *under, code=1)
    assert "file/out.pt2" in refused("embed", film, *under, code=1)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "f.parquet")

    with monkeypatch.context() as patched:
        patched.setattr(embed, "write_part", full)
        assert "No space left on device" in refused("embed", film, *EMBED, code=1)
    assert call("embed", film, *EMBED)[0] == 0  # what was there is used


def test_another_process_is_at_it(work: Path, film: Path) -> None:
    with embed._working_beside(Path("f.parquet")):
        assert "another process is writing it" in refused("embed", film, *EMBED)


def test_an_interrupt_is_one_line(film: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(embed, "write_part", interrupt)
        line = refused("embed", film, *EMBED, code=130)
    assert "interrupted; " in line and "the same command goes on from there" in line


def test_without_the_extra_for_onnx(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "find_spec", lambda name: None)
    line = refused("export", "--checkpoint", "run", "--out", "n.onnx")
    assert "exporting to ONNX needs onnx and onnxscript" in line
    assert "pip install 'evolved-losses[onnx]'" in line
