"""DALI's graphs: JPEG pictures, films, sound and flow, each the same on a CPU and a GPU where both can do it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from nvidia.dali import fn, pipeline_def, types
from torch import Tensor


def _built(graph: Callable[[], Any], *, batch_size: int, device: torch.device, threads: int) -> Any:
    """Build a graph for one device; it runs ahead of its reader only where it is scheduled."""
    settings = {"batch_size": batch_size, "num_threads": threads, "prefetch_queue_depth": 1}
    index = device.index if device.type == "cuda" else None
    return pipeline_def(graph, device_id=index, **settings)()


def _input(name: str, dtype: Any, ndim: int) -> Any:
    return fn.external_source(name=name, dtype=dtype, ndim=ndim)


def _cut(pictures: Any, *, size: int) -> Any:
    """The box between the corners ``start`` and ``end``, at ``size``, mirrored where ``flip`` says so."""
    start, end = (_input(name, types.FLOAT, 1) for name in ("start", "end"))
    box = {"roi_start": start, "roi_end": end, "roi_relative": True}
    return fn.flip(
        fn.resize(pictures, size=[size, size], **box), horizontal=_input("flip", types.INT32, 0)
    )


def frames_graph(
    *, size: int, batch_size: int, device: torch.device, threads: int, on_host: bool
) -> Any:
    """JPEG bytes -> uint8 (size, size, 3) each: decode, crop, resize, flip; ``on_host``: decoded by the CPU."""
    gpu = device.type == "cuda"

    def graph() -> Any:
        where = "mixed" if gpu and not on_host else "cpu"
        jpeg = _input("jpeg", types.UINT8, 1)
        pictures = fn.decoders.image(jpeg, device=where, output_type=types.RGB)
        return _cut(pictures.gpu() if gpu and on_host else pictures, size=size)

    return _built(graph, batch_size=batch_size, device=device, threads=threads)


def films_graph(
    *, size: int, batch_size: int, device: torch.device, threads: int, on_host: bool
) -> Any:
    """Short films and places of frames in them -> uint8 (F, size, size, 3) each; ``on_host``: decoded by the CPU."""
    gpu = device.type == "cuda"

    def graph() -> Any:
        film, places = _input("film", types.UINT8, 1), _input("places", types.INT32, 1)
        where = "mixed" if gpu and not on_host else "cpu"
        frames = fn.decoders.video(film, frames=places, device=where)
        return _cut(frames.gpu() if gpu and on_host else frames, size=size)

    return _built(graph, batch_size=batch_size, device=device, threads=threads)


def sound_graph(*, samples: int, batch_size: int, device: torch.device, threads: int) -> Any:
    """FLAC bytes -> two windows of float32 (samples,): one decode, two cuts; zeros outside the clip."""

    def graph() -> Any:
        wave, _ = fn.decoders.audio(_input("flac", types.UINT8, 1), dtype=types.FLOAT, downmix=True)
        starts = [_input(name, types.INT32, 1) for name in ("start", "shifted")]
        window = {"shape": [samples], "axes": [0], "out_of_bounds_policy": "pad"}
        cuts = [fn.slice(wave, start=start, **window) for start in starts]
        return tuple(cut.gpu() if device.type == "cuda" else cut for cut in cuts)

    return _built(graph, batch_size=batch_size, device=device, threads=threads)


def flow_graph(*, batch_size: int, device: torch.device, threads: int) -> Any:
    """uint8 clips (F, H, W, 3) on a GPU -> float32 (F-1, H, W, 2) by the flow engine."""

    def graph() -> Any:
        frames = {"device": "gpu", "dtype": types.UINT8, "layout": "FHWC", "ndim": 4}
        return fn.optical_flow(fn.external_source(name="clip", **frames), output_grid=1)

    return _built(graph, batch_size=batch_size, device=device, threads=threads)


def to_torch(batch: Any) -> Tensor:
    """Copy a uniform DALI batch to torch, on this thread's stream.

    DALI gives the buffer to other work as soon as nothing refers to it: its reader has to hold ``batch`` until the
    copy is made, which on a GPU is later than it is asked for (``streams.finish``).
    """
    return torch.utils.dlpack.from_dlpack(batch.as_tensor()).clone()
