"""The video networks against torchvision's published numbers, names and layers; the audio network as they are."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from engine.model.resnet3d import DEPTHS, AudioResNet, ResNet3D, scaled

NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def on_meta(arch: str, *, pool: bool = False) -> ResNet3D:
    with torch.device("meta"):
        return ResNet3D(arch, 3, pool=pool)


def gigaflop(network: ResNet3D, *shape: int) -> float:
    with FlopCounterMode(display=False) as counter:
        network(torch.empty(shape, device="meta"))
    return counter.get_total_flops() / 1e9


def clips(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def named(conv: str, norm: str) -> list[str]:
    return [f"{conv}.weight", *(f"{norm}.{part}" for part in NORM)]


def kinetics_names(*, factorized: bool) -> set[str]:
    """The keys of torchvision's r3d_18 and r2plus1d_18 files, written out, without fc."""
    names = named("stem.0", "stem.1") + (named("stem.3", "stem.4") if factorized else [])
    for layer in (1, 2, 3, 4):
        for block in (0, 1):
            for conv in (1, 2):
                at = f"layer{layer}.{block}.conv{conv}"
                if factorized:
                    names += [*named(f"{at}.0.0", f"{at}.0.1"), f"{at}.0.3.weight"]
                    names += named("drop", f"{at}.1")[1:]
                else:
                    names += named(f"{at}.0", f"{at}.1")
        if layer > 1:
            names += named(f"layer{layer}.0.downsample.0", f"layer{layer}.0.downsample.1")
    return set(names)


