"""Writing what ``media`` reads: JPEG pictures and FLAC sound for shards, and whole mp4 files.

Equal input gives equal bytes. Shape letters: T frames, H height, W width.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterable
from contextlib import suppress
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.codec.context import Flags
from numpy.typing import NDArray

from engine.data.media.decode import SAMPLE_RATE, full_range
from engine.data.media.frames import Frames


def encode_jpeg(frames: Frames, *, quality: int) -> list[bytes]:
    """Encode frames as baseline 4:2:0 JPEG, one complete file each; equal input, equal bytes.

    ``frames`` are RGB uint8 (T, H, W, 3) or I420 uint8 (T, 3H/2, W), of even size. ``quality`` is 1 to 100 on
    the scale that libjpeg made usual. Raises ValueError for a quality outside it.
    """
    if not 1 <= quality <= 100:
        raise ValueError(f"quality must be 1 to 100, not {quality}")
    share = (100 - quality) / 50 if quality >= 50 else 50 / quality
    scale = str(
        min(31, max(2, round(10 * share)))
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
            frame = full_range(array)
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


def _encode_sound(
    out: Any, stream: Any, samples: NDArray[np.float32], *, at: int, sample_rate: int
) -> None:
    if len(samples):
        chunk = np.ascontiguousarray(samples, dtype=np.float32)[None]
        frame = av.AudioFrame.from_ndarray(chunk, format="fltp", layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = sample_rate, at, Fraction(1, sample_rate)
        out.mux(stream.encode(frame))
