"""Loading pretrained weights: whole, inflated, or an error; never silently in part."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from engine.model.pretrained import load_pretrained
from engine.model.resnet3d import DEPTHS, ResNet3D

State = dict[str, Tensor]
WIDTH = 0.125
PLANES = (8, 16, 32, 64)


def image_state(depths: tuple[int, ...], *, bottleneck: bool, counters: bool = False) -> State:
    """Random weights under the names and shapes of torchvision's image ResNets, at WIDTH."""
    generator = torch.Generator().manual_seed(0)
    state: State = {}

    def conv(name: str, *shape: int) -> None:
        scale = (2 / (shape[1] * shape[2] * shape[3])) ** 0.5
        state[f"{name}.weight"] = torch.randn(shape, generator=generator) * scale

    def norm(name: str, size: int) -> None:
        for part in ("weight", "running_var"):
            state[f"{name}.{part}"] = torch.rand(size, generator=generator) + 0.5
        for part in ("bias", "running_mean"):
            state[f"{name}.{part}"] = torch.randn(size, generator=generator) * 0.1
        if counters:
            state[f"{name}.num_batches_tracked"] = torch.tensor(7)

    conv("conv1", 8, 3, 7, 7)
    norm("bn1", 8)
    inputs = 8
    for layer, (depth, planes) in enumerate(zip(depths, PLANES, strict=True), start=1):
        outputs = planes * (4 if bottleneck else 1)
        for block in range(depth):
            at = f"layer{layer}.{block}"
            sizes = [(1, inputs, planes), (3, planes, planes), (1, planes, outputs)]
            if not bottleneck:
                sizes = [(3, inputs, planes), (3, planes, planes)]
            for i, (kernel, a, b) in enumerate(sizes, start=1):
                conv(f"{at}.conv{i}", b, a, kernel, kernel)
                norm(f"{at}.bn{i}", b)
            if block == 0 and (layer > 1 or inputs != outputs):
                conv(f"{at}.downsample.0", outputs, inputs, 1, 1)
                norm(f"{at}.downsample.1", outputs)
            inputs = outputs
    state["fc.weight"] = torch.randn(1000, inputs, generator=generator)
    state["fc.bias"] = torch.zeros(1000)
    return state


