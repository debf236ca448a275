"""Eq. 1's L2 terms with their gradients: the fused op beside a plain sum of mean squared errors.

The pairs are distillation's, with its target's gradient stopped: the five activations of a network, for three
modalities. Bytes are those of the floor: each student and each teacher read once, each student's gradient
written once: three units, which is what the op moves. Compiled on its own, as here, it moves five, since the product
with the upstream gradient is a pass over all gradients; in a step that melts into whatever reads them. FLOPs
are counted by hand: a difference, a square, a sum and a product for the gradient, for each pair of elements.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import kernels
from engine.bench.base import Bench, shape
from engine.bench.rows import Row
from engine.core.recipe import Clip, Model
from engine.model.resnet3d import video_network
from kernels import reference

MODALITIES, SCALARS, ELEMENT_FLOPS = 3, 24, 4
EAGER = "eager sum of mse_loss"
Case = tuple[str, list[tuple[int, ...]], torch.dtype]


def mse_sum(
    students: list[Tensor],
    teachers: list[Tensor],
    masks: Tensor,
    weights: Tensor,
    divisors: Tensor,
    scalars: Tensor,
) -> tuple[Tensor, Tensor]:
    """The plain sum that one would write without the op; it knows no masks."""
    del masks
    losses = [F.mse_loss(s, t) for s, t in zip(students, teachers, strict=True)]
    values = torch.cat([torch.stack(losses).float(), scalars]) / divisors
    return (weights * values).sum(), values


def activation_shapes(
    model: Model, clip: Clip, *, batch_size: int, whole_stem: bool = False
) -> list[tuple[int, ...]]:
    """Shapes of the five activations that are distilled, without computing them.

    ``whole_stem`` takes the stem's output from before the pool.
    """
    with torch.device("meta"):
        network = video_network(model)
        x = torch.empty(batch_size, 3, clip.num_frames, clip.size, clip.size)
        maps = network.forward_features(x)[:5]
        if whole_stem:
            maps[0] = network.stem(x)
    return [tuple(m.shape) for m in maps]


def cases(bench: Bench) -> Iterator[Case]:
    """Cases to time: the recipe's network, and a larger one whose activations no cache holds."""
    recipe, single, half = bench.recipe, torch.float32, torch.bfloat16
    own = (recipe.model, recipe.clip, recipe.optim.batch_size)
    chosen = [(*own, single), (*own, half)] if bench.gpu else [(*own, single)]
    if bench.gpu:
        chosen.append((Model(arch="r3d_50", pool=True), Clip(num_frames=8, size=224), 16, half))
    elif not bench.quick:
        chosen.append((Model(width=0.25), Clip(num_frames=8, size=64), 16, single))
    for i, (model, clip, n, dtype) in enumerate(chosen):
        stem = bench.gpu and i == len(chosen) - 1
        width = "" if model.width == 1.0 else f" width {model.width:g}"
        size = shape(n, clip.num_frames, clip.size, clip.size)
        shapes = activation_shapes(model, clip, batch_size=n, whole_stem=stem)
        yield f"{model.arch}{width} {size} {str(dtype)[6:]}", shapes, dtype


def run(bench: Bench) -> Iterator[Row]:
    """Rows of each case."""
    for name, shapes, dtype in cases(bench):
        yield from _case(bench, name, shapes * MODALITIES, dtype)


def _case(
    bench: Bench, name: str, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype
) -> list[Row]:
    torch.manual_seed(bench.recipe.seed)
    students, teachers = ([_draw(s, bench.device, dtype) for s in shapes] for _ in range(2))
    for student in students:
        student.requires_grad_()
    masks = torch.ones(len(shapes), shapes[0][0], device=bench.device)
    weights = torch.rand(len(shapes) + SCALARS, device=bench.device)
    divisors = torch.rand_like(weights) + 0.5
    scalars = torch.rand(SCALARS, device=bench.device, requires_grad=True)
    inputs = (students, teachers, masks, weights, divisors, scalars)

    def gradients(function: Callable[..., tuple[Tensor, Tensor]]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(function(*inputs)[0], [*students, scalars])

    peers = bench.compiled(mse_sum)  # first: it forgets what was compiled before
    ours = {"kernels.weighted_loss": kernels.weighted_loss}
    if bench.gpu:
        compiled = torch.compile(kernels.weighted_loss, dynamic=False)
        ours["kernels.weighted_loss, compiled"] = compiled
    peers = {"reference": reference.weighted_loss, **ours, EAGER: mse_sum, **peers}
    calls = {key: partial(gradients, peer) for key, peer in peers.items()}
    steps = bench.agreeing("loss", calls, reference="reference")
    del steps["reference"]
    elements = sum(s.numel() for s in students)
    return bench.memory_rows(
        steps,
        ours=list(ours),
        bytes=3 * elements * dtype.itemsize,
        part="loss",
        shape=name,
        flops=ELEMENT_FLOPS * elements,
        note=f"{len(shapes)} pairs, {elements * dtype.itemsize / 1e6:.0f} MB a side",
    )


def _draw(size: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    x = torch.randn(size, device=device).to(dtype)
    return x.contiguous(memory_format=torch.channels_last_3d)
