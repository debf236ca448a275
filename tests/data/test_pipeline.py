import io
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from engine.core.recipe import Audio, Clip
from engine.data.flow import dis_flow
from engine.data.pipeline import ClipBatch, InputPipeline
from engine.data.plan import ClipPlan, plan_batch, plan_views, square_boxes
from engine.data.shards.index import ClipIndex

CLIP, AUDIO = Clip(size=48), Audio()
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def index(tiny_shards: Path) -> ClipIndex:
    return ClipIndex([tiny_shards / "labelled", tiny_shards / "unlabelled"])


@pytest.fixture(scope="module")
def pipeline(index: ClipIndex) -> InputPipeline:
    return InputPipeline(
        index, CLIP, audio=AUDIO, device=CPU, batch_size=6, num_frames=12, threads=1
    )


def plan(index: ClipIndex, step: int, batch_size: int = 6) -> ClipPlan:
    return plan_batch(index, CLIP, AUDIO, seed=0, step=step, batch_size=batch_size)


def changed(p: ClipPlan, **fields) -> ClipPlan:
    return ClipPlan(**{name: fields.get(name, getattr(p, name)) for name in p.__dataclass_fields__})


def decoded(data: np.ndarray) -> np.ndarray:
    with av.open(io.BytesIO(data.tobytes())) as file:
        return next(file.decode(video=0)).to_ndarray(format="rgb24")


def heard(data: np.ndarray) -> np.ndarray:
    with av.open(io.BytesIO(data.tobytes())) as file:
        parts = [frame.to_ndarray().reshape(-1) for frame in file.decode(audio=0)]
    return np.concatenate(parts).astype(np.float64) / 32768


def test_frames_are_those_planned_cropped_and_flipped(index, pipeline) -> None:
    p = plan(index, 0)
    batch = pipeline.load(p)
    boxes = square_boxes(p, index.width[p.clip], index.height[p.clip])
    for i in (0, 3, 5):
        source = decoded(index.read(int(p.clip[i]), [int(p.frames[i, 4])]).frames[0])
        h, w, _ = source.shape
        left, top, right, bottom = boxes[i] * [w, h, w, h]
        u = left + (np.arange(48) + 0.5) / 48 * (right - left) - 0.5
        v = top + (np.arange(48) + 0.5) / 48 * (bottom - top) - 0.5
        expected = bilinear(source, u, v)
        if p.flip[i]:
            expected = expected[:, ::-1]
        error = np.abs(batch.rgb[i, 4].numpy().astype(float) - expected)
        assert error.mean() < 3.0  # another resize filter and another JPEG decoder, the same place


