"""What the bench counts: FLOPs against arithmetic by hand, bytes, gains; and how it takes time."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from engine.bench import limits
from engine.bench.cohort import Costs, possible_gain
from engine.bench.kmeans import Problem, draw, product_flops
from engine.bench.loss import activation_shapes
from engine.bench.step import TrafficMode
from engine.bench.timing import interleaved
from engine.bench.views import floor_bytes
from engine.core.recipe import Clip, Model
from engine.model.resnet3d import ResNet3D

CPU = torch.device("cpu")


def by_hand(network: ResNet3D, clip: tuple[int, int, int, int, int]) -> int:
    """FLOPs of forward: two for each weight at each place of each convolution's output, worked out by shapes."""
    n, _, *size = clip

    def conv(module: nn.Conv3d, size: list[int]) -> tuple[int, list[int]]:
        kernel, stride, padding = module.kernel_size, module.stride, module.padding
        out = [
            (s + 2 * int(p) - k) // t + 1
            for s, k, t, p in zip(size, kernel, stride, padding, strict=True)
        ]
        weights = module.out_channels * module.in_channels * math.prod(kernel)
        return 2 * n * weights * math.prod(out), out

    def convs(module: nn.Module) -> list[nn.Conv3d]:
        return [m for m in module.modules() if isinstance(m, nn.Conv3d)]

    total, size = conv(convs(network.stem)[0], size)
    if not isinstance(network.pool, nn.Identity):
        size = [(s + 2 - 3) // 2 + 1 for s in size]
    for stage in (network.layer1, network.layer2, network.layer3, network.layer4):
        for block in stage:
            inside = size
            for branch in (block.conv1, block.conv2, block.conv3):
                for module in [] if branch is None else convs(branch):
                    flops, inside = conv(module, inside)
                    total += flops
            if block.downsample is not None:
                total += conv(convs(block.downsample)[0], size)[0]
            size = inside
    return total


@pytest.mark.parametrize("arch, pool", [("r3d_18", False), ("r3d_50", True)])
def test_flops_of_a_network(arch: str, pool: bool) -> None:
    """Backward takes twice forward, less the gradient to the clip itself, which nobody asks for."""
    network, clip = ResNet3D(arch, 3, width=0.125, pool=pool), torch.randn(2, 3, 5, 32, 24)
    with FlopCounterMode(display=False) as counter:
        total = network(clip).sum()
    forward = counter.get_total_flops()
    assert forward == by_hand(network, (2, 3, 5, 32, 24))
    with FlopCounterMode(display=False) as counter:
        total.backward()
    stem = network.stem[0]
    assert isinstance(stem, nn.Conv3d)
    frames = (5 + 2 * stem.padding[0] - stem.kernel_size[0]) + 1  # type: ignore[operator]
    to_clip = 2 * 2 * stem.weight.numel() * frames * 16 * 12
    assert counter.get_total_flops() == 2 * forward - to_clip


def test_flops_of_an_r3d_18() -> None:
    """Kinetics' usual clip of 16x112x112 takes 81 GFLOP."""
    with torch.device("meta"):
        network, clip = ResNet3D("r3d_18", 3), torch.empty(1, 3, 16, 112, 112)
        with FlopCounterMode(display=False) as counter:
            network(clip)
    assert counter.get_total_flops() == pytest.approx(81e9, rel=0.01)


def test_activation_shapes() -> None:
    """Those of a real forward; and the size that five maps of an R3D-50 have in bf16 at batch 16."""
    model, clip = Model(width=0.125, pool=True), Clip(num_frames=4, size=32)
    network = ResNet3D(model.arch, 3, width=model.width, pool=model.pool)
    maps = network.forward_features(torch.zeros(2, 3, 4, 32, 32))
    assert activation_shapes(model, clip, batch_size=2) == [tuple(m.shape) for m in maps[:5]]
    large, clip = Model(arch="r3d_50", pool=True), Clip(num_frames=8, size=224)
    shapes = activation_shapes(large, clip, batch_size=16, whole_stem=True)
    assert 2 * sum(map(math.prod, shapes)) == pytest.approx(344e6, rel=0.005)


def test_bytes_of_operations() -> None:
    x, y = torch.zeros(10, 4), torch.zeros(10, 4)
    with TrafficMode() as traffic:
        z = (x + y).view(40)  # the sum reads two and writes one; the view moves nothing
        z.mul_(2)  # reads and writes one
    assert traffic.bytes == 5 * 160
    assert floor_bytes(10, torch.bfloat16) == 10 * (3 + 8)


def test_possible_gain() -> None:
    """M(D + C) / (D + MC): none for one member, all of D saved for many, M where steps cost nothing."""
    assert possible_gain(1, 30.0, 50.0) == 1.0
    assert possible_gain(4, 30.0, 50.0) == pytest.approx(320 / 230)
    assert possible_gain(10**6, 30.0, 50.0) == pytest.approx(80 / 50, rel=1e-4)
    assert possible_gain(7, 30.0, 0.0) == pytest.approx(7.0)
    assert Costs([30.0, 99.0, 30.0], [1.0, 50.0, 99.0]).gain(4) == pytest.approx(320 / 230)


def test_flops_of_kmeans() -> None:
    """10 clips, 6 features, 4 classes: a product with all centres is 480; 3 candidates; two an iteration."""
    sizes = Problem(members=2, clips=10, features=6, classes=4)
    assert product_flops(sizes, starts=0, iterations=5) == 480 * 10
    assert product_flops(sizes, starts=2, iterations=5) == 480 * (10 + 2 * 3)
    features, labels = draw(sizes, seed=1)
    again, _ = draw(sizes, seed=1)
    assert [f.shape for f in features] == [(10, 6)] * 2 and set(labels) == {0, 1, 2, 3}
    assert np.array_equal(features[1], again[1]) and not np.array_equal(*features)


def test_peers_are_timed_in_turn_after_a_warm_up() -> None:
    calls = ""

    def step(name: str, seconds: float) -> None:
        nonlocal calls
        calls += name
        time.sleep(seconds)

    steps = {"a": lambda: step("a", 0.01), "b": lambda: step("b", 0.001)}
    took = interleaved(steps, device=CPU, seconds=0.03, flush=True)
    assert calls.startswith("aabb") and set(calls[4:].split("ab")) == {""}
    assert len(took["a"]) == len(took["b"]) == (len(calls) - 4) // 2 >= 3
    assert min(took["a"]) >= 10 > max(took["b"][:1] + [1.0])


def test_limits_are_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(limits.COPY_BYTES, "cpu", 2**20)
    monkeypatch.setitem(limits.MATRIX_SIDES, "cpu", (64,))
    limits._copy_bandwidth.cache_clear()
    limits._matrix_peak.cache_clear()
    copy = limits.copy_bandwidth(CPU, quick=True)
    peak = limits.matrix_peak(CPU, torch.float32, quick=True)
    assert copy.unit == "GB/s" and copy.value > 0.1 and "1 thread" in copy.name
    assert peak.unit == "TFLOP/s" and peak.value > 1e-4 and "float32" in peak.name
    assert limits.copy_bandwidth(CPU, quick=True) is copy
    assert limits.matrix_peak(CPU, torch.float32, quick=True) is peak
    assert limits.matrix_peak(CPU, torch.bfloat16, quick=True) is not peak
    limits._copy_bandwidth.cache_clear()
    limits._matrix_peak.cache_clear()
