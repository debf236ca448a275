"""Kernels that can't be built on a machine: the reference does their work, and that is told once."""

import os
import warnings

import pytest
import torch
from triton.compiler.errors import CompilationError
from triton.runtime.errors import PTXASError

import kernels

pytestmark = [
    pytest.mark.skipif(not kernels.HAS_TRITON, reason="no Triton"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="nothing is built there"),
]


class Launches:
    """A kernel's launcher that fails."""

    def __init__(self, error: Exception) -> None:
        self.error, self.count = error, 0

    def __call__(self, *_: object) -> None:
        self.count += 1
        raise self.error


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take CPU tensors for a GPU's."""
    monkeypatch.setattr(kernels, "_not_built", {})
    monkeypatch.setattr(kernels, "_on_kernel", lambda _, name: name not in kernels._not_built)


def views() -> tuple[torch.Tensor, torch.Tensor]:
    frames = torch.arange(48, dtype=torch.uint8).view(1, 2, 2, 4, 3)
    return kernels.clip_views(frames, torch.full((3,), 0.4), torch.full((3,), 0.2))


def loss() -> tuple[torch.Tensor, torch.Tensor]:
    student = torch.linspace(0, 1, 12).view(3, 4).requires_grad_()
    total, _ = kernels.weighted_loss(
        *([student], [torch.zeros(3, 4)], torch.ones(1, 3), torch.ones(1), torch.ones(1)),
        torch.zeros(0),
    )
    (2 * total).backward()
    assert student.grad is not None
    return total.detach(), student.grad


BUILDING = [
    CompilationError("a kernel", None, "unsupported"),
    PTXASError("ptxas fatal: sm_999 is not defined"),
    RuntimeError("Failed to find C compiler. Please specify via CC environment variable."),
    FileNotFoundError("cuda.h"),
    RuntimeError("Triton Error [CUDA]: device kernel image is invalid"),
]


@pytest.mark.parametrize("error", BUILDING, ids=lambda error: type(error).__name__)
def test_a_kernel_that_can_not_be_built_gives_way(
    error: Exception, as_on_a_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as off_gpu:
        off_gpu.setattr(kernels, "_on_kernel", lambda *_: False)
        want = [*views(), *loss()]
    fails = Launches(error)
    for name in ("clip_views_forward", "weighted_loss_forward", "scale_"):
        monkeypatch.setattr(kernels, name, fails)
    for turn in range(2):
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            got = [*views(), *loss()]
        for one, other in zip(got, want, strict=True):
            torch.testing.assert_close(one, other)
        lines = [str(w.message) for w in told if "can't be built" in str(w.message)]
        assert len(lines) == (3 if turn == 0 else 0), "each kernel says it once"
    assert fails.count == 3 and set(kernels.not_built()) == {"clip_views", "weighted_loss", "scale"}


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory."),
        torch.AcceleratorError("CUDA error: device-side assert triggered", 710),
        RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        ValueError("65 pairs"),
    ],
    ids=["memory", "device", "triton", "triton memory", "caller"],
)
def test_what_is_not_a_matter_of_building_is_raised(
    error: Exception, as_on_a_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "clip_views_forward", Launches(error))
    with pytest.raises(type(error)):
        views()
    assert kernels.not_built() == {}


def test_loops_are_not_interpreted_where_the_interpreter_can_not(fault_with) -> None:
    assert fault_with({"triton": "3.6.0", "numpy": "2.4.6"}.__getitem__) is not None
    assert fault_with({"triton": "3.6.0", "numpy": "2.3.5"}.__getitem__) is None
    assert fault_with({"triton": "3.9.0", "numpy": "2.4.6"}.__getitem__) is None
