"""Tensors in a file: what is written comes back, and writes that are cut short leave the old file."""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from engine.core.tensors import CheckpointError, load_tensors, save_tensors, with_prefix


def test_tensors_keep_their_values_types_and_facts(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    strided = torch.arange(48.0).reshape(1, 2, 2, 3, 4).to(memory_format=torch.channels_last_3d)
    tensors = {"a": strided, "b": torch.tensor([1, 2]), "c": torch.ones(2, dtype=torch.bfloat16)}
    save_tensors(path, tensors, facts={"name": "Ä", "lr": 0.1, "none": None})
    found, facts = load_tensors(path)
    assert facts == {"name": "Ä", "lr": 0.1, "none": None}
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)


@pytest.mark.parametrize("moment", ["fsync", "replace"])
def test_a_kill_while_saving_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    path = tmp_path / "x.safetensors"
    save_tensors(path, {"a": torch.zeros(3)}, facts={"step": 1})
    old = path.read_bytes()

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(os, moment, killed)
        with pytest.raises(KeyboardInterrupt):
            save_tensors(path, {"a": torch.ones(3)}, facts={"step": 2})
    assert path.read_bytes() == old
    save_tensors(path, {"a": torch.ones(3)}, facts={"step": 2})
    assert load_tensors(path)[1] == {"step": 2}


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Let writes past ``size`` bytes fail, as they do on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_write_that_fails_is_an_os_error_and_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_tensors(path, {"a": torch.zeros(3)}, facts={})
    old = path.read_bytes()
    with largest_file(50_000), pytest.raises(OSError, match=r"x\.safetensors") as caught:
        save_tensors(path, {"a": torch.zeros(100_000)}, facts={})
    assert caught.value.errno == errno.EFBIG and "\n" not in str(caught.value)
    assert path.read_bytes() == old
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_tensors_of_a_prefix_must_be_those_wanted(tmp_path: Path) -> None:
    tensors = {"a.x": torch.zeros(2), "b.x": torch.ones(3), "ax": torch.ones(1)}
    path = tmp_path / "x.safetensors"
    assert torch.equal(with_prefix(tensors, "a.", {"x": torch.ones(2)}, path)["x"], tensors["a.x"])
    for wanted, match in (
        ({"x": torch.ones(2), "y": torch.ones(1)}, "has no tensor y"),
        ({}, "has an unknown tensor x"),
        ({"x": torch.ones(2, 1)}, r"x has shape \(2,\), not \(2, 1\)"),
    ):
        with pytest.raises(CheckpointError, match=match):
            with_prefix(tensors, "a.", wanted, path)
