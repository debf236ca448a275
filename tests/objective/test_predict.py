"""Decoding tasks: which target, at which size, over which clips."""

import copy

import numpy as np
import pytest
import torch

import kernels
from engine.core.recipe import Clip, Model, Objective
from engine.data.views import Views
from engine.model.decoder import Decoder
from engine.objective.loss import EvolvedLoss
from engine.objective.predict import DecodeTask, shrunk
from engine.objective.task import Activations

N, T, P, SIZE, HEARD, COMING, MELS = 3, 4, 3, 32, 12, 8, 16
HAS_AUDIO = torch.tensor([True, False, True])
CHANNELS = {"rgb": 3, "grey": 1, "flow": 2}
# name: (network, target, of the future)
TERMS = {
    **{f"{m}/predict": (m, m, True) for m in ("rgb", "grey", "flow", "audio")},
    **{f"{m}/reconstruct": (m, m, False) for m in ("rgb", "grey", "flow", "audio")},
    "grey/colorize": ("grey", "rgb", False),
    "rgb/to_flow": ("rgb", "flow", False),
    "grey/to_flow": ("grey", "flow", False),
    "flow/to_rgb": ("flow", "rgb", False),
}


@pytest.fixture(scope="module")
def tasks() -> dict[str, DecodeTask]:
    torch.manual_seed(0)
    loss = EvolvedLoss(
        Model(width=0.125),
        Clip(num_frames=T, num_future_frames=P, size=SIZE),
        objective=Objective(decoder_width=8, embed_dim=4),
        audio_size=(HEARD, COMING, MELS),
    )
    found = {t.terms[0]: t for t in loss.tasks if isinstance(t, DecodeTask)}
    for task in found.values():  # as training leaves them
        torch.nn.init.normal_(task.decoder.output.weight, std=0.1)
    return found


@pytest.fixture
def views() -> Views:
    torch.manual_seed(1)
    clip = {m: torch.randn(N, c, T, SIZE, SIZE) for m, c in CHANNELS.items()}
    frames = {"rgb": P, "grey": P, "flow": P - 1}
    future = {m: torch.randn(N, c, frames[m], SIZE, SIZE) for m, c in CHANNELS.items()}
    clip["audio"] = torch.randn(N, 1, HEARD, MELS)
    future["audio"] = torch.randn(N, 1, COMING, MELS)
    return Views(clip, future, None, HAS_AUDIO, HAS_AUDIO, torch.arange(T).repeat(N, 1))


def activations(modality: str) -> Activations:
    rng = torch.Generator().manual_seed(2)
    shape = (N, 64, 2, 1) if modality == "audio" else (N, 64, 1, 2, 2)
    stage4 = torch.randn(shape, generator=rng).requires_grad_()
    pooled = torch.randn(N, 64, generator=rng)
    return Activations({modality: [*[torch.full((N, 1), torch.nan)] * 4, stage4, pooled]})


