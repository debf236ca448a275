"""Muon beside torch's own for matrices, singular values in float64, and AdamW."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from engine.core.recipe import Optim
from engine.train.muon import Muon, orthogonal
from engine.train.optim import make_optimizer


@pytest.mark.parametrize("shape", [(64, 1728), (1728, 64), (8, 81), (5, 3), (1, 7), (64, 64)])
@pytest.mark.parametrize("decades", [0, 2])
def test_directions_stay_and_become_equally_strong(shape: tuple[int, int], decades: int) -> None:
    """The singular vectors are those of float64's decomposition, and values from 1/100 on come near to 1."""
    torch.manual_seed(0)
    least = min(shape)
    u, _ = torch.linalg.qr(torch.randn(shape[0], least, dtype=torch.float64))
    v, _ = torch.linalg.qr(torch.randn(shape[1], least, dtype=torch.float64))
    strengths = torch.logspace(0, -decades, least, dtype=torch.float64)
    (got,) = orthogonal([(u * strengths @ v.T).float()])
    assert got.dtype == torch.float32
    diagonal = u.T @ got.double() @ v
    values = diagonal.diag()
    assert 0.6 < values.min() and values.max() < 1.25
    torch.testing.assert_close(diagonal, values.diag(), atol=2e-3, rtol=0)
    torch.testing.assert_close(got.double(), u @ diagonal @ v.T, atol=2e-3, rtol=0)


def test_no_gradient_is_no_step() -> None:
    still, bf16 = orthogonal([torch.zeros(4, 6), torch.randn(4, 6).bfloat16()])
    assert not still.any()
    assert bf16.dtype == torch.float32 and bf16.isfinite().all()


def test_a_matrix_is_alone_among_others() -> None:
    """Company of equal, other and turned sizes changes nothing but rounding."""
    torch.manual_seed(0)
    matrices = [torch.randn(shape) for shape in ((8, 81), (8, 27), (81, 8), (16, 9), (4, 4))]
    for matrix, among in zip(matrices, orthogonal(matrices), strict=True):
        torch.testing.assert_close(among, *orthogonal([matrix]), atol=1e-5, rtol=1e-5)


def test_matrices_step_as_torchs_muon_steps_them() -> None:
    """torch rounds the step to bf16, which is the difference."""
    torch.manual_seed(0)
    ours, theirs = (nn.Parameter(torch.linspace(-1, 1, 8 * 20).view(8, 20)) for _ in range(2))
    mine = Muon([{"params": [ours], "momentum": 0.8, "weight_decay": 0.1}], lr=0.01)
    peer = torch.optim.Muon(
        [theirs], lr=0.05, weight_decay=0.02, momentum=0.8, adjust_lr_fn="match_rms_adamw"
    )  # it decays by lr too, which is five times ours
    for _ in range(5):
        gradient = torch.randn(8, 20) * torch.logspace(0, -2, 20)
        before = ours.detach().clone()
        for parameter, optimizer in ((ours, mine), (theirs, peer)):
            parameter.grad = gradient.clone()
            optimizer.step()
        moved = (ours.detach() - before).norm()
        assert (ours.detach() - theirs.detach()).norm() < 0.03 * moved
        with torch.no_grad():
            theirs.copy_(ours)


def test_all_but_convolutions_is_adamw_to_the_bit() -> None:
    results = {}
    for name in ("adamw", "muon"):
        torch.manual_seed(0)
        net = nn.ModuleList(
            [nn.Conv3d(2, 4, 3), nn.BatchNorm3d(4), nn.Linear(4, 3), nn.ConvTranspose3d(4, 2, 2)]
        )
        optimizer = make_optimizer([(net, 1.0)], Optim(name=name, lr=0.1))
        for _ in range(3):
            for parameter in net.parameters():
                parameter.grad = torch.sin(parameter.detach() * 7)
            optimizer.step()
        results[name] = {key: p.detach() for key, p in net.named_parameters()}
    for key, value in results["adamw"].items():
        assert torch.equal(value, results["muon"][key]) == (key != "0.weight"), key


def test_a_convolution_moves_by_the_rate_and_groups_stay() -> None:
    torch.manual_seed(0)
    net = nn.Conv3d(16, 32, 3, bias=False).to(memory_format=torch.channels_last_3d)
    optimizer = make_optimizer([(net, 1.0)], Optim(name="muon", lr=0.01, weight_decay=0.0))
    before, strides = net.weight.detach().clone(), net.weight.stride()
    net.weight.grad = 1e-6 * torch.randn_like(net.weight)
    optimizer.step()
    assert float((net.weight.detach() - before).square().mean().sqrt()) == pytest.approx(
        0.01, rel=0.15
    )
    assert net.weight.stride() == strides and net.weight.grad is not None
    assert [sorted(g.keys() & {"momentum", "factor"}) for g in optimizer.param_groups] == [
        ["factor", "momentum"],
        ["factor"],
        ["factor"],
    ]


@pytest.mark.parametrize("shape", [(16, 8, 3, 3, 3), (8, 16, 1, 1, 1), (4, 2, 3, 3)])
def test_a_convolutions_layout_in_memory_changes_nothing_but_rounding(
    shape: tuple[int, ...],
) -> None:
    torch.manual_seed(0)
    start, gradient = torch.randn(shape), torch.randn(shape)
    layout = torch.channels_last_3d if len(shape) == 5 else torch.channels_last
    moved = []
    for formats in ([torch.contiguous_format] * 2, [layout] * 2, [layout, torch.contiguous_format]):
        weight = nn.Parameter(start.clone(memory_format=formats[0]))
        optimizer = Muon([{"params": [weight], "momentum": 0.6}], lr=0.01, weight_decay=0.05)
        for _ in range(3):
            weight.grad = gradient.clone(memory_format=formats[1])
            optimizer.step()
        moved.append(weight.detach())
    for each in moved[1:]:
        torch.testing.assert_close(each, moved[0], atol=1e-5, rtol=1e-5)
