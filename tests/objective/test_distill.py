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
CHANNELS = [shape[0] for shape in VIDEO]
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
        *[torch.ones(len(pairs))] * 2,
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
    task = DistillTask(other, CHANNELS, stop_gradient=stop, way="l2")
    assert task.terms == tuple(f"distill/{other}@{k}" for k in range(5))
    pairs = task(VIEWS, acts, task.terms)
    assert [p.name for p in pairs] == list(task.terms)
    _, values = evaluated(pairs, teacher_grad=not stop)
    np.testing.assert_allclose(values, [expected(acts, other, k) for k in range(5)], rtol=1e-5)


@pytest.mark.parametrize("layer", range(5))
@pytest.mark.parametrize("other", ["grey", "flow", "audio"])
def test_one_layer_alone_moves_that_layer_of_the_student_alone(other, layer) -> None:
    acts = activations(other)
    task = DistillTask(other, CHANNELS, stop_gradient=True, way="l2")
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
    task = DistillTask(other, CHANNELS, stop_gradient=False, way="l2")
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
    task = DistillTask("audio", CHANNELS, stop_gradient=False, way="l2")
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
        task = DistillTask(other, CHANNELS, stop_gradient=True, way="l2")
        assert all(p.mask is None for p in task(VIEWS, activations(other), task.terms))


def by_hand(x: torch.Tensor, kept: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance of each channel over the kept clips' positions."""
    x = np.moveaxis(x.detach().double().numpy()[kept], 1, 0)
    flat = x.reshape(len(x), -1)
    return flat.mean(1), flat.var(1)


def broadcast(channels: np.ndarray, like: np.ndarray) -> np.ndarray:
    return channels.reshape(1, -1, *[1] * (like.ndim - 2))


@pytest.mark.parametrize("layer", range(5))
@pytest.mark.parametrize("other", ["flow", "audio"])
def test_chance_is_what_the_teachers_mean_gets(other, layer) -> None:
    acts = activations(other)
    name = f"distill/{other}@{layer}"
    (pair,) = DistillTask(other, CHANNELS, stop_gradient=True, way="l2")(VIEWS, acts, [name])
    kept = HAS_AUDIO.numpy() if other == "audio" else np.ones(N, bool)
    mean, _ = by_hand(pair.teacher, kept)
    teacher = pair.teacher.double().numpy()[kept]
    want = ((teacher - broadcast(mean, teacher)) ** 2).mean()
    assert pair.chance.item() == pytest.approx(want, rel=1e-5) and not pair.chance.requires_grad


@pytest.mark.parametrize("other", ["flow", "audio"])
def test_standardised_activations(other) -> None:
    """Two unrelated sides differ by 2; scaling or shifting a side changes nothing."""
    acts = activations(other)
    task = DistillTask(other, CHANNELS, stop_gradient=True, way="standardised")
    kept = HAS_AUDIO.numpy() if other == "audio" else np.ones(N, bool)
    pairs = task(VIEWS, acts, task.terms)
    _, values = evaluated(pairs, teacher_grad=False)
    for layer, pair in enumerate(pairs):
        sides = []
        for m in ("rgb", other):
            x = acts.clip[m][layer]
            x = x.flatten(2).mean(2) if other == "audio" else x
            mean, variance = by_hand(x, kept)
            x = x.detach().double().numpy()
            scale = np.sqrt(broadcast(variance, x) + 1e-6)
            sides.append(((x - broadcast(mean, x)) / scale)[kept])
        assert values[layer].item() == pytest.approx(((sides[0] - sides[1]) ** 2).mean(), rel=1e-4)
        assert pair.chance == 2.0
    acts.clip["rgb"] = [3.0 + 10.0 * x for x in acts.clip["rgb"]]
    _, same = evaluated(task(VIEWS, acts, task.terms), teacher_grad=False)
    torch.testing.assert_close(values, same, rtol=0.02, atol=0)  # but for the guard of the variance


def test_a_standardised_student_is_not_drawn_to_be_smaller() -> None:
    acts = activations("flow")
    task = DistillTask("flow", CHANNELS, stop_gradient=True, way="standardised")
    evaluated(task(VIEWS, acts, task.terms), teacher_grad=False)[0].backward()
    for x in acts.clip["rgb"][:5]:
        along = (x.grad * x.detach()).sum((0, *range(2, x.dim())))
        across = (x.grad * x.detach()).abs().sum((0, *range(2, x.dim())))
        assert (along.abs() < 1e-3 * across).all()


@pytest.mark.parametrize("other", ["flow", "audio"])
def test_projected_students_can_match_any_linear_image(other) -> None:
    acts = activations(other)
    torch.manual_seed(0)
    task = DistillTask(other, CHANNELS, stop_gradient=True, way="projected")
    pairs = task(VIEWS, acts, task.terms)
    for layer, pair in enumerate(pairs):
        x = acts.clip["rgb"][layer]
        x = x.flatten(2).mean(2) if other == "audio" else x
        head = task.project[layer]
        want = head(x.movedim(1, -1)).movedim(-1, 1)
        torch.testing.assert_close(pair.student, want, rtol=1e-4, atol=1e-5)
        assert pair.chance == 1.0
    evaluated(pairs, teacher_grad=False)[0].backward()
    assert all(p.grad.any() for p in task.parameters())
