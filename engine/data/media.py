"""Video and audio files through FFmpeg's libraries: the only module that imports PyAV.

Clocks: a window's start counts from the video's first frame, and sound is placed by its time stamps on the
same clock. Frames are kept as I420, uint8 (T, 3H/2, W): the full-range BT.601 planes that JPEG stores.
Shape letters: T frames, H height, W width.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.codec.context import Flags
from numpy.typing import NDArray

SAMPLE_RATE = 16000
"""Samples a second of the sound that goes with a clip."""
MAX_ASPECT = 16.0
"""Pictures narrower than this are refused: resized by their short side they would be huge."""
LONGEST = 6 * 3600.0
"""Declared durations above this many seconds are checked against the packets."""
GAP = 0.02
"""Seconds by which sound may stray from its time stamps before it is placed anew."""
MATRICES = {1: 1, 4: 4, 5: 5, 6: 5, 7: 7, 9: 9, 10: 9}
"""FFmpeg's code for a YUV matrix (AVCOL_SPC) to swscale's (SWS_CS)."""
ATTACHED_PICTURE = 0x400

Frames = NDArray[np.uint8]


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
        return np.stack([_full_range(f).to_ndarray(format="rgb24") for f in self.frames])


def probe(path: Path | str) -> MediaFacts:
    """Read a file's facts and decode its first frame; raises MediaError with the reason where that fails."""
    with _open(path) as container:
        video = _stream(container, "video", path)
        duration = float(video.duration * video.time_base) if video.duration else 0.0
        if not duration and container.duration:
            late = (
                float((video.start_time or 0) * video.time_base) - (container.start_time or 0) / 1e6
            )
            duration = container.duration / 1e6 - late
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
    if not 0.0 < duration <= LONGEST:
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
    size = (_even(facts.width * scale), _even(facts.height * scale))
    num_frames = max(1, round(seconds * fps))
    problems: list[str] = []
    times = facts.start + start + np.arange(num_frames) / fps
    shown = _show(_frames_from(path, times[0], facts, problems), times, fps, facts)
    planes: list[Frames] = []
    last: Any = None
    for frame in shown:
        planes.append(planes[-1] if frame is last else _i420(frame, size, facts.rotation))
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


def _show(
    frames: Iterator[tuple[float, Any]], times: NDArray[np.float64], fps: float, facts: MediaFacts
) -> Iterator[Any]:
    """The frame shown at each of ``times`` (rising, seconds), up to the end of the video."""
    i, shown, since, lasts = 0, None, 0.0, 1.0 / (facts.fps or fps)
    for time, frame in frames:
        if shown is not None:
            until = time - min((time - since) / 2, 0.5 / fps) + 1e-6
            while i < len(times) and times[i] <= until:
                yield shown
                i += 1
            if i == len(times):
                return
        shown, since = frame, time
    if shown is not None:
        if shown.duration:
            lasts = float(shown.duration * shown.time_base)
        left = round((since + lasts - times[0]) * fps)  # grid points up to the last frame's end
        for _ in range(i, min(left, len(times))):
            yield shown


def _even(x: float) -> int:
    return max(2, 2 * round(x / 2))


