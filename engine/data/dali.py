"""DALI's graphs: JPEG pictures, films, sound and flow, each the same on a CPU and a GPU where both can do it."""

from __future__ import annotations

from typing import Any

import torch
from nvidia.dali import fn, pipeline_def, types
from torch import Tensor


def frames_graph(*, size: int, batch_size: int, device: torch.device, threads: int) -> Any:
    """JPEG bytes -> uint8 (size, size, 3) each: decode, crop, resize, flip."""
    gpu = device.type == "cuda"

    @pipeline_def(
        batch_size=batch_size,
        num_threads=threads,
        device_id=(device.index or 0) if gpu else None,
        prefetch_queue_depth=1,
    )
    def graph() -> Any:
        jpeg = fn.external_source(name="jpeg", dtype=types.UINT8, ndim=1)
        start = fn.external_source(name="start", dtype=types.FLOAT, ndim=1)
        end = fn.external_source(name="end", dtype=types.FLOAT, ndim=1)
        flip = fn.external_source(name="flip", dtype=types.INT32, ndim=0)
        image = fn.decoders.image(jpeg, device="mixed" if gpu else "cpu", output_type=types.RGB)
        return _cut(image, start, end, flip, size=size)

    return graph()


def films_graph(
    *, size: int, batch_size: int, device: torch.device, threads: int, on_host: bool
) -> Any:
    """Short films and places of frames in them -> uint8 (F, size, size, 3) each; ``on_host``: decoded by the CPU."""
    gpu = device.type == "cuda"

    @pipeline_def(
        batch_size=batch_size,
        num_threads=threads,
        device_id=(device.index or 0) if gpu else None,
        prefetch_queue_depth=1,
    )
    def graph() -> Any:
        film = fn.external_source(name="film", dtype=types.UINT8, ndim=1)
        places = fn.external_source(name="places", dtype=types.INT32, ndim=1)
        start = fn.external_source(name="start", dtype=types.FLOAT, ndim=1)
        end = fn.external_source(name="end", dtype=types.FLOAT, ndim=1)
        flip = fn.external_source(name="flip", dtype=types.INT32, ndim=0)
        frames = fn.decoders.video(
            film, frames=places, device="mixed" if gpu and not on_host else "cpu"
        )
        return _cut(frames.gpu() if gpu and on_host else frames, start, end, flip, size=size)

    return graph()


def _cut(pictures: Any, start: Any, end: Any, flip: Any, *, size: int) -> Any:
    """The box between two corners, at ``size``, mirrored where ``flip`` says so."""
    cut = fn.resize(pictures, size=[size, size], roi_start=start, roi_end=end, roi_relative=True)
    return fn.flip(cut, horizontal=flip)


def sound_graph(*, samples: int, batch_size: int, device: torch.device, threads: int) -> Any:
    """FLAC bytes -> two windows of float32 (samples,): one decode, two cuts; zeros outside the clip."""
    gpu = device.type == "cuda"

    @pipeline_def(
        batch_size=batch_size,
        num_threads=threads,
        device_id=(device.index or 0) if gpu else None,
        prefetch_queue_depth=1,
    )
    def graph() -> Any:
        flac = fn.external_source(name="flac", dtype=types.UINT8, ndim=1)
        start = fn.external_source(name="start", dtype=types.INT32, ndim=1)
        shifted = fn.external_source(name="shifted", dtype=types.INT32, ndim=1)
        wave, _ = fn.decoders.audio(flac, dtype=types.FLOAT, downmix=True)
        cuts = [
            fn.slice(wave, start=s, shape=[samples], axes=[0], out_of_bounds_policy="pad")
            for s in (start, shifted)
        ]
        return tuple(cut.gpu() for cut in cuts) if gpu else tuple(cuts)

    return graph()


def flow_graph(*, batch_size: int, device: torch.device, threads: int) -> Any:
    """uint8 clips (F, H, W, 3) on a GPU -> float32 (F-1, H, W, 2) by the flow engine."""

    @pipeline_def(
        batch_size=batch_size,
        num_threads=threads,
        device_id=device.index or 0,
        prefetch_queue_depth=1,
    )
    def graph() -> Any:
        clip = fn.external_source(
            name="clip", device="gpu", dtype=types.UINT8, layout="FHWC", ndim=4
        )
        return fn.optical_flow(clip, output_grid=1)

    return graph()


def to_torch(batch: Any) -> Tensor:
    """Take a uniform DALI batch over to torch; copied, because DALI reuses its buffer in the next run."""
    return torch.utils.dlpack.from_dlpack(batch.as_tensor()).clone()
