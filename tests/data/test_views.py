"""Views against float64 arithmetic in NumPy: values, the split in time, layout, and changed copies."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from engine.core.recipe import Audio, Clip
from engine.data.audio import FLOOR, LOG_MEAN, LOG_SCALE, LogMel
from engine.data.pipeline import ClipBatch
from engine.data.views import FLOW_SCALE, RGB_MEAN, RGB_STD, ViewMaker, backward, shuffled

N, T, P, SIZE = 2, 4, 3, 20
CLIP = Clip(num_frames=T, num_future_frames=P, size=SIZE)
AUDIO = Audio(num_mels=12, fft_size=128, hop=40, sample_rate=4000)
SAMPLES = 2800
"""0.7 s: 0.1 s a frame."""
ALL = ("rgb", "grey", "flow", "audio")


def batch(seed: int = 0, **fields) -> ClipBatch:
    rng = torch.Generator().manual_seed(seed)
    made = ClipBatch(
        rgb=torch.randint(0, 256, (N, T + P, SIZE, SIZE, 3), dtype=torch.uint8, generator=rng),
        flow=3 * torch.randn(N, T + P - 1, SIZE, SIZE, 2, generator=rng),
        wave=0.1 * torch.randn(N, SAMPLES, generator=rng),
        wave_shifted=0.1 * torch.randn(N, SAMPLES, generator=rng),
        has_audio=torch.tensor([True, False]),
        has_shift=torch.tensor([False, True]),
        order=torch.stack([torch.randperm(T, generator=rng) for _ in range(N)]),
        clip=np.arange(N),
    )
    return replace(made, **fields)


@pytest.fixture(scope="module")
def make() -> ViewMaker:
    return ViewMaker(CLIP, AUDIO)


def test_rgb_and_grey(make) -> None:
    b = batch()
    views = make(b, ALL)
    x = b.rgb.double().numpy() / 255
    luma, mean, std = np.array([0.299, 0.587, 0.114]), np.array(RGB_MEAN), np.array(RGB_STD)
    rgb = np.moveaxis((x - mean) / std, -1, 1)
    grey = ((x @ luma - luma @ mean) / std.mean())[:, None]
    for m, want in (("rgb", rgb), ("grey", grey)):
        assert views.clip[m].dtype == torch.float32
        np.testing.assert_allclose(views.clip[m], want[:, :, :T], atol=3e-6)
        np.testing.assert_allclose(views.future[m], want[:, :, T:], atol=3e-6)
    assert len(views) == N


def test_flow_is_in_twentieths_of_the_frame(make) -> None:
    """A motion by a twentieth of the frame becomes 1, whatever the frame's size; u comes before v."""
    b = batch()
    views = make(b, ALL)
    want = np.moveaxis(b.flow.double().numpy(), -1, 1) * FLOW_SCALE / SIZE
    np.testing.assert_allclose(views.clip["flow"], want[:, :, :T], rtol=1e-6)
    np.testing.assert_allclose(views.future["flow"], want[:, :, T:], rtol=1e-6)
    for size in (16, 40):
        right = torch.zeros(N, T + P - 1, size, size, 2)
        right[..., 0] = size / 20
        frames = torch.zeros(N, T + P, size, size, 3, dtype=torch.uint8)
        maker = ViewMaker(Clip(num_frames=T, num_future_frames=P, size=size), AUDIO)
        flow = maker(batch(rgb=frames, flow=right), ["flow"]).clip["flow"]
        assert torch.allclose(flow[:, 0], torch.tensor(1.0)) and (flow[:, 1] == 0).all()


def test_split_in_time(make) -> None:
    views = make(batch(), ALL)
    for m, channels, future in (("rgb", 3, P), ("grey", 1, P), ("flow", 2, P - 1)):
        assert views.clip[m].shape == (N, channels, T, SIZE, SIZE)
        assert views.future[m].shape == (N, channels, future, SIZE, SIZE)
    assert (views.has_audio.tolist(), views.has_shift.tolist()) == ([True, False], [False, True])
    assert torch.equal(views.order, batch().order)


def test_frames_of_the_future_do_not_enter_the_clip(make) -> None:
    """But for the last flow map, which leads from the last frame of the clip to the first of the future."""
    b = batch()
    rgb, flow = b.rgb.clone(), b.flow.clone()
    rgb[:, T:], flow[:, T:] = 7, 9.0
    one, two = make(b, ALL), make(replace(b, rgb=rgb, flow=flow), ALL)
    for m in ("rgb", "grey", "flow"):
        assert torch.equal(one.clip[m], two.clip[m])
        assert not torch.equal(one.future[m], two.future[m])


def test_layout_is_channels_last(make) -> None:
    views = make(batch(), ALL)
    for part in (views.clip, views.future):
        for m in ("rgb", "grey", "flow"):
            channels = part[m].shape[1]
            _, c, t, h, w = part[m].stride()
            assert (c, t, h, w) == (1, SIZE * SIZE * channels, SIZE * channels, channels), m
    for m in ("rgb", "grey", "flow"):
        whole = torch.cat([views.clip[m], views.future[m]], 2)
        assert whole.contiguous(memory_format=torch.channels_last_3d).stride(1) == 1


