"""The RGB network's file: round trips, published state dicts, and files that do not fit."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from engine.core.recipe import load_recipe
from engine.core.tensors import CheckpointError, save_tensors
from engine.data.views import RGB_MEAN
from engine.model.network_file import (
    IMAGENET_MEAN,
    Card,
    ClipInput,
    card_of,
    load_network,
    save_network,
)
from engine.model.resnet3d import ResNet3D, video_network

CLIP = torch.randn(2, 3, 4, 32, 32, generator=torch.Generator().manual_seed(1))


def made(arch: str = "r3d_18", width: float = 0.125, *, pool: bool = False) -> ResNet3D:
    torch.manual_seed(0)
    return ResNet3D(arch, 3, width=width, pool=pool).eval()


def saved(path: Path, network: nn.Module, **card: object) -> Path:
    values = {"arch": "r3d_18", "width": 0.125, "input": ClipInput(4, 2, 32), **card}
    save_network(path, network.state_dict(), Card(**values), trial=7)  # type: ignore[arg-type]
    return path


def test_a_saved_network_gives_the_same_features(tmp_path: Path) -> None:
    network = made(pool=True)
    path = saved(tmp_path / "rgb.safetensors", network, pool=True, loss={"rgb/shuffle": 0.5})
    for where in (path, tmp_path):  # the file, or the run's folder that holds it
        loaded, card = load_network(where)
        own, found = network.state_dict(), loaded.state_dict()
        assert all(torch.equal(found[name], own[name]) for name in own) and not loaded.training
        assert torch.allclose(loaded(CLIP), network(CLIP), rtol=1e-4, atol=1e-5)
        assert card.input == ClipInput(4, 2, 32) and card.loss == {"rgb/shuffle": 0.5}
        assert card.source == str(path) and not card.labels_used


def test_strides_and_depths_come_back_from_the_card(tmp_path: Path) -> None:
    recipe = load_recipe("demo")
    torch.manual_seed(0)
    network = video_network(recipe.model).eval()
    path = tmp_path / "rgb.safetensors"
    save_network(path, network.state_dict(), card_of(recipe))
    loaded, card = load_network(path)
    assert card.depths == recipe.model.depths and card.time_strides == recipe.model.time_strides
    for one, other in zip(
        network.forward_features(CLIP), loaded.forward_features(CLIP), strict=True
    ):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("arch", ["r3d_18", "r2plus1d_18"])
def test_a_published_state_dict_is_known_by_its_names(tmp_path: Path, arch: str) -> None:
    network = made(arch, 1.0)
    state = {
        **network.state_dict(),
        "fc.weight": torch.zeros(400, 512),
        "fc.bias": torch.zeros(400),
    }
    torch.save(state, tmp_path / "kinetics.pth")
    loaded, card = load_network(tmp_path / "kinetics.pth")
    assert card.arch == arch and card.labels_used and card.mean == RGB_MEAN
    assert torch.allclose(loaded(CLIP), network(CLIP), rtol=1e-4, atol=1e-5)


def test_an_image_network_is_inflated_and_takes_imagenets_statistics(tmp_path: Path) -> None:
    network = made("r3d_18", 1.0, pool=True)
    names = {"stem.0": "conv1", "stem.1": "bn1"}
    state = {}
    for key, value in network.state_dict().items():
        flat = value[:, :, 0] if value.ndim == 5 else value
        for i in (1, 2):
            key = key.replace(f"conv{i}.0.", f"CONV{i}.").replace(f"conv{i}.1.", f"bn{i}.")
        for ours, theirs in names.items():
            key = key.replace(ours + ".", theirs + ".")
        state[key.replace("CONV", "conv")] = flat
    torch.save({"state_dict": state}, tmp_path / "imagenet.pt")
    _, card = load_network(tmp_path / "imagenet.pt", say=lambda line: None)
    assert card.arch == "r3d_18" and card.pool and card.mean == IMAGENET_MEAN


def published(arch: str = "r3d_18") -> dict[str, torch.Tensor]:
    """A state dict of full size that takes next to no room: every value of a tensor is the same one."""
    generator = torch.Generator().manual_seed(3)
    with torch.device("meta"):
        shapes = ResNet3D(arch, 3).state_dict()
    return {
        key: torch.rand((), generator=generator).expand(value.shape)
        for key, value in shapes.items()
        if not key.endswith("num_batches_tracked")
    }


@pytest.mark.parametrize(
    ("key", "prefix"),
    [
        ("model", "module."),
        ("state_dict", "backbone."),
        ("model_state", ""),
        ("network", "module.encoder."),
        ("student", "encoder."),
    ],
)
def test_weights_one_level_down_and_under_a_prefix_load(
    tmp_path: Path, key: str, prefix: str
) -> None:
    state, path = published(), tmp_path / "theirs.pyth"
    inner = {prefix + name: value for name, value in state.items()}
    inner[f"{prefix}fc.weight"] = torch.zeros(1).expand(400, 512)
    content = {"epoch": 3, key: inner, "optimizer": {"state": {}}, "args": Namespace(lr=0.1)}
    torch.save({**content, "best_acc": np.float64(0.7)}, path)
    said: list[str] = []
    loaded, card = load_network(path, say=said.append)
    assert card.arch == "r3d_18" and card.source == str(path)
    own = loaded.state_dict()
    assert all(torch.equal(own[name], value) for name, value in state.items())
    assert len(said) == 1 and f"key {key!r}" in said[0]
    assert (f"prefix {prefix!r}" in said[0]) == bool(prefix)


def test_a_plain_state_dict_loads_without_a_word(tmp_path: Path) -> None:
    torch.save(published(), tmp_path / "plain.pth")
    said: list[str] = []
    load_network(tmp_path / "plain.pth", say=said.append)
    assert not said


def test_of_two_networks_the_likelier_key_is_taken_and_both_are_named(tmp_path: Path) -> None:
    average = {name: value * 0 for name, value in published().items()}
    torch.save({"model_ema": average, "model": published()}, tmp_path / "two.pth")
    said: list[str] = []
    loaded, _ = load_network(tmp_path / "two.pth", say=said.append)
    assert loaded.stem[0].weight.abs().sum() > 0
    assert "took the weights at key 'model'; there are networks at 'model_ema' too" in said[0]


def test_what_does_not_fit_one_level_down_keeps_its_reason(tmp_path: Path) -> None:
    short = published()
    del short["layer3.0.conv1.0.weight"]
    torch.save({"model": {f"backbone.{k}": v for k, v in short.items()}}, tmp_path / "short.pth")
    with pytest.raises(CheckpointError, match=r"missing: layer3.0.conv1.0.weight"):
        load_network(tmp_path / "short.pth")
    torch.save(
        {"model_state": {"s1.pathway0_stem.conv.weight": torch.zeros(1)}}, tmp_path / "s.pyth"
    )
    with pytest.raises(CheckpointError, match=r"PySlowFast's.*can't be loaded"):
        load_network(tmp_path / "s.pyth")


def test_objects_beside_the_weights_are_named(tmp_path: Path) -> None:
    torch.save({"model": published(), "history": Path("x")}, tmp_path / "objects.pth")
    with pytest.raises(
        CheckpointError, match=r"holds objects \(pathlib.*state dict alone"
    ) as caught:
        load_network(tmp_path / "objects.pth")
    assert "\n" not in str(caught.value)


def test_what_does_not_fit_is_one_line(tmp_path: Path) -> None:
    network = made()
    path = saved(tmp_path / "a.safetensors", network)
    whole = path.read_bytes()
    short = dict(list(network.state_dict().items())[2:])
    save_tensors(tmp_path / "short.safetensors", short, facts={"arch": "r3d_18", "width": 0.125})
    extra = {**network.state_dict(), "layer5.weight": torch.zeros(2)}
    save_tensors(tmp_path / "extra.safetensors", extra, facts={"arch": "r3d_18", "width": 0.125})
    saved(tmp_path / "other.safetensors", network, arch="r3d_34")
    saved(tmp_path / "odd.safetensors", network, width="wide")
    (tmp_path / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.pth").write_text("not weights")
    torch.save([1, 2], tmp_path / "list.pth")
    (tmp_path / "empty").mkdir()
    wrong = {
        "none.safetensors": "no such checkpoint",
        "none.pth": "no such checkpoint",
        "short.safetensors": "missing",
        "extra.safetensors": "have no place: layer5.weight",
        "other.safetensors": "r3d_34",
        "odd.safetensors": "card",
        "cut.safetensors": "not a readable safetensors",
        "text.pth": "not a file of weights",
        "list.pth": "not a state dict",
        "empty": "no RGB network in this folder",
    }
    for name, reason in wrong.items():
        with pytest.raises(CheckpointError, match=reason) as caught:
            load_network(tmp_path / name)
        assert name in str(caught.value) and "\n" not in str(caught.value)