def target_blocks(views: Views, target: str, future: bool) -> np.ndarray:
    """Means over blocks of 4 by 4 pixels, or of 2 mels, in float64; time is kept."""
    x = (views.future if future else views.clip)[target].double().numpy()
    if target == "audio":
        return x.reshape(*x.shape[:3], MELS // 2, 2).mean(-1)
    return x.reshape(*x.shape[:3], SIZE // 4, 4, SIZE // 4, 4).mean((4, 6))


def trivial(views: Views, network: str, target: str, future: bool, want: np.ndarray) -> np.ndarray:
    """Zero flow; the last frame, or the mean spectrum of what was heard, for what comes next; else the mean picture."""
    if target == "flow":
        return np.zeros_like(want)
    if future:
        seen = target_blocks(views, target, False)
        return seen[:, :, -1:] if target != "audio" else seen.mean(2, keepdims=True)
    kept = HAS_AUDIO.numpy() if target == "audio" else np.ones(N, bool)
    return want[kept].mean((0, 2), keepdims=True)


def value_of(pair) -> tuple[torch.Tensor, float]:
    mask = torch.ones(N) if pair.mask is None else pair.mask.float()
    total, values = kernels.weighted_loss(
        [pair.student], [pair.teacher], mask[None], torch.ones(1), torch.ones(1), torch.zeros(0)
    )
    return total, values.item()


def test_every_decoding_term_has_a_task(tasks) -> None:
    assert {n: (t.modality, t.target, t.future) for n, t in tasks.items()} == TERMS


@pytest.mark.parametrize("name", TERMS)
def test_value_against_block_averages(name, tasks, views) -> None:
    network, target, future = TERMS[name]
    acts = activations(network)
    (pair,) = tasks[name](views, acts, [name])
    want = target_blocks(views, target, future)
    assert pair.name == name and pair.student.shape == pair.teacher.shape == want.shape
    np.testing.assert_allclose(pair.teacher, want, atol=1e-6)
    decoder = copy.deepcopy(tasks[name].decoder).double()
    decoded = decoder(acts.clip[network][4].detach().double()).detach().numpy()
    start = trivial(views, network, target, future, want)
    decoded = decoded + start
    kept = HAS_AUDIO.numpy() if "audio" in (network, target) else np.ones(N, bool)
    expected = np.mean([((decoded[i] - want[i]) ** 2).mean() for i in np.flatnonzero(kept)])
    assert value_of(pair)[1] == pytest.approx(expected, rel=1e-5)
    chance = np.mean([((start - want)[i] ** 2).mean() for i in np.flatnonzero(kept)])
    assert pair.chance.item() == pytest.approx(chance, rel=1e-5)


@pytest.mark.parametrize("name", TERMS)
def test_a_new_decoder_is_at_chance(name, tasks, views) -> None:
    task = copy.deepcopy(tasks[name])
    torch.nn.init.zeros_(task.decoder.output.weight)
    (pair,) = task(views, activations(TERMS[name][0]), [name])
    assert value_of(pair)[1] == pytest.approx(pair.chance.item(), rel=1e-5)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("rgb/predict", (3, P, 8, 8)),
        ("flow/predict", (2, P - 1, 8, 8)),
        ("flow/reconstruct", (2, T, 8, 8)),
        ("grey/colorize", (3, T, 8, 8)),
        ("audio/predict", (1, COMING, 8)),
        ("audio/reconstruct", (1, HEARD, 8)),
    ],
)
def test_sizes(name, shape, tasks, views) -> None:
    (pair,) = tasks[name](views, activations(TERMS[name][0]), [name])
    assert pair.student.shape == (N, *shape)


@pytest.mark.parametrize("name", ["audio/predict", "audio/reconstruct"])
def test_clips_without_sound_change_nothing(name, tasks, views) -> None:
    acts = activations("audio")
    (pair,) = tasks[name](views, acts, [name])
    total, before = value_of(pair)
    total.backward()
    grad = acts.clip["audio"][4].grad
    assert (grad[~HAS_AUDIO] == 0).all() and (grad[HAS_AUDIO] != 0).any()
    with torch.no_grad():
        for x in (views.clip["audio"], views.future["audio"], acts.clip["audio"][4]):
            x[~HAS_AUDIO] = float("nan")
    (pair,) = tasks[name](views, acts, [name])
    assert value_of(pair)[1] == before


def test_an_inactive_task_reads_nothing(tasks) -> None:
    nothing = Views({}, {}, None, HAS_AUDIO, HAS_AUDIO, torch.arange(T).repeat(N, 1))
    for name, task in tasks.items():
        others = [n for n in TERMS if n != name]
        assert task(nothing, Activations({}), others) == []


@pytest.mark.parametrize("size", [(3, 4, 4), (2, 5, 3)])
def test_frames_shrink_to_sizes_that_do_not_divide(size) -> None:
    """Output i averages from floor(i * in / out) up to ceil((i + 1) * in / out)."""
    x = torch.randn(2, 1, 3, 18, 18)
    want = x.double().numpy()
    for axis, out in zip((2, 3, 4), size, strict=True):
        n = want.shape[axis]
        parts = [
            want.take(range(i * n // out, -(-(i + 1) * n // out)), axis).mean(axis)
            for i in range(out)
        ]
        want = np.stack(parts, axis)
    np.testing.assert_allclose(shrunk(x, size), want, atol=1e-6)


def test_a_perfect_decoder_has_no_loss(views) -> None:
    decoder = Decoder(64, 1, (T, 8, 8), hidden=4)
    task = DecodeTask("grey/reconstruct", "grey", target="grey", future=False, decoder=decoder)
    target = torch.nn.functional.avg_pool3d(views.clip["grey"], (1, 4, 4))
    decoder.forward = lambda x: target - target.mean((0, 2), keepdim=True)
    (pair,) = task(views, activations("grey"), ["grey/reconstruct"])
    assert value_of(pair)[1] == pytest.approx(0.0, abs=1e-12)
