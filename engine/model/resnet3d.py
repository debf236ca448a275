"""3D and (2+1)D residual networks for clips, and a 2-D one for sound, of one trunk.

Shape letters: N clips, C channels, T frames, H W pixels, F audio frames, D features. Parameter names are those of
torchvision's video networks (``stem.0.weight``, ``layer1.0.conv1.0.weight``, ...), so that weights
trained on Kinetics with them load unchanged; see ``engine.model.pretrained``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from engine.core.recipe import Model

DEPTHS: dict[str, tuple[int, int, int, int]] = {
    "r3d_18": (2, 2, 2, 2),
    "r3d_34": (3, 4, 6, 3),
    "r3d_50": (3, 4, 6, 3),
    "r2plus1d_18": (2, 2, 2, 2),
    "r2plus1d_50": (3, 4, 6, 3),
}
"""Residual blocks per stage, by architecture."""

STEM_CHANNELS = 64
STEM_FRAMES = {"r3d_18": 3, "r3d_34": 3, "r3d_50": 7}
"""Frames that a 3D stem's kernel covers: torchvision's choice, and Hara et al.'s for 50 layers."""
STEM_MIDDLE = 45
"""Channels between the two convolutions of the (2+1)D stem, at width 1."""
STAGE_PLANES = (64, 128, 256, 512)
Strides = tuple[int, int, int, int, int]
"""Of the stem and of the first block of each stage."""
TIME_STRIDES: Strides = (1, 1, 2, 2, 2)
SPACE_STRIDES: Strides = (2, 1, 2, 2, 2)
"""The papers' and torchvision's."""


def is_bottleneck(arch: str) -> bool:
    """Whether an architecture's blocks are 1x1x1, 3x3x3, 1x1x1, with 4 times the channels out."""
    return arch.endswith("_50")


def scaled(channels: int, width: float) -> int:
    """Channels times width, rounded to the nearest multiple of 8, at least 8."""
    return max(8, int(channels * width / 8 + 0.5) * 8)


def stage_planes(arch: str, width: float) -> tuple[int, ...]:
    """Channels inside the four stages' blocks; ValueError for an unknown arch or a bad width."""
    if arch not in DEPTHS:
        raise ValueError(f"unknown architecture {arch!r}; use one of {', '.join(DEPTHS)}")
    if not 0.0 < width < float("inf"):
        raise ValueError(
            f"{arch}: width is {width}; it must be a positive factor, such as 1.0 or 0.25"
        )
    return tuple(scaled(planes, width) for planes in STAGE_PLANES)


def factorized_channels(inputs: int, planes: int) -> int:
    """Channels inside a (2+1)D convolution that give it as many parameters as a 3x3x3 one.

    Tran et al., "A Closer Look at Spatiotemporal Convolutions for Action Recognition", Sec. 3.5. As
    in torchvision, ``inputs`` are the block's channels, for every convolution in the block.
    """
    return (inputs * planes * 27) // (inputs * 9 + planes * 3)


Stride = tuple[int, int]
"""In time, and along both axes of space."""


@dataclass(frozen=True)
class Layers:
    """Parts of a residual block, so that 2-D, 3D and (2+1)D networks share the blocks."""

    conv: Callable[[int, int, int, Stride], nn.Module]
    """(inputs, outputs, channels inside a (2+1)D one, stride) -> convolution of 3 per axis."""
    point: Callable[[int, int, Stride], nn.Module]
    """(inputs, outputs, stride) -> convolution over single positions."""
    norm: Callable[[int], nn.Module]


def _conv3d(inputs: int, outputs: int, middle: int, stride: Stride) -> nn.Module:
    time, space = stride
    return nn.Conv3d(inputs, outputs, 3, stride=(time, space, space), padding=1, bias=False)


