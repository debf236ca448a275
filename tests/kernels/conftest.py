"""What the kernels' tests share: poisoned allocations, and a run of a test file in Triton's interpreter."""

import os
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
LOOPS = Path(__file__).with_name("test_weighted_loss.py")
"""Tests of the kernels that have loops."""


def interpreter_fault(find: Callable[[str], str] = version) -> str | None:
    """Why Triton's interpreter can't run a kernel with loops here, if it can't; ``find`` gives a package's version."""
    try:
        triton, numpy = (tuple(map(int, find(name).split(".")[:2])) for name in ("triton", "numpy"))
    except PackageNotFoundError:
        return None
    if triton <= (3, 6) and numpy >= (2, 4):
        return "Triton 3.6's interpreter can't count loops with NumPy 2.4 or newer"
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    fault = interpreter_fault() if os.environ.get("TRITON_INTERPRET") == "1" else None
    for item in items:
        if fault is not None and item.path == LOOPS:
            item.add_marker(pytest.mark.skip(reason=fault))


@pytest.fixture
def fault_with() -> Callable[[Callable[[str], str]], str | None]:
    """``interpreter_fault``."""
    return interpreter_fault


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Fill what torch.empty and torch.empty_like give with nan; returns the shapes given out so far."""
    shapes: list[tuple[int, ...]] = []
    for name in ("empty", "empty_like"):
        real = getattr(torch, name)

        def poisoned(*args, real=real, **kwargs):
            out = real(*args, **kwargs)
            shapes.append(tuple(out.shape))
            return out.fill_(float("nan"))

        monkeypatch.setattr(torch, name, poisoned)
    return shapes


@pytest.fixture
def interpret() -> Callable[[str], None]:
    """Run a test file again with the Triton kernels on CPU tensors: the variable counts at import only."""
    pytest.importorskip("triton")
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("already in the interpreter")
    fault = interpreter_fault()

    def run(file: str) -> None:
        if fault is not None and Path(file) == LOOPS:
            pytest.skip(fault)
        paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
        env = {
            **os.environ,
            "TRITON_INTERPRET": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        }
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", file]
        done = subprocess.run(
            command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=280
        )
        assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
        assert " passed" in done.stdout

    return run
