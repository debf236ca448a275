"""The RGB network's file: round trips, published state dicts, and files that do not fit."""

from __future__ import annotations

from pathlib import Path

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
    _, card = load_network(tmp_path / "imagenet.pt")
    assert card.arch == "r3d_18" and card.pool and card.mean == IMAGENET_MEAN


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
