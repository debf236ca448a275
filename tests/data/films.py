"""Small films of every kind, made with PyAV's encoders, for the tests of reading them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

KINDS: dict[str, tuple[str, str, str, int]] = {
    "mp4": ("mp4", "libx264", "aac", 44100),
    "mov": ("mov", "mpeg4", "pcm_s16le", 22050),
    "mkv": ("matroska", "libx264", "libmp3lame", 44100),
    "webm": ("webm", "libvpx", "libopus", 48000),
    "avi": ("avi", "mpeg4", "libmp3lame", 44100),
    "ts": ("mpegts", "mpeg2video", "mp2", 48000),
    "ogv": ("ogg", "libvpx", "libvorbis", 44100),
    "flv": ("flv", "flv", "libmp3lame", 44100),
}
"""Suffix -> container, video codec, sound codec, samples a second."""
OPTIONS = {
    "libx264": {"preset": "ultrafast"},
    "libx265": {"preset": "ultrafast", "x265-params": "log-level=none"},
    "libvpx": {"deadline": "realtime", "cpu-used": "8", "auto-alt-ref": "0"},
}


def present(name: str) -> str:
    """The codec, or the one that stands in for it where FFmpeg was built without."""
    return name if name in av.codecs_available else {"libvorbis": "libopus"}.get(name, "aac")


def write_film(
    path: Path,
    pictures: Iterable[np.ndarray],
    *,
    fps: int = 25,
    sound: Callable[[np.ndarray], np.ndarray] | None = None,
    sound_from: float = 0.0,
    sound_to: float = 0.0,
    start: float = 0.0,
    kind: str | None = None,
    codec: str | None = None,
    sound_codec: str | None = None,
    pix_fmt: str = "yuv420p",
    gop: int = 12,
    options: dict[str, str] | None = None,
    container_options: dict[str, str] | None = None,
) -> Path:
    """Write ``pictures`` (H, W, 3) uint8 at ``start`` + i / fps seconds, and the sound.

    ``sound`` maps times in seconds (from the first picture) to samples in [-1, 1]; it is written from
    ``sound_from`` to ``sound_to``. AVI, whose writer keeps no starts, gets them in its stream headers.
    """
    name, video_codec, audio_codec, rate = KINDS[kind or path.suffix[1:]]
    audio_codec = present(sound_codec or audio_codec)
    rate = 48000 if audio_codec == "libopus" else rate
    begins = (start, start + sound_from)
    shift = -sound_from if name == "avi" else start
    with av.open(str(path), "w", format=name, container_options=container_options or {}) as out:
        video: Any = out.add_stream(codec or video_codec, rate=fps)
        audio: Any = out.add_stream(audio_codec, rate=rate, layout="mono") if sound else None
        sounds = _sound_packets(audio, sound, sound_from, sound_to, shift, rate)
        packets = _video_packets(
            video,
            pictures,
            fps,
            0.0 if name == "avi" else start,
            pix_fmt,
            gop,
            options or OPTIONS.get(codec or video_codec),
        )
        _mux_in_order(out, packets, sounds)
    if name == "avi":
        _set_avi_starts(path, begins)
    return path


def _set_avi_starts(path: Path, begins: tuple[float, float]) -> None:
    """Write when each stream starts into its header (dwStart, in units of dwScale / dwRate seconds)."""
    data = bytearray(path.read_bytes())
    for kind, begin in zip((b"vids", b"auds"), begins, strict=True):
        at = data.find(b"strh")
        while at >= 0 and data[at + 8 : at + 12] != kind:
            at = data.find(b"strh", at + 4)
        if at >= 0:
            scale, rate = np.frombuffer(data[at + 28 : at + 36], "<u4")
            data[at + 36 : at + 40] = round(begin * rate / scale).to_bytes(4, "little")
    path.write_bytes(data)


def _video_packets(
    stream: Any,
    pictures: Iterable[np.ndarray],
    fps: int,
    start: float,
    pix_fmt: str,
    gop: int,
    options: dict[str, str] | None,
) -> Iterator[Any]:
    context = stream.codec_context
    for i, picture in enumerate(pictures):
        if i == 0:
            stream.height, stream.width = picture.shape[:2]
            stream.pix_fmt, context.gop_size, context.thread_count = pix_fmt, gop, 1
            context.options = dict(options or {})
            context.bit_rate = 400_000
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
        frame = frame.reformat(format=pix_fmt, threads=1)
        frame.pts, frame.time_base = i + round(start * fps), Fraction(1, fps)
        yield from stream.encode(frame)
    yield from stream.encode(None)


def _sound_packets(
    stream: Any,
    sound: Callable[[np.ndarray], np.ndarray] | None,
    begin: float,
    end: float,
    start: float,
    rate: int,
) -> Iterator[Any]:
    if stream is None or sound is None:
        return
    for at in range(round(begin * rate), round(end * rate), 1024):
        t = np.arange(at, min(at + 1024, round(end * rate))) / rate
        wave = np.clip(sound(t) * 32000, -32768, 32767).astype(np.int16)
        frame = av.AudioFrame.from_ndarray(wave[None], format="s16", layout="mono")
        frame.sample_rate, frame.time_base = rate, Fraction(1, rate)
        frame.pts = at + round(start * rate)
        yield from stream.encode(frame)
    yield from stream.encode(None)


def _mux_in_order(out: Any, video: Iterator[Any], audio: Iterator[Any]) -> None:
    """Interleave by decoding time, so that muxers need hold nothing back."""
    heads = [next(video, None), next(audio, None)]
    sources = [video, audio]
    while any(head is not None for head in heads):
        times = [
            float("inf") if head is None else float((head.dts or 0) * head.time_base)
            for head in heads
        ]
        i = times.index(min(times))
        out.mux(heads[i])
        heads[i] = next(sources[i], None)


def flash_pictures(
    count: int, flash: int, *, size: tuple[int, int] = (48, 64)
) -> Iterator[np.ndarray]:
    """Dark pictures with one bright one."""
    for i in range(count):
        yield np.full((*size, 3), 235 if i == flash else 25, np.uint8)


def beep_at(moment: float) -> Callable[[np.ndarray], np.ndarray]:
    """40 ms of 1 kHz from ``moment``, over a hum that marks the rest as sound."""

    def sound(t: np.ndarray) -> np.ndarray:
        loud = (t >= moment) & (t < moment + 0.04)
        return 0.8 * np.sin(6283.185 * t) * loud + 0.01 * np.sin(628.3 * t)

    return sound


def texture(i: int, *, height: int = 48, width: int = 64) -> np.ndarray:
    """A moving pattern with detail enough that its code takes space."""
    y, x = np.mgrid[:height, :width]
    waves = [np.sin((x + 2 * i) / 5 + k) * np.cos((y - i) / 7 + k) for k in range(3)]
    grain = np.random.default_rng(i).integers(-20, 20, (height, width, 3))
    return np.clip(128 + 90 * np.stack(waves, -1) + grain, 0, 255).astype(np.uint8)
