"""The fused loss, the views and the input beside their limits and peers, by the engine's own bench."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import torch
from torch import Tensor

import kernels
from engine.bench import input, loss, views
from engine.bench.base import Bench
from engine.bench.rows import Row, gigabytes_per_second, quantiles
from engine.core.recipe import Clip, Model
from gpu_checks.job import Job
from gpu_checks.record import Recorder


class Alone(Bench):
    """A bench without peers that take long to compile."""

    def compiled(self, function: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
        """None."""
        return {}


def record(rec: Recorder, row: Row, **more: Any) -> None:
    """A row of ``engine bench`` as a row of this check."""
    held = (
        ""
        if row.percent is None or row.limit is None
        else f"{row.percent:.0f} % of {row.limit.name}, "
    )
    detail = f"{row.shape}; {held}{row.ms[1]:.3g} ms"
    figures = {"ms": row.ms, "percent": row.percent, "bytes": row.bytes, "flops": row.flops}
    figures |= row.figures
    name = more.pop("name", f"{row.part}: {row.name}")
    rec.row(name, row.throughput, unit=row.unit, detail=detail, figures=figures, **more)


def bench(job: Job, rec: Recorder) -> None:
    """The loss at R3D-50's size, views of a large batch, and every stage of input."""
    with rec.check("fused loss"):
        _loss(job, rec)
    with rec.check("views"):
        _views(job, rec)
    with rec.check("input"):
        host = job.on_host()
        for row in input.run(job.bench(job.full())):
            record(rec, msgspec.structs.replace(row, shape=f"{row.shape} {host}".strip()))
    for line in job.said:
        rec.row("said", ok=True, detail=line[:300])


def _loss(job: Job, rec: Recorder) -> None:
    """Five maps of R3D-50 for three modalities, with all peers, and each as autocast would run it."""
    recipe, dtype = job.full(), job.size(torch.bfloat16, torch.float32)
    on_gpu = (Model(arch="r3d_50", pool=True), Clip(num_frames=8, size=224), 16)
    model, clip, n = job.size(on_gpu, (recipe.model, recipe.clip, 4))
    maps = loss.activation_shapes(model, clip, batch_size=n, whole_stem=True)
    shapes = maps * loss.MODALITIES
    torch.manual_seed(0)
    students, teachers = ([loss._draw(s, job.device, dtype) for s in shapes] for _ in range(2))
    for student in students:
        student.requires_grad_()
    masks = torch.ones(len(shapes), n, device=job.device)
    weights = torch.rand(len(shapes) + loss.SCALARS, device=job.device)
    scalars = torch.rand(loss.SCALARS, device=job.device, requires_grad=True)
    inputs = (students, teachers, masks, weights, torch.ones_like(weights), scalars)

    def gradients(function: Callable[..., tuple[Tensor, Tensor]]) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(function(*inputs)[0], [*students, scalars])

    def eager_amp(*given: Any) -> tuple[Tensor, Tensor]:
        with torch.autocast(job.device.type, torch.bfloat16, enabled=job.gpu):
            return loss.mse_sum(*given)

    steps = {
        "one pass": lambda: kernels.weighted_loss(*inputs),
        "op": gradients(kernels.weighted_loss),
        "eager AMP": gradients(eager_amp),
    }
    if job.gpu:
        torch._dynamo.reset()
        steps["op, compiled"] = gradients(torch.compile(kernels.weighted_loss, dynamic=False))
        steps["Inductor"] = gradients(torch.compile(loss.mse_sum, dynamic=False))
    bench_ = job.bench(recipe)
    took = {name: quantiles(ms)[1] for name, ms in bench_.time(steps, flush=True).items()}
    limit, elements = bench_.copy_bandwidth(), sum(s.numel() for s in students)
    # reads students and teachers and writes gradients; compiled, upstream's factor reads and writes them again
    units = {"op, compiled": 5}
    for name, ms in took.items():
        figures = {"ms": ms}
        detail = (
            f"{ms:.3g} ms, {len(shapes)} pairs, {elements * dtype.itemsize / 1e6:.0f} MB a side"
        )
        moved = elements * dtype.itemsize * units.get(name, 3)
        rate = gigabytes_per_second(moved, ms)
        detail += f", {rate:.0f} GB/s of {units.get(name, 3)} units"
        rec.row(f"loss: {name}", ms, unit="ms", detail=detail, figures=figures)
        if name == "one pass":
            share = 100 * rate / limit.value
            rec.row(
                "fused loss, share of copy", share, unit="%", goal=job.size(85, None), detail=detail
            )
    best = min(took[name] for name in ("op", "op, compiled") if name in took)
    for name, goal in (("eager AMP", 4.0), ("Inductor", 1.3)):
        if name in took:
            rec.row(
                f"fused loss over {name}",
                took[name] / best,
                unit="times",
                goal=job.size(goal, None),
            )


def _views(job: Job, rec: Recorder) -> None:
    """A batch that no cache holds, then the recipe's own."""
    for n in job.size((128, 16), (4,)):
        plain = job.bench(job.full(f"optim.batch_size={n}"))
        alone = Alone(plain.recipe, plain.runtime, plain.index, plain.say, quick=True)
        for row in views.run(alone):
            record(rec, row, name=f"views: {row.name} {row.shape}")
            if row.name == "kernels.clip_views" and n == job.size(128, 4):
                dtype = row.shape.split()[-1]
                name = f"clip_views, share of copy, {dtype}"
                rec.row(name, row.percent, unit="%", goal=job.size(85, None), detail=row.shape)
