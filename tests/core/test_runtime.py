"""Which number format a device gets."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from threadpoolctl import threadpool_info, threadpool_limits

from engine.core.runtime import (
    LARGE_PRODUCT,
    choose_runtime,
    cpu_has_bf16,
    is_device_error,
    one_thread,
)


@pytest.mark.parametrize("amx", [True, False])
def test_a_cpu_gets_bf16_only_where_it_is_asked_for_and_sound(
    monkeypatch: pytest.MonkeyPatch, amx: bool
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    found = {amp: choose_runtime("cpu", amp=amp).amp for amp in ("auto", "off", "bf16")}
    assert found == {"auto": False, "off": False, "bf16": amx}


def test_gradients_are_the_same_each_time() -> None:
    """In the format that this CPU is given for bf16: of a shape whose gradient bf16 without AMX gets wrong."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(16, 32, 2, 6, 6, generator=draw).to(memory_format=torch.channels_last_3d)
    weight = torch.randn(32, 32, 3, 3, 3, generator=draw)
    found = []
    for _ in range(20):
        kernel = weight.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=cpu_has_bf16()):
            out = F.conv3d(x, kernel, padding=1)
        out.float().square().mean().backward()
        found.append(kernel.grad)
        torch.full((2**20,), float("nan"))  # what the next one may find in memory
    assert all(torch.equal(found[0], grad) for grad in found if grad is not None)
    assert found[0] is not None and torch.isfinite(found[0]).all()


def test_small_products_get_one_thread_and_large_ones_all() -> None:
    def threads() -> set[int]:
        return {torch.get_num_threads(), *(pool["num_threads"] for pool in threadpool_info())}

    with threadpool_limits(2):
        with one_thread():
            assert threads() == {1}
        with one_thread(
            960**2 * 512
        ):  # a ridge's on 960 clips of 512 features: a second thread only waits
            assert threads() == {1}
        with one_thread(LARGE_PRODUCT):
            assert threads() == {2}
        with pytest.raises(KeyError), one_thread():
            raise KeyError
        assert threads() == {2}


def test_a_gpu_that_is_named_is_the_one_that_cuda_means(monkeypatch) -> None:
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 2)
    assert choose_runtime("cuda:3").device == torch.device("cuda:3")
    for which in ("cuda", "auto"):  # a thread that a stage starts would take the first
        assert choose_runtime(which).device == torch.device("cuda:2")
    choose_runtime("cpu")
    assert chosen == [torch.device("cuda:3")]


def test_what_can_not_be_recorded_is_no_error_of_the_gpu() -> None:
    assert is_device_error(RuntimeError("CUDA error: an illegal memory access was encountered"))
    said = "CUDA error: operation not permitted when stream is capturing"
    assert not is_device_error(RuntimeError(said))
