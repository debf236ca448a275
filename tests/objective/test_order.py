"""Shuffle and backward cross-entropies against float64 arithmetic in NumPy."""

import math

import numpy as np
import pytest
import torch

from engine.data.views import Views
from engine.objective.order import OrderTask
from engine.objective.task import Activations, Scalar

N, D = 5, 6
NO_CLIPS = torch.zeros(N, dtype=torch.bool)
VIEWS = Views({}, {}, None, NO_CLIPS, NO_CLIPS, torch.arange(4).repeat(N, 1))


def make(modality: str, copies: int, *, seed: int = 0):
    """A task and the pooled features of N clips, of their shuffled and of their reversed copies."""
    torch.manual_seed(seed)
    task = OrderTask(modality, D)
    pooled, shuffled, reversed_ = (
        torch.randn(n, D, requires_grad=True) for n in (N, copies, copies)
    )
    activations = Activations(
        clip={modality: [pooled]}, shuffled={modality: shuffled}, reversed={modality: reversed_}
    )
    return task, activations, (pooled, shuffled, reversed_)


def cross_entropy(head: torch.nn.Linear, real: torch.Tensor, changed: torch.Tensor) -> float:
    """Mean of -log p(label): clips as they are have label 0, changed ones 1."""
    w, b = (p.detach().double().numpy() for p in (head.weight, head.bias))
    losses = []
    for features, label in ((real, 0), (changed, 1)):
        for x in features.detach().double().numpy():
            logits = w @ x + b
            losses.append(np.log(np.exp(logits).sum()) - logits[label])
    return float(np.mean(losses))


@pytest.mark.parametrize("copies", [1, 3, N])
@pytest.mark.parametrize("modality", ["rgb", "grey", "flow"])
def test_values_compare_the_clips_that_the_copies_were_made_of(modality, copies) -> None:
    task, activations, (pooled, shuffled, reversed_) = make(modality, copies)
    names = (f"{modality}/shuffle", f"{modality}/backward")
    values = task(VIEWS, activations, names)
    assert [v.name for v in values] == list(names) == list(task.terms)
    want = (
        cross_entropy(task.shuffle, pooled[:copies], shuffled),
        cross_entropy(task.backward_time, pooled[N - copies :], reversed_),
    )
    for value, expected in zip(values, want, strict=True):
        assert isinstance(value, Scalar) and value.value.dtype == torch.float32
        assert value.value.item() == pytest.approx(expected, rel=1e-5)


def test_clips_without_a_copy_take_no_part() -> None:
    task, activations, (pooled, _, _) = make("rgb", 2)
    (first,) = task(VIEWS, activations, ["rgb/shuffle"])
    (grad,) = torch.autograd.grad(first.value, pooled)
    assert (grad[:2] != 0).any(1).all() and (grad[2:] == 0).all()
    (last,) = task(VIEWS, activations, ["rgb/backward"])
    (grad,) = torch.autograd.grad(last.value, pooled)
    assert (grad[-2:] != 0).any(1).all() and (grad[:-2] == 0).all()


def test_a_term_reads_its_own_copies_and_its_own_head() -> None:
    task, activations, (_, shuffled, reversed_) = make("flow", N)
    for name, own, other, head in (
        ("flow/shuffle", shuffled, reversed_, task.shuffle),
        ("flow/backward", reversed_, shuffled, task.backward_time),
    ):
        (value,) = task(VIEWS, activations, [name])
        grads = torch.autograd.grad(
            value.value, [own, other, *task.parameters()], allow_unused=True
        )
        assert grads[0].abs().sum() > 0 and grads[1] is None
        used = [p for p, g in zip(task.parameters(), grads[2:], strict=True) if g is not None]
        assert {id(p) for p in used} == {id(p) for p in head.parameters()}


def test_inactive_terms_need_no_copies() -> None:
    task, activations, _ = make("grey", N)
    bare = Activations(clip=activations.clip)
    assert task(VIEWS, bare, ["rgb/shuffle", "rgb/backward"]) == []
    activations.reversed.clear()
    assert [v.name for v in task(VIEWS, activations, ["grey/shuffle"])] == ["grey/shuffle"]


def test_an_undecided_head_is_at_chance_and_a_sure_one_at_zero() -> None:
    task, activations, _ = make("rgb", N)
    torch.nn.init.zeros_(task.shuffle.weight)
    torch.nn.init.zeros_(task.shuffle.bias)
    (chance,) = task(VIEWS, activations, ["rgb/shuffle"])
    assert chance.value.item() == pytest.approx(math.log(2))
    head = task.backward_time
    with torch.no_grad():
        head.weight.zero_()
        head.bias.zero_()
        head.weight[0, 0], head.weight[1, 0] = 50.0, -50.0
    ones = torch.eye(D)[:1].expand(N, D)
    right = Activations(clip={"rgb": [ones]}, reversed={"rgb": -ones})
    (sure,) = task(VIEWS, right, ["rgb/backward"])
    assert sure.value.item() == pytest.approx(0.0, abs=1e-6)
    wrong = Activations(clip={"rgb": [-ones]}, reversed={"rgb": ones})
    (mistaken,) = task(VIEWS, wrong, ["rgb/backward"])
    assert mistaken.value.item() == pytest.approx(100.0, rel=1e-4)


def test_bf16_features_give_a_float32_value() -> None:
    task, activations, _ = make("rgb", N)
    exact = [v.value.item() for v in task(VIEWS, activations, task.terms)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        values = task(VIEWS, activations, task.terms)
    for value, want in zip(values, exact, strict=True):
        assert value.value.dtype == torch.float32
        assert value.value.item() == pytest.approx(want, rel=2e-2)
