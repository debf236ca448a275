"""The RGB network as a file: its weights, and a card that says what they are, what they take and where they come from.

``engine pretrain`` and ``engine evolve`` write such files; published state dicts of video and image ResNets, which
have no card, are read too, and get the card of what they were trained on.
"""

from __future__ import annotations

import argparse
import codecs
import json
import pickle
import re
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from msgspec import Struct
from torch import Tensor

from engine.core.recipe import Model, Recipe
from engine.core.tensors import CheckpointError, load_tensors, save_tensors
from engine.data.views import RGB_MEAN, RGB_STD
from engine.model.peers import state_dict_in
from engine.model.pretrained import LoadReport, architecture_of, is_image_network, load_pretrained
from engine.model.resnet3d import ResNet3D, video_network

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
_SCALAR: Any = np.float64(0).__reduce__()[0]
HARMLESS: list[Any] = [
    argparse.Namespace,
    (_SCALAR, "numpy.core.multiarray.scalar"),
    (_SCALAR, "numpy._core.multiarray.scalar"),
    codecs.encode,
    np.dtype,
    *(type(np.dtype(name)) for name in ("float64", "float32", "int64")),
]
"""What training scripts keep beside their weights, and loads without running code: options and NumPy's numbers."""


class ClipInput(Struct, frozen=True):
    """The clip that a network was trained on: frames, frames between two of them, side in pixels."""

    num_frames: int = 16
    frame_stride: int = 2
    size: int = 112


class Card(Model, frozen=True, kw_only=True, forbid_unknown_fields=False):
    """The contents of a network's file beside its weights: its shape, what it takes and where it comes from."""

    input: ClipInput = ClipInput()
    mean: tuple[float, float, float] = RGB_MEAN
    """Of frames scaled to [0, 1], RGB: clips are normalised by it and ``std`` before they enter."""
    std: tuple[float, float, float] = RGB_STD
    labels_used: bool = False
    """Whether labels had a part in these weights: in choosing the loss, or in training."""
    loss: dict[str, float] | None = None
    """Eq. 1's weights; None for a network that was not trained by them."""
    recipe_hash: str | None = None
    seed: int | None = None
    ema: float = 0.0
    """Decay of the running average over training steps that these weights are; 0: they are the last step's."""
    num_clips: int | None = None
    """Unlabelled clips trained on."""
    git_sha: str | None = None
    versions: dict[str, str] = msgspec.field(default_factory=dict)
    feature_mean: tuple[float, ...] = ()
    """(D,) of the features over training clips; none for networks of other projects."""
    feature_scale: tuple[float, ...] = ()
    """(D,) their standard deviation."""
    source: str = ""
    """The file that it was read from."""


def card_of(recipe: Recipe, **facts: Any) -> Card:
    """The card of a network trained with a recipe; ``facts`` are the card's other fields."""
    clip = ClipInput(recipe.clip.num_frames, recipe.clip.frame_stride, recipe.clip.size)
    return Card(**msgspec.structs.asdict(recipe.model), input=clip, **facts)


def save_network(path: Path, state: Mapping[str, Tensor], card: Card, **facts: Any) -> None:
    """Write an RGB network's weights with its card, and any other facts beside it; whole or not at all."""
    save_tensors(path, state, facts={**msgspec.to_builtins(card), **facts})


def card_text(facts: Mapping[str, Any]) -> str:
    """A card's JSON for a file beside the network: a field a line."""
    lines = (f" {json.dumps(name)}: {json.dumps(value)}" for name, value in facts.items())
    return "{\n" + ",\n".join(lines) + "\n}\n"


def load_network(
    path: Path,
    *,
    device: torch.device | str = "cpu",
    say: Callable[[str], object] = warnings.warn,
) -> tuple[ResNet3D, Card]:
    """The RGB network of a file, in evaluation mode and channels-last, and its card.

    ``path`` is a file of this engine's, a run's folder (its RGB network), or a state dict, in safetensors or by
    ``torch.save``, of a video or image ResNet under torchvision's names: these are taken to be of width 1, and image
    networks are inflated. Such a state dict may lie one level down in the file (``model``, ``state_dict``, ...) and
    its names under a prefix (``module.``, ``backbone.``, ...): ``say`` tells which were taken. Raises CheckpointError
    for a file that is not there, damaged, or does not fit as a whole.
    """
    path = file_in(path)
    content, facts = load_tensors(path) if path.suffix == ".safetensors" else (_pickled(path), {})
    key, tensors, beside = ("", content, ()) if "arch" in facts else state_dict_in(content)
    try:
        card = _card(tensors, facts, path)
        network = video_network(card)
        report = load_pretrained(network, tensors, where=str(path))
    except ValueError as error:
        raise CheckpointError(str(error)) from None
    if key or report.prefix:
        say(_taken(path, key, beside, report))
    network.to(device=device, memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    return network.eval(), card


def _taken(path: Path, key: str, beside: tuple[str, ...], report: LoadReport) -> str:
    """What of a file was loaded, in a line."""
    at = [f"key {key!r}"] * bool(key) + [f"prefix {report.prefix!r}"] * bool(report.prefix)
    text = f"{path}: took the weights at {', '.join(at)}"
    if beside:
        text += f"; there are networks at {', '.join(map(repr, beside))} too"
    if report.ignored:
        text += f"; left out {len(report.ignored)} others, such as {report.ignored[0]}"
    return text


def file_in(path: Path) -> Path:
    """The network's file: ``path`` itself, or the one in a run's folder. Raises CheckpointError where there is none."""
    if not path.is_dir():
        return path
    for name in ("rgb.safetensors", "checkpoints/best.safetensors"):
        if (path / name).is_file():
            return path / name
    raise CheckpointError(f"{path}: no RGB network in this folder; give a run's folder or a file")


def _pickled(path: Path) -> dict[str, Any]:
    try:
        with torch.serialization.safe_globals(HARMLESS):
            state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such checkpoint") from None
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path}: {_unreadable(error)}") from None
    if not isinstance(state, dict):
        raise CheckpointError(f"{path}: holds a {type(state).__name__}, not a state dict")
    return state


def _unreadable(error: Exception) -> str:
    """Why a pickled file can't be read: what is in it beside weights, where that is why."""
    if (other := re.search(r"Unsupported global: GLOBAL (\S+)", str(error))) is not None:
        return (
            f"holds objects ({other[1]}) beside the weights, which are not loaded because they may run code: where"
            " you trust the file, save its state dict alone in a file of its own (torch.save)"
        )
    reason = next(iter(str(error).splitlines()), type(error).__name__)
    return f"not a file of weights that can be read: {reason}"


def _card(tensors: Mapping[str, Tensor], facts: Mapping[str, Any], path: Path) -> Card:
    if "arch" not in facts:
        arch = architecture_of(tensors, where=str(path))
        facts = {"arch": arch, "pool": arch == "r3d_50", "labels_used": True}
        if is_image_network(tensors, where=str(path)):
            facts |= {"pool": True, "mean": IMAGENET_MEAN, "std": IMAGENET_STD}
    try:
        return msgspec.convert({**facts, "source": str(path)}, Card)
    except msgspec.ValidationError as error:
        raise CheckpointError(f"{path}: its card can't be read: {error}") from None
