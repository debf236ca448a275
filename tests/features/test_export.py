"""Exported networks against the engine's own features: by torch's and by ONNX Runtime's reading of the files."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from sklearn.preprocessing import normalize

import kernels
from engine.api import embed_clips
from engine.features import export as export_module
from engine.features.export import export
from engine.model.network_file import IMAGENET_MEAN, IMAGENET_STD, Card, ClipInput
from engine.model.resnet3d import ResNet3D

NETWORKS = [("r2plus1d_18", True)]
"""r3d_18 without its pool is exported with its features read out."""


def made(arch: str, *, pool: bool, **card: Any) -> tuple[ResNet3D, Card]:
    """A narrow network whose batch norm has seen some clips, of statistics that are not the defaults'."""
    torch.manual_seed(0)
    network = ResNet3D(arch, 3, width=0.125, pool=pool).train()
    with torch.no_grad():
        for _ in range(3):
            network(torch.randn(4, 3, 8, 32, 32))
    # several rows and columns are left in the last stage, so that their number stays free in torch
    facts = {
        "input": ClipInput(8, 2, 64 if pool else 32),
        "mean": IMAGENET_MEAN,
        "std": IMAGENET_STD,
        **card,
    }
    return network.eval(), Card(arch=arch, width=0.125, pool=pool, **facts)


def frames(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, (*shape, 3), dtype=torch.uint8)


def wanted(network: ResNet3D, card: Card, clips: torch.Tensor) -> np.ndarray[Any, Any]:
    """As the engine does it: its own kernel, then the network."""
    rgb, _ = kernels.clip_views(clips, torch.tensor(card.mean), torch.tensor(card.std))
    with torch.no_grad():
        return network(rgb).numpy()


@pytest.mark.parametrize(("arch", "pool"), NETWORKS)
def test_onnx_runtime_gives_the_engines_features(tmp_path: Path, arch: str, pool: bool) -> None:
    network, card = made(arch, pool=pool, loss={"rgb/shuffle": 0.5})
    out = tmp_path / "new" / "network.onnx"
    report = export(network, card, out=out)
    assert report.format == "onnx" and report.difference is not None and report.difference < 1e-4
    assert sorted(p.name for p in out.parent.iterdir()) == ["network.onnx", "network.onnx.json"]
    session = onnxruntime.InferenceSession(out)
    (entry,) = session.get_inputs()
    assert (entry.name, entry.type, entry.shape[4]) == ("frames", "tensor(uint8)", 3)
    side = card.input.size
    sizes = [(n, 8, side, side) for n in (1, 2, 7)] + [(3, 16, 64, 96), (2, 5, 33, 41)]
    for size in sizes:
        clips = frames(*size)
        (found,) = session.run(["features"], {"frames": clips.numpy()})
        assert found.dtype == np.float32 and found.shape == (size[0], network.feature_dim)
        np.testing.assert_allclose(found, wanted(network, card, clips), atol=1e-4, rtol=0)
    onnx.checker.check_model(onnx.load(out), full_check=True)
    told = json.loads(session.get_modelmeta().custom_metadata_map["card"])
    assert told == json.loads(Path(f"{out}.json").read_text())
    assert (
        told["arch"] == arch and told["loss"] == {"rgb/shuffle": 0.5} and told["format"] == "onnx"
    )


@pytest.mark.parametrize(("arch", "pool"), NETWORKS)
def test_a_torch_program_gives_the_engines_features(tmp_path: Path, arch: str, pool: bool) -> None:
    network, card = made(arch, pool=pool)
    out = tmp_path / "network.pt2"
    report = export(network, card, out=out)
    assert report.format == "torch" and report.difference is not None and report.difference < 1e-4
    extra = {"card.json": ""}
    program = torch.export.load(io.BytesIO(out.read_bytes()), extra_files=extra).module()
    side = card.input.size
    for size in [*((n, 8, side, side) for n in (1, 2, 7)), (3, 6, 64, 96)]:
        clips = frames(*size)
        with torch.no_grad():
            found = program(clips).numpy()
        np.testing.assert_allclose(found, wanted(network, card, clips), atol=1e-4, rtol=0)
    told = json.loads(extra["card.json"])
    assert told == json.loads(Path(f"{out}.json").read_text()) and told["mean"][0] == 0.485


@pytest.mark.parametrize(("name", "how"), [("network.onnx", "unit"), ("network.pt2", "zscore")])
def test_exports_read_out_as_the_engine_does_and_name_their_axes(
    tmp_path: Path, name: str, how: Any
) -> None:
    rng = np.random.default_rng(0)
    mean, scale = (tuple(rng.uniform(0.1, 1, 64).astype(np.float32).tolist()) for _ in range(2))
    network, card = made("r3d_18", pool=False, feature_mean=mean, feature_scale=scale)
    out, clips = tmp_path / name, frames(3, 8, 32, 32)
    report = export(network, card, out=out, readout=how)
    assert report.difference is not None and report.difference < 1e-4
    if report.format == "onnx":
        session = onnxruntime.InferenceSession(out)
        (entry,), (result,) = session.get_inputs(), session.get_outputs()
        assert entry.shape == ["clips", "frames", "height", "width", 3]
        assert result.shape == ["clips", 64]
        (found,) = session.run(["features"], {"frames": clips.numpy()})
    else:
        with torch.no_grad():
            found = torch.export.load(out).module()(clips).numpy()
    expected = embed_clips(network, card, clips, readout=how)
    assert found.dtype == expected.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=0)
    raw = wanted(network, card, clips) - np.float64(mean)
    by_hand = normalize(raw) if how == "unit" else raw / np.float64(scale)
    np.testing.assert_allclose(expected, by_hand, rtol=1e-5, atol=1e-6)
    facts = json.loads(Path(f"{out}.json").read_text())
    assert facts["readout"] == how and "(clips, frames, height, width, 3)" in facts["frames"]
    with pytest.raises(ValueError, match=f"use read-out raw instead of {how}"):
        export(*made("r3d_18", pool=False), out=out, readout=how)


def test_a_network_that_computes_something_else_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network, card = made("r3d_18", pool=True)
    write = export_module._write_torch

    def wrong(*arguments: Any) -> tuple[bytes, Any]:
        data, run = write(*arguments)
        return data, lambda clips: run(clips) + 1e-2

    monkeypatch.setattr(export_module, "_write_torch", wrong)
    with pytest.raises(RuntimeError, match=r"differs from the engine's by 0\.01"):
        export(network, card, out=tmp_path / "n.pt2")
    assert not os.listdir(tmp_path)


def test_what_can_not_be_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network, card = made("r3d_18", pool=True)
    with pytest.raises(ValueError, match=r"--format tflite is no format: use torch \(\.pt2\)"):
        export(network, card, out=tmp_path / "n.pt2", format="tflite")
    with pytest.raises(ValueError, match="by its suffix, is no format"):
        export(network, card, out=tmp_path / "n.bin")
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="can't write there"):
        export(network, card, out=tmp_path / "file" / "n.pt2")
    find = export_module.find_spec
    monkeypatch.setattr(
        export_module, "find_spec", lambda name: None if name == "onnxscript" else find(name)
    )
    with pytest.raises(ValueError, match=r"needs onnxscript: pip install 'evolved-losses\[onnx\]'"):
        export(network, card, out=tmp_path / "n.onnx")
    monkeypatch.setattr(export_module, "_write_torch", lambda *_: (b"not run", None))
    assert export(network, card, out=tmp_path / "n.pt2").difference is None
