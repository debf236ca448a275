"""Reading video files through FFmpeg's libraries: what a file is, and any stretch of it.

Clocks: a window's start counts from the video's first frame, and sound is placed by its time stamps on the
same clock. Frames are kept as I420, uint8 (T, 3H/2, W): the full-range BT.601 planes that JPEG stores.
Shape letters: T frames, H height, W width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray

from engine.data.media.container import (
    TIME_LIMIT,
    Clock,
    frames_from,
    held_bytes,
    open_media,
    progressive,
    stream_of,
    timed_frames,
)
from engine.data.media.container import MediaError as MediaError
from engine.data.media.extent import SLACK, length_of
from engine.data.media.frames import Frames, even, show, to_i420
from engine.data.media.part import MediaFile
from engine.data.media.sound import SAMPLE_RATE as SAMPLE_RATE
from engine.data.media.sound import read_sound

MAX_ASPECT = 16.0
"""Pictures narrower than this are refused: resized by their short side they would be huge."""
MAX_BYTES = 340 * 2**20
"""What a window and its decoder may take: with what else a worker needs, 400 MiB."""


@dataclass(frozen=True)
class MediaFacts:
    """Facts of a file, from its head and its first frame."""

    duration: float
    """Seconds of video that are there."""
    start: float
    """The first frame's time stamp in seconds."""
    width: int
    height: int
    """Size in pixels as displayed: turned upright, with square pixels."""
    fps: float
    """Average rate that the file declares; 0 where it declares none."""
    rotation: int
    """Quarter turns, counter-clockwise, that bring a stored frame upright: 0 to 3."""
    has_audio: bool
    codec: str
    held: int = 0
    """Bytes that decoding takes, about."""
    promised: float = 0.0
    """Seconds of video that the file's head promises, where its data end before; else 0."""

    @property
    def cut(self) -> str | None:
        """Where the file ends and where it should, in words; None where all of it is there."""
        if not self.promised:
            return None
        return f"the file ends at {self.duration:.1f} s of {self.promised:.1f} s: it is cut off"


@dataclass(frozen=True)
class Window:
    """A stretch of a file at a constant frame rate, with its sound."""

    frames: Frames
    """uint8 (T, 3H/2, W): I420, full range, BT.601."""
    sound: NDArray[np.float32] | None
    """Mono (samples,) in [-1, 1], as long as the frames; None where the file has none here."""
    note: str | None
    """What is missing, where the window is shorter than the file promised or its sound is damaged."""

    def rgb(self) -> Frames:
        """The frames as RGB, uint8 (T, H, W, 3)."""
        return np.stack([full_range(f).to_ndarray(format="rgb24") for f in self.frames])


def probe(path: MediaFile, *, time_limit: float = TIME_LIMIT) -> MediaFacts:
    """Read a file's facts and decode its first frame.

    Raises MediaError with the reason where that fails, or takes more than ``time_limit`` seconds.
    """
    with Clock(time_limit) as clock, open_media(path) as container:
        video = stream_of(container, "video")
        problems: list[str] = []
        frames = timed_frames(container, video, problems, clock)
        first = next(frames, None)
        if first is None:
            why = f": {problems[0]}" if problems else ""
            raise MediaError(f"no frame can be decoded{why}")
        if container.format.name == "gif" and next(frames, None) is None:
            raise MediaError("it is a still picture")
        start, frame = first
        turns = round(frame.rotation / 90) % 4
        aspect = float(video.sample_aspect_ratio or 1)
        shape = [max(1, round(frame.width * aspect)), frame.height]
        if max(shape) > MAX_ASPECT * min(shape):
            raise MediaError(f"its picture of {shape[0]}x{shape[1]} is too narrow")
        width, height = shape[::-1] if turns % 2 else shape
        audio = container.streams.best("audio", related=video)
        held = held_bytes(video.codec_context)
        duration, promised = length_of(path, container, video, start, clock)
    return MediaFacts(
        duration=duration,
        promised=promised,
        start=start,
        width=width,
        height=height,
        fps=float(video.average_rate or 0),
        rotation=turns,
        has_audio=audio is not None and audio.codec_context is not None,
        codec=str(video.codec_context.name),
        held=held,
    )


