"""A clip as a short film: its frames encoded as VP9 or H.264, or cut out of the source without encoding.

Equal input gives equal bytes.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
from av.codec.context import Flags
from numpy.typing import NDArray

from engine.data.media.codecs import COPIED, H264, KEY_EVERY, VP9, Pictures
from engine.data.media.container import (
    MAX_LEAD,
    TIME_LIMIT,
    Clock,
    MediaError,
    open_media,
    packets,
    reason_of,
    seek,
    stream_of,
    timed_frames,
)
from engine.data.media.decode import MediaFacts, full_range, notes_of
from engine.data.media.frames import Frames, show, unknown_colours
from engine.data.media.part import MediaFile
from engine.data.media.sound import read_sound
from engine.data.media.tone import BT2020, DCI_P3, DISPLAY_P3

MAX_FILM = 64 * 2**20
"""Largest copied stretch, in bytes."""
HIGH_RANGE = {16: "PQ", 18: "HLG"}
"""FFmpeg's codes of transfer curves (AVCOL_TRC) of high dynamic range."""
WIDE = {BT2020: "BT.2020", DCI_P3: "DCI-P3", DISPLAY_P3: "Display P3"}
VP9_OPTIONS = {
    "deadline": "good",
    "cpu-used": "5",
    "crf": "30",
    "b": "0",
    "auto-alt-ref": "0",  # a packet a frame, none hidden
    "lag-in-frames": "0",
    "tile-columns": "0",
    "row-mt": "0",
}
H264_OPTIONS = {"preset": "medium", "crf": "20", "x264-params": "no-mbtree=1:scenecut=0"}


def encode_vp9(frames: Frames, *, fps: float) -> Pictures:
    """Encode I420 pictures, uint8 (T, 3H/2, W) in full range, as VP9 with a key frame every KEY_EVERY frames."""
    encoder: Any = av.CodecContext.create("libvpx-vp9", "w")
    _set_up(encoder, frames, fps=fps, options=VP9_OPTIONS)
    encoded = list(_encode(encoder, frames))
    assert len(encoded) == len(frames)
    assert all(packet.is_keyframe for packet in encoded[::KEY_EVERY])
    return Pictures(VP9, tuple(bytes(packet) for packet in encoded))


def encode_h264(frames: Frames, *, fps: float) -> Pictures:
    """Encode pictures like ``encode_vp9``, as an mp4 file of H.264; raises ValueError where FFmpeg lacks libx264."""
    if "libx264" not in av.codecs_available:
        raise ValueError("this build of FFmpeg can't encode H.264: take the codec vp9 or jpeg")
    file = io.BytesIO()
    with _mp4(file) as out:
        stream = out.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        _set_up(stream.codec_context, frames, fps=fps, options=H264_OPTIONS)
        for packet in _encode(stream.codec_context, frames):
            packet.stream = stream
            out.mux(packet)
    return Pictures(H264, (file.getvalue(),), tuple(range(len(frames))))


def _set_up(encoder: Any, frames: Frames, *, fps: float, options: dict[str, str]) -> None:
    encoder.width, encoder.height = frames.shape[2], frames.shape[1] * 2 // 3
    encoder.pix_fmt, encoder.thread_count = "yuv420p", 1
    encoder.time_base = 1 / Fraction(fps).limit_denominator(1001)
    encoder.framerate = 1 / encoder.time_base
    encoder.gop_size, encoder.max_b_frames = KEY_EVERY, 0
    encoder.colorspace, encoder.color_range = 5, 1  # BT.601 in limited range, as decoders assume
    encoder.flags |= Flags.bitexact
    encoder.options = options


def _encode(encoder: Any, frames: Frames) -> Iterator[Any]:
    for i, planes in enumerate(frames):
        frame = full_range(planes).reformat(
            format="yuv420p", src_color_range=2, dst_color_range=1, threads=1
        )
        frame.colorspace, frame.color_range = 5, 1
        frame.pts, frame.time_base = i, encoder.time_base
        frame.pict_type = 1 if i % KEY_EVERY == 0 else 0  # an I frame, or the encoder's choice
        yield from encoder.encode(frame)
    yield from encoder.encode(None)


def _mp4(file: io.BytesIO) -> Any:
    # no edit list: every decoder then counts the same frames
    options = {"fflags": "+bitexact", "use_editlist": "0"}
    return av.open(file, "w", format="mp4", container_options=options)


@dataclass(frozen=True)
class CopiedClip:
    """A stretch of a source's own stream."""

    pictures: Pictures
    sound: NDArray[np.float32] | None
    """Mono (samples,) in [-1, 1], as long as the frames; None where the file has none here."""
    note: str | None
    """What is missing of it."""


def copy_clip(
    path: MediaFile,
    facts: MediaFacts,
    *,
    start: float,
    seconds: float,
    fps: float,
    time_limit: float = TIME_LIMIT,
) -> CopiedClip:
    """Cut [start, start + seconds) out of a file without encoding anew, from the key frame before it.

    The clip's frames, ``fps`` a second, are those that ``media.decode_window`` would show: ``Pictures.shown`` says
    which of the stream's they are. All of it is decoded once, to know that it can be. Raises MediaError for a
    stream that a decoder of shards doesn't take or whose pictures need more than scaling, and where no frame
    can be decoded.
    """
    clock = Clock(time_limit)
    moment = facts.start + start
    _check_kind(path, facts, clock)
    with open_media(path) as container:
        stream = stream_of(container, "video")
        kept = _stretch(container, stream, moment, moment + seconds, facts, clock)
        film, first = _remux(stream, kept)
    times = moment + np.arange(max(1, round(seconds * fps))) / fps
    problems: list[str] = []
    numbered = _numbered(film, float(first), problems, clock)
    shown = tuple(frame.number for frame in show(numbered, times, fps=fps, source_fps=facts.fps))
    end = start + len(shown) / fps
    notes = notes_of(facts, problems, start=start, end=end, until=start + seconds)
    sound = None
    if facts.has_audio:
        sound = read_sound(path, moment, len(shown) / fps, clock, notes)
    pictures = Pictures(COPIED[facts.codec], (film,), shown)
    return CopiedClip(pictures, sound, "; ".join(notes) or None)


