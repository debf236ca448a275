"""The doctor: every part has a row, and what is missing comes with what to do."""

from __future__ import annotations

import ctypes

import torch
from click.testing import CliRunner

import kernels
from engine.cli import doctor
from engine.cli.main import main
from engine.data import hardware

PARTS = "device torch DALI nvImageCodec flow k-means Triton kernels".split()


def row(part: str) -> tuple[str, str]:
    ((_, found, path),) = (r for r in doctor.diagnose() if r[0] == part)
    return found, path


def test_every_part_is_told() -> None:
    rows = doctor.diagnose()
    names = [name for name, _, _ in rows]
    assert set(PARTS) <= set(names) and len(set(names)) == len(names)
    assert all(isinstance(cell, str) and cell for r in rows for cell in r)
    assert row("torch")[0] == torch.__version__


def test_a_cpu_takes_the_cpu_paths(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert row("device")[1].startswith("float32") and row("device")[0].startswith("CPU")
    assert row("flow")[1] == "OpenCV's DIS on the CPU"
    assert row("k-means")[1] == "scikit-learn"
    assert "plain PyTorch" in row("Triton")[1]


def pretend_gpu(monkeypatch, *, cudnn: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "A card")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(doctor, "picture_fault", lambda device: "")
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: cudnn)


def unloadable(name: str, *rest: object) -> object:
    raise OSError(f"{name}: cannot open shared object file")


def test_a_gpu_takes_the_gpu_paths(monkeypatch) -> None:
    pretend_gpu(monkeypatch, cudnn=91900)
    monkeypatch.setattr(doctor, "flow_fault", lambda device, size: "")
    assert row("device") == ("A card", "bf16 autocast")
    assert row("torch")[1] == "cuDNN 91900"
    assert row("flow")[1] == "the GPU's flow engine"
    assert row("Triton")[1] == "fused kernels"
    assert row("DALI")[1] == "on the GPU, by its JPEG engines if any"


def test_an_old_cudnn_is_told(monkeypatch) -> None:
    pretend_gpu(monkeypatch, cudnn=91000)
    assert "update to 9.15" in row("torch")[1]


def test_a_container_without_the_flow_engine_is_told_what_to_set(monkeypatch) -> None:
    pretend_gpu(monkeypatch, cudnn=91900)
    monkeypatch.setattr(ctypes, "CDLL", unloadable)
    monkeypatch.setenv("NVIDIA_DRIVER_CAPABILITIES", "compute")
    hardware.flow_fault.cache_clear()
    assert row("flow")[0] == row("video decoder")[0] == "absent"
    assert row("flow")[1].startswith(
        "OpenCV's DIS on the CPU: libnvidia-opticalflow.so.1 is absent"
    )
    for part in ("flow", "video decoder"):
        assert "compute,video,utility (now compute)" in row(part)[1]


def test_a_gpu_that_decodes_no_pictures_is_told(monkeypatch) -> None:
    pretend_gpu(monkeypatch, cudnn=91900)
    monkeypatch.setattr(doctor, "picture_fault", lambda device: "no decoder found")
    assert row("DALI")[1] == "libjpeg-turbo on the CPU: no decoder found"


def test_a_missing_library_says_what_to_install(monkeypatch) -> None:
    monkeypatch.setattr(doctor, "_version", lambda *_: "absent")
    found, path = row("DALI")
    assert found == "absent" and "install the extra cpu, cuda12 or cuda13" in path


def test_a_foreign_kernels_package_is_told(monkeypatch) -> None:
    assert row("kernels") == ("the engine's own", "ready")
    monkeypatch.delattr(kernels, "__engine_kernels__")
    found, path = row("kernels")
    assert found == "hidden" and "pip uninstall kernels" in path


def test_the_command_prints_every_row() -> None:
    result = CliRunner().invoke(main, ["doctor"], env={"COLUMNS": "200"})
    assert result.exit_code == 0 and result.stderr == ""
    assert all(part in result.stdout for part in PARTS)
