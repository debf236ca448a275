"""Audio alignment and joint embedding against float64 loops in NumPy."""

import numpy as np
import pytest
import torch

from engine.data.views import Views
from engine.objective.align import AlignAudioTask, EmbedTask
from engine.objective.task import Activations, Scalar

N, D, MARGIN = 5, 6, 0.5
MASKS = {
    "all": [1, 1, 1, 1, 1],
    "some": [1, 1, 0, 0, 1],
    "alternating": [1, 0, 1, 0, 0],
    "one": [0, 0, 1, 0, 0],
    "none": [0, 0, 0, 0, 0],
}


def views_of(has_audio, has_shift=None) -> Views:
    has = torch.tensor(has_audio, dtype=torch.bool)
    shift = has if has_shift is None else torch.tensor(has_shift, dtype=torch.bool)
    return Views({}, {}, None, has, shift, torch.arange(4).repeat(N, 1))


def features(*modalities: str, seed: int = 0) -> Activations:
    rng = torch.Generator().manual_seed(seed)
    pooled = {m: torch.randn(N, D, generator=rng).requires_grad_() for m in modalities}
    shifted = torch.randn(N, D, generator=rng).requires_grad_() if "audio" in pooled else None
    return Activations({m: [x] for m, x in pooled.items()}, shifted_audio=shifted)


def units(head: torch.nn.Linear, x: torch.Tensor) -> np.ndarray:
    """Projected features of length 1, in float64."""
    w, b, x = (v.detach().double().numpy() for v in (head.weight, head.bias, x))
    out = x @ w.T + b
    return out / np.linalg.norm(out, axis=1, keepdims=True)


def align_loss(task: AlignAudioTask, acts: Activations, views: Views) -> float:
    """Mean hinge over the clips' shifted sounds and over the sound of the clip before in the batch."""
    video = units(task.video, acts.clip[task.modality][0])
    sound, shifted = (units(task.audio, x) for x in (acts.clip["audio"][0], acts.shifted_audio))
    hinges = []
    for i in range(N):
        own, before = video[i] @ sound[i], (i - 1) % N
        if views.has_shift[i]:
            hinges.append(max(0.0, MARGIN - own + video[i] @ shifted[i]))
        if views.has_audio[i] and views.has_audio[before]:
            hinges.append(max(0.0, MARGIN - own + video[i] @ sound[before]))
    return float(np.mean(hinges)) if hinges else 0.0


def embed_loss(task: EmbedTask, acts: Activations, views: Views) -> float:
    """Mean hinge over ordered pairs of clips, against the other's embedding and against the other's RGB."""
    rgb, other = (
        units(h, acts.clip[m][0]) for h, m in ((task.rgb, "rgb"), (task.with_rgb, task.other))
    )
    hinges = []
    for i in range(N):
        for j in range(N):
            if i == j or (task.other == "audio" and not views.has_audio[[i, j]].all()):
                continue
            own = rgb[i] @ other[i]
            hinges.append(max(0.0, MARGIN - own + rgb[i] @ other[j]))
            hinges.append(max(0.0, MARGIN - own + rgb[j] @ other[i]))
    return float(np.mean(hinges)) if hinges else 0.0


def align_task(modality: str = "rgb") -> AlignAudioTask:
    torch.manual_seed(3)
    return AlignAudioTask(modality, D, embed_dim=4, margin=MARGIN)


def embed_task(other: str) -> EmbedTask:
    torch.manual_seed(4)
    return EmbedTask(other, D, embed_dim=4, margin=MARGIN)


def value_of(task, acts: Activations, views: Views) -> torch.Tensor:
    (scalar,) = task(views, acts, task.terms)
    assert isinstance(scalar, Scalar) and scalar.name == task.terms[0]
    assert scalar.value.dtype == torch.float32 and scalar.value.shape == ()
    return scalar.value


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("modality", ["rgb", "grey", "flow"])
def test_align_value(modality, mask, seed) -> None:
    task, acts = align_task(modality), features(modality, "audio", seed=seed)
    assert task.terms == (f"{modality}/align_audio",)
    views = views_of(MASKS[mask])
    want = align_loss(task, acts, views)
    assert value_of(task, acts, views).item() == pytest.approx(want, rel=1e-5, abs=1e-7)


