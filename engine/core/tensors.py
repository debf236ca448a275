"""Tensors with a card of facts as one safetensors file: written whole or not at all, and checked when read."""

from __future__ import annotations

import json
import os
import re
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from engine.core.files import replacing


class CheckpointError(ValueError):
    """A checkpoint that can't be read or does not fit: the message names the file and what differs."""


class DamagedCheckpoint(CheckpointError):
    """A checkpoint whose bytes are not those that were written."""


def save_tensors(path: Path, tensors: Mapping[str, Tensor], *, facts: Mapping[str, Any]) -> None:
    """Write tensors and a JSON card of facts; a kill leaves the old file or the new one.

    Raises OSError where the file can't be written, and leaves no part of it.
    """
    whole = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    metadata = {"facts": json.dumps(dict(facts)), "crc32": _checksum(whole)}
    try:
        with replacing(path) as temporary:
            save_file(whole, temporary, metadata=metadata)
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))  # the system's, given as text alone
        if number is None:
            raise OSError(f"can't write {path}: {error}") from None
        text = f"can't write the checkpoint: {os.strerror(int(number[1]))}"
        raise OSError(int(number[1]), text, str(path)) from None


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    """CRC-32 of names and bytes: safetensors itself notices a file that is too short, but no changed byte."""
    crc = 0
    for name in sorted(tensors):
        data: Any = tensors[name].reshape(-1).view(torch.uint8).numpy()
        crc = zlib.crc32(data, zlib.crc32(name.encode(), crc))
    return f"{crc:08x}"


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read tensors, on the CPU, and facts.

    Raises CheckpointError for a file that is not there, DamagedCheckpoint for one that is not as it was written.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            facts = json.loads(metadata.get("facts", "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such checkpoint") from None
    except (SafetensorError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DamagedCheckpoint(f"{path}: not a readable safetensors file: {error}") from None
    if "crc32" in metadata and metadata["crc32"] != _checksum(tensors):
        raise DamagedCheckpoint(f"{path}: damaged: its checksum is not that of what was written")
    return tensors, facts


def with_prefix(
    tensors: Mapping[str, Tensor], prefix: str, like: Mapping[str, Tensor], path: Path
) -> dict[str, Tensor]:
    """The tensors whose names begin with ``prefix``, without it.

    Raises CheckpointError, which names ``path``, where their names and shapes are not those of ``like``.
    """
    saved = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
    for name in sorted(saved.keys() ^ like.keys()):
        what = "has no" if name in like else "has an unknown"
        raise CheckpointError(f"{path}: {what} tensor {name}")
    for name, tensor in like.items():
        if saved[name].shape != tensor.shape:
            shapes = f"{tuple(saved[name].shape)}, not {tuple(tensor.shape)}"
            raise CheckpointError(f"{path}: {name} has shape {shapes}")
    return saved
