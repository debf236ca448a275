"""RGB and grey clips against float64 arithmetic in NumPy, on the CPU path and in the Triton kernel."""

import inspect
import os
import sys

import numpy as np
import pytest
import torch
import torch._dynamo.testing

import kernels
from kernels import reference

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICES = ["cpu"] + [pytest.param("cuda", marks=pytest.mark.gpu)] * torch.cuda.is_available()
SHAPES = [(1, 1, 1, 1, 3), (2, 3, 5, 7, 3), (3, 1, 9, 16, 3), (1, 2, 63, 3, 3), (2, 4, 16, 8, 3)]
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


@pytest.fixture(params=DEVICES)
def device(request):
    return request.param


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Blocks so small that odd shapes take several."""
    if INTERPRETED:
        monkeypatch.setattr(sys.modules["kernels.clip_views"], "BLOCK", 64)


def make(shape, *, device="cpu", seed=0):
    """Frames that hold every byte, and a mean and std that differ between channels."""
    rng = torch.Generator().manual_seed(seed)
    frames = torch.randint(0, 256, shape, dtype=torch.uint8, generator=rng)
    frames.view(-1)[:: max(1, frames.numel() // 256)] = torch.arange(
        len(frames.view(-1)[:: max(1, frames.numel() // 256)])
    ).to(torch.uint8)
    mean, std = torch.tensor([0.43, 0.39, 0.37]), torch.tensor([0.22, 0.17, 0.29])
    return frames.to(device), mean.to(device), std.to(device)


def check(frames, mean, std, dtype=torch.float32):
    """The op's views against the definition in float64."""
    rgb, grey = kernels.clip_views(frames, mean, std, dtype=dtype)
    x, mean, std = (v.cpu().double().numpy() for v in (frames, mean, std))
    luma = np.array([0.299, 0.587, 0.114])
    want_rgb = np.moveaxis((x / 255 - mean) / std, -1, 1)
    want_grey = ((x / 255) @ luma - mean @ luma)[:, None] / std.mean()
    for got, want in ((rgb, want_rgb), (grey, want_grey)):
        assert got.dtype == dtype and tuple(got.shape) == want.shape
        assert got.is_contiguous(memory_format=torch.channels_last_3d)
        assert got.stride(1) == 1, "a layout that torch reads as channels-last"
        np.testing.assert_allclose(
            got.cpu().double(), want, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype]
        )


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES)
def test_odd_shapes_and_dtypes(shape, dtype, device, poison):
    check(*make(shape, device=device), dtype=dtype)
    assert shape in poison, "the results were not allocated through the poisoned functions"


@pytest.mark.parametrize(
    "cut",
    [
        lambda x: x[:, 1:4],
        lambda x: x[::2],
        lambda x: x[:, :, 1:6, 2:7],
        lambda x: x.flip(1).transpose(2, 3),
        lambda x: x[:, :1].expand(-1, 3, -1, -1, -1),
        lambda x: x[..., [2, 1, 0]].movedim(-1, 1).contiguous().movedim(1, -1),
    ],
    ids=["some frames", "some clips", "crop", "transposed", "expanded", "channels first"],
)
def test_any_strides(cut, device, poison):
    frames, mean, std = make((3, 5, 7, 8, 3), device=device)
    check(cut(frames), mean, std)
    check(frames, mean.repeat(2)[::2], std.flip(0).repeat_interleave(2)[::2])


def test_no_clips(device):
    frames, mean, std = make((0, 3, 4, 5, 3), device=device)
    rgb, grey = kernels.clip_views(frames, mean, std)
    assert rgb.shape == (0, 3, 3, 4, 5) and grey.shape == (0, 1, 3, 4, 5)


def test_a_grey_frame_has_equal_views(device):
    """With one mean and one std, a colourless frame's luma is each of its channels."""
    frames = torch.arange(256, dtype=torch.uint8, device=device).view(1, 1, 16, 16, 1)
    half = torch.full((3,), 0.5, device=device)
    rgb, grey = kernels.clip_views(frames.expand(-1, -1, -1, -1, 3), half, half / 2)
    torch.testing.assert_close(rgb, grey.expand_as(rgb), rtol=1e-6, atol=1e-6)


def test_same_bits_twice_and_for_each_clip_alone(device):
    frames, mean, std = make((3, 2, 9, 11, 3), device=device)
    first, again = (kernels.clip_views(frames, mean, std) for _ in range(2))
    alone = kernels.clip_views(frames[1:2], mean, std)
    for a, b, c in zip(first, again, alone, strict=True):
        assert torch.equal(a, b) and torch.equal(a[1:2], c)


def test_opcheck_and_one_graph(device):
    frames, mean, std = make((2, 3, 5, 4, 3), device=device)
    torch.library.opcheck(kernels._clip_views, (frames, mean, std, torch.bfloat16))
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda *x: [v * 2 for v in kernels.clip_views(*x)], backend=counter, fullgraph=True
    )
    for scale in (1.0, 0.5):
        got = compiled(frames, mean * scale, std)
        want = kernels.clip_views(frames, mean * scale, std)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b * 2)
    assert counter.frame_count == 1


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"frames": torch.zeros(2, 3, 4, 5, 1, dtype=torch.uint8)}, r"frames must be uint8 \(N, F"),
        ({"frames": torch.zeros(2, 3, 4, 5, 3)}, "frames must be uint8.*not torch.float32"),
        ({"mean": torch.zeros(1)}, r"mean must be float32 \(3,\)"),
        ({"std": torch.ones(3, dtype=torch.float64)}, "std must be float32.*not torch.float64"),
        ({"dtype": torch.float64}, "dtype must be float32, bfloat16 or float16"),
    ],
)
def test_mistakes_are_named(changes, message):
    frames, mean, std = make((2, 3, 4, 5, 3))
    with pytest.raises(ValueError, match=message):
        kernels.clip_views(**{"frames": frames, "mean": mean, "std": std, **changes})


def test_the_reference_is_what_a_cpu_runs():
    frames, mean, std = make((2, 3, 5, 7, 3))
    assert inspect.signature(reference.clip_views) == inspect.signature(kernels.clip_views)
    for a, b in zip(
        reference.clip_views(frames, mean, std), kernels.clip_views(frames, mean, std), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_triton_kernel_in_the_interpreter(interpret):
    interpret(__file__)
