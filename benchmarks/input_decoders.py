"""Peers of ``input_peers.py``: torchcodec, decord, PyAV and OpenCV, each used as its guides recommend."""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import av
import click
import numpy as np
from numpy.typing import NDArray

INSTALL = "pip install torchcodec==0.13.0 decord2"
Frames = NDArray[np.uint8]
Peer = Callable[[str, NDArray[np.int64], int], Sequence[Frames]]
"""(file, frames wanted, threads) -> frames (H, W, 3)."""


def torchcodec_peer(exact: bool) -> Peer:
    from torchcodec.decoders import VideoDecoder

    mode = "exact" if exact else "approximate"

    def read(file: str, frames: NDArray[np.int64], threads: int) -> Sequence[Frames]:
        decoder = VideoDecoder(
            file, num_ffmpeg_threads=threads, seek_mode=mode, dimension_order="NHWC"
        )
        return decoder.get_frames_at(frames.tolist()).data.numpy()

    return read


def decord_peer() -> Peer:
    import decord

    def read(file: str, frames: NDArray[np.int64], threads: int) -> Sequence[Frames]:
        return decord.VideoReader(file, num_threads=threads).get_batch(frames.tolist()).asnumpy()

    return read


def pyav_peer() -> Peer:
    def read(file: str, frames: NDArray[np.int64], threads: int) -> Sequence[Frames]:
        wanted, found = set(frames.tolist()), []
        with av.open(file) as container:
            stream: Any = container.streams.video[0]
            stream.thread_type, stream.codec_context.thread_count = "AUTO", threads
            rate = stream.average_rate
            container.seek(int(frames[0] / rate / stream.time_base), stream=stream)
            for frame in container.decode(stream):
                place = round(float(frame.pts * stream.time_base * rate))
                if place in wanted:
                    found.append(frame.to_ndarray(format="rgb24"))
                if place >= frames[-1]:
                    break
        return found

    return read


def opencv_peer() -> Peer:
    import cv2

    cv2.setNumThreads(1)

    def read(file: str, frames: NDArray[np.int64], threads: int) -> Sequence[Frames]:
        film = cv2.VideoCapture(file, cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, threads])
        film.set(cv2.CAP_PROP_POS_FRAMES, int(frames[0]))
        wanted, found = set(frames.tolist()), []
        for place in range(int(frames[0]), int(frames[-1]) + 1):
            film.grab()
            if place in wanted:
                found.append(cv2.cvtColor(film.retrieve()[1], cv2.COLOR_BGR2RGB))
        return found

    return read


def find_peers() -> dict[str, Peer]:
    """Peers that work here; tells of the others why not."""
    makers: dict[str, tuple[str, Callable[[], Peer]]] = {
        "torchcodec, exact": ("torchcodec", lambda: torchcodec_peer(True)),
        "torchcodec, approximate": ("torchcodec", lambda: torchcodec_peer(False)),
        "decord": ("decord", decord_peer),
        "PyAV": ("av", pyav_peer),
        "OpenCV": ("cv2", opencv_peer),
    }
    found, reported = {}, set()
    for name, (module, make) in makers.items():
        try:
            importlib.import_module(module)
            found[name] = make()
        except Exception as error:  # a library that doesn't fit raises what it likes
            if module not in reported:
                reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
                hint = "" if module in ("av", "cv2") else f" (to compare with it: {INSTALL})"
                click.echo(f"{module} is left out: {reason}{hint}")
            reported.add(module)
    return found


def versions() -> dict[str, str]:
    """Versions of the peers that are installed, by their packages' names."""
    found = {}
    for name in ("torchcodec", "decord2", "av", "opencv-python-headless"):
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found
