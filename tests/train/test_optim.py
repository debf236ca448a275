"""Optimizers and their schedule, beside torch's own and the equations written out."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from engine.core.recipe import Optim
from engine.train.optim import (
    RunningAverage,
    descend,
    learning_rate,
    make_optimizer,
    new_moments,
    start_moments,
)


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv3d(1, 2, 1), nn.BatchNorm3d(2))


def test_a_trapezoid_stays_up_and_falls_over_the_last_two_fifths() -> None:
    settings = Optim(lr=0.1, steps=10, warmup_steps=2, schedule="trapezoid")
    expected = [0.05, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.075, 0.05, 0.025]
    assert [learning_rate(settings, k) for k in range(10)] == pytest.approx(expected)
    assert learning_rate(settings, 10) == pytest.approx(0.0)


def test_learning_rate_warms_up_and_falls_like_a_cosine() -> None:
    settings = Optim(lr=0.1, steps=6, warmup_steps=2)
    half = math.sqrt(0.5)
    expected = [0.05, 0.1, 0.1, 0.05 * (1 + half), 0.05, 0.05 * (1 - half)]
    assert [learning_rate(settings, k) for k in range(6)] == pytest.approx(expected)
    assert learning_rate(settings, 6) == pytest.approx(0.0)
    assert learning_rate(Optim(lr=0.1, steps=6, warmup_steps=0), 0) == pytest.approx(0.1)


def test_the_rate_of_a_child_is_warmed_up_to_the_schedules() -> None:
    settings = Optim(steps=100, warmup_steps=10)
    rates = [learning_rate(settings, step, first=50) for step in range(50, 100)]
    cold = [learning_rate(settings, step) for step in range(100)]
    assert rates[9:] == cold[59:]
    assert rates[0] == pytest.approx(cold[50] / 10) and rates[:9] == sorted(rates[:9])


@pytest.mark.parametrize("name", ["adamw", "muon", "sgd"])
def test_norms_and_biases_are_not_decayed(name: str) -> None:
    net = torch.nn.Sequential(torch.nn.Conv3d(1, 2, 1), torch.nn.BatchNorm3d(2))
    groups = make_optimizer([(net, 1.0)], Optim(name=name, weight_decay=0.3)).param_groups
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert decay == {id(p): 0.3 if p.dim() > 1 else 0.0 for p in net.parameters()}


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("name", ["adamw", "muon", "sgd"])
def test_moments_are_those_that_torch_makes(name: str, fused: bool) -> None:
    """From them a first step gives the bits that it gives without, and other steps follow."""
    results = []
    for made in (True, False):
        net = small()
        optimizer = make_optimizer([(net, 1.0)], Optim(name=name, lr=0.1), fused=fused)
        if made:
            start_moments(optimizer)
            assert all(optimizer.state[p].keys() for p in net.parameters())
        for _ in range(3):
            for parameter in net.parameters():
                parameter.grad = torch.sin(parameter.detach() * 7)
            optimizer.step()
        results.append([p.detach().clone() for p in net.parameters()])
        (parameter, *_) = net.parameters()
        state, own = optimizer.state[parameter], new_moments(optimizer, parameter)
        assert state.keys() == own.keys() or (name == "sgd" and "momentum_buffer" in state)
        assert all(own[key].dtype == state[key].dtype for key in own)
    assert all(map(torch.equal, *results))


def test_a_step_is_torchs_own_with_rate_factor_and_clipping() -> None:
    settings = Optim(name="sgd", lr=0.5, steps=4, warmup_steps=0, momentum=0.0, grad_clip=0.1)
    net, other = nn.Linear(3, 2), nn.Linear(3, 2)
    other.load_state_dict(net.state_dict())
    x = torch.randn(5, 3)

    def backward() -> Tensor:
        loss = net(x).square().sum()
        loss.backward()
        return loss.detach()

    optimizer = make_optimizer([(net, 3.0)], settings)
    assert descend(optimizer, settings, step=1, backward=backward) > 0
    rate = 3.0 * 0.25 * (1 + math.cos(math.pi / 4))
    other(x).square().sum().backward()
    norm = math.sqrt(sum(float(p.grad.square().sum()) for p in other.parameters()))
    decay = settings.weight_decay
    for mine, p in zip(net.parameters(), other.parameters(), strict=True):
        step = p.grad * (0.1 / norm) + (decay * p if p.dim() > 1 else 0.0)
        torch.testing.assert_close(mine.detach(), (p - rate * step).detach())


def test_a_backward_that_raises_moves_no_weight() -> None:
    net = small()
    before = [p.detach().clone() for p in net.parameters()]

    def backward() -> None:
        net(torch.ones(2, 1, 1, 1, 1)).sum().backward()
        raise ArithmeticError

    with pytest.raises(ArithmeticError):
        descend(make_optimizer([(net, 1.0)], Optim()), Optim(), step=0, backward=backward)
    assert all(map(torch.equal, before, net.parameters()))


def test_the_running_average_is_the_recursion_by_hand() -> None:
    network = nn.BatchNorm1d(1)
    average = RunningAverage(network, 0.5)
    expected = 1.0
    for step in range(30):
        with torch.no_grad():
            network.weight.fill_(float(step))
        network.running_mean.fill_(float(step))
        network.num_batches_tracked.fill_(step)
        average.update(network, step=step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * step
        torch.testing.assert_close(average.tensors["weight"].item(), expected, rtol=1e-5, atol=1e-5)
        assert average.tensors["num_batches_tracked"] == step
    assert 27.9 < average.tensors["running_mean"] < 29
    assert network.weight.item() == 29.0
