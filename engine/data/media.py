"""Reading video and audio files through FFmpeg's libraries: what a file is, and any stretch of it.

Clocks: a window's start counts from the video's first frame, and sound is placed by its time stamps on the
same clock. Frames are kept as I420, uint8 (T, 3H/2, W): the full-range BT.601 planes that JPEG stores.
Shape letters: T frames, H height, W width.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray

from engine.data.frames import Frames, even, show, to_i420

SAMPLE_RATE = 16000
"""Samples a second of the sound that goes with a clip."""
MAX_ASPECT = 16.0
"""Pictures narrower than this are refused: resized by their short side they would be huge."""
LONGEST = 6 * 3600.0
"""Declared durations above this many seconds are checked against the packets."""
GAP = 0.02
"""Seconds by which sound may stray from its time stamps before it is placed anew."""
ATTACHED_PICTURE = 0x400


class MediaError(Exception):
    """A media file that can't be used; the message says why in words for the file's owner."""


@dataclass(frozen=True)
class MediaFacts:
    """What a file says of itself, and what its first frame shows."""

    duration: float
    """Seconds of video."""
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


def probe(path: Path | str) -> MediaFacts:
    """Read a file's facts and decode its first frame; raises MediaError with the reason where that fails."""
    with _open(path) as container:
        video = _stream(container, "video", path)
        duration = float(video.duration * video.time_base) if video.duration else 0.0
        declared = bool(duration)
        if not declared and container.duration:
            duration = container.duration / 1e6
        problems: list[str] = []
        first = next(_timed_frames(container, video, problems), None)
        if first is None:
            why = f": {problems[0]}" if problems else ""
            raise MediaError(f"no frame can be decoded{why}")
        start, frame = first
        turns = round(frame.rotation / 90) % 4
        aspect = float(video.sample_aspect_ratio or 1)
        shape = [max(1, round(frame.width * aspect)), frame.height]
        if max(shape) > MAX_ASPECT * min(shape):
            raise MediaError(f"its picture of {shape[0]}x{shape[1]} is too narrow")
        width, height = shape[::-1] if turns % 2 else shape
        audio = container.streams.best("audio", related=video)
        facts = MediaFacts(
            duration=duration,
            start=start,
            width=width,
            height=height,
            fps=float(video.average_rate or 0),
            rotation=turns,
            has_audio=audio is not None and audio.codec_context is not None,
            codec=str(video.codec_context.name),
        )
    # Where only the container tells a duration, some count it from zero and some from the start.
    if not 0.0 < duration <= LONGEST or (not declared and abs(start) > 0.1):
        facts = MediaFacts(**{**vars(facts), "duration": _scan_duration(path)})
    return facts


def decode_window(
    path: Path | str,
    facts: MediaFacts,
    *,
    start: float,
    seconds: float,
    fps: float,
    short_side: int,
    sample_rate: int = SAMPLE_RATE,
) -> Window:
    """Decode [start, start + seconds) of a file, seeking to it; ``facts`` are ``probe``'s.

    Grid point i lies at start + i / fps seconds after the video's first frame and shows the frame on screen
    there, or the next one where that is closer and at most half a grid step away. The short side is resized
    to ``short_side`` pixels (even), the long one follows the displayed aspect, rounded to even. The window is
    shorter where the video ends or its intact part does; ``note`` tells the latter. Raises MediaError where
    no frame can be decoded there.
    """
    if short_side < 2 or short_side % 2:
        raise ValueError(f"short_side must be an even number of pixels, not {short_side}")
    scale = short_side / min(facts.width, facts.height)
    size = (even(facts.width * scale), even(facts.height * scale))
    num_frames = max(1, round(seconds * fps))
    problems: list[str] = []
    times = facts.start + start + np.arange(num_frames) / fps
    decoded = _frames_from(path, times[0], facts, problems)
    shown = show(decoded, times, fps=fps, source_fps=facts.fps)
    planes: list[Frames] = []
    last: Any = None
    for frame in shown:
        planes.append(planes[-1] if frame is last else to_i420(frame, size, facts.rotation))
        last = frame
    if not planes:
        why = f": {problems[0]}" if problems else ""
        raise MediaError(f"no frame can be decoded at {start:.2f} s{why}")
    end = start + len(planes) / fps
    if problems:
        problems = [f"decoding stops at {end:.2f} s: {problems[0]}"]
    elif min(start + seconds, facts.duration) - end > 0.5:
        problems = [f"the picture ends at {end:.2f} s of {facts.duration:.2f} s"]
    sound = None
    if facts.has_audio:
        samples = round(len(planes) / fps * sample_rate)
        sound, problem = _sound(path, float(times[0]), samples, sample_rate)
        problems += [problem] if problem else []
    return Window(np.stack(planes), sound, "; ".join(problems) or None)


