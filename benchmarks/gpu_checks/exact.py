"""Numbers on the GPU beside float64 and the CPU: the kernels, every term, and a member's first losses."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import engine.train.trainer
import kernels
from engine.core.recipe import Recipe
from engine.core.runtime import choose_runtime
from engine.data.views import RGB_MEAN, RGB_STD, Views
from engine.objective.lossfile import load_loss
from engine.train.trainer import Trainer
from gpu_checks.inputs import moved
from gpu_checks.job import Job
from gpu_checks.record import Absent, Recorder
from kernels import reference

ODD = ((5, 3, 2, 7, 11), (5, 64, 2, 9, 9), (5, 513))
LARGE = ((16, 64, 8, 56, 56), (16, 256, 4, 14, 14), (16, 2048))
MAX_REGISTERS = 128
"""A multiprocessor then holds 512 threads, each with 64 bytes of loads under way."""
BF16_STEP = 2.0**-8
"""Rounding of bfloat16, relative."""


def kernel_numbers(job: Job, rec: Recorder) -> None:
    """Both ops against float64, twice the same bits, and their registers."""
    for dtype in (torch.float32, torch.bfloat16):
        for label, shapes in (("odd", ODD), ("large", job.size(LARGE, ODD))):
            name = f"weighted_loss, {label} shapes, {str(dtype)[6:]}"
            with rec.check(name):
                _weighted_loss(job, rec, name, shapes, dtype)
    for dtype in (torch.float32, torch.bfloat16):
        for shape in ((3, 2, 7, 5, 3), job.size((16, 20, 112, 112, 3), (2, 3, 16, 16, 3))):
            name = f"clip_views, {'x'.join(map(str, shape))} {str(dtype)[6:]}"
            with rec.check(name):
                _clip_views(job, rec, name, shape, dtype)
    with rec.check("registers"):
        _registers(job, rec)


def _weighted_loss(
    job: Job, rec: Recorder, name: str, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    students, teachers = ([_draw(s, job.device, dtype) for s in shapes] for _ in range(2))
    masks = (torch.rand(len(shapes), shapes[0][0], device=job.device) > 0.3).float()
    weights, divisors = (torch.rand(len(shapes) + 2, device=job.device) for _ in range(2))
    divisors += 0.5
    scalars = torch.rand(2, device=job.device)

    def run(function: Any, wide: torch.dtype | None) -> tuple[list[Tensor], list[Tensor]]:
        cast = (lambda x: x) if wide is None else (lambda x: x.to(wide))
        leaves = [cast(s).detach().clone().requires_grad_() for s in students]
        rest = [
            [cast(t) for t in teachers],
            cast(masks),
            cast(weights),
            cast(divisors),
            cast(scalars),
        ]
        total, values = function(leaves, *rest)
        return [total.detach(), *values], list(torch.autograd.grad(3.0 * total, leaves))

    values, grads = run(kernels.weighted_loss, None)
    again = run(kernels.weighted_loss, None)
    true_values, true_grads = run(reference.weighted_loss, torch.float64)
    value_error = max(_relative(v, t) for v, t in zip(values, true_values, strict=True))
    grad_error = max(_relative(g, t) for g, t in zip(grads, true_grads, strict=True))
    rec.row(f"{name}: values", value_error, goal=1e-5, sense="<=", detail="relative, to float64")
    # rounded where it is saved, and where upstream's factor comes in
    limit = 3 * BF16_STEP if dtype == torch.bfloat16 else 1e-5
    rec.row(f"{name}: gradients", grad_error, goal=limit, sense="<=", detail="of the largest")
    same = all(map(torch.equal, [*values, *grads], [*again[0], *again[1]]))
    rec.row(f"{name}: the same bits twice", same, ok=same)


def _draw(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    x = torch.randn(shape, device=device).to(dtype)
    return x.contiguous(memory_format=torch.channels_last_3d) if len(shape) == 5 else x


def _relative(got: Tensor, true: Tensor) -> float:
    return float((got.double() - true.double()).abs().max() / true.abs().max().clamp(min=1e-30))


def _clip_views(
    job: Job, rec: Recorder, name: str, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    frames = torch.randint(0, 256, shape, dtype=torch.uint8, device=job.device)
    mean, std = (torch.tensor(x, device=job.device) for x in (RGB_MEAN, RGB_STD))
    got, again = (kernels.clip_views(frames, mean, std, dtype=dtype) for _ in range(2))
    x, luma = frames.double() / 255, torch.tensor(reference.LUMA, device=job.device).double()
    m, s = mean.double(), std.double()
    rgb = ((x - m) / s).permute(0, 4, 1, 2, 3)
    grey = ((x @ luma - m @ luma) / s.mean())[:, None]
    error = max(_relative(a, b) for a, b in zip(got, (rgb, grey), strict=True))
    limit = BF16_STEP if dtype == torch.bfloat16 else 1e-5
    rec.row(name, error, goal=limit, sense="<=", detail="of the largest, to float64")
    same = all(map(torch.equal, got, again))
    rec.row(f"{name}: the same bits twice", same, ok=same)


def _registers(job: Job, rec: Recorder) -> None:
    """What the driver says of each version of a kernel that the checks above compiled."""
    job.need_gpu()
    lost = kernels.not_built()
    rec.row("kernels that can't be built", len(lost), ok=not lost, detail=str(lost or "none"))
    seen = 0
    for op in ("weighted_loss", "clip_views"):
        for name, function in vars(sys.modules[f"kernels.{op}"]).items():
            held = getattr(function, "device_caches", {}).get(torch.cuda.current_device())
            compiled = list((held[0] if isinstance(held, tuple) else held or {}).values())
            compiled = [each for each in compiled if hasattr(each, "_init_handles")]
            if not compiled:
                continue
            for each in compiled:
                each._init_handles()
            registers, spills = [k.n_regs for k in compiled], [k.n_spills for k in compiled]
            detail = f"{len(compiled)} versions: {registers}; spills {spills}"
            ok = max(registers) <= MAX_REGISTERS and not any(spills)
            held_to = {"goal": MAX_REGISTERS, "sense": "<=", "ok": ok, "detail": detail}
            rec.row(f"registers of {name}", max(registers), **held_to)
            seen += 1
    if not seen:
        raise Absent("no compiled kernel is found: this Triton keeps them elsewhere")


def terms(job: Job, rec: Recorder) -> None:
    """Every term at the same weights on CPU and GPU, and a member's first 20 losses on the same views."""
    exact = "optim.amp=off optim.compile=off".split()
    with rec.check("terms"):
        _values(job, rec, job.small(*exact))
    with rec.check("first losses"):
        tiny = "clip.size=32 clip.num_frames=4 clip.num_future_frames=2 optim.batch_size=8"
        steps = job.size(20, 4)
        wanted = [*tiny.split(), f"optim.steps={steps}", "optim.warmup_steps=2"]
        _first_losses(job, rec, job.small(*exact, *wanted))