def image_network(state: State, x: Tensor, *, pool: bool) -> list[Tensor]:
    """An image ResNet in eval mode as a chain of functional calls: stem (pooled) and stages."""

    def norm(x: Tensor, at: str) -> Tensor:
        mean, var = state[f"{at}.running_mean"], state[f"{at}.running_var"]
        return functional.batch_norm(x, mean, var, state[f"{at}.weight"], state[f"{at}.bias"])

    x = norm(functional.conv2d(x, state["conv1.weight"], stride=2, padding=3), "bn1").relu()
    if pool:
        x = functional.max_pool2d(x, 3, stride=2, padding=1)
    outputs = [x]
    for layer in (1, 2, 3, 4):
        block = 0
        while (at := f"layer{layer}.{block}") + ".conv1.weight" in state:
            stride = 2 if layer > 1 and block == 0 else 1
            last = 3 if f"{at}.conv3.weight" in state else 2
            out = x
            for i in range(1, last + 1):
                kernel = state[f"{at}.conv{i}.weight"]
                step = stride if i == last - 1 else 1  # the 3x3 of a bottleneck, else the first
                out = functional.conv2d(out, kernel, stride=step, padding=kernel.shape[2] // 2)
                out = norm(out, f"{at}.bn{i}")
                out = out.relu() if i < last else out
            if f"{at}.downsample.0.weight" in state:
                x = functional.conv2d(x, state[f"{at}.downsample.0.weight"], stride=stride)
                x = norm(x, f"{at}.downsample.1")
            x = (out + x).relu()
            block += 1
        outputs.append(x)
    return outputs


def inflated(arch: str, *, pool: bool = False, in_channels: int = 3) -> tuple[ResNet3D, State]:
    state = image_state(DEPTHS[arch], bottleneck=arch == "r3d_50")
    network = ResNet3D(arch, in_channels, width=WIDTH, pool=pool).eval()
    report = load_pretrained(network, state, where="image.pt")
    assert report.inflated
    assert report.ignored == ("fc.weight", "fc.bias")
    return network, state


def frame(size: int) -> Tensor:
    return torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize(
    ("arch", "pool", "frames", "stages"),
    # Zeros beyond the ends reach 54 frames in by the last stage of r3d_18, farther in the others.
    [("r3d_18", False, 112, 5), ("r3d_34", False, 48, 3), ("r3d_50", True, 64, 3)],
)
def test_still_video_gives_the_images_activations(
    arch: str, pool: bool, frames: int, stages: int
) -> None:
    network, state = inflated(arch, pool=pool)
    still = frame(32)
    with torch.no_grad():
        video = network.forward_features(still.unsqueeze(2).expand(-1, -1, frames, -1, -1))
    for ours, image in list(zip(video, image_network(state, still, pool=pool), strict=False))[
        :stages
    ]:
        middle = ours[:, :, ours.shape[2] // 2]
        torch.testing.assert_close(middle, image, rtol=1e-3, atol=1e-4)


def test_grey_stem_sees_a_grey_image_as_the_rgb_one_does() -> None:
    grey, _ = inflated("r3d_18", in_channels=1)
    rgb, _ = inflated("r3d_18")
    x = torch.rand(1, 1, 4, 32, 32, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        torch.testing.assert_close(grey(x), rgb(x.expand(-1, 3, -1, -1, -1)), rtol=1e-4, atol=1e-5)


def test_flow_stem_takes_the_mean_over_rgb() -> None:
    network, state = inflated("r3d_18", in_channels=2)
    mean = state["conv1.weight"].mean(1)
    for channel in (0, 1):
        kernel = network.stem[0].weight[:, channel].sum(1)  # over the three frames
        torch.testing.assert_close(kernel, mean * 1.5)


@pytest.mark.parametrize(
    ("arch", "prefix"),
    [
        *((arch, "") for arch in DEPTHS),
        ("r3d_18", "module."),
        ("r3d_18", "rgb."),
        ("r2plus1d_18", "module.rgb."),
    ],
)
def test_own_state_loads_as_it_is(arch: str, prefix: str) -> None:
    torch.manual_seed(0)
    source, target = (ResNet3D(arch, 3, width=WIDTH) for _ in range(2))
    for value in source.state_dict().values():
        value.add_(1)  # batch norms' statistics and counters too
    state = {prefix + key: value for key, value in source.state_dict().items()}
    state[f"{prefix}fc.weight"] = torch.zeros(3, 3)
    report = load_pretrained(target, state, where="own")
    assert report.ignored == (f"{prefix}fc.weight",)
    assert not report.inflated
    assert not report.adapted
    assert list(report.loaded) == list(target.state_dict())
    for key, value in target.state_dict().items():
        assert torch.equal(value, source.state_dict()[key]), key


def test_only_rgb_is_taken_from_a_state_of_many_networks() -> None:
    network = ResNet3D("r3d_18", 3, width=WIDTH)
    own = {key: torch.ones_like(value) for key, value in network.state_dict().items()}
    state = {f"rgb.{k}": v for k, v in own.items()} | {f"flow.{k}": v * 2 for k, v in own.items()}
    report = load_pretrained(network, state, where="own")
    assert set(report.ignored) == {f"flow.{key}" for key in own}
    assert all(bool((value == 1).all()) for value in network.state_dict().values())


def test_3d_kernels_under_image_names_load_without_inflation() -> None:
    state = image_state(DEPTHS["r3d_50"], bottleneck=True, counters=True)
    network = ResNet3D("r3d_50", 3, width=WIDTH)
    frames = {"conv1.weight": 7}
    for key, value in state.items():
        if value.ndim == 4:
            count = frames.get(key, 3 if value.shape[-1] == 3 else 1)
            state[key] = torch.stack([value * i for i in range(count)], 2)
    report = load_pretrained(network, state, where="hara")
    assert not report.inflated
    assert torch.equal(network.layer4[2].conv2[0].weight, state["layer4.2.conv2.weight"])
    assert torch.equal(network.stem[0].weight, state["conv1.weight"])
    assert network.stem[1].num_batches_tracked.item() == 7


def kinetics(arch: str) -> State:
    return dict(ResNet3D(arch, 3, width=WIDTH).state_dict())


@pytest.mark.parametrize(
    ("arch", "change", "words"),
    [
        ("r3d_18", {"layer2.0.conv1.0.weight": None}, "missing: layer2.0.conv1.0.weight"),
        ("r3d_18", {"stem.1.bias": torch.zeros(9)}, r"stem.1.bias is \(9,\), not \(8,\)"),
        ("r3d_18", {"layer5.0.bias": torch.zeros(1)}, "no place: layer5.0.bias"),
        ("r3d_18", {"epoch": 3}, "'epoch' holds a int"),
        ("r3d_34", {}, "no place: layer1.2.*set arch to 'r3d_34'"),
        ("r2plus1d_18", {}, "missing.*set arch to 'r2plus1d_18'"),
        ("r3d_50", {}, "missing|no place.*set arch to 'r3d_50'"),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_is_changed(
    arch: str, change: dict[str, Tensor | None], words: str
) -> None:
    network = ResNet3D("r3d_18", 3, width=WIDTH)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    state = {k: v for k, v in (kinetics(arch) | change).items() if v is not None}
    with pytest.raises(ValueError, match=f"(?s)weights.pt.*{words}"):
        load_pretrained(network, state, where="weights.pt")
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


def test_other_width_says_what_to_do() -> None:
    network = ResNet3D("r3d_18", 3, width=0.25)
    with pytest.raises(ValueError, match=r"stem.0.weight is \(8, .*width 0.25.*need width 1"):
        load_pretrained(network, kinetics("r3d_18"), where="weights.pt")


def test_image_weights_do_not_inflate_into_a_factorized_network() -> None:
    state = image_state(DEPTHS["r3d_18"], bottleneck=False)
    with pytest.raises(ValueError, match=r"resnet18.*set arch to 'r3d_18'"):
        load_pretrained(ResNet3D("r2plus1d_18", 3, width=WIDTH), state, where="image.pt")


def test_image_weights_of_another_depth_are_refused() -> None:
    state = image_state(DEPTHS["r3d_34"], bottleneck=False)
    with pytest.raises(ValueError, match=r"resnet34.*set arch to 'r3d_34'"):
        load_pretrained(ResNet3D("r3d_18", 3, width=WIDTH), state, where="image.pt")


def test_a_state_that_is_no_resnet_is_refused() -> None:
    with pytest.raises(ValueError, match="not a ResNet's"):
        load_pretrained(
            ResNet3D("r3d_18", 3, width=WIDTH), {"cls_token": torch.zeros(1)}, where="vit.pt"
        )


def conv_modules(state: State) -> State:
    """An image ResNet's weights under MMAction2's names, whose convolutions bring their norms along."""
    renamed = {}
    for key, value in state.items():
        head, _, part = key.rpartition(".")
        parent, _, module = head.rpartition(".")
        if module[:4] == "conv":
            new = f"{head}.conv"
        elif module[:2] == "bn":
            new = f"{parent}.conv{module[2:]}.bn".removeprefix(".")
        elif parent.endswith("downsample"):
            new = f"{parent}.{('conv', 'bn')[int(module)]}"
        else:
            new = "cls_head.fc_cls"
        renamed[new.removeprefix("backbone.") + "." + part] = value
    return {(k if k.startswith("cls") else f"backbone.{k}"): v for k, v in renamed.items()}


@pytest.mark.parametrize("arch", ["r3d_18", "r3d_50"])
def test_mmaction2s_image_networks_are_inflated_as_torchvisions_are(arch: str) -> None:
    bottleneck = arch == "r3d_50"
    state = image_state(DEPTHS[arch], bottleneck=bottleneck)
    theirs = conv_modules(state)
    assert "backbone.layer2.0.downsample.conv.weight" in theirs
    assert "backbone.layer1.0.conv1.bn.running_var" in theirs
    ours, other = (ResNet3D(arch, 3, width=WIDTH, pool=True) for _ in range(2))
    load_pretrained(ours, state, where="image.pt")
    report = load_pretrained(other, theirs, where="tsn.pth")
    assert report.prefix == "backbone." and report.inflated
    assert set(report.ignored) == {"cls_head.fc_cls.weight", "cls_head.fc_cls.bias"}
    for key, value in other.state_dict().items():
        assert torch.equal(value, ours.state_dict()[key]), key


def test_a_sequence_of_a_resnets_children_loads() -> None:
    image = image_state(DEPTHS["r3d_18"], bottleneck=False)
    places = {"conv1": "0", "bn1": "1", **{f"layer{i}": str(3 + i) for i in range(1, 5)}}
    video = kinetics("r2plus1d_18")
    for arch, state, names in (
        ("r3d_18", image, places),
        ("r2plus1d_18", video, {"stem": "0", **{f"layer{i}": str(i) for i in range(1, 5)}}),
    ):
        theirs = {}
        for key, value in state.items():
            first, rest = key.split(".", 1)
            if first != "fc":
                theirs[f"backbone.{names[first]}.{rest}"] = value
        theirs["projection_head.layers.0.weight"] = torch.zeros(2, 2)
        ours, other = (ResNet3D(arch, 3, width=WIDTH) for _ in range(2))
        load_pretrained(ours, state, where="plain.pt")
        report = load_pretrained(other, theirs, where="children.pt")
        assert report.prefix == "backbone."
        for key, value in other.state_dict().items():
            assert torch.equal(value, ours.state_dict()[key]), key


def slow_r50() -> State:
    """Some of the weights of PySlowFast's slow-only network, with their shapes."""
    shapes = {
        "s1.pathway0_stem.conv.weight": (64, 3, 1, 7, 7),
        "s2.pathway0_res0.branch1.weight": (256, 64, 1, 1, 1),
        "s2.pathway0_res0.branch2.a.weight": (64, 64, 1, 1, 1),
        "s4.pathway0_res0.branch2.a.weight": (256, 512, 3, 1, 1),
        "s4.pathway0_res0.branch2.b.weight": (256, 256, 1, 3, 3),
        "head.projection.weight": (400, 2048),
    }
    return {key: torch.zeros(1).expand(shape) for key, shape in shapes.items()}


def mmaction2_video(factorized: bool) -> State:
    """Some of the weights of MMAction2's R(2+1)D-34 and of its slow-only network."""
    if factorized:
        shapes = {
            "backbone.conv1.conv.conv_s.weight": (83, 3, 1, 7, 7),
            "backbone.layer1.0.conv1.conv.conv_s.weight": (144, 64, 1, 3, 3),
        }
    else:
        shapes = {
            "backbone.conv1.conv.weight": (64, 3, 1, 7, 7),
            "backbone.layer1.0.conv1.conv.weight": (64, 64, 1, 1, 1),
        }
    return {key: torch.zeros(1).expand(shape) for key, shape in shapes.items()}


@pytest.mark.parametrize(
    ("state", "words"),
    [
        (slow_r50(), "PySlowFast's.*can't be loaded"),
        (mmaction2_video(True), r"\(2\+1\)D ResNet of MMAction2.*can't be loaded"),
        (mmaction2_video(False), "3D .*ResNet of MMAction2.*only 2-D ResNets"),
        ({"blocks.1.res_blocks.0.branch1_conv.weight": torch.zeros(1)}, "PyTorchVideo's"),
        ({"encoder.blocks.0.attn.qkv.weight": torch.zeros(1)}, "vision transformer's"),
    ],
)
def test_networks_that_this_engine_does_not_have_are_refused_by_name(
    state: State, words: str
) -> None:
    with pytest.raises(ValueError, match=f"weights.pth.*{words}"):
        load_pretrained(ResNet3D("r3d_50", 3, width=WIDTH), state, where="weights.pth")
