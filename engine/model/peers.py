"""State dicts as other projects keep them: one level down, under a prefix, under names of their own.

What is found here has torchvision's names; ``engine.model.pretrained`` loads it. Networks whose layers this engine
does not have are refused by name, since their weights would fit nowhere.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

KEYS = ("model", "state_dict", "model_state", "model_state_dict", "network")
"""Where checkpoints keep their state dict, the likeliest first; others are looked at after these."""
RGB = "rgb."
"""Ends the prefix of the network that is taken where a state dict holds several."""

REFUSED = {
    r"(^|\.)s\d\.pathway\d_": "PySlowFast's, whose blocks (Tx1x1, 1x3x3, 1x1x1) no network here has",
    r"(^|\.)blocks\.\d\.(res_blocks|multipathway_blocks)\.": "PyTorchVideo's, whose blocks no network here has",
    r"(^|\.)(cls_token|patch_embed\.|blocks\.\d+\.attn\.)": "a vision transformer's, not a ResNet's",
}
"""Names that tell whose weights these are, and why they can't be loaded."""


@dataclass(frozen=True)
class Named:
    """One network of a state dict."""

    tensors: dict[str, Tensor]
    """By torchvision's names."""
    source: dict[str, str]
    """Each of these names to the state dict's."""
    prefix: str
    """What stood before every name of this network."""
    others: tuple[str, ...]
    """The state dict's names of anything else."""


def _as_it_is(name: str) -> str:
    return name


def _of_conv_modules(name: str) -> str:
    """MMAction2's: ``conv1.conv``, ``conv1.bn``, ``downsample.conv``."""
    name = re.sub(r"(^|\.)downsample\.conv\.", r"\1downsample.0.", name)
    name = re.sub(r"(^|\.)downsample\.bn\.", r"\1downsample.1.", name)
    return re.sub(r"(^|\.)conv(\d)\.(conv|bn)\.", r"\1\3\2.", name)


def _of_children(first: int) -> Callable[[str], str]:
    """A plain sequence's of a ResNet's children, whose stage 1 is at place ``first``."""
    stem = {"0": "stem"} if first == 1 else {"0": "conv1", "1": "bn1"}
    names = {**stem, **{str(first + i): f"layer{1 + i}" for i in range(4)}}

    def rename(name: str) -> str:
        place, rest = name.split(".", 1)
        return f"{names.get(place, place)}.{rest}"

    return rename


DIALECTS: tuple[tuple[str, Callable[[str], str]], ...] = (
    (r"layer1\.0\.conv1\.conv\.", _of_conv_modules),
    (r"layer1\.0\.conv1\.", _as_it_is),
    (r"1\.0\.conv1\.(0\.)+weight$", _of_children(1)),
    (r"4\.0\.conv1\.weight$", _of_children(4)),
)
"""A weight that each way to name a ResNet has, after the prefix, and how its names become torchvision's."""


def state_dict_in(content: Mapping[str, Any]) -> tuple[str, Mapping[str, Any], tuple[str, ...]]:
    """The state dict of a checkpoint's content: itself, or one level down in it.

    Gives its key ("" for the content itself), the state dict, and other keys that hold a network too. Where nothing
    looks like a network, what is at the likeliest key.
    """
    inner = {key: value for key, value in content.items() if isinstance(value, Mapping)}
    order = [*(key for key in KEYS if key in inner), *(key for key in inner if key not in KEYS)]
    if _networks(content) or not order:
        return "", content, ()
    held = [key for key in order if _networks(inner[key])]
    known = [key for key in order if key in KEYS or _refusal(inner[key])]
    if not held and not known:
        return "", content, ()
    first = (held or known)[0]
    return str(first), inner[first], tuple(str(key) for key in held if key != first)


def network_in(state: Mapping[str, Tensor], *, where: str) -> Named:
    """The network of a state dict, by torchvision's names, without what stands before each of them.

    Of several networks the one under ``rgb.`` is taken, else the first. Raises ValueError, which names ``where``,
    for the weights of a network that this engine does not have.
    """
    found = _networks(state)
    if not found and (why := _refusal(state)) is not None:
        raise ValueError(f"{where}: these weights are {why}: they can't be loaded")
    prefix = next((p for p in found if p.endswith(RGB)), next(iter(found), ""))
    rename = found.get(prefix, _as_it_is)
    source = {rename(full[len(prefix) :]): full for full in state if full.startswith(prefix)}
    tensors = {name: state[full] for name, full in source.items()}
    if any(".conv_s." in name or value.ndim == 5 for name, value in tensors.items()) and (
        rename is _of_conv_modules
    ):
        raise ValueError(
            f"{where}: these weights are of a 3D or (2+1)D ResNet of MMAction2, whose kernels, channels and strides"
            " no network here has: they can't be loaded; of MMAction2 only 2-D ResNets can"
        )
    others = tuple(full for full in state if not full.startswith(prefix))
    return Named(tensors, source, prefix, others)


def _networks(state: Mapping[str, Any]) -> dict[str, Callable[[str], str]]:
    """What stands before the names of each ResNet of a state dict, and how these names become torchvision's."""
    found: dict[str, Callable[[str], str]] = {}
    for name in map(str, state):
        for pattern, rename in DIALECTS:
            if (match := re.match(rf"((?:.*\.)?){pattern}", name)) is not None:
                found.setdefault(match[1], rename)
                break
    return found


def _refusal(state: Mapping[str, Any]) -> str | None:
    """Whose weights these are, and why they can't be loaded, where their names tell."""
    for pattern, why in REFUSED.items():
        if any(re.search(pattern, str(name)) for name in state):
            return why
    return None