def _conv2plus1d(
    inputs: int, outputs: int, middle: int, stride: Stride, *, size: int = 3
) -> nn.Sequential:
    time, space = stride
    stride_3d, padding = (1, space, space), (0, size // 2, size // 2)
    return nn.Sequential(
        nn.Conv3d(inputs, middle, (1, size, size), stride_3d, padding, bias=False),
        nn.BatchNorm3d(middle),
        nn.ReLU(inplace=True),
        nn.Conv3d(middle, outputs, (3, 1, 1), stride=(time, 1, 1), padding=(1, 0, 0), bias=False),
    )


def _point3d(inputs: int, outputs: int, stride: Stride) -> nn.Module:
    time, space = stride
    return nn.Conv3d(inputs, outputs, 1, stride=(time, space, space), bias=False)


def _conv2d(inputs: int, outputs: int, middle: int, stride: Stride) -> nn.Module:
    return nn.Conv2d(inputs, outputs, 3, stride=stride[1], padding=1, bias=False)


def _point2d(inputs: int, outputs: int, stride: Stride) -> nn.Module:
    return nn.Conv2d(inputs, outputs, 1, stride=stride[1], bias=False)


LAYERS_3D = Layers(conv=_conv3d, point=_point3d, norm=nn.BatchNorm3d)
LAYERS_2PLUS1D = Layers(conv=_conv2plus1d, point=_point3d, norm=nn.BatchNorm3d)
LAYERS_2D = Layers(conv=_conv2d, point=_point2d, norm=nn.BatchNorm2d)


class ResidualBlock(nn.Module):
    """A residual block, basic or bottleneck: relu(branch(x) + shortcut(x)).

    The shortcut is a strided convolution over single positions where the shape changes, else the
    identity. In-place operations touch only what the block itself made, never its input.
    """

    conv3: nn.Sequential | None

    def __init__(
        self, inputs: int, planes: int, *, layers: Layers, stride: Stride, bottleneck: bool
    ) -> None:
        super().__init__()
        middle = factorized_channels(inputs, planes)
        outputs = planes * (4 if bottleneck else 1)

        def normed(layer: nn.Module, channels: int, *, relu: bool = True) -> nn.Sequential:
            return nn.Sequential(
                layer, layers.norm(channels), *([nn.ReLU(inplace=True)] if relu else [])
            )

        if bottleneck:
            self.conv1 = normed(layers.point(inputs, planes, (1, 1)), planes)
            self.conv2 = normed(layers.conv(planes, planes, middle, stride), planes)
            self.conv3 = normed(layers.point(planes, outputs, (1, 1)), outputs, relu=False)
        else:
            self.conv1 = normed(layers.conv(inputs, planes, middle, stride), planes)
            self.conv2 = normed(layers.conv(planes, planes, middle, (1, 1)), planes, relu=False)
            self.conv3 = None
        self.downsample: nn.Sequential | None = None
        if stride != (1, 1) or inputs != outputs:
            self.downsample = normed(layers.point(inputs, outputs, stride), outputs, relu=False)

    def forward(self, x: Tensor) -> Tensor:
        """The block's output, of its input's size over the stride, rounded up."""
        out: Tensor = self.conv2(self.conv1(x))
        if self.conv3 is not None:
            out = self.conv3(out)
        out += x if self.downsample is None else self.downsample(x)
        return torch.relu_(out)


class ResNet(nn.Module):
    """A stem, four stages of residual blocks and a global average: every modality's network.

    ``channels`` are those of the stem and the four stages; ``feature_dim`` is the last of them.
    """

    def __init__(
        self,
        arch: str,
        stem: nn.Sequential,
        *,
        in_channels: int,
        width: float,
        layers: Layers,
        pool: nn.Module,
        depths: tuple[int, ...] = (),
        time_strides: Strides = TIME_STRIDES,
        space_strides: Strides = SPACE_STRIDES,
    ) -> None:
        super().__init__()
        planes = stage_planes(arch, width)
        depths = depths or DEPTHS[arch]
        if len(depths) != 4 or min(depths) < 1:
            raise ValueError(f"{arch}: depths are {depths}; give four numbers, each at least 1")
        expansion = 4 if is_bottleneck(arch) else 1
        self.arch = arch
        self.in_channels = in_channels
        self.width = width
        self.channels: tuple[int, ...] = (
            scaled(STEM_CHANNELS, width),
            *(p * expansion for p in planes),
        )
        self.feature_dim: int = self.channels[4]
        self.stem = stem
        self.pool = pool
        stages = []
        for stage, (depth, inside) in enumerate(zip(depths, planes, strict=True)):
            stride = (time_strides[stage + 1], space_strides[stage + 1])
            blocks = [
                ResidualBlock(
                    self.channels[stage if block == 0 else stage + 1],
                    inside,
                    layers=layers,
                    stride=stride if block == 0 else (1, 1),
                    bottleneck=is_bottleneck(arch),
                )
                for block in range(depth)
            ]
            stages.append(nn.Sequential(*blocks))
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        _initialize(self)

    def forward_features(self, x: Tensor) -> list[Tensor]:
        """The six activations that the tasks read: stem, the four stages, and their average (N, D).

        Activation 0 is what enters the first stage, that is the stem's output after the pool where
        there is one: it is an eighth of the size there, and distils more cheaply. The first five
        have the network's compute dtype, the average at least float32. None of them is altered
        after it is returned.
        """
        activations: list[Tensor] = [self.pool(self.stem(x))]
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            activations.append(stage(activations[-1]))
        last = activations[-1]
        # A plain mean: the backward of adaptive average pooling is not deterministic on CUDA.
        dtype = torch.promote_types(last.dtype, torch.float32)
        activations.append(last.mean(dim=tuple(range(2, last.ndim)), dtype=dtype))
        return activations

    def last_grid(self, size: tuple[int, ...]) -> tuple[int, ...]:
        """Positions of the last stage along each axis, for one input of ``size``: (C, T, H, W), or (1, F, mels)."""
        shadow = copy.deepcopy(self).to("meta").eval()
        return tuple(shadow.forward_features(torch.empty(1, *size, device="meta"))[4].shape[2:])

    def forward(self, x: Tensor) -> Tensor:
        """The features of clips: the global average (N, D) of the last stage."""
        return self.forward_features(x)[-1]


class ResNet3D(ResNet):
    """A video network over clips (N, C, T, H, W) of floats, for any T >= 2 and H, W >= 16.

    ``arch`` is in torchvision's naming: ``r3d_18``, ``r3d_34``, ``r3d_50`` with 3x3x3 convolutions,
    ``r2plus1d_18``, ``r2plus1d_50`` with them factorized (Tran et al., arXiv 1711.11248). The
    18-layer ones at width 1 and without pool are torchvision's, less ``fc``. ``width`` multiplies
    all channels, each rounded to a multiple of 8. ``pool`` adds a 3x3x3 max pool of stride 2 after
    the stem, as in the ImageNet networks that r3d_* can be inflated from. ``r3d_50`` with pool is
    Hara et al.'s 3D ResNet-50, stem 7x7x7 (arXiv 1711.09577): 41 GFLOP forward for a clip of
    8x224x224, against 226 without pool. The pool's backward is not bit-deterministic on CUDA.

    The stem halves H and W; the stages 2 to 4 halve T, H and W each (rounded up), unless
    ``time_strides`` and ``space_strides`` say otherwise: five numbers each, of the stem and the four
    stages. ``depths`` are the blocks of each stage, where they are not those of ``arch``; ``stem_size`` is the
    height and width of the stem's kernel. Weights are drawn
    by He et al. from torch's global generator, so that ``torch.manual_seed`` determines them. For
    speed call ``.to(memory_format=torch.channels_last_3d)``. Raises ValueError for an unknown
    ``arch`` or a bad number.
    """

    def __init__(
        self,
        arch: str,
        in_channels: int,
        *,
        width: float = 1.0,
        pool: bool = False,
        depths: tuple[int, ...] = (),
        time_strides: Strides = TIME_STRIDES,
        space_strides: Strides = SPACE_STRIDES,
        stem_size: int = 7,
        motion_stem: float = 0.0,
    ) -> None:
        stage_planes(arch, width)  # a bad arch or width ends here, before any layer is made
        if in_channels < 1:
            raise ValueError(f"{arch}: in_channels is {in_channels}; a clip has at least one")
        factorized = arch.startswith("r2plus1d")
        stride = (time_strides[0], space_strides[0])
        super().__init__(
            arch,
            _stem2plus1d(in_channels, width, stride, size=stem_size)
            if factorized
            else _stem3d(in_channels, width, stride, frames=STEM_FRAMES[arch], size=stem_size),
            in_channels=in_channels,
            width=width,
            layers=LAYERS_2PLUS1D if factorized else LAYERS_3D,
            pool=nn.MaxPool3d(3, stride=2, padding=1) if pool else nn.Identity(),
            depths=depths,
            time_strides=time_strides,
            space_strides=space_strides,
        )
        if motion_stem:
            _start_from_motion(self.stem, motion_stem)


def video_network(settings: Model, in_channels: int = 3, *, pictures: bool = True) -> ResNet3D:
    """A network as a recipe's ``[model]`` or a file's card says; without ``pictures`` it sees flow, which is motion."""
    return ResNet3D(
        settings.arch,
        in_channels,
        width=settings.width,
        pool=settings.pool,
        depths=settings.depths,
        time_strides=settings.time_strides,
        space_strides=settings.space_strides,
        stem_size=settings.stem_size,
        motion_stem=settings.motion_stem if pictures else 0.0,
    )


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
            layers=LAYERS_2D,
            pool=nn.Identity(),
            depths=depths,
            space_strides=space_strides,
        )