def test_sound_is_split_where_the_frames_are(make) -> None:
    views = make(batch(), ALL)
    total = SAMPLES // AUDIO.hop + 1
    heard, to_come = make.audio_frames(SAMPLES, AUDIO.hop)
    assert heard + to_come == total
    assert abs(heard - total * T / (T + P)) <= 0.5
    assert views.clip["audio"].shape == (N, 1, heard, AUDIO.num_mels)
    assert views.future["audio"].shape == (N, 1, to_come, AUDIO.num_mels)
    assert views.shifted_audio.shape == views.clip["audio"].shape
    unheard = make(replace(batch(), wave_shifted=None), ALL, misaligned=False)
    assert unheard.shifted_audio is None and torch.equal(unheard.clip["audio"], views.clip["audio"])


@pytest.mark.parametrize(
    ("frames", "future", "samples"),
    [(8, 4, 16000), (4, 3, 2800), (4, 4, 1999), (2, 2, 500), (5, 2, 3333)],
)
def test_audio_frames_foretells_the_views(frames, future, samples) -> None:
    maker = ViewMaker(Clip(num_frames=frames, num_future_frames=future, size=16), AUDIO)
    b = batch(
        rgb=torch.zeros(N, frames + future, 16, 16, 3, dtype=torch.uint8),
        flow=None,
        wave=torch.zeros(N, samples),
        wave_shifted=torch.zeros(N, samples),
        order=torch.arange(frames).repeat(N, 1),
    )
    views = maker(b, ["audio"])
    found = views.clip["audio"].shape[2], views.future["audio"].shape[2]
    assert found == maker.audio_frames(samples, AUDIO.hop)


def test_a_click_is_heard_in_the_part_in_whose_time_it_falls(make) -> None:
    """Outside the reach of one window around the border, which lies at T / (T + P) of the samples."""
    silence = (np.log(FLOOR) - LOG_MEAN) / LOG_SCALE
    border, reach = SAMPLES * T // (T + P), AUDIO.fft_size
    for place, in_clip in ((reach, True), (border - reach, True), (border + reach, False)):
        wave = torch.zeros(N, SAMPLES)
        wave[:, place] = 1.0
        views = make(batch(wave=wave, wave_shifted=wave), ["audio"])
        clip, future = views.clip["audio"], views.future["audio"]
        loud, quiet = (clip, future) if in_clip else (future, clip)
        assert (loud > silence + 0.1).any()
        torch.testing.assert_close(quiet, torch.full_like(quiet, silence))
        torch.testing.assert_close(views.shifted_audio, clip)


def test_sound_is_the_log_mel_of_its_own_wave(make) -> None:
    b, log_mel = batch(), LogMel(AUDIO)
    views = make(b, ALL)
    whole = torch.cat([views.clip["audio"], views.future["audio"]], 2)
    torch.testing.assert_close(whole, log_mel(b.wave))
    heard = views.clip["audio"].shape[2]
    torch.testing.assert_close(views.shifted_audio, log_mel(b.wave_shifted)[:, :, :heard])


@pytest.mark.parametrize("asked", [("rgb",), ("grey",), ("rgb", "flow"), ("audio",), ()])
def test_only_what_is_asked_for_is_there(make, asked) -> None:
    b = batch()
    if "flow" not in asked:
        b = replace(b, flow=None)
    if "audio" not in asked:
        b = replace(b, wave=None, wave_shifted=None)
    views, every = make(b, asked), make(batch(), ALL)
    assert set(views.clip) == set(views.future) == set(asked)
    assert (views.shifted_audio is None) == ("audio" not in asked)
    for m in asked:
        assert torch.equal(views.clip[m], every.clip[m])
        assert torch.equal(views.future[m], every.future[m])


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_shuffled_follows_the_order_of_each_clip(channels) -> None:
    clip = torch.randn(N, channels, T, 5, 3)
    order = torch.tensor([[2, 0, 3, 1], [3, 2, 1, 0]])
    got = shuffled(clip, order)
    want = np.stack([clip[i].numpy()[:, order[i].numpy()] for i in range(N)])
    assert np.array_equal(got, want)
    assert torch.equal(shuffled(clip, torch.arange(T).repeat(N, 1)), clip)


def test_backward_turns_time_round_and_the_motion_of_flow() -> None:
    clip = torch.randn(N, 2, T, 5, 3)
    turned = clip.numpy()[:, :, ::-1]
    for m in ("rgb", "grey"):
        assert np.array_equal(backward(clip, m), turned)
    assert np.array_equal(backward(clip, "flow"), -turned)
    for m in ("rgb", "grey", "flow"):
        assert torch.equal(backward(backward(clip, m), m), clip)


def test_flow_of_a_film_played_backward_is_the_backward_flow() -> None:
    """A dot that moves by a known step: forward flow of the reversed film, found from the dot's places."""
    rng = np.random.default_rng(0)
    places = rng.integers(0, 20, (T + 1, 2))  # across, down, in each of T + 1 frames
    ahead = np.diff(places, axis=0)  # T displacements (u, v)
    of_reversed = np.diff(places[::-1], axis=0)
    flow = torch.from_numpy(ahead.T.copy()).float()[None, :, :, None, None]
    want = torch.from_numpy(of_reversed.T.copy()).float()[None, :, :, None, None]
    assert torch.equal(backward(flow, "flow"), want)
