"""Parts of a GPU and its driver that input needs, tried out before a run, so that none is missed in the middle of it.

A container without the capability ``video`` has neither library; Turing's flow engine has no grid of single pixels;
GPUs differ in the codecs and sizes of their video decoders. What can't be used is replaced by the CPU.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch

from engine.data.dali import flow_graph, frames_graph
from engine.data.media.encode import encode_jpeg

FLOW_LIBRARY = "libnvidia-opticalflow.so.1"
FILM_LIBRARY = "libnvcuvid.so.1"
CAPABILITIES = "NVIDIA_DRIVER_CAPABILITIES"
"""Environment variable that says which of the driver's libraries a container gets."""
JPEG_SIDE = 64
"""Pixels of the picture that decoding is tried with."""


def missing(library: str) -> str:
    """What to do about a library of the driver that can't be loaded; empty where it can."""
    try:
        ctypes.CDLL(library)
    except OSError:
        asked = os.environ.get(CAPABILITIES, "unset")
        return f"{library} is absent: start the container with {CAPABILITIES}=compute,video,utility (now {asked})"
    return ""


def fault(run: Callable[[], object]) -> str:
    """First line of the error that ``run`` ends with; empty where it ends well."""
    try:
        run()
    except RuntimeError as error:
        return first_line(error)
    return ""


def first_line(error: Exception) -> str:
    """First line of an error's message that says anything."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines or [type(error).__name__])[0]


@cache
def flow_fault(device: torch.device, size: int) -> str:
    """Why a GPU's flow engine can't be used for frames of ``size`` pixels a side; empty where it can."""
    if absent := missing(FLOW_LIBRARY):
        return absent

    def run() -> None:
        frames = torch.zeros(1, 2, size, size, 3, dtype=torch.uint8, device=device)
        torch.cuda.current_stream(device).synchronize()
        _once(flow_graph(batch_size=1, device=device, threads=1), {"clip": frames})

    return fault(run)


@cache
def picture_fault(device: torch.device) -> str:
    """Why a GPU can't decode JPEG pictures; empty where it can."""
    grey = np.full((1, 3 * JPEG_SIDE // 2, JPEG_SIDE), 128, np.uint8)  # planes, as 4:2:0 has them
    jpeg = [np.frombuffer(data, np.uint8) for data in encode_jpeg(grey, quality=85)]
    corner = np.zeros((1, 2), np.float32)
    inputs = {"jpeg": jpeg, "start": corner, "end": corner + 1, "flip": np.zeros(1, np.int32)}

    def run() -> None:
        graph = frames_graph(size=JPEG_SIDE, batch_size=1, device=device, threads=1, on_host=False)
        _once(graph, inputs)

    return fault(run)


def film_fault() -> str:
    """Why a GPU's video decoder can't be used; empty where nothing speaks against it."""
    return missing(FILM_LIBRARY)


def _once(graph: Any, inputs: dict[str, Any]) -> None:
    for name, data in inputs.items():
        graph.feed_input(name, data)
    graph.run()
