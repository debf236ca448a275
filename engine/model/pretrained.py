"""Loading pretrained weights into a video network: as they are, or inflated from 2-D to 3D.

Nothing is loaded in part: a state dict fits the network whole, or ValueError says what doesn't.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.model.peers import network_in
from engine.model.resnet3d import DEPTHS, STEM_CHANNELS, ResNet3D, is_bottleneck

CLASSIFIERS = ("fc.", "classifier.", "head.")
COUNTER = "num_batches_tracked"
STEM = "stem.0.weight"


@dataclass(frozen=True)
class LoadReport:
    """What ``load_pretrained`` did with a state dict."""

    loaded: tuple[str, ...]
    """The network's own names that were loaded; batch counters may be absent, nothing else is."""
    ignored: tuple[str, ...]
    """The state dict's names that were left out: a classifier, other networks beside ``rgb.``."""
    inflated: bool
    """Whether 2-D kernels were repeated over time."""
    adapted: bool
    """Whether the stem's kernel was fitted to another number of input channels."""
    prefix: str
    """What stood before every name that was loaded."""


def load_pretrained(network: ResNet3D, state: Mapping[str, Tensor], *, where: str) -> LoadReport:
    """Load a state dict into ``network``, in place, whole or not at all.

    Recognised: this engine's own and torchvision's video networks' (same names: Kinetics weights),
    and image ResNets' (``conv1``, ``bn1``, ``layer1.0.conv1``, ..., as torchvision's for ImageNet),
    whose 2-D kernels are inflated into r3d_* as in Carreira and Zisserman, "Quo Vadis, Action
    Recognition?", Sec. 2.2: repeated over the kernel's frames and divided by their number, so that
    a still video gives the image's activations away from the clip's ends, which are padded with
    zeros. Kernels under those names that are 3D already load
    as they are. A prefix of all of a network's names (``module.``, ``backbone.``) is stripped, and
    what is not under it is ignored, as is a classifier; of several networks ``rgb.`` is taken, else
    the first. MMAction2's 2-D ResNets and sequences of a ResNet's children are known too.

    A stem of 3 channels fits a network of C others: its mean over RGB is repeated, times 3 / C, so
    that an input of equal channels gives the same (grey: the sum over RGB). Dtypes are converted to
    the network's.

    ``where`` names the state dict in messages. Raises ValueError that names the first few keys, and
    what to do, where a key is missing or too many, a shape differs, or the weights are of another
    architecture.
    """
    named, ignored, prefix = _unwrapped(state, where)
    two_d = "conv1.weight" in named
    found = _architecture(named, two_d)
    renamed = {_video_name(key): value for key, value in named.items()} if two_d else named
    inflated = two_d and renamed[STEM].ndim == 4
    if inflated and not network.arch.startswith("r3d_"):
        raise ValueError(
            f"{where}: {found or 'image network'} weights are 2-D and can't be inflated into"
            f" {network.arch}, whose convolutions are factorized; set arch to"
            f" {_video_arch(found)!r}"
        )
    own = network.state_dict()
    hint = _hint(network, found, two_d)
    _check_names(own, renamed, where, hint)
    values = {key: renamed[key] for key in own if key in renamed}
    if inflated:
        values = {key: _inflated(value, own[key]) for key, value in values.items()}
    adapted = values[STEM].ndim == 5 and values[STEM].shape[1] == 3 != network.in_channels
    if adapted:
        share = values[STEM].mean(1, keepdim=True) * (3 / network.in_channels)
        values[STEM] = share.expand(-1, network.in_channels, -1, -1, -1)
    _check_shapes(own, values, where, hint)
    with torch.no_grad():
        for key, value in values.items():
            own[key].copy_(value)
    return LoadReport(tuple(values), tuple(ignored), inflated, adapted, prefix)


def architecture_of(state: Mapping[str, Tensor], *, where: str) -> str:
    """The video architecture that a state dict belongs to, or is inflated into: such as ``r3d_18``.

    Raises ValueError where its names are not those of a ResNet.
    """
    named, _, _ = _unwrapped(state, where)
    found = _architecture(named, "conv1.weight" in named)
    if found is None:
        raise ValueError(f"{where}: these are not the weights of a ResNet that can be loaded")
    return _video_arch(found)