def decode_window(
    path: MediaFile,
    facts: MediaFacts,
    *,
    start: float,
    seconds: float,
    fps: float,
    short_side: int,
    time_limit: float = TIME_LIMIT,
) -> Window:
    """Decode [start, start + seconds) of a file, seeking to it; ``facts`` are ``probe``'s.

    Grid point i lies at start + i / fps seconds after the video's first frame and shows the frame on screen
    there, or the next one where that is closer and at most half a grid step away. The short side is resized
    to ``short_side`` pixels (even), the long one follows the displayed aspect, rounded to even. The window is
    shorter where the video ends or its intact part does; ``note`` tells the latter. Interlaced pictures are
    de-interlaced, high dynamic range and wide gamut become standard (``tone``). Raises MediaError where no frame
    can be decoded there, the nearest key frame is too far, the window would take more than MAX_BYTES, or
    reading takes more than ``time_limit`` seconds.
    """
    if short_side < 2 or short_side % 2:
        raise ValueError(f"short_side must be an even number of pixels, not {short_side}")
    problems: list[str] = []
    times = facts.start + start + np.arange(max(1, round(seconds * fps))) / fps
    sound = None
    with Clock(time_limit) as clock:
        frames = _pictures(path, facts, times, problems, clock, fps=fps, short_side=short_side)
        end = start + len(frames) / fps
        notes = notes_of(facts, problems, start=start, end=end, until=start + seconds)
        if facts.has_audio:
            sound = read_sound(path, float(times[0]), len(frames) / fps, clock, notes)
    return Window(frames, sound, "; ".join(notes) or None)


def notes_of(
    facts: MediaFacts, problems: list[str], *, start: float, end: float, until: float
) -> list[str]:
    """Say what is missing of [start, until) where pictures end at ``end``; raises MediaError where there are none."""
    if end <= start:
        why = f": {problems[0]}" if problems else ""
        raise MediaError(f"no frame can be decoded at {start:.2f} s{why}")
    if problems and not (facts.promised and end > facts.duration - SLACK):
        return [f"decoding stops at {end:.2f} s: {problems[0]}"]
    if facts.cut and until - end > 1e-6:
        return [facts.cut]
    if min(until, facts.duration) - end > SLACK:
        return [f"the picture ends at {end:.2f} s of {facts.duration:.2f} s"]
    return []


def _pictures(
    path: MediaFile,
    facts: MediaFacts,
    times: NDArray[np.float64],
    problems: list[str],
    clock: Clock,
    *,
    fps: float,
    short_side: int,
) -> Frames:
    """Decode the pictures shown at ``times``, as far as they go."""
    scale = short_side / min(facts.width, facts.height)
    size = (even(facts.width * scale), even(facts.height * scale))
    shape = (len(times), size[1] * 3 // 2, size[0])
    if shape[0] * shape[1] * shape[2] + facts.held > MAX_BYTES:
        raise MediaError(
            f"a clip of {shape[0]} frames of {size[0]}x{size[1]}, from pictures of {facts.width}x{facts.height}, "
            f"takes more than {MAX_BYTES >> 20} MiB: cut shorter clips, or of a smaller short side"
        )
    planes = np.empty(shape, np.uint8)
    count, last = 0, None
    decoded = progressive(frames_from(path, float(times[0]), facts.start, problems, clock))
    for frame in show(decoded, times, fps=fps, source_fps=facts.fps):
        planes[count] = planes[count - 1] if frame is last else to_i420(frame, size, facts.rotation)
        count, last = count + 1, frame
    return planes[:count]


def full_range(planes: Frames) -> Any:
    """A PyAV frame of one I420 picture, uint8 (3H/2, W)."""
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(planes), format="yuvj420p")
    frame.colorspace, frame.color_range = 5, 2
    return frame