def _values(job: Job, rec: Recorder, recipe: Recipe) -> None:
    weights, found = load_loss("equal"), {}
    host = Trainer(recipe, job.index, choose_runtime("cpu", amp="off"))
    member = host.member(weights, seed=0)
    _, views = next(host.rounds([member], seed=0))
    total, values = member.loss.evaluate(views, member.ordered, member.computed)
    found["CPU float32"] = [float(total), *values.tolist()]
    names = ["total", *member.computed, *(f"rank of {m}" for m in member.alive.networks)]
    for label, amp, tf32 in (
        ("float32", "off", False), ("float32 with TF32", "off", True), ("bf16", "bf16", True),
    ):  # fmt: skip
        _convolutions(tf32=tf32)
        trainer = Trainer(recipe, job.index, job.runtime(amp))
        there = trainer.member(weights, seed=0)
        there.loss.load_state_dict(member.loss.state_dict())
        on_device = moved(views, job.device)
        with torch.no_grad(), torch.autocast(job.device.type, torch.bfloat16, amp == "bf16"):
            total, values = there.loss.evaluate(on_device, there.ordered, there.computed)
        found[label] = [float(total), *values.tolist()]
        apart = [_apart(a, b) for a, b in zip(found[label], found["CPU float32"], strict=True)]
        worst = max(range(len(apart)), key=apart.__getitem__)
        limit = {"float32": 1e-3, "float32 with TF32": 0.02, "bf16": 0.1}[label]
        rec.row(
            f"terms in {label} against the CPU's float32", apart[worst], goal=limit, sense="<=",
            detail=f"largest relative difference of {len(names)} values, at {names[worst]}",
            figures=dict(zip(names, zip(found["CPU float32"], found[label], strict=True), strict=True)),
        )  # fmt: skip
    _convolutions(tf32=True)


def _convolutions(*, tf32: bool) -> None:
    """By the interface that the rest of the checks reads: torch does not let the older one mix with it."""
    torch.backends.cudnn.conv.fp32_precision = "tf32" if tf32 else "ieee"  # type: ignore[attr-defined]


def _apart(one: float, other: float) -> float:
    return abs(one - other) / max(abs(other), 1e-3)


def _first_losses(job: Job, rec: Recorder, recipe: Recipe) -> None:
    engine.train.trainer.CHECK_EVERY_ON_GPU = 1  # every loss is wanted
    _convolutions(tf32=False)
    weights = load_loss("equal")
    host = Trainer(recipe, job.index, choose_runtime("cpu", amp="off"))
    device = Trainer(recipe, job.index, job.runtime("off"))
    both = [(trainer, trainer.member(weights, seed=0)) for trainer in (host, device)]
    losses: list[list[float]] = [[], []]
    for _, views in host.rounds([both[0][1]], seed=0):
        there: Views = moved(views, job.device)
        for side, (trainer, member) in enumerate(both):
            losses[side].append(trainer.step(member, there if side else views))
    apart = [_apart(b, a) for a, b in zip(*losses, strict=True)]
    detail = (
        f"at step 0 {apart[0]:.1e}, half-way {apart[len(apart) // 2]:.1e}, last {apart[-1]:.1e}"
    )
    name = f"first {len(apart)} losses against the CPU's"
    figures = {"cpu": losses[0], "gpu": losses[1]}
    rec.row(name, max(apart), goal=0.02, sense="<=", detail=detail, figures=figures)
    _convolutions(tf32=True)
