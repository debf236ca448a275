"""The decoder: sizes, cost, gradients, and that it can learn what it is asked to decode."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from engine.model.decoder import Decoder, LinearDecoder
from engine.model.resnet3d import ResNet3D


def activations(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def decoder_of(*sizes: int, out_size: tuple[int, ...], hidden: int = 8) -> Decoder:
    """A decoder as training leaves it: its last weights are not zero any more."""
    decoder = Decoder(*sizes, out_size, hidden=hidden)
    nn.init.normal_(decoder.output.weight, std=0.1)
    return decoder


def flop(module: nn.Module, *shape: int) -> int:
    with FlopCounterMode(display=False) as counter:
        module(torch.empty(shape, device="meta"))
    return counter.get_total_flops()


@pytest.mark.parametrize(
    ("given", "out_size"),
    [
        ((1, 4, 4), (8, 16, 16)),
        ((1, 2, 2), (4, 16, 16)),
        ((1, 1, 1), (3, 5, 7)),
        ((2, 7, 7), (4, 28, 28)),
        ((8, 4, 4), (3, 64, 64)),  # more frames in than out
        ((4, 3), (61, 40)),
        ((1, 1), (16, 16)),
    ],
)
def test_output_has_the_size_asked_for(given: tuple[int, ...], out_size: tuple[int, ...]) -> None:
    decoder = decoder_of(16, 2, out_size=out_size)
    out = decoder(activations(3, 16, *given))
    assert out.shape == (3, 2, *out_size)
    out.square().sum().backward()
    assert all(bool(p.grad.any()) for p in decoder.parameters() if p.grad is not None)
    assert all(p.grad is not None for p in decoder.parameters())


def test_every_input_position_reaches_the_output() -> None:
    x = activations(1, 8, 2, 4, 3).requires_grad_()
    decoder_of(8, 3, out_size=(4, 16, 16))(x).square().sum().backward()
    assert x.grad is not None
    assert bool(x.grad.abs().sum(1).gt(0).all())


def test_an_input_position_moves_its_own_place_most() -> None:
    torch.manual_seed(0)
    decoder = decoder_of(8, 1, out_size=(8, 32, 32))
    x = activations(1, 8, 1, 4, 4)
    y = x.clone()
    y[..., 0, 3, 1] += 1.0
    change = (decoder(y) - decoder(x)).abs()[0, 0].sum(0)
    near, far = change[24:, 8:16].mean(), change[:12].mean()
    assert near > 5 * far  # farther than the convolutions reach: what norms spread alone


def test_costs_little_beside_its_backbone() -> None:
    with torch.device("meta"):
        backbone = ResNet3D("r3d_18", 3, width=0.25)
        decoder = Decoder(128, 3, (8, 16, 16), hidden=32)
    cost = flop(decoder, 1, 128, 1, 4, 4)
    assert cost < 0.04 * flop(backbone, 1, 3, 8, 64, 64)


def test_starts_at_zero_and_teaches_its_input_from_the_second_step_on() -> None:
    torch.manual_seed(0)
    decoder, x = Decoder(8, 2, (4, 16, 16), hidden=8), activations(2, 8, 2, 4, 4).requires_grad_()
    target = activations(2, 2, 4, 16, 16)
    assert not decoder(x).any()
    for _ in range(2):
        x.grad = None
        (decoder(x) - target).square().mean().backward()
        with torch.no_grad():
            decoder.output.weight -= decoder.output.weight.grad
    assert x.grad is not None and bool(x.grad.any())


def test_frames_of_one_time_step_differ() -> None:
    """Positions tell them apart, away from the edges that padding marks."""
    out = decoder_of(8, 1, out_size=(8, 16, 16))(activations(1, 8, 1, 4, 4))[0, 0]
    assert (out[3] - out[4]).std() > 0.3 * out.std()


def test_stays_alive_where_relus_would_die() -> None:
    """Steps of a large rate toward a constant: the gradient still reaches the input."""
    torch.manual_seed(0)
    decoder, x = Decoder(16, 2, (4, 12, 12), hidden=8), activations(4, 16, 1, 3, 3).requires_grad_()
    optimizer = torch.optim.Adam(decoder.parameters(), 0.03)
    for _ in range(60):
        optimizer.zero_grad()
        decoder(x).square().mean().add(decoder(x).mean()).backward()
        optimizer.step()
    target = activations(4, 2, 4, 12, 12)
    (grad,) = torch.autograd.grad((decoder(x) - target).square().mean(), x)
    assert grad.abs().gt(0).float().mean() > 0.95


def test_learns_to_decode_frames() -> None:
    torch.manual_seed(0)
    decoder = Decoder(16, 3, (4, 16, 16), hidden=16)
    x = activations(2, 16, 1, 4, 4)
    coarse = torch.rand(2, 3, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    target = coarse.repeat_interleave(4, 2).repeat_interleave(4, 3).repeat_interleave(4, 4)
    optimizer = torch.optim.Adam(decoder.parameters(), 3e-3)
    losses = []
    for _ in range(100):
        loss = (decoder(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.25 * target.var().item() < losses[0]


def test_same_seed_same_weights_and_bit_equal_gradients() -> None:
    def gradients() -> list[Tensor]:
        torch.manual_seed(5)
        decoder = decoder_of(8, 2, out_size=(3, 10, 10))
        decoder(activations(2, 8, 1, 3, 3)).square().sum().backward()
        return [p.grad for p in decoder.parameters() if p.grad is not None]

    for a, b in zip(gradients(), gradients(), strict=True):
        assert torch.equal(a, b)


def test_channels_last_gives_the_same() -> None:
    decoder = decoder_of(16, 3, out_size=(8, 12, 20))
    x = activations(2, 16, 2, 3, 5)
    plain = decoder(x)
    last = decoder.to(memory_format=torch.channels_last_3d)(
        x.to(memory_format=torch.channels_last_3d)
    )
    torch.testing.assert_close(plain, last, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("channels", "out_size", "words"),
    [(8, (4,), "out_size"), (8, (4, 0, 4), "out_size"), (0, (4, 4, 4), "in_channels")],
)
def test_mistakes_are_named(channels: int, out_size: tuple[int, ...], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Decoder(channels, 3, out_size, hidden=8)


def linear(*sizes: int, grid: tuple[int, ...], out_size: tuple[int, ...], future: bool = False):
    torch.manual_seed(0)
    return LinearDecoder(*sizes, out_size, grid=grid, future=future)


def test_a_linear_decoder_is_one_matrix_over_each_position() -> None:
    """Against einsum in float64: each position's block is its own activations times one matrix."""
    decoder = linear(6, 2, grid=(2, 3, 3), out_size=(8, 6, 6)).double()
    x = activations(4, 6, 2, 3, 3).double()
    weight, bias = decoder.output.weight, decoder.output.bias
    expected = torch.einsum("nctij,coabd->notaibjd", x, weight).reshape(4, 2, 8, 6, 6)
    torch.testing.assert_close(decoder(x), expected + bias.view(1, 2, 1, 1, 1))