def bilinear(image: np.ndarray, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    h, w, _ = image.shape
    u, v = np.clip(u, 0, w - 1), np.clip(v, 0, h - 1)
    u0, v0 = np.minimum(u.astype(int), w - 2), np.minimum(v.astype(int), h - 2)
    fu, fv = (u - u0)[None, :, None], (v - v0)[:, None, None]
    image = image.astype(float)
    rows = image[v0] * (1 - fv) + image[v0 + 1] * fv
    return rows[:, u0] * (1 - fu) + rows[:, u0 + 1] * fu


def test_flow_is_that_of_the_frames_given(index, pipeline) -> None:
    batch = pipeline.load(plan(index, 1))
    np.testing.assert_array_equal(batch.flow.numpy(), dis_flow(batch.rgb.numpy(), preset=CLIP.flow))


def test_a_flipped_clip_has_mirrored_flow_with_u_negated(index, pipeline) -> None:
    p = plan(index, 2)
    plain = pipeline.load(changed(p, flip=np.zeros(6, bool)))
    mirrored = pipeline.load(changed(p, flip=np.ones(6, bool)))
    np.testing.assert_array_equal(mirrored.rgb.numpy(), plain.rgb.flip(3).numpy())
    back = mirrored.flow.flip(3) * torch.tensor([-1.0, 1.0])
    strong = plain.flow.norm(dim=-1) > 1.0
    assert strong.float().mean() > 0.02  # there is motion to compare
    error = (back - plain.flow).norm(dim=-1)[strong].mean() / plain.flow.norm(dim=-1)[strong].mean()
    assert error < 0.35  # DIS scans patches in a fixed direction: mirrored input is not bit-equal


def test_sound_is_cut_at_the_frames_time(index, pipeline) -> None:
    p = plan(index, 3)
    batch = pipeline.load(p)
    assert batch.has_audio.any()
    samples = batch.wave.shape[1]
    assert samples == round(12 * 2 / index.fps * 16000)
    for i in np.flatnonzero(batch.has_audio.numpy()):
        sound = heard(index.read(int(p.clip[i]), []).sound)
        for wave, begin in (
            (batch.wave, p.sound_start[i]),
            (batch.wave_shifted, p.sound_start[i] + p.shift[i]),
        ):
            first = round(begin * 16000)
            expected = np.zeros(samples)
            piece = sound[first : first + samples]
            expected[: len(piece)] = piece
            np.testing.assert_allclose(wave[i].numpy(), expected, atol=1e-4)


def test_clips_without_sound_are_zero_and_marked(index, pipeline) -> None:
    silent = np.flatnonzero(~index.has_audio)
    assert len(silent), "the demo has silent clips"
    p = plan(index, 0)
    clips = p.clip.copy()
    clips[0] = silent[0]
    batch = pipeline.load(
        changed(p, clip=clips, frames=np.minimum(p.frames, index.num_frames[clips][:, None] - 1))
    )
    assert not batch.has_audio[0] and not batch.has_shift[0]
    assert (batch.wave[0] == 0).all()


def test_batches_equal_single_loads_in_order(index, pipeline) -> None:
    plans = [plan(index, step) for step in range(4)]
    one_by_one = [pipeline.load(p) for p in plans]
    ahead = list(pipeline.batches(plans))
    assert len(ahead) == 4
    for a, b in zip(one_by_one, ahead, strict=True):
        for name in ("rgb", "flow", "wave", "wave_shifted", "order"):
            assert torch.equal(getattr(a, name), getattr(b, name))


def test_an_error_in_the_input_thread_reaches_the_reader(index, pipeline) -> None:
    bad = changed(plan(index, 0), frames=plan(index, 0).frames + 10_000)
    with pytest.raises(ValueError, match="frames"):
        list(pipeline.batches([plan(index, 0), bad]))


def test_a_reader_that_stops_early_ends_the_thread(index, pipeline) -> None:
    import threading

    before = set(threading.enumerate())
    stream = pipeline.batches(plan(index, step) for step in range(1000))
    next(stream)
    assert set(threading.enumerate()) > before
    stream.close()
    assert not set(threading.enumerate()) - before


def test_evaluation_frames_need_neither_flow_nor_sound(index) -> None:
    only = InputPipeline(
        index,
        CLIP,
        audio=AUDIO,
        device=CPU,
        batch_size=5,
        num_frames=8,
        threads=1,
        flow=False,
        sound=False,
    )
    batch = only.load(plan_views(index, CLIP, clips=np.arange(5), view=0, num_views=1))
    assert isinstance(batch, ClipBatch)
    assert batch.rgb.shape == (5, 8, 48, 48, 3)
    assert batch.flow is None and batch.wave is None
    smaller = only.load(plan_views(index, CLIP, clips=np.arange(3), view=0, num_views=1))
    assert torch.equal(smaller.rgb, batch.rgb[:3])


@pytest.mark.gpu
def test_batches_are_the_cpus_while_training_is_behind(index, pipeline) -> None:
    """Training reads each batch half a second late: DALI has run several times by then, and memory was given back."""
    gpu = torch.device("cuda:0")
    plans = [plan(index, step) for step in range(50)]
    sizes = {"batch_size": 6, "num_frames": 12, "threads": 2}
    on_gpu = InputPipeline(index, CLIP, audio=AUDIO, device=gpu, **sizes)
    calm = [on_gpu.load(p).flow.cpu() for p in plans]
    late: list[dict[str, torch.Tensor]] = []
    names = ("rgb", "flow", "wave", "wave_shifted", "has_audio", "has_shift", "order")
    for number, batch in enumerate(on_gpu.batches(plans)):
        if number % 10 == 0:
            torch.cuda._sleep(1_000_000_000)  # cycles
        late.append({name: getattr(batch, name).clone() for name in names})
    for p, still, got in zip(plans, calm, late, strict=True):
        want = pipeline.load(p)
        error = (got["rgb"].cpu().float() - want.rgb.float()).square().flatten(1).mean(1)
        assert error.max() < 255**2 * 10**-3.5, "35 dB for every clip"
        assert (got["flow"].cpu() - still).abs().mean() < 0.05
        for name in ("wave", "wave_shifted"):
            torch.testing.assert_close(got[name].cpu(), getattr(want, name), rtol=0, atol=1e-4)
        for name in ("has_audio", "has_shift", "order"):
            assert torch.equal(got[name].cpu(), getattr(want, name))