def is_image_network(state: Mapping[str, Tensor], *, where: str) -> bool:
    """Whether a state dict's kernels are an image network's, which are inflated."""
    named, _, _ = _unwrapped(state, where)
    return "conv1.weight" in named and named["conv1.weight"].ndim == 4


def _unwrapped(state: Mapping[str, Tensor], where: str) -> tuple[dict[str, Tensor], list[str], str]:
    """The tensors by torchvision's names, the full names of what is ignored, and what stood before the others'."""
    for full, value in state.items():
        if not isinstance(value, Tensor):
            raise ValueError(
                f"{where}: {full!r} holds a {type(value).__name__}, not a tensor; give the state"
                " dict itself, not the checkpoint around it"
            )
    network = network_in(state, where=where)
    heads = [name for name in network.tensors if name.startswith(CLASSIFIERS)]
    kept = {name: value for name, value in network.tensors.items() if name not in heads}
    ignored = [*network.others, *(network.source[name] for name in heads)]
    return kept, ignored, network.prefix


def _inflated(value: Tensor, like: Tensor) -> Tensor:
    """A 2-D kernel repeated over the frames of ``like`` and divided by their number."""
    if value.ndim != 4:
        return value
    frames = like.shape[2]
    return value.unsqueeze(2).expand(-1, -1, frames, -1, -1) / frames


def _video_name(key: str) -> str:
    """The video networks' name for an image ResNet's: ``conv2.1.bias`` for ``bn2.bias``."""
    key = re.sub(r"^conv1\.", "stem.0.", key)
    key = re.sub(r"^bn1\.", "stem.1.", key)
    key = re.sub(r"^(layer\d\.\d+\.)conv(\d)\.", r"\1conv\2.0.", key)
    return re.sub(r"^(layer\d\.\d+\.)bn(\d)\.", r"\1conv\2.1.", key)


def _architecture(named: Mapping[str, Tensor], two_d: bool) -> str | None:
    """Which network the names belong to, such as ``r2plus1d_18``, ``resnet50``; None if unknown."""
    blocks = {m.groups() for key in named if (m := re.match(r"layer(\d)\.(\d+)\.", key))}
    depths = tuple(sum(stage == str(i) for stage, _ in blocks) for i in range(1, 5))
    bottleneck = any(key.startswith("layer1.0.conv3.") for key in named)
    factorized = "stem.3.weight" in named
    for arch, blocks_per_stage in DEPTHS.items():
        if (blocks_per_stage, is_bottleneck(arch), arch.startswith("r2plus1d")) == (
            depths,
            bottleneck,
            factorized,
        ):
            image = two_d and named["conv1.weight"].ndim == 4
            return arch.replace("r3d_", "resnet") if image else arch
    return None


def _video_arch(found: str | None) -> str:
    return (found or "r3d_18").replace("resnet", "r3d_")


def _hint(network: ResNet3D, found: str | None, two_d: bool) -> str:
    this = (
        f"the network is {network.arch} of {network.in_channels} channels, width {network.width:g}"
    )
    if found is None:
        return f"These are not a ResNet's weights that can be loaded; {this}"
    if _video_arch(found) != network.arch:
        return f"These are {found} weights, {this}; set arch to {_video_arch(found)!r}"
    return (
        f"These are {found} weights, {this}; published weights need width 1"
        f" ({STEM_CHANNELS} channels in the stem), this engine's need the recipe they came with"
    )


def _check_names(
    own: Mapping[str, Tensor], renamed: Mapping[str, Tensor], where: str, hint: str
) -> None:
    missing = [key for key in own if key not in renamed and not key.endswith(COUNTER)]
    if missing:
        raise ValueError(f"{where}: {len(missing)} weights are missing: {_few(missing)}. {hint}")
    extra = [key for key in renamed if key not in own]
    if extra:
        raise ValueError(f"{where}: {len(extra)} weights have no place: {_few(extra)}. {hint}")


def _check_shapes(
    own: Mapping[str, Tensor], values: Mapping[str, Tensor], where: str, hint: str
) -> None:
    wrong = [
        f"{key} is {tuple(value.shape)}, not {tuple(own[key].shape)}"
        for key, value in values.items()
        if value.shape != own[key].shape
    ]
    if wrong:
        raise ValueError(f"{where}: {len(wrong)} weights of other shapes: {_few(wrong)}. {hint}")


def _few(names: Iterable[str], count: int = 3) -> str:
    every = list(names)
    return "; ".join(every[:count]) + ("; ..." if len(every) > count else "")
