"""A film's sound as mono samples on the video's clock."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray

from engine.data.media.container import Clock, MediaError, open_media, packets, reason_of, stream_of

GAP = 0.02
"""Seconds by which sound may stray from its time stamps before it is placed anew."""
WARM_UP = 0.5
"""Seconds of sound decoded before those that are wanted: codecs need some to settle."""


def read_sound(
    path: Path | str, start: float, samples: int, rate: int, clock: Clock
) -> tuple[NDArray[np.float32] | None, str | None]:
    """Mono float32 (samples,) in [-1, 1] from ``start`` (seconds by the file's clock) at ``rate`` Hz.

    Sound is put where its time stamps say; where there is none, it is silent. None where nothing louder than
    16 bits can hold is heard. The second value says what is damaged. Where seeking finds nothing, sound is looked
    for from further back; where it fails, and in AVI, whose index knows of no late start, from the file's start.
    """
    out, problem = np.zeros(samples, dtype=np.float32), None
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
                    lost = not _seek(container, stream, start - preroll)
                    if lost:
                        continue
                first, problem = _place(container, stream, out, start, rate, clock)
            except (av.FFmpegError, MediaError, ValueError) as error:
                return None, f"the sound can't be decoded: {reason_of(error)}"
        if first is not None and first <= max(start, begin + 0.1):
            break
    if np.abs(out).max(initial=0.0) < 2**-14:
        return None, problem
    return np.clip(out, -1.0, 1.0), problem


def _seek(container: Any, stream: Any, time: float) -> bool:
    try:
        container.seek(int(time / stream.time_base), stream=stream)
    except av.FFmpegError:
        return False
    return True


def _place(
    container: Any, stream: Any, out: NDArray[np.float32], start: float, rate: int, clock: Clock
) -> tuple[float | None, str | None]:
    """Resample the sound stretch by stretch, each put where its time stamp says; gives the first stamp."""
    first, problem, stretch = None, None, None
    end = start + len(out) / rate
    for packet in packets(container, stream, clock):
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
                stretch = _Stretch(kind, time, out, start, rate)
            stretch.add(frame)
        if stretch is not None and stretch.end > end + 0.1:
            break
        if stamp is not None and stamp > end + 1.0:
            break
    if stretch is not None:
        stretch.add(None)
    return first, problem


class _Stretch:
    """Sound without a gap: input frames in, mono float32 at ``rate`` into its place in ``out``."""

    def __init__(
        self,
        kind: tuple[str, str, int],
        time: float,
        out: NDArray[np.float32],
        start: float,
        rate: int,
    ) -> None:
        self.kind, self.end, self.out = kind, time, out
        self.at = round((time - start) * rate)
        self.resampler = av.AudioResampler(format="fltp", layout="mono", rate=rate)

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
