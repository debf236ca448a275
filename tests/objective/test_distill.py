"""Distillation pairs against float64 arithmetic in NumPy, and whose gradient they carry."""

import numpy as np
import pytest
import torch

import kernels
from engine.data.views import Views
from engine.objective.distill import DistillTask
from engine.objective.task import Activations

N = 4
HAS_AUDIO = torch.tensor([True, False, True, True])
VIEWS = Views({}, {}, None, HAS_AUDIO, HAS_AUDIO, torch.arange(4).repeat(N, 1))
VIDEO = [(3, 4, 6, 6), (3, 4, 6, 6), (5, 2, 3, 3), (6, 1, 2, 2), (7, 1, 1, 1)]
AUDIO = [(3, 9, 8), (3, 9, 8), (5, 5, 4), (6, 3, 2), (7, 2, 1)]


def activations(other: str, *, seed: int = 0) -> Activations:
    rng = torch.Generator().manual_seed(seed)

    def leaves(shapes):
        shapes = [*shapes, shapes[-1][:1]]
        return [torch.randn(N, *s, generator=rng).requires_grad_() for s in shapes]

    return Activations({"rgb": leaves(VIDEO), other: leaves(AUDIO if other == "audio" else VIDEO)})


def evaluated(pairs, *, teacher_grad: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Total at weight 1 and values, by the op that sums Eq. 1."""
    masks = torch.stack([torch.ones(N) if p.mask is None else p.mask.float() for p in pairs])
    return kernels.weighted_loss(
        [p.student for p in pairs],
        [p.teacher for p in pairs],
        masks,
        torch.ones(len(pairs)),
        torch.zeros(0),
        teacher_grad=teacher_grad,
    )


def expected(acts: Activations, other: str, layer: int) -> float:
    rgb, second = (acts.clip[m][layer].detach().double().numpy() for m in ("rgb", other))
    if other != "audio":
        return float(((rgb - second) ** 2).mean())
    difference = rgb.mean((2, 3, 4)) - second.mean((2, 3))
    return float((difference[HAS_AUDIO.numpy()] ** 2).mean())


@pytest.mark.parametrize("stop", [True, False])
@pytest.mark.parametrize("other", ["grey", "flow", "audio"])
def test_values_per_layer(other, stop) -> None:
    acts = activations(other)
    task = DistillTask(other, stop_gradient=stop)
    assert task.terms == tuple(f"distill/{other}@{k}" for k in range(5))
    pairs = task(VIEWS, acts, task.terms)
    assert [p.name for p in pairs] == list(task.terms)
    _, values = evaluated(pairs, teacher_grad=not stop)
    np.testing.assert_allclose(values, [expected(acts, other, k) for k in range(5)], rtol=1e-5)


@pytest.mark.parametrize("layer", range(5))
@pytest.mark.parametrize("other", ["grey", "flow", "audio"])
def test_one_layer_alone_moves_that_layer_of_the_student_alone(other, layer) -> None:
    acts = activations(other)
    task = DistillTask(other, stop_gradient=True)
    pairs = task(VIEWS, acts, [f"distill/{other}@{layer}", "rgb/predict"])
    assert len(pairs) == 1
    total, _ = evaluated(pairs, teacher_grad=True)  # so that the task's own stop is what stops it
    total.backward()
    for k in range(6):
        student, teacher = acts.clip["rgb"][k], acts.clip[other][k]
        assert teacher.grad is None
        assert (student.grad is not None and student.grad.abs().sum() > 0) == (k == layer)


@pytest.mark.parametrize("other", ["grey", "audio"])
def test_without_the_stop_both_sides_move_against_each_other(other) -> None:
    acts = activations(other)
    task = DistillTask(other, stop_gradient=False)
    total, _ = evaluated(task(VIEWS, acts, task.terms), teacher_grad=True)
    total.backward()
    for k in range(5):
        student, teacher = (acts.clip[m][k].grad.double() for m in ("rgb", other))
        if other == "grey":
            torch.testing.assert_close(teacher, -student)
            continue
        # each position of an average gets its share
        sums = student.sum((2, 3, 4)), teacher.sum((2, 3))
        torch.testing.assert_close(sums[1], -sums[0])
        rgb, audio = acts.clip["rgb"][k].double(), acts.clip["audio"][k].double()
        apart = rgb.mean((2, 3, 4)) - audio.mean((2, 3))
        want = 2 * apart / apart.shape[1] / HAS_AUDIO.sum() * HAS_AUDIO[:, None]
        torch.testing.assert_close(sums[0], want.detach(), rtol=1e-4, atol=1e-7)


def test_clips_without_sound_change_nothing() -> None:
    acts = activations("audio")
    task = DistillTask("audio", stop_gradient=False)
    total, before = evaluated(task(VIEWS, acts, task.terms), teacher_grad=True)
    total.backward()
    for m in ("rgb", "audio"):
        for k in range(5):
            grad = acts.clip[m][k].grad
            assert (grad[~HAS_AUDIO] == 0).all() and (grad[HAS_AUDIO] != 0).any()
    with torch.no_grad():
        for k in range(5):
            acts.clip["audio"][k][~HAS_AUDIO] = float("nan")
    _, after = evaluated(task(VIEWS, acts, task.terms), teacher_grad=True)
    assert torch.equal(before, after)


def test_video_pairs_count_every_clip() -> None:
    for other in ("grey", "flow"):
        task = DistillTask(other, stop_gradient=True)
        assert all(p.mask is None for p in task(VIEWS, activations(other), task.terms))
