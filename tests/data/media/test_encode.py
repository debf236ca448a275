from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from engine.data.media.encode import encode_flac, encode_jpeg, write_video
from engine.data.media.frames import to_i420


def smooth(height: int = 96, width: int = 128) -> np.ndarray:
    y, x = np.mgrid[0:height, 0:width]
    rgb = np.stack(
        [255 * x / width, 255 * y / height, 127 + 120 * np.sin(x / 20) * np.cos(y / 15)], -1
    )
    return rgb.astype(np.uint8)


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / np.mean((a.astype(float) - b.astype(float)) ** 2)))


def decode_with_dali(data: bytes) -> np.ndarray:
    pytest.importorskip("nvidia.dali")
    from nvidia.dali import fn, pipeline_def

    @pipeline_def(batch_size=1, num_threads=1, device_id=None)
    def graph() -> Any:
        source = fn.external_source(source=lambda: [np.frombuffer(data, np.uint8)])
        return fn.decoders.image(source, device="cpu")

    pipe = graph()
    pipe.build()
    return np.array(pipe.run()[0].at(0))


def test_jpeg_colours_come_back() -> None:
    rgb = smooth()
    planes = to_i420(av.VideoFrame.from_ndarray(rgb, format="rgb24"), (128, 96), 0)
    for frames in (rgb[None], planes[None]):
        data = encode_jpeg(frames, quality=85)[0]
        decoder = av.CodecContext.create("mjpeg", "r")
        by_ffmpeg = decoder.decode(av.Packet(data))[0].to_ndarray(format="rgb24")
        assert psnr(by_ffmpeg, rgb) >= 30
        assert psnr(decode_with_dali(data), rgb) >= 30


def test_jpeg_files_are_complete_and_equal() -> None:
    frames = np.stack([smooth(), smooth()[::-1]])
    first, again = encode_jpeg(frames, quality=85), encode_jpeg(frames, quality=85)
    assert first == again
    assert all(f[:2] == b"\xff\xd8" and f[-2:] == b"\xff\xd9" for f in first)
    assert (
        len(encode_jpeg(frames, quality=30)[0])
        < len(first[0])
        < len(encode_jpeg(frames, quality=95)[0])
    )
    with pytest.raises(ValueError, match="quality"):
        encode_jpeg(frames, quality=0)


def test_flac_gives_the_sound_back() -> None:
    pytest.importorskip("nvidia.dali")
    from nvidia.dali import fn, pipeline_def, types

    rng = np.random.default_rng(0)
    sound = rng.uniform(-0.9, 0.9, 16000).astype(np.float32)
    data = encode_flac(sound)
    assert data == encode_flac(sound)
    with av.open(io.BytesIO(data)) as container:
        frames = [f.to_ndarray()[0] for f in container.decode(audio=0)]
        assert container.streams.audio[0].rate == 16000
    assert np.abs(np.concatenate(frames) / 32767 - sound).max() < 1 / 32767

    @pipeline_def(batch_size=1, num_threads=1, device_id=None)
    def graph() -> Any:
        source = fn.external_source(source=lambda: [np.frombuffer(data, np.uint8)])
        decoded, rate = fn.decoders.audio(source, dtype=types.FLOAT, downmix=True)
        return decoded, rate

    pipe = graph()
    pipe.build()
    decoded, rate = pipe.run()
    assert float(np.array(rate.at(0))) == 16000
    assert np.abs(np.array(decoded.at(0)) - sound).max() < 1e-4


def test_equal_films_have_equal_bytes(tmp_path: Path) -> None:
    sound = (0.5 * np.sin(np.arange(16000) / 3)).astype(np.float32)
    for name in ("a.mp4", "b.mp4"):
        frames = [np.roll(smooth(), i, axis=1) for i in range(30)]
        write_video(tmp_path / name, frames, fps=30, sound=sound)
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()


def test_a_film_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    def failing() -> Any:
        yield smooth()
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        write_video(tmp_path / "a.mp4", failing(), fps=30)
    with pytest.raises(ValueError, match="even"):
        write_video(tmp_path / "a.mp4", [np.zeros((5, 4, 3), np.uint8)], fps=30)
    with pytest.raises(ValueError, match="no frames"):
        write_video(tmp_path / "a.mp4", [], fps=30)
    assert list(tmp_path.iterdir()) == []