def test_align_without_room_for_a_shift_uses_other_clips_alone() -> None:
    task, acts = align_task(), features("rgb", "audio")
    views = views_of([1, 1, 1, 0, 1], [1, 0, 0, 0, 1])
    value = value_of(task, acts, views)
    assert value.item() == pytest.approx(align_loss(task, acts, views), rel=1e-5)
    (grad,) = torch.autograd.grad(value, acts.shifted_audio)
    assert (grad[~views.has_shift] == 0).all() and (grad[views.has_shift] != 0).any()
    with torch.no_grad():
        acts.shifted_audio[~views.has_shift] = 1e3 * torch.randn(3, D)
    assert value_of(task, acts, views).item() == value.item()


def test_align_gradient_by_differences() -> None:
    task, acts = align_task(), features("rgb", "audio")
    views = views_of([1, 1, 0, 1, 1], [1, 0, 0, 1, 1])
    inputs = (acts.clip["rgb"][0], acts.clip["audio"][0], acts.shifted_audio)
    check_gradients(task, acts, views, inputs, align_loss)


@pytest.mark.parametrize("other", ["grey", "flow", "audio"])
def test_embed_gradient_by_differences(other) -> None:
    task, acts = embed_task(other), features("rgb", other)
    views = views_of(MASKS["some"])
    check_gradients(task, acts, views, (acts.clip["rgb"][0], acts.clip[other][0]), embed_loss)


def check_gradients(task, acts, views, inputs, by_hand, *, step: float = 2.0**-10) -> None:
    grads = torch.autograd.grad(value_of(task, acts, views), inputs)
    for x, grad in zip(inputs, grads, strict=True):
        for place in [(0, 0), (1, 3), (2, 2), (4, 5)]:
            ends = []
            for sign in (1, -1):
                with torch.no_grad():
                    x[place] += sign * step
                    ends.append(by_hand(task, acts, views))
                    x[place] -= sign * step
            want = (ends[0] - ends[1]) / (2 * step)
            assert grad[place].item() == pytest.approx(want, rel=1e-2, abs=1e-4)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("other", ["grey", "flow", "audio"])