def plain_basic_18(state: Mapping[str, Tensor], x: Tensor) -> list[Tensor]:
    """torchvision's r3d_18 and r2plus1d_18 in eval mode as a chain of functional calls on a state dict."""

    def norm(x: Tensor, at: str) -> Tensor:
        mean, var = state[f"{at}.running_mean"], state[f"{at}.running_var"]
        return functional.batch_norm(x, mean, var, state[f"{at}.weight"], state[f"{at}.bias"])

    def conv(x: Tensor, at: str, stride: int) -> Tensor:
        if f"{at}.weight" in state:
            return functional.conv3d(x, state[f"{at}.weight"], stride=stride, padding=1)
        flat = (1, stride, stride)
        x = functional.conv3d(x, state[f"{at}.0.weight"], stride=flat, padding=(0, 1, 1))
        x = norm(x, f"{at}.1").relu()
        along = (stride, 1, 1)
        return functional.conv3d(x, state[f"{at}.3.weight"], stride=along, padding=(1, 0, 0))

    kernel = state["stem.0.weight"]
    x = functional.conv3d(x, kernel, stride=(1, 2, 2), padding=(kernel.shape[2] // 2, 3, 3))
    x = norm(x, "stem.1").relu()
    if "stem.3.weight" in state:
        x = functional.conv3d(x, state["stem.3.weight"], padding=(1, 0, 0))
        x = norm(x, "stem.4").relu()
    outputs = [x]
    for layer in (1, 2, 3, 4):
        for block in (0, 1):
            at, stride = f"layer{layer}.{block}", 2 if layer > 1 and block == 0 else 1
            out = norm(conv(x, f"{at}.conv1.0", stride), f"{at}.conv1.1").relu()
            out = norm(conv(out, f"{at}.conv2.0", 1), f"{at}.conv2.1")
            if f"{at}.downsample.0.weight" in state:
                x = functional.conv3d(x, state[f"{at}.downsample.0.weight"], stride=stride)
                x = norm(x, f"{at}.downsample.1")
            x = (out + x).relu()
        outputs.append(x)
    return [*outputs, x.mean((2, 3, 4))]


def with_statistics(network: ResNet3D) -> ResNet3D:
    """In eval mode, with batch norms that differ from the identity."""
    generator = torch.Generator().manual_seed(1)
    for name, value in network.state_dict().items():
        if name.endswith(("running_var", "running_mean")) or value.ndim == 1:
            value.copy_(torch.rand(value.shape, generator=generator) * 0.5 + 0.5)
    return network.eval()


@pytest.mark.parametrize(
    ("arch", "published"), [("r3d_18", 33_371_472), ("r2plus1d_18", 31_505_325)]
)
def test_parameters_are_those_that_torchvision_publishes(arch: str, published: int) -> None:
    classifier = 512 * 400 + 400
    assert sum(p.numel() for p in on_meta(arch).parameters()) + classifier == published


@pytest.mark.parametrize(("arch", "published_gmac"), [("r3d_18", 40.697), ("r2plus1d_18", 40.519)])
def test_operations_are_those_that_torchvision_publishes(arch: str, published_gmac: float) -> None:
    # A multiplication with its addition is two operations here, one in torchvision's tables.
    assert gigaflop(on_meta(arch), 1, 3, 16, 112, 112) == pytest.approx(
        2 * published_gmac, rel=1e-3
    )


def test_r3d_50_with_pool_takes_41_gigaflop() -> None:
    assert gigaflop(on_meta("r3d_50", pool=True), 1, 3, 8, 224, 224) == pytest.approx(41.2, abs=0.1)


@pytest.mark.parametrize("arch", ["r3d_18", "r2plus1d_18"])
def test_names_are_those_of_kinetics_weights(arch: str) -> None:
    names = set(on_meta(arch).state_dict())
    assert names == kinetics_names(factorized=arch == "r2plus1d_18")


def test_r2plus1d_stem_and_middle_channels_are_torchvisions() -> None:
    state = on_meta("r2plus1d_18").state_dict()
    assert state["stem.0.weight"].shape == (45, 3, 1, 7, 7)
    assert state["stem.3.weight"].shape == (64, 45, 3, 1, 1)
    assert state["layer1.0.conv1.0.0.weight"].shape == (144, 64, 1, 3, 3)
    assert state["layer2.0.conv1.0.3.weight"].shape == (128, 230, 3, 1, 1)
    assert state["layer2.0.conv2.0.0.weight"].shape == (230, 128, 1, 3, 3)


@pytest.mark.parametrize("arch", ["r3d_18", "r2plus1d_18"])
def test_activations_are_those_of_a_plain_chain_of_convolutions(arch: str) -> None:
    network = with_statistics(ResNet3D(arch, 3, width=0.125))
    x = clips(2, 3, 5, 33, 24)
    with torch.no_grad():
        ours, plain = network.forward_features(x), plain_basic_18(network.state_dict(), x)
        pooled = network(x)
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(pooled, ours[5])


@pytest.mark.parametrize("arch", list(DEPTHS))
@pytest.mark.parametrize("pool", [False, True])
def test_shapes_channels_and_gradients(arch: str, pool: bool) -> None:
    network = ResNet3D(arch, 2, width=0.125, pool=pool)
    features = network.forward_features(clips(2, 2, 2, 16, 19))
    assert len(features) == 6
    assert [f.shape[1] for f in features] == [*network.channels, network.feature_dim]
    assert features[5].shape == (2, network.feature_dim)
    assert features[0].shape[2:] == ((1, 4, 5) if pool else (2, 8, 10))
    assert features[4].shape[2:] == ((1, 1, 1) if pool else (1, 1, 2))
    sum(f.square().sum() for f in features).backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert bool(parameter.grad.isfinite().all()), name
    assert bool(network.stem[0].weight.grad.any())


def test_every_parameter_gets_a_gradient_that_is_not_zero() -> None:
    network = ResNet3D("r2plus1d_18", 3, width=0.125)
    network.forward_features(clips(2, 3, 8, 32, 32))[5].square().sum().backward()
    assert all(bool(p.grad.any()) for p in network.parameters() if p.grad is not None)


def test_channels_scale_to_multiples_of_eight() -> None:
    assert [scaled(64, w) for w in (1.0, 0.25, 0.3, 0.01, 0.1875)] == [64, 16, 16, 8, 16]
    with torch.device("meta"):
        assert ResNet3D("r3d_18", 3).channels == (64, 64, 128, 256, 512)
        assert ResNet3D("r3d_50", 3).channels == (64, 256, 512, 1024, 2048)
        assert ResNet3D("r3d_34", 1, width=0.25).channels == (16, 16, 32, 64, 128)


@pytest.mark.parametrize("pool", [False, True])
def test_returned_activations_are_not_altered_later(pool: bool) -> None:
    network = ResNet3D("r3d_18", 3, width=0.125, pool=pool)
    x = clips(2, 3, 4, 32, 32)
    kept: list[Tensor] = []
    for module in (network.pool, *(getattr(network, f"layer{i}") for i in (1, 2, 3, 4))):
        module.register_forward_hook(lambda _m, _x, out: kept.append(out.detach().clone()))
    given = x.clone()
    for returned, at_once in zip(network.forward_features(x)[:5], kept, strict=True):
        assert torch.equal(returned, at_once)
    assert torch.equal(x, given)


@pytest.mark.parametrize("in_channels", [1, 3])
def test_channels_last_gives_the_same_and_stays_so(in_channels: int) -> None:
    network = ResNet3D("r3d_18", in_channels, width=0.125, pool=True).train()
    x = clips(2, in_channels, 5, 40, 33)
    plain = network.forward_features(x)
    network = network.to(memory_format=torch.channels_last_3d)
    last = network.forward_features(x.to(memory_format=torch.channels_last_3d))
    for a, b in zip(plain, last, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert all(a.is_contiguous(memory_format=torch.channels_last_3d) for a in last[1:5])


def test_seed_determines_the_weights() -> None:
    def draw(seed: int) -> Tensor:
        torch.manual_seed(seed)
        network = ResNet3D("r3d_18", 3, width=0.125)
        return torch.cat([p.detach().flatten() for p in network.parameters()])

    assert torch.equal(draw(3), draw(3))
    assert not torch.equal(draw(3), draw(4))


def test_weights_follow_he_and_no_branch_starts_at_zero() -> None:
    torch.manual_seed(0)
    network = ResNet3D("r3d_18", 3, width=0.5)
    kernel = network.layer3[1].conv1[0].weight
    assert kernel.std().item() == pytest.approx((2 / (kernel.shape[0] * 27)) ** 0.5, rel=0.02)
    norms = [m for m in network.modules() if isinstance(m, torch.nn.BatchNorm3d)]
    assert all(bool((m.weight == 1).all()) and bool((m.bias == 0).all()) for m in norms)


def test_average_is_float32_under_bf16() -> None:
    network = ResNet3D("r3d_18", 3, width=0.125)
    with torch.autocast("cpu", torch.bfloat16):
        features = network.forward_features(clips(2, 3, 2, 16, 16))
    assert features[4].dtype == torch.bfloat16
    assert features[5].dtype == torch.float32


@pytest.mark.parametrize(
    ("arch", "in_channels", "width", "words"),
    [
        ("resnet18", 3, 1.0, "resnet18.*r3d_18"),
        ("r3d_18", 0, 1.0, "in_channels"),
        ("r3d_18", 3, 0.0, "width"),
        ("r3d_18", 3, float("inf"), "width"),
    ],
)
def test_mistakes_are_named(arch: str, in_channels: int, width: float, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ResNet3D(arch, in_channels, width=width)


def test_strides_and_depths_keep_time_and_space_of_small_clips() -> None:
    network = ResNet3D(
        "r3d_18",
        3,
        width=0.125,
        depths=(1, 2, 1, 1),
        time_strides=(1, 1, 1, 2, 1),
        space_strides=(4, 2, 2, 1, 1),
    )
    maps = network.forward_features(torch.randn(2, 3, 8, 48, 48))
    assert [tuple(m.shape[2:]) for m in maps[:5]] == [
        (8, 12, 12),
        (8, 6, 6),
        (8, 3, 3),
        (4, 3, 3),
        (4, 3, 3),
    ]
    assert [len(getattr(network, f"layer{i}")) for i in (1, 2, 3, 4)] == [1, 2, 1, 1]
    factorized = ResNet3D("r2plus1d_18", 3, width=0.125, time_strides=(2, 1, 1, 2, 2))
    assert factorized.forward_features(torch.randn(1, 3, 8, 32, 32))[0].shape[2:] == (4, 16, 16)


@pytest.mark.parametrize("depths", [(1, 1), (1, 0, 1, 1)])
def test_depths_that_can_not_be(depths: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="depths"):
        ResNet3D("r3d_18", 3, depths=depths)


@pytest.mark.parametrize("arch", ["r3d_18", "r2plus1d_18"])
def test_a_motion_stem_does_not_answer_to_what_stands_still(arch: str) -> None:
    torch.manual_seed(0)
    plain = ResNet3D(arch, 3, width=0.125)
    torch.manual_seed(0)
    network = ResNet3D(arch, 3, width=0.125, motion_stem=0.5)
    last = [module for module in network.stem if isinstance(module, torch.nn.Conv3d)][-1]
    still = torch.randn(2, last.in_channels, 1, 32, 32).expand(-1, -1, 8, -1, -1)
    moving = torch.randn(2, last.in_channels, 8, 32, 32)
    answers = [last(clip)[:, :, 1:-1].detach().std((0, 2, 3, 4)) for clip in (still, moving)]
    half = last.out_channels // 2
    assert answers[0][:half].max() < 1e-5 < answers[0][half:].min()
    assert answers[1][:half].mean() == pytest.approx(answers[1][half:].mean().item(), rel=0.5)
    for (name, one), other in zip(plain.named_parameters(), network.parameters(), strict=True):
        if not name.startswith("stem"):
            torch.testing.assert_close(one, other, rtol=0, atol=0)


def spectrograms(frames: int, mels: int) -> torch.Tensor:
    return torch.randn(2, 1, frames, mels, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("arch", list(DEPTHS))
@pytest.mark.parametrize("width", [0.125, 1.0])
def test_audio_has_the_channels_and_depth_of_the_video_networks(arch: str, width: float) -> None:
    with torch.device("meta"):
        audio, video = AudioResNet(arch, width=width), ResNet3D(arch, 3, width=width)
    assert audio.channels == video.channels
    assert audio.feature_dim == video.feature_dim
    for name in ("layer1", "layer2", "layer3", "layer4"):
        assert len(getattr(audio, name)) == len(getattr(video, name))


def test_18_audio_layers_have_the_parameters_of_the_2d_network_of_one_channel() -> None:
    with torch.device("meta"):
        audio = AudioResNet("r3d_18")
    # torchvision's resnet18 has 11,689,512 with its classifier of 1000 and three input channels.
    expected = 11_689_512 - (512 * 1000 + 1000) - 64 * 2 * 49
    assert sum(p.numel() for p in audio.parameters()) == expected


@pytest.mark.parametrize("arch", ["r3d_18", "r3d_50"])
@pytest.mark.parametrize(("frames", "mels"), [(16, 16), (61, 40), (33, 17)])
def test_audio_shapes_and_gradients(arch: str, frames: int, mels: int) -> None:
    network = AudioResNet(arch, width=0.125)
    features = network.forward_features(spectrograms(frames, mels))
    assert [f.shape[1] for f in features] == [*network.channels, network.feature_dim]
    expected = frames, mels
    for activation, halved in zip(features[:5], (True, False, True, True, True), strict=True):
        if halved:
            expected = (expected[0] + 1) // 2, (expected[1] + 1) // 2
        assert activation.shape[2:] == expected
    torch.testing.assert_close(features[5], features[4].mean((2, 3)))
    sum(f.square().sum() for f in features).backward()
    assert all(bool(p.grad.isfinite().all()) for p in network.parameters() if p.grad is not None)
    assert all(p.grad is not None for p in network.parameters())


def test_audio_activations_are_not_altered_and_forward_is_their_average() -> None:
    network = AudioResNet("r3d_18", width=0.125).eval()
    kept = []
    network.stem.register_forward_hook(lambda _m, _x, out: kept.append(out.detach().clone()))
    x = spectrograms(32, 24)
    features = network.forward_features(x)
    assert torch.equal(features[0], kept[0])
    assert torch.equal(network(x), features[5])


def test_unknown_audio_architecture_is_named() -> None:
    with pytest.raises(ValueError, match=r"r3d_99.*r3d_18"):
        AudioResNet("r3d_99")


@pytest.mark.parametrize("arch", ["r3d_18", "r2plus1d_18"])
@pytest.mark.parametrize("size", [3, 5])
def test_a_smaller_stem_keeps_every_size_behind_it(arch: str, size: int) -> None:
    clips = torch.rand(2, 3, 4, 16, 16)
    usual, small = ResNet3D(arch, 3, width=0.125), ResNet3D(arch, 3, width=0.125, stem_size=size)
    kernels = [m.kernel_size for m in small.stem if isinstance(m, torch.nn.Conv3d)]
    assert kernels[0] == (3 if arch == "r3d_18" else 1, size, size)
    shapes = [x.shape for x in small.forward_features(clips)]
    assert shapes == [x.shape for x in usual.forward_features(clips)]