@pytest.mark.parametrize(
    ("grid", "out_size"),
    [
        ((4, 3, 3), (8, 6, 6)),
        ((1, 2, 2), (4, 16, 16)),
        ((3, 3, 3), (8, 7, 5)),  # no multiple: the nearest values of the blocks
        ((8, 4, 4), (3, 64, 64)),  # more frames in than out
        ((4, 3), (61, 40)),
    ],
)
@pytest.mark.parametrize("future", [False, True])
def test_linear_decoders_give_the_size_asked_for(
    grid: tuple[int, ...], out_size: tuple[int, ...], future: bool
) -> None:
    decoder = linear(16, 2, grid=grid, out_size=out_size, future=future)
    x = activations(3, 16, *grid).requires_grad_()
    out = decoder(x)
    assert out.shape == (3, 2, *out_size)
    out.square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in decoder.parameters())
    assert x.grad is not None
    reached = x.grad.abs().sum((0, 1, *range(3, x.dim()))) > 0  # by time step
    assert reached.tolist() == ([False] * (grid[0] - 1) + [True] if future else reached.tolist())


def test_a_linear_decoder_starts_near_zero_and_teaches_at_once() -> None:
    decoder = linear(64, 3, grid=(4, 3, 3), out_size=(8, 6, 6))
    x, target = activations(8, 64, 4, 3, 3).requires_grad_(), activations(8, 3, 8, 6, 6)
    out = decoder(x)
    assert 0.01 < out.std() < 0.1
    (grad,) = torch.autograd.grad((out - target).square().mean(), x)
    assert grad.abs().gt(0).all()


@pytest.mark.parametrize(
    ("grid", "out_size", "words"),
    [((4, 4), (4, 4, 4), "grid"), ((0, 2, 2), (4, 4, 4), "grid"), ((2,), (4,), "grid")],
)
def test_mistakes_of_linear_decoders_are_named(
    grid: tuple[int, ...], out_size: tuple[int, ...], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        LinearDecoder(8, 3, out_size, grid=grid)


@pytest.mark.parametrize(("frames", "size"), [(8, 24), (16, 32), (5, 17)])
def test_networks_know_the_grid_of_their_last_stage(frames: int, size: int) -> None:
    network = ResNet3D("r3d_18", 3, width=0.125)
    before = {k: v.clone() for k, v in network.state_dict().items()}
    grid = network.last_grid((3, frames, size, size))
    assert network.forward_features(torch.zeros(2, 3, frames, size, size))[4].shape[2:] == grid
    fresh = ResNet3D("r3d_18", 3, width=0.125)
    fresh.load_state_dict(before)
    fresh.last_grid((3, frames, size, size))
    assert all(torch.equal(v, before[k]) for k, v in fresh.state_dict().items())