def audio_network(settings: Model) -> AudioResNet:
    """The audio network beside video networks of these settings."""
    return AudioResNet(
        settings.arch,
        width=settings.width,
        depths=settings.depths,
        space_strides=settings.space_strides,
    )


def _stem3d(inputs: int, width: float, stride: Stride, *, frames: int, size: int) -> nn.Sequential:
    outputs, (time, space) = scaled(STEM_CHANNELS, width), stride
    kernel, padding = (frames, size, size), (frames // 2, size // 2, size // 2)
    return nn.Sequential(
        nn.Conv3d(
            inputs, outputs, kernel, stride=(time, space, space), padding=padding, bias=False
        ),
        nn.BatchNorm3d(outputs),
        nn.ReLU(inplace=True),
    )


def _stem2plus1d(inputs: int, width: float, stride: Stride, *, size: int) -> nn.Sequential:
    outputs, middle = scaled(STEM_CHANNELS, width), max(8, round(STEM_MIDDLE * width))
    convolution = _conv2plus1d(inputs, outputs, middle, stride, size=size)
    return nn.Sequential(*convolution, nn.BatchNorm3d(outputs), nn.ReLU(inplace=True))


@torch.no_grad()
def _start_from_motion(stem: nn.Sequential, share: float) -> None:
    """Take the mean over time off the kernels of a share of the stem's channels; their scale is kept on average."""
    weight = [module for module in stem if isinstance(module, nn.Conv3d)][-1].weight
    frames, first = weight.shape[2], weight[: round(len(weight) * share)]
    first -= first.mean(2, keepdim=True)
    first *= (frames / (frames - 1)) ** 0.5


def _initialize(network: nn.Module) -> None:
    """He et al.'s normal draw for convolutions; every batch norm starts at scale 1, shift 0.

    The last scale of a block is 1 too, not 0: the features of an untrained network are compared
    with others.
    """
    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.Conv3d)):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
