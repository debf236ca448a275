"""Input on the GPU beside the CPU's: JPEG frames, films, optical flow, and the views made of them."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.bench.base import interleaved
from engine.core.runtime import num_cores
from engine.data.dali import to_torch
from engine.data.hardware import flow_fault
from engine.data.pipeline import ClipBatch
from engine.data.plan import plan_batch
from engine.data.views import ViewMaker, Views
from gpu_checks.job import Job, input_pipeline, without_dali
from gpu_checks.record import Absent, Recorder

CPU = torch.device("cpu")
SHIFT = (2, -1)
"""Pixels to the right and down by which the made-up texture moves between frames."""
BORDER = 12
"""Pixels at the edges that come from outside the picture: flow is not judged there."""


def psnr(one: Any, other: Any) -> float:
    """Peak signal-to-noise ratio in dB of two uint8 arrays or tensors."""
    a, b = (torch.as_tensor(x).cpu().double() for x in (one, other))
    error = float((a - b).square().mean())
    return 99.0 if error == 0 else float(10 * np.log10(255**2 / error))


def milliseconds(job: Job, call: Callable[[], Any], *, seconds: float = 0.5) -> float:
    """Median of a call."""
    return median(interleaved({"": call}, device=job.device, seconds=seconds)[""])


def plans(job: Job, recipe: Any, count: int) -> list[Any]:
    """Plans of a few batches."""
    sizes: dict[str, Any] = {"seed": 0, "batch_size": recipe.optim.batch_size}
    return [
        plan_batch(job.index, recipe.clip, recipe.audio, step=step, **sizes)
        for step in range(count)
    ]


def decode(job: Job, rec: Recorder) -> None:
    """Frames and sound of the same plan on both devices, their speed, and who decodes JPEG."""
    recipe = job.full()
    n = recipe.optim.batch_size
    (plan,) = plans(job, recipe, 1)
    on_cpu = input_pipeline(job, recipe, CPU, flow=False)
    want = on_cpu.load(plan)
    with rec.check("frames on the GPU are the CPU's"):
        on_device = input_pipeline(job, recipe, job.device, flow=False)
        got = on_device.load(plan)
        rec.row(
            "frames on the GPU are the CPU's", psnr(got.rgb, want.rgb), unit="dB", goal=35.0,
            detail=f"{tuple(got.rgb.shape)} on {got.rgb.device} {job.on_host()}".strip(),
        )  # fmt: skip
        for name in ("wave", "wave_shifted"):
            error = float((getattr(got, name).cpu() - getattr(want, name)).abs().max())
            rec.row(f"{name} on the GPU is the CPU's", error, goal=1e-4, sense="<=")
        for name, pipeline in (("GPU", on_device), ("CPU", on_cpu)):
            ms = milliseconds(job, lambda pipeline=pipeline: pipeline.load(plan))
            detail = f"{ms:.1f} ms a batch of {n}, sound included, {num_cores()} cores"
            rec.row(f"decoding for the {name}", n / ms * 1e3, unit="clips/s", detail=detail)
    with rec.check("the JPEG engines are at work"):
        if without_dali():
            raise Absent("DALI is not installed")
        busy = _busy(job, "jpeg", lambda: on_device.load(plan))
        rec.row("the JPEG engines are at work", busy, unit="% busy", goal=1)
    with rec.check("JPEG engines beside CUDA decoding"):
        _decoder_loads(job, rec, on_device, plan)
    for codec in ("libvpx-vp9", "libx264"):
        with rec.check(f"film by NVDEC, {codec}"):
            _film(job, rec, codec)


def _decoder_loads(job: Job, rec: Recorder, pipeline: Any, plan: Any) -> None:
    """The same frames with all, the default share and none of them given to the engines."""
    from nvidia.dali import fn, pipeline_def, types

    job.need_gpu()
    pairs = zip(plan.clip, plan.frames, strict=True)
    frames = [f for c, wanted in pairs for f in pipeline.index.read(int(c), wanted.tolist()).frames]
    for load in (1.0, 0.9, 0.0):

        @pipeline_def(
            batch_size=len(frames), num_threads=min(num_cores(), 16), device_id=0,
            prefetch_queue_depth=1,
        )  # fmt: skip
        def graph(load: float = load) -> Any:
            jpeg = fn.external_source(name="jpeg", dtype=types.UINT8, ndim=1)
            return fn.decoders.image(jpeg, device="mixed", hw_decoder_load=load)

        built = graph()

        def step(built: Any = built) -> None:
            built.feed_input("jpeg", frames)
            built.run()
            job.wait()

        ms = milliseconds(job, step, seconds=0.3)
        name = f"JPEG decoding, hw_decoder_load {load:g}"
        rec.row(name, len(frames) / ms * 1e3, unit="frames/s", detail=f"{ms:.1f} ms a batch")


def _busy(job: Job, engine: str, call: Callable[[], Any]) -> float:
    """Per cent at most that nvidia-smi shows of an engine (jpeg, ofa, decoder) during a second of calls."""
    job.need_gpu()
    with _watched(engine) as seen:
        milliseconds(job, call, seconds=1.5)
    values = [float(value) for value in seen if value.strip().replace(".", "").isdigit()]
    if not values:
        raise Absent(
            f"nvidia-smi shows no utilization.{engine}: {' '.join(seen)[:200] or 'nothing'}"
        )
    return max(values)


@contextmanager
def _watched(engine: str) -> Iterator[list[str]]:
    query = ["nvidia-smi", f"--query-gpu=utilization.{engine}", "--format=csv,noheader,nounits"]
    try:
        process = subprocess.Popen(
            [*query, "-lms", "100"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
    except OSError as error:
        raise Absent(f"nvidia-smi: {error}") from None
    seen: list[str] = []
    try:
        yield seen
    finally:
        process.terminate()
        seen += (process.communicate(timeout=10)[0] or "").splitlines()


def _film(job: Job, rec: Recorder, codec: str) -> None:
    """A film made here, decoded by PyAV and by DALI on the device."""
    import av
    from nvidia.dali import fn, pipeline_def, types

    path = job.work / f"film-{codec}.{'webm' if 'vp9' in codec else 'mp4'}"
    path.parent.mkdir(parents=True, exist_ok=True)
    _encode(path, codec, moving_texture(1, 24, 240, 320)[0])
    with av.open(str(path)) as film:
        want = np.stack([f.to_ndarray(format="rgb24") for f in film.decode(video=0)])
    if not job.gpu and codec != "libvpx-vp9":
        raise Absent(f"DALI decodes {codec} on a GPU only")
    home = fn.decoders if hasattr(fn.decoders, "video") else fn.experimental.decoders

    @pipeline_def(batch_size=1, num_threads=2, device_id=0 if job.gpu else None)
    def graph() -> Any:
        film = fn.external_source(name="film", dtype=types.UINT8, ndim=1)
        return home.video(film, device="mixed" if job.gpu else "cpu", sequence_length=len(want))

    data = np.fromfile(path, np.uint8)
    try:
        built = graph()
        built.feed_input("film", [data])
        (out,) = built.run()
    except RuntimeError as error:
        text = str(error)
        if any(sign in text for sign in ("nvcuvid", "NVCUVID", "NvDecoder", "libnvcuvid.so")):
            raise Absent(text.splitlines()[0]) from None
        raise
    got = to_torch(out)[0]
    rec.row(
        f"film by NVDEC, {codec}", psnr(got, want), unit="dB", goal=30.0,
        detail=f"{tuple(got.shape)} on {got.device}, beside PyAV's frames",
    )  # fmt: skip


def _encode(path: Path, codec: str, frames: NDArray[np.uint8]) -> None:
    import av

    with av.open(str(path), "w") as film:
        stream = film.add_stream(codec, rate=25)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt, stream.bit_rate = "yuv420p", 4_000_000
        for frame in frames:
            film.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        film.mux(stream.encode())


def moving_texture(clips: int, frames: int, height: int, width: int) -> NDArray[np.uint8]:
    """uint8 (N, F, H, W, 3): smooth textures that move by SHIFT a frame, with no edge in sight."""
    right, down = SHIFT
    margin = frames * max(map(abs, SHIFT))
    torch.manual_seed(0)
    size = (height + 2 * margin, width + 2 * margin)
    picture = torch.zeros(clips, 3, *size)
    for cell, strength in ((16, 1.0), (8, 0.7), (4, 0.4)):
        coarse = torch.rand(clips, 3, size[0] // cell + 2, size[1] // cell + 2)
        wide = torch.nn.functional.interpolate(coarse, scale_factor=cell, mode="bicubic")
        picture += strength * wide[:, :, : size[0], : size[1]]
    low, high = picture.amin((1, 2, 3), keepdim=True), picture.amax((1, 2, 3), keepdim=True)
    bytes_ = ((picture - low) / (high - low) * 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()
    cuts = []
    for k in range(frames):
        top, left = margin - k * down, margin - k * right  # the window moves against the texture
        cuts.append(bytes_[:, top : top + height, left : left + width])
    return np.ascontiguousarray(np.stack(cuts, 1))


def end_point_error(flow: Tensor, truth: Tensor) -> float:
    """Mean length in pixels of the difference, borders aside."""
    inner = (flow.cpu() - truth.cpu())[:, :, BORDER:-BORDER, BORDER:-BORDER]
    return float(inner.square().sum(-1).sqrt().mean())


def flow(job: Job, rec: Recorder) -> None:
    """The flow engine against a known shift and against the CPU's flow."""
    recipe = job.full("clip.size=112") if job.gpu else job.full("clip.size=64")
    n, size = recipe.optim.batch_size, recipe.clip.size
    frames = recipe.clip.num_frames + recipe.clip.num_future_frames
    made = torch.from_numpy(moving_texture(n, frames, size, size))
    truth = torch.tensor(SHIFT, dtype=torch.float32).expand(n, frames - 1, size, size, 2)
    on_cpu = input_pipeline(job, recipe, CPU, sound=False)
    error = end_point_error(on_cpu._compute_flow(made), truth)
    rec.row("flow on the CPU of a known shift", error, unit="px", goal=0.5, sense="<=")
    (plan,) = plans(job, recipe, 1)
    real = on_cpu._start_frames(plan, _read(job, plan))()
    host_ms = milliseconds(job, lambda: on_cpu._compute_flow(real)) / n
    rec.row("flow on the CPU", host_ms, unit="ms a clip", detail=f"{num_cores()} cores, {size} px")
    there: Tensor | None = None
    with rec.check("flow engine"):
        job.need_gpu()
        on_device = input_pipeline(job, recipe, job.device, sound=False)
        if fault := flow_fault(job.device, size):
            raise Absent(f"{fault}; the CPU computes flow")
        got = on_device._compute_flow(made.to(job.device))
        error = end_point_error(got, truth)
        mean = [
            round(x, 2)
            for x in got[:, :, BORDER:-BORDER, BORDER:-BORDER].mean((0, 1, 2, 3)).tolist()
        ]
        detail = f"mean flow {mean}, true {list(SHIFT)}"
        rec.row("flow engine", error, unit="px", goal=0.5, sense="<=", detail=detail)
        there = real.to(job.device)
        ours, theirs = on_device._compute_flow(there), on_cpu._compute_flow(real)
        length = float(theirs.square().sum(-1).sqrt().mean())
        rec.row(
            "flow engine against the CPU's flow", end_point_error(ours, theirs), unit="px",
            detail=f"on the videos, where the CPU's flow is {length:.2f} px long on average",
        )  # fmt: skip
        ms = milliseconds(job, lambda: on_device._compute_flow(there)) / n
        rec.row("flow engine, time", ms, unit="ms a clip", detail=f"{frames - 1} pairs, {size} px")
        small = torch.from_numpy(moving_texture(2, 4, 48, 48)).to(job.device)
        tiny = input_pipeline(job, job.small("optim.batch_size=2"), job.device, sound=False)
        found = end_point_error(tiny._compute_flow(small), torch.tensor(SHIFT).float())
        rec.row("flow engine at 48 px", found, unit="px", goal=0.7, sense="<=")
    with rec.check("the flow engine is at work"):
        if there is None:
            raise Absent("no flow engine, or no GPU")
        busy = _busy(job, "ofa", lambda: on_device._compute_flow(there))
        rec.row("the flow engine is at work", busy, unit="% busy", goal=1)


