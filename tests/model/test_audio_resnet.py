"""The audio network: the video networks' contract over spectrograms."""

from __future__ import annotations

import pytest
import torch

from engine.model.audio_resnet import AudioResNet
from engine.model.resnet3d import DEPTHS, ResNet3D


def spectrograms(frames: int, mels: int) -> torch.Tensor:
    return torch.randn(2, 1, frames, mels, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("arch", list(DEPTHS))
@pytest.mark.parametrize("width", [0.125, 1.0])
def test_channels_and_depth_are_the_video_networks(arch: str, width: float) -> None:
    with torch.device("meta"):
        audio, video = AudioResNet(arch, width=width), ResNet3D(arch, 3, width=width)
    assert audio.channels == video.channels
    assert audio.feature_dim == video.feature_dim
    for name in ("layer1", "layer2", "layer3", "layer4"):
        assert len(getattr(audio, name)) == len(getattr(video, name))


def test_18_layers_have_the_parameters_of_the_2d_network_of_one_channel() -> None:
    with torch.device("meta"):
        audio = AudioResNet("r3d_18")
    # torchvision's resnet18 has 11,689,512 with its classifier of 1000 and three input channels.
    expected = 11_689_512 - (512 * 1000 + 1000) - 64 * 2 * 49
    assert sum(p.numel() for p in audio.parameters()) == expected


@pytest.mark.parametrize("arch", ["r3d_18", "r3d_50"])
@pytest.mark.parametrize(("frames", "mels"), [(16, 16), (61, 40), (33, 17)])
def test_shapes_and_gradients(arch: str, frames: int, mels: int) -> None:
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


def test_activations_are_not_altered_and_forward_is_their_average() -> None:
    network = AudioResNet("r3d_18", width=0.125).eval()
    kept = []
    network.stem.register_forward_hook(lambda _m, _x, out: kept.append(out.detach().clone()))
    x = spectrograms(32, 24)
    features = network.forward_features(x)
    assert torch.equal(features[0], kept[0])
    assert torch.equal(network(x), features[5])


def test_unknown_architecture_is_named() -> None:
    with pytest.raises(ValueError, match=r"r3d_99.*r3d_18"):
        AudioResNet("r3d_99")