def _i420(frame: Any, size: tuple[int, int], turns: int) -> Frames:
    """Scale a decoded frame to ``size`` (width, height as displayed) and turn it upright: (3H/2, W)."""
    width, height = size[::-1] if turns % 2 else size
    full = frame.color_range == 2 or frame.format.name.startswith("yuvj") or frame.format.is_rgb
    small = frame.reformat(
        width=width,
        height=height,
        format="yuv420p",
        src_colorspace=MATRICES.get(frame.colorspace, 1 if frame.height >= 720 else 5),
        dst_colorspace=5,
        src_color_range=2 if full else 1,
        dst_color_range=2,
        interpolation="AREA" if width < frame.width else "BICUBIC",
        threads=1,
    )
    planes: Frames = small.to_ndarray()
    if turns:
        luma, chroma = planes[:height], planes[height:].reshape(2, height // 2, width // 2)
        upright = [np.rot90(luma, turns), *(np.rot90(c, turns) for c in chroma)]
        planes = np.concatenate([p.ravel() for p in upright]).reshape(size[1] * 3 // 2, size[0])
    return planes


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


def _full_range(planes: Frames) -> Any:
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(planes), format="yuvj420p")
    frame.colorspace, frame.color_range = 5, 2
    return frame


def encode_jpeg(frames: Frames, *, quality: int) -> list[bytes]:
    """Encode frames as baseline 4:2:0 JPEG, one complete file each; equal input, equal bytes.

    ``frames`` are RGB uint8 (T, H, W, 3) or I420 uint8 (T, 3H/2, W), of even size. ``quality`` is 1 to 100 on
    the scale that libjpeg made usual. Raises ValueError for a quality outside it.
    """
    if not 1 <= quality <= 100:
        raise ValueError(f"quality must be 1 to 100, not {quality}")
    share = (100 - quality) / 50 if quality >= 50 else 50 / quality
    scale = str(
        min(31, max(2, round(14 * share)))
    )  # libjpeg's scaling onto FFmpeg's, by the mean step
    rgb = frames.ndim == 4
    encoder: Any = av.CodecContext.create("mjpeg", "w")
    encoder.width = frames.shape[2]
    encoder.height = frames.shape[1] if rgb else frames.shape[1] * 2 // 3
    encoder.pix_fmt, encoder.time_base, encoder.thread_count = "yuvj420p", Fraction(1, 25), 1
    encoder.flags |= Flags.bitexact
    encoder.options = {"qmin": scale, "qmax": scale}
    out = []
    for i, array in enumerate(frames):
        if rgb:
            frame: Any = av.VideoFrame.from_ndarray(np.ascontiguousarray(array), format="rgb24")
            frame = frame.reformat(
                format="yuvj420p", dst_colorspace=5, dst_color_range=2, threads=1
            )
        else:
            frame = _full_range(array)
        frame.pts, frame.time_base = i, encoder.time_base
        out += [bytes(packet) for packet in encoder.encode(frame)]
    out += [bytes(packet) for packet in encoder.encode(None)]
    assert len(out) == len(frames)
    return out


def encode_flac(sound: NDArray[np.float32], *, sample_rate: int = SAMPLE_RATE) -> bytes:
    """Encode mono float32 (samples,) in [-1, 1] as a 16-bit FLAC file; equal input, equal bytes."""
    file = io.BytesIO()
    whole = np.round(np.clip(sound, -1.0, 1.0) * 32767).astype(np.int16)
    options = {"fflags": "+bitexact"}
    with av.open(file, "w", format="flac", container_options=options) as container:
        out: Any = container
        stream = out.add_stream("flac", rate=sample_rate, layout="mono")
        stream.codec_context.flags |= Flags.bitexact
        frame = av.AudioFrame.from_ndarray(whole[None], format="s16", layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = sample_rate, 0, Fraction(1, sample_rate)
        out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return file.getvalue()


def write_video(
    path: Path | str,
    frames: Iterable[NDArray[np.uint8]],
    *,
    fps: int,
    sound: NDArray[np.float32] | None = None,
    sample_rate: int = SAMPLE_RATE,
) -> None:
    """Write an mp4 file (H.264, or MPEG-4 Part 2 without libx264; sound as AAC): equal input, equal bytes.

    ``frames`` are RGB uint8 (H, W, 3), all of one size with even H and W; ``sound`` is mono float32 (samples,)
    in [-1, 1] that starts with the first frame. The file appears whole or not at all. Raises ValueError for
    frames of another shape and for no frames.
    """
    path = Path(path)
    temp = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with av.open(
            os.path.abspath(temp), "w", format="mp4", container_options={"fflags": "+bitexact"}
        ) as out:
            _mux(out, frames, fps=fps, sound=sound, sample_rate=sample_rate)
        os.replace(temp, path)
    finally:
        with suppress(FileNotFoundError):
            temp.unlink()


def _mux(
    out: Any,
    frames: Iterable[NDArray[np.uint8]],
    *,
    fps: int,
    sound: NDArray[np.float32] | None,
    sample_rate: int,
) -> None:
    """Encode frames and sound side by side, so that the muxer never has to hold much of either."""
    video, audio, size, sent = None, None, None, 0
    for i, rgb in enumerate(frames):
        if video is None:
            size = rgb.shape
            if len(size) != 3 or size[2] != 3 or size[0] % 2 or size[1] % 2:
                raise ValueError(f"frames must be (H, W, 3) with even H and W, not {size}")
            video = _video_stream(out, width=size[1], height=size[0], fps=fps)
            audio = None if sound is None else _audio_stream(out, sample_rate)
        if rgb.shape != size or rgb.dtype != np.uint8:
            raise ValueError(f"frame {i} is {rgb.dtype} {rgb.shape}, the first one uint8 {size}")
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(rgb), format="rgb24").reformat(
            format="yuv420p", dst_colorspace="ITU601", dst_color_range="MPEG", threads=1
        )
        frame.pts, frame.time_base = i, Fraction(1, fps)
        out.mux(video.encode(frame))
        if audio is not None and sound is not None:
            upto = (i + 1) * sample_rate // fps
            _encode_sound(out, audio, sound[sent:upto], at=sent, sample_rate=sample_rate)
            sent = max(sent, min(upto, len(sound)))
    if video is None:
        raise ValueError("no frames to write")
    out.mux(video.encode(None))
    if audio is not None and sound is not None:
        _encode_sound(out, audio, sound[sent:], at=sent, sample_rate=sample_rate)
        out.mux(audio.encode(None))


def _video_stream(out: Any, *, width: int, height: int, fps: int) -> Any:
    names = [n for n in ("libx264", "mpeg4") if n in av.codecs_available]
    stream = out.add_stream(names[0], rate=fps)
    stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
    context = stream.codec_context
    context.thread_count = 1
    context.flags |= Flags.bitexact
    context.colorspace, context.color_range = 5, 1  # what the frames are: BT.601, limited range
    if names[0] == "libx264":
        context.options = {"preset": "veryfast", "crf": "18"}
    else:
        context.bit_rate = max(500_000, width * height * fps // 2)
    return stream


def _audio_stream(out: Any, sample_rate: int) -> Any:
    stream = out.add_stream("aac", rate=sample_rate, layout="mono")
    stream.codec_context.flags |= Flags.bitexact
    stream.codec_context.bit_rate = 96_000
    return stream


def _encode_sound(
    out: Any, stream: Any, samples: NDArray[np.float32], *, at: int, sample_rate: int
) -> None:
    if len(samples):
        chunk = np.ascontiguousarray(samples, dtype=np.float32)[None]
        frame = av.AudioFrame.from_ndarray(chunk, format="fltp", layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = sample_rate, at, Fraction(1, sample_rate)
        out.mux(stream.encode(frame))