def _read(job: Job, plan: Any) -> list[Any]:
    pairs = zip(plan.clip, plan.frames, strict=True)
    return [job.index.read(int(clip), frames.tolist()) for clip, frames in pairs]


def moved(holder: Any, device: torch.device) -> Any:
    """A batch or views on another device."""

    def there(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to(device)
        return {k: there(v) for k, v in value.items()} if isinstance(value, dict) else value

    changed = {f.name: there(getattr(holder, f.name)) for f in fields(holder)}
    return replace(holder, **changed)


def views(job: Job, rec: Recorder) -> None:
    """The same batch's views on both devices."""
    recipe = job.full()
    (plan,) = plans(job, recipe, 1)
    batch: ClipBatch = input_pipeline(job, recipe, CPU).load(plan)
    modalities = ("rgb", "grey", "flow", "audio")
    make = ViewMaker(recipe.clip, recipe.audio)
    want: Views = make(batch, modalities)
    got: Views = make.to(job.device)(moved(batch, job.device), modalities)
    pairs = {m: (got.clip[m], want.clip[m]) for m in modalities}
    pairs |= {f"future {m}": (got.future[m], want.future[m]) for m in modalities}
    pairs["misaligned audio"] = (got.shifted_audio, want.shifted_audio)
    for name, (ours, theirs) in pairs.items():
        worst = float((ours.cpu() - theirs).abs().max())
        same = ours.cpu().stride() == theirs.stride()
        detail = f"largest difference; values up to {float(theirs.abs().max()):.1f}"
        detail += "" if same else f"; strides {ours.stride()} and {theirs.stride()}"
        limit = 2e-2 if "audio" in name else 1e-4
        rec.row(f"views: {name}", worst, goal=limit, sense="<=", detail=detail)