def test_embed_value(other, mask, seed) -> None:
    task, acts = embed_task(other), features("rgb", other, seed=seed)
    assert task.terms == (f"rgb+{other}/embed",)
    views = views_of(MASKS[mask])
    want = embed_loss(task, acts, views)
    assert value_of(task, acts, views).item() == pytest.approx(want, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("task", [align_task(), embed_task("audio")], ids=["align", "embed"])
def test_clips_without_sound_change_nothing(task) -> None:
    acts, views = features("rgb", "audio"), views_of(MASKS["some"])
    silent = ~views.has_audio
    inputs = [acts.clip["rgb"][0], acts.clip["audio"][0]]
    if isinstance(task, AlignAudioTask):
        inputs.append(acts.shifted_audio)
    before = value_of(task, acts, views)
    for grad in torch.autograd.grad(before, inputs):
        assert (grad[silent] == 0).all() and (grad[~silent] != 0).any()
    with torch.no_grad():
        for x in inputs:
            x[silent] = 1e4 * torch.randn(2, D)
    assert value_of(task, acts, views).item() == before.item()


@pytest.mark.parametrize("task", [align_task(), embed_task("audio")], ids=["align", "embed"])
@pytest.mark.parametrize("mask", ["none", "one"])
def test_a_batch_without_negatives_gives_zero_and_a_zero_gradient(task, mask) -> None:
    acts = features("rgb", "audio")
    value = value_of(task, acts, views_of(MASKS[mask], MASKS["none"]))
    assert value.item() == 0.0
    value.backward()
    for x in (acts.clip["rgb"][0], acts.clip["audio"][0], *task.parameters()):
        assert x.grad is None or (x.grad == 0).all()


def identity(*heads: torch.nn.Linear) -> None:
    for head in heads:
        torch.nn.init.eye_(head.weight)
        torch.nn.init.zeros_(head.bias)


def test_align_of_known_vectors() -> None:
    """The clip's sound is its video's; then it is the negatives' instead, and the hinge is margin + 1."""
    task = AlignAudioTask("rgb", D, embed_dim=D, margin=MARGIN)
    identity(task.video, task.audio)
    basis, views = torch.eye(D)[:N] * 7.0, views_of(MASKS["all"])
    acts = Activations({"rgb": [basis], "audio": [basis]}, shifted_audio=-basis)
    assert value_of(task, acts, views).item() == 0.0
    acts = Activations({"rgb": [basis], "audio": [-basis]}, shifted_audio=basis)
    # shifted: margin + 1 + 1; other clips are orthogonal: margin + 1
    assert value_of(task, acts, views).item() == pytest.approx(MARGIN + 1.5)
    acts = Activations({"rgb": [basis], "audio": [basis.roll(-1, 0)]}, shifted_audio=-basis)
    # shifted: max(0, margin - 0 - 1); the clip before has this one's sound: margin - 0 + 1
    assert value_of(task, acts, views).item() == pytest.approx((MARGIN + 1) / 2)


def test_embed_of_known_vectors() -> None:
    task = EmbedTask("flow", D, embed_dim=D, margin=MARGIN)
    identity(task.rgb, task.with_rgb)
    basis, views = torch.eye(D)[:N] * 0.3, views_of(MASKS["none"])
    assert value_of(task, Activations({"rgb": [basis], "flow": [basis]}), views).item() == 0.0
    same = Activations({"rgb": [basis[:1].expand(N, D)], "flow": [basis[:1].expand(N, D)]})
    assert value_of(task, same, views).item() == pytest.approx(MARGIN)
    apart = Activations({"rgb": [basis], "flow": [basis.roll(1, 0)]})
    # own similarity 0; of the N-1 others one has similarity 1, the rest 0: both ways alike
    assert value_of(task, apart, views).item() == pytest.approx(MARGIN + 1 / (N - 1))


def test_embed_looks_both_ways() -> None:
    """All RGB alike and all flow alike but one: the two directions differ, and both count."""
    task = EmbedTask("flow", D, embed_dim=D, margin=MARGIN)
    identity(task.rgb, task.with_rgb)
    rgb = torch.eye(D)[[0, 0, 0, 0, 0]].requires_grad_()
    flow = torch.eye(D)[[0, 1, 1, 1, 1]].requires_grad_()
    acts, views = Activations({"rgb": [rgb], "flow": [flow]}), views_of(MASKS["none"])
    to_flow = 4 * 0.0 + 4 * (MARGIN + 1) + 12 * MARGIN
    to_rgb = 4 * MARGIN + 16 * MARGIN
    assert value_of(task, acts, views).item() == pytest.approx((to_flow + to_rgb) / 40)


def test_inactive_tasks_read_nothing() -> None:
    views = views_of(MASKS["all"])
    for task in (align_task(), embed_task("grey"), embed_task("audio")):
        assert task(views, Activations({}), ["rgb/predict", "grey/align_audio"]) == []


def test_bf16_autocast_keeps_similarities_in_float32() -> None:
    """Close vectors: a similarity rounded to 8 bits would be off by more than their difference."""
    task = EmbedTask("flow", D, embed_dim=D, margin=MARGIN)
    identity(task.rgb, task.with_rgb)
    rgb, flow = (torch.randn(N, D).bfloat16().float() for _ in range(2))
    acts, views = Activations({"rgb": [rgb], "flow": [flow]}), views_of(MASKS["none"])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = value_of(task, acts, views)
    assert value.item() == pytest.approx(embed_loss(task, acts, views), rel=1e-6)
    align = AlignAudioTask("rgb", D, embed_dim=D, margin=MARGIN)
    identity(align.video, align.audio)
    acts = Activations({"rgb": [rgb], "audio": [flow]}, shifted_audio=flow.roll(2, 0))
    views = views_of(MASKS["all"])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = value_of(align, acts, views)
    assert value.item() == pytest.approx(align_loss(align, acts, views), rel=1e-6)
