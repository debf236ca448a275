"""A film's sound as mono samples on the video's clock."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray

from engine.data.media.container import (
    Clock,
    MediaError,
    open_media,
    packets,
    reason_of,
    seek,
    stream_of,
)
from engine.data.media.part import MediaFile

SAMPLE_RATE = 16000
"""Samples a second of the sound that goes with a clip."""
GAP = 0.02
"""Seconds by which sound may stray from its time stamps before it is placed anew."""
WARM_UP = 0.5
"""Seconds of sound decoded before those that are kept: codecs need some to settle."""


def read_sound(
    path: MediaFile, start: float, seconds: float, clock: Clock, problems: list[str]
) -> NDArray[np.float32] | None:
    """Read mono float32 (samples,) in [-1, 1] at SAMPLE_RATE from ``start``, in seconds by the file's clock.

    Sound is put where its time stamps say; where there is none, it is silent. None where nothing louder than
    16 bits can hold is heard. What is damaged is added to ``problems``. Where seeking finds nothing, sound is looked
    for from further back; where it fails, and in AVI, whose index knows of no late start, from the file's start.
    """
    out, problem = np.zeros(round(seconds * SAMPLE_RATE), dtype=np.float32), None
    lost = False
    for preroll in (WARM_UP, 10.0, None):
        with open_media(path) as container:
            if preroll is None and not lost and container.format.name != "avi":
                break
            out[:] = 0.0
            try:
                stream = stream_of(container, "audio")
                begin = float((stream.start_time or 0) * stream.time_base)
                if preroll is not None and start - preroll > begin:
                    lost = not seek(container, stream, start - preroll)
                    if lost:
                        continue
                first, problem = _place(container, stream, out, start, clock)
            except (av.FFmpegError, MediaError, ValueError) as error:
                problems.append(f"the sound can't be decoded: {reason_of(error)}")
                return None
        if first is not None and first <= max(start, begin + 0.1):
            break
    problems += [problem] if problem else []
    return None if np.abs(out).max(initial=0.0) < 2**-14 else np.clip(out, -1.0, 1.0)


def _place(
    container: Any, stream: Any, out: NDArray[np.float32], start: float, clock: Clock
) -> tuple[float | None, str | None]:
    """Resample the sound stretch by stretch, each put where its time stamp says; returns the first stamp."""
    first, problem, stretch = None, None, None
    end = start + len(out) / SAMPLE_RATE
    source = packets(container, [stream], clock)
    while True:
        try:
            packet = next(source, None)
        except av.FFmpegError as error:  # the file ends within it
            problem = f"part of the sound can't be decoded: {reason_of(error)}"
            break
        if packet is None:
            break
        stamp = None if packet.pts is None else float(packet.pts * packet.time_base)
        if stamp is not None and stamp < start - 2 * WARM_UP:  # seeking fell far short
            first = stamp if first is None else first
            continue
        try:
            frames = packet.decode()
        except av.FFmpegError as error:
            problem = f"part of the sound can't be decoded: {reason_of(error)}"
            continue
        for frame in frames:
            time = frame.time if frame.time is not None else (stretch.end if stretch else 0.0)
            first = time if first is None else first
            kind = (frame.format.name, frame.layout.name, frame.sample_rate)
            if stretch is None or stretch.kind != kind or abs(time - stretch.end) > GAP:
                if stretch is not None:
                    stretch.add(None)
                at = round((time - start) * SAMPLE_RATE)
                resampler = av.AudioResampler(format="fltp", layout="mono", rate=SAMPLE_RATE)
                stretch = _Stretch(kind, time, out, at, resampler)
            stretch.add(frame)
        if stretch is not None and stretch.end > end + 0.1:
            break
        if stamp is not None and stamp > end + 1.0:
            break
    if stretch is not None:
        stretch.add(None)
    return first, problem


@dataclass
class _Stretch:
    """Sound without a gap: input frames in, mono float32 at SAMPLE_RATE into its place in ``out``."""

    kind: tuple[str, str, int]
    end: float
    """Seconds by the file's clock, of the frames so far."""
    out: NDArray[np.float32]
    at: int
    """Where in ``out`` the next sample goes; it may lie before its beginning."""
    resampler: av.AudioResampler

    def add(self, frame: Any) -> None:
        """Take a frame, or None at the end of the stretch."""
        if frame is not None:
            self.end += frame.samples / frame.sample_rate
            frame.pts = None  # the stretch keeps the time; the resampler is not to fill gaps
        for part in self.resampler.resample(frame):
            sound = part.to_ndarray()[0]
            begin, end = max(self.at, 0), min(self.at + len(sound), len(self.out))
            if begin < end:
                self.out[begin:end] = sound[begin - self.at : end - self.at]
            self.at += len(sound)