def _open(path: Path | str) -> Any:
    try:
        # absolute, since FFmpeg takes what precedes a colon in a relative path for a protocol
        return av.open(os.path.abspath(path), metadata_errors="replace")
    except av.FFmpegError as error:
        raise MediaError(f"can't be opened as a video: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    log = getattr(error, "log", None)
    detail = f" ({str(log[2]).strip().rstrip('.')})" if log else ""
    return f"{getattr(error, 'strerror', None) or error}{detail}"


def _stream(container: Any, kind: str, path: Path | str) -> Any:
    video = container.streams.best("video")
    if video is None or int(video.disposition) & ATTACHED_PICTURE:
        raise MediaError(
            "it holds no video, only sound" if container.streams.audio else "it holds no video"
        )
    stream = video if kind == "video" else container.streams.best(kind, related=video)
    if stream is None or stream.codec_context is None:
        raise MediaError(f"its {kind} is in a format that can't be decoded")
    stream.codec_context.thread_count = (
        1  # processes share the cores; errors surface at the same frame
    )
    return stream


def _scan_duration(path: Path | str) -> float:
    """Seconds of video by the packets' time stamps, for files that declare nothing believable."""
    first, last = None, 0.0
    with _open(path) as container, suppress(av.FFmpegError):
        video = _stream(container, "video", path)
        for packet in container.demux(video):
            stamp = packet.dts if packet.pts is None else packet.pts
            if stamp is not None:
                begin = float(stamp * packet.time_base)
                first = begin if first is None else min(first, begin)
                last = max(last, begin + float((packet.duration or 0) * packet.time_base))
    return max(0.0, last - (first or 0.0))


def _timed_frames(container: Any, stream: Any, problems: list[str]) -> Iterator[tuple[float, Any]]:
    """Frames with rising time stamps in seconds, up to the end or the first damage after an intact frame.

    Damage before any frame (a stream cut into midway) is skipped. AVI stores no presentation times: with
    B-frames its packets' own are out of order, so there the decoding times count, which are in order.
    """
    use_dts = container.format.name == "avi"
    step = 1.0 / float(stream.average_rate or 25)
    last: float | None = None
    packets = container.demux(stream)
    while True:
        try:
            packet = next(packets, None)
            frames = [] if packet is None else packet.decode()
            if any(frame.is_corrupt for frame in frames):
                raise av.InvalidDataError(0, "damaged frame")
        except (av.FFmpegError, UnicodeDecodeError) as error:
            problems.append(_reason(error))
            if last is not None:
                return
            continue
        if packet is None:
            return
        for frame in frames:
            stamp = frame.pts if not use_dts or frame.dts is None else frame.dts
            stamp = frame.dts if stamp is None else stamp
            timed = None if stamp is None else float(stamp * frame.time_base)
            if use_dts and frame.dts is None and last is not None:
                timed = last + step  # frames that the decoder gives up at the end of the file
            time = timed if timed is not None else (0.0 if last is None else last + step)
            if last is None or time > last:
                if last is None:
                    problems.clear()
                last = time
                yield time, frame


def _frames_from(
    path: Path | str, time: float, facts: MediaFacts, problems: list[str]
) -> Iterator[tuple[float, Any]]:
    """Timed frames from the key frame before ``time`` on, or from further back where seeking overshoots."""
    for preroll in (0.0, 2.0, 15.0, None):
        with _open(path) as container:
            stream = _stream(container, "video", path)
            target = None if preroll is None else time - preroll
            if target is not None and target > facts.start:
                try:
                    container.seek(int(target / stream.time_base), stream=stream)
                except av.FFmpegError:
                    continue
            else:
                target = None
            problems.clear()
            frames = _timed_frames(container, stream, problems)
            first = next(frames, None)
            if target is None or (first is not None and first[0] <= time + 1e-6):
                if first is not None:
                    yield first
                    yield from frames
                return


def _sound(
    path: Path | str, start: float, samples: int, rate: int
) -> tuple[NDArray[np.float32] | None, str | None]:
    """Mono sound of ``samples`` from ``start`` (seconds by the file's clock), silent where there is none."""
    for preroll in (0.5, 10.0):
        out = np.zeros(samples, dtype=np.float32)
        with _open(path) as container:
            try:
                stream = _stream(container, "audio", path)
                begin = float((stream.start_time or 0) * stream.time_base)
                if start - preroll > begin:
                    container.seek(int((start - preroll) / stream.time_base), stream=stream)
                first, problem = _place_sound(container, stream, out, start, rate)
            except (av.FFmpegError, MediaError, ValueError) as error:
                return None, f"the sound can't be decoded: {_reason(error)}"
        if first is None or first <= max(start, begin + 0.1):
            break
    if first is None or np.abs(out).max(initial=0.0) < 2**-14:  # nothing that 16 bits could hold
        return None, problem
    return np.clip(out, -1.0, 1.0), problem


def _place_sound(
    container: Any, stream: Any, out: NDArray[np.float32], start: float, rate: int
) -> tuple[float | None, str | None]:
    """Resample the sound stretch by stretch, each put where its time stamp says; gives the first stamp."""
    first, problem, stretch = None, None, None
    for packet in container.demux(stream):
        try:
            frames = packet.decode()
        except av.FFmpegError as error:
            problem = f"part of the sound can't be decoded: {_reason(error)}"
            continue
        for frame in frames:
            time = frame.time if frame.time is not None else (stretch.end if stretch else 0.0)
            first = time if first is None else first
            kind = (frame.format.name, frame.layout.name, frame.sample_rate)
            if stretch is None or stretch.kind != kind or abs(time - stretch.end) > GAP:
                if stretch is not None:
                    stretch.finish(out, start)
                stretch = _Stretch(kind, time, rate)
            stretch.add(frame)
        if stretch is not None and stretch.end > start + len(out) / rate + 0.1:
            break
    if stretch is not None:
        stretch.finish(out, start)
    return first, problem


class _Stretch:
    """Sound without a gap: input frames in, mono float32 at ``rate`` out."""

    def __init__(self, kind: tuple[str, str, int], time: float, rate: int) -> None:
        self.kind, self.time, self.end, self.rate = kind, time, time, rate
        self.parts: list[NDArray[np.float32]] = []
        self.resampler = av.AudioResampler(format="fltp", layout="mono", rate=rate)

    def add(self, frame: Any) -> None:
        self.end += frame.samples / frame.sample_rate
        frame.pts = None  # the stretch keeps the time; the resampler is not to fill gaps of its own
        self.parts += [f.to_ndarray()[0] for f in self.resampler.resample(frame)]

    def finish(self, out: NDArray[np.float32], start: float) -> None:
        self.parts += [f.to_ndarray()[0] for f in self.resampler.resample(None)]
        sound = np.concatenate(self.parts) if self.parts else np.zeros(0, np.float32)
        at = round((self.time - start) * self.rate)
        begin, end = max(at, 0), min(at + len(sound), len(out))
        if begin < end:
            out[begin:end] = sound[begin - at : end - at]


def full_range(planes: Frames) -> Any:
    """A PyAV frame of one I420 picture, uint8 (3H/2, W)."""
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(planes), format="yuvj420p")
    frame.colorspace, frame.color_range = 5, 2
    return frame