def _check_kind(path: MediaFile, facts: MediaFacts, clock: Clock) -> None:
    """Raise MediaError for pictures that a decoder of shards would show wrongly or not at all."""
    otherwise = "which copying keeps: take another codec"
    if facts.codec not in COPIED:
        can = "H.264, HEVC, VP9 and MPEG-4"
        raise MediaError(f"its stream is {facts.codec}; only {can} can be copied")
    if facts.rotation:
        raise MediaError(f"its picture is turned by {90 * facts.rotation} degrees, {otherwise}")
    with open_media(path) as container:
        stream = stream_of(container, "video")
        first = next(timed_frames(container, stream, [], clock), None)
        curve = int(stream.codec_context.color_trc or 0)
        primaries = int(stream.codec_context.color_primaries or 0)
    if first is None:
        raise MediaError("no frame can be decoded")
    _, frame = first
    kind = None
    if frame.format.name not in ("yuv420p", "yuvj420p"):
        kind = frame.format.name
    elif frame.interlaced_frame:
        kind = "interlaced"
    elif curve in HIGH_RANGE:
        kind = f"of high dynamic range ({HIGH_RANGE[curve]})"
    elif primaries in WIDE:
        kind = f"of wide gamut ({WIDE[primaries]})"
    if (why := unknown_colours(frame)) is not None:
        raise MediaError(why)
    if kind is not None:
        raise MediaError(f"its pictures are {kind}, {otherwise}")


def _stretch(
    container: Any, stream: Any, begin: float, end: float, facts: MediaFacts, clock: Clock
) -> list[Any]:
    """Packets from the key frame at or before ``begin`` up to all that is shown before ``end``."""
    if container.format.name == "avi" and stream.codec_context.has_b_frames:
        raise MediaError("AVI doesn't say when its B-frames are shown: take another codec")
    base = float(stream.time_base)
    for preroll in (0.0, 2.0, 15.0, None):
        if not seek(container, stream, facts.start if preroll is None else begin - preroll):
            if preroll is None:
                raise MediaError("it can't be searched for a key frame")
            continue
        kept = _from_key_frame(container, stream, begin, end, clock)
        if not kept:
            continue
        key = _stamps(kept[0])[1] * base
        if preroll is None or key <= begin + 1e-6:
            if begin - key > MAX_LEAD:
                raise MediaError(
                    f"its key frame before {begin - facts.start:.2f} s lies more than {MAX_LEAD:g} s back"
                )
            return kept
    raise MediaError(f"no key frame was found before {begin - facts.start:.2f} s")


def _from_key_frame(
    container: Any, stream: Any, begin: float, end: float, clock: Clock
) -> list[Any]:
    """Read packets up to ``end``, and drop those before the last key frame at or before ``begin``."""
    base = float(stream.time_base)
    kept: list[Any] = []
    size = 0
    for packet in packets(container, [stream], clock):
        if not packet.size:
            continue
        dts, pts = _stamps(packet)
        if packet.is_keyframe and (pts * base <= begin + 1e-6 or not kept):
            kept, size = [], 0  # nearer than the key frame before it
        elif not kept:
            continue
        if dts * base > end:
            break
        # what is shown before its key frame leans on lost ones
        if not kept or pts >= _stamps(kept[0])[1]:
            kept.append(packet)
            size += packet.size
        if size > MAX_FILM or pts * base - begin > MAX_LEAD:
            raise MediaError(f"a stretch of it takes more than {MAX_FILM >> 20} MiB")
    return kept


def _stamps(packet: Any) -> tuple[int, int]:
    dts = packet.pts if packet.dts is None else packet.dts
    pts = packet.dts if packet.pts is None else packet.pts
    if dts is None or pts is None:
        raise MediaError("its packets have no time stamps, which copying needs: take another codec")
    return dts, pts


def _remux(stream: Any, kept: list[Any]) -> tuple[bytes, Fraction]:
    """Packets as an mp4 file, and the time in seconds that its clock has to be moved by."""
    file = io.BytesIO()
    shift = min(_stamps(packet)[0] for packet in kept)
    try:
        with _mp4(file) as out:
            target = out.add_stream_from_template(stream)
            for packet in kept:
                dts, pts = _stamps(packet)
                packet.dts, packet.pts, packet.stream = dts - shift, pts - shift, target
                out.mux_one(packet)
    except (av.FFmpegError, ValueError) as error:
        raise MediaError(f"its stream can't be copied: {reason_of(error)}") from error
    return file.getvalue(), shift * stream.time_base


def _numbered(
    film: bytes, first: float, problems: list[str], clock: Clock
) -> Iterator[tuple[float, Any]]:
    """The film's frames by their numbers, at their times by the source's clock."""
    with av.open(io.BytesIO(film)) as container:
        stream = stream_of(container, "video")
        for number, (time, frame) in enumerate(timed_frames(container, stream, problems, clock)):
            facts = {"duration": frame.duration, "time_base": frame.time_base}
            yield time + first, SimpleNamespace(number=number, **facts)
