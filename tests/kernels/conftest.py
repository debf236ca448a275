"""What the kernels' tests share: poisoned allocations, and a run of a test file in Triton's interpreter."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


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

    def run(file: str) -> None:
        paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
        env = {
            **os.environ,
            "TRITON_INTERPRET": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        }
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", file]
        done = subprocess.run(
            command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120
        )
        if "only 0-dimensional arrays can be converted" in done.stdout:
            pytest.skip("Triton 3.6's interpreter can't count loops with NumPy 2.4 or newer")
        assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
        assert " passed" in done.stdout

    return run
