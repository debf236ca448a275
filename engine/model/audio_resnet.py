"""A 2-D residual network over log-mel spectrograms, of the depth and channels of a video network.

Shape letters: N clips, F audio frames, D features.
"""

from __future__ import annotations

from torch import nn

from engine.model.resnet3d import (
    SPACE_STRIDES,
    STEM_CHANNELS,
    Layers,
    NetworkSettings,
    ResNet,
    Stride,
    Strides,
    scaled,
    stage_planes,
)


def _conv2d(inputs: int, outputs: int, middle: int, stride: Stride) -> nn.Module:
    return nn.Conv2d(inputs, outputs, 3, stride=stride[1], padding=1, bias=False)


def _point2d(inputs: int, outputs: int, stride: Stride) -> nn.Module:
    return nn.Conv2d(inputs, outputs, 1, stride=stride[1], bias=False)


class AudioResNet(ResNet):
    """A network over log-mel spectrograms (N, 1, F, mels) of floats, for any F and mels >= 16.

    ``arch`` and ``width`` are those of ``ResNet3D``; depth, kind of block and ``channels`` equal
    that network's, so that activations can be compared through their global averages. The stem
    (7x7) and the stages 2 to 4 halve F and mels each, or divide them by ``space_strides``; there is no
    pool. He init from torch's global generator. Raises ValueError for an unknown ``arch`` or a bad width.
    """

    def __init__(
        self,
        arch: str,
        *,
        width: float = 1.0,
        depths: tuple[int, ...] = (),
        space_strides: Strides = SPACE_STRIDES,
    ) -> None:
        stage_planes(arch, width)  # a bad arch or width ends here, before any layer is made
        outputs = scaled(STEM_CHANNELS, width)
        stem = nn.Sequential(
            nn.Conv2d(1, outputs, 7, stride=space_strides[0], padding=3, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(inplace=True),
        )
        super().__init__(
            arch,
            stem,
            in_channels=1,
            width=width,
            layers=Layers(conv=_conv2d, point=_point2d, norm=nn.BatchNorm2d),
            pool=nn.Identity(),
            depths=depths,
            space_strides=space_strides,
        )


def audio_network(settings: NetworkSettings) -> AudioResNet:
    """The audio network beside video networks of these settings."""
    return AudioResNet(
        settings.arch,
        width=settings.width,
        depths=settings.depths,
        space_strides=settings.space_strides,
    )
