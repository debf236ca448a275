"""Writing what ``decode`` reads: JPEG pictures and FLAC sound for shards, and whole mp4 files.

Equal input gives equal bytes. Shape letters: T frames, H height, W width.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.codec.context import Flags
from numpy.typing import NDArray

from engine.core.files import replacing
from engine.data.media.decode import SAMPLE_RATE, full_range
from engine.data.media.frames import Frames


def encode_jpeg(frames: Frames, *, quality: int) -> list[bytes]:
    """Encode I420 frames, uint8 (T, 3H/2, W) of even size, as baseline JPEG files; equal input, equal bytes.

    ``quality`` is 1 to 100 on the scale that libjpeg made usual. Raises ValueError for a quality outside it.
    """
    if not 1 <= quality <= 100:
        raise ValueError(f"quality must be 1 to 100, not {quality}")
    share = (100 - quality) / 50 if quality >= 50 else 50 / quality
    # libjpeg's scaling onto FFmpeg's, by the mean step
    scale = str(min(31, max(2, round(10 * share))))
    encoder: Any = av.CodecContext.create("mjpeg", "w")
    encoder.width, encoder.height = frames.shape[2], frames.shape[1] * 2 // 3
    encoder.pix_fmt, encoder.time_base, encoder.thread_count = "yuvj420p", Fraction(1, 25), 1
    encoder.flags |= Flags.bitexact
    encoder.options = {"qmin": scale, "qmax": scale}
    out = []
    for i, planes in enumerate(frames):
        frame = full_range(planes)
        frame.pts, frame.time_base = i, encoder.time_base
        out += [bytes(packet) for packet in encoder.encode(frame)]
    out += [bytes(packet) for packet in encoder.encode(None)]
    assert len(out) == len(frames)
    return out


def encode_flac(sound: NDArray[np.float32]) -> bytes:
    """Encode mono float32 (samples,) in [-1, 1] at SAMPLE_RATE as a 16-bit FLAC file; equal input, equal bytes."""
    file = io.BytesIO()
    whole = np.round(np.clip(sound, -1.0, 1.0) * 32767).astype(np.int16)
    options = {"fflags": "+bitexact"}
    with av.open(file, "w", format="flac", container_options=options) as container:
        out: Any = container
        stream = out.add_stream("flac", rate=SAMPLE_RATE, layout="mono")
        stream.codec_context.flags |= Flags.bitexact
        out.mux(stream.encode(_sound_frame(whole, "s16", at=0, sample_rate=SAMPLE_RATE)))
        out.mux(stream.encode(None))
    return file.getvalue()


def _sound_frame(samples: NDArray[Any], kind: str, *, at: int, sample_rate: int) -> Any:
    """A PyAV frame of mono samples, the first of which is number ``at``."""
    frame = av.AudioFrame.from_ndarray(
        np.ascontiguousarray(samples)[None], format=kind, layout="mono"
    )
    frame.sample_rate, frame.pts, frame.time_base = sample_rate, at, Fraction(1, sample_rate)
    return frame


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
    options = {"fflags": "+bitexact"}
    with (
        replacing(Path(path)) as file,
        av.open(os.path.abspath(file), "w", format="mp4", container_options=options) as out,
    ):
        _mux(out, frames, fps=fps, sound=sound, sample_rate=sample_rate)


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
        sent += _send_sound(out, audio, sound, sent, (i + 1) * sample_rate // fps)
    if video is None:
        raise ValueError("no frames to write")
    out.mux(video.encode(None))
    if audio is not None and sound is not None:
        _send_sound(out, audio, sound, sent, len(sound))
        out.mux(audio.encode(None))


def _video_stream(out: Any, *, width: int, height: int, fps: int) -> Any:
    name = next(n for n in ("libx264", "mpeg4") if n in av.codecs_available)
    stream = out.add_stream(name, rate=fps)
    stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
    context = stream.codec_context
    context.thread_count = 1
    context.flags |= Flags.bitexact
    context.colorspace, context.color_range = 5, 1  # what the frames are: BT.601, limited range
    if name == "libx264":
        # Macroblock-tree rate control reads beyond the rows of odd widths: bytes then differ from run to run.
        context.options = {"preset": "veryfast", "crf": "18", "x264-params": "no-mbtree=1"}
    else:
        context.bit_rate = max(500_000, width * height * fps // 2)
    return stream


def _audio_stream(out: Any, sample_rate: int) -> Any:
    stream = out.add_stream("aac", rate=sample_rate, layout="mono")
    stream.codec_context.flags |= Flags.bitexact
    stream.codec_context.bit_rate = 192_000  # below, the encoder garbles the first 70 ms
    return stream


def _send_sound(
    out: Any, stream: Any, sound: NDArray[np.float32] | None, begin: int, end: int
) -> int:
    """Encode the sound from sample ``begin`` to ``end``, as far as there is any; returns how many samples."""
    chunk = np.zeros(0, np.float32) if sound is None else sound[begin:end].astype(np.float32)
    if len(chunk):
        out.mux(stream.encode(_sound_frame(chunk, "fltp", at=begin, sample_rate=stream.rate)))
    return len(chunk)
