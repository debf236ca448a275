from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from engine.data.media import container
from engine.data.media.decode import MediaError, decode_window, probe
from engine.data.media.encode import encode_flac, write_video

BITS = 8


def coded(number: int, *, height: int = 64, width: int = 128) -> np.ndarray:
    """A frame that shows ``number`` as a row of black and white blocks."""
    bits = [(number >> b) & 1 for b in range(BITS)]
    row = np.repeat(np.array(bits, np.uint8) * 255, width // BITS)
    return np.broadcast_to(row[None, :, None], (height, width, 3)).copy()


def read_code(rgb: np.ndarray) -> int:
    """The number shown by a frame of ``coded``."""
    columns = rgb.mean(axis=(0, 2)).reshape(BITS, -1).mean(axis=1)
    return sum(1 << b for b in range(BITS) if columns[b] > 127)


def codes(path: Path, *, start: float = 0.0, seconds: float = 10.0, fps: float = 25.0) -> list[int]:
    window = decode_window(path, probe(path), start=start, seconds=seconds, fps=fps, short_side=64)
    return [read_code(frame) for frame in window.rgb()]


def write_timed(path: Path, stamps_ms: list[int], *, sar: Fraction | None = None) -> None:
    """A Matroska film of coded frames 0, 1, ... at these time stamps."""
    with av.open(str(path), "w", format="matroska") as out:
        stream: Any = out.add_stream("libx264", rate=25, options={"preset": "ultrafast", "g": "10"})
        stream.width, stream.height, stream.pix_fmt = 128, 64, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        if sar is not None:
            stream.codec_context.sample_aspect_ratio = sar
        for i, stamp in enumerate(stamps_ms):
            frame = av.VideoFrame.from_ndarray(coded(i), format="rgb24").reformat(format="yuv420p")
            frame.pts, frame.time_base = stamp, Fraction(1, 1000)
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))


def beep(seconds: float, *, at: float, rate: int = 16000) -> np.ndarray:
    """Silence with 40 ms of 1 kHz in it."""
    t = np.arange(round(seconds * rate)) / rate
    return (np.sin(2 * np.pi * 1000 * t) * ((t >= at) & (t < at + 0.04)) * 0.8).astype(np.float32)


def onset(sound: np.ndarray, rate: int = 16000) -> float:
    return float(np.argmax(np.abs(sound) > 0.2 * np.abs(sound).max())) / rate


def shown_at(grid: float, stamps: list[float], step: float) -> int:
    """Independent rule: the frame on screen, or the next where it is closer and within half a step."""
    current = max((i for i, s in enumerate(stamps) if s <= grid + 1e-9), default=0)
    if current + 1 < len(stamps):
        ahead, behind = stamps[current + 1] - grid, grid - stamps[current]
        if ahead < behind - 1e-6 and ahead < step / 2 - 1e-6:
            return current + 1
    return current


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four seconds at 30 fps."""
    path = tmp_path_factory.mktemp("film") / "film.mp4"
    write_video(path, (coded(i) for i in range(120)), fps=30)
    return path


def test_frames_are_picked_by_time_stamp(film: Path) -> None:
    assert codes(film) == [round(1.2 * i) for i in range(100)]


def test_windows_are_cut_by_seeking(film: Path) -> None:
    expected = [round(30 * (2.36 + i / 25)) for i in range(25)]
    assert codes(film, start=2.36, seconds=1.0) == expected


def test_lower_and_equal_rates(film: Path) -> None:
    assert codes(film, fps=30.0) == list(range(120))
    assert codes(film, fps=10.0) == list(range(0, 120, 3))


def test_a_long_film_is_not_decoded_from_its_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "long.mkv"
    write_timed(path, [40 * i for i in range(250)])
    seen = []
    original = container.timed_frames

    def counting(*args: Any, **options: Any) -> Any:
        for item in original(*args, **options):
            seen.append(item[0])
            yield item

    facts = probe(path)
    monkeypatch.setattr(container, "timed_frames", counting)
    window = decode_window(path, facts, start=8.0, seconds=0.4, fps=25, short_side=64)
    assert [read_code(f) for f in window.rgb()] == list(range(200, 210))
    assert len(seen) < 40


def test_non_zero_start(tmp_path: Path) -> None:
    path = tmp_path / "late.mkv"
    write_timed(path, [5000 + round(1000 * i / 30) for i in range(60)])
    facts = probe(path)
    assert facts.start == pytest.approx(5.0, abs=1e-3)
    assert facts.duration == pytest.approx(2.0, abs=0.05)
    assert codes(path) == [round(1.2 * i) for i in range(50)]
    assert codes(path, start=1.0, seconds=0.4) == [round(30 + 1.2 * i) for i in range(10)]


def test_variable_frame_rate(tmp_path: Path) -> None:
    stamps = [0, 40, 80, 600, 610, 620, 700, 1400, 1440, 1500, 1990]
    path = tmp_path / "variable.mkv"
    write_timed(path, stamps)
    seconds = [s / 1000 for s in stamps]
    found = codes(path, seconds=1.9)
    assert found == [shown_at(i / 25, seconds, 1 / 25) for i in range(len(found))]
    assert len(found) in (47, 48)
    assert found[10] == 2  # still the frame before the gap


def test_sample_aspect_ratio(tmp_path: Path) -> None:
    path = tmp_path / "wide.mkv"
    write_timed(path, [0, 40, 80], sar=Fraction(2, 1))
    facts = probe(path)
    assert (facts.width, facts.height) == (256, 64)
    window = decode_window(path, facts, start=0, seconds=1, fps=25, short_side=32)
    assert window.frames.shape == (3, 48, 128)


@pytest.mark.data
def test_rotation_in_real_files(real_data: Path) -> None:
    facts = probe(real_data / "odd/torchcodec/nasa_13013_rotated.mp4")
    assert (facts.width, facts.height, facts.rotation) == (270, 480, 1)
    assert probe(real_data / "odd/decord/video_90.mov").rotation == 3  # clockwise


def test_flash_and_beep_stay_together(tmp_path: Path) -> None:
    path = tmp_path / "flash.mp4"
    frames = [np.full((64, 64, 3), 230 if i == 40 else 20, np.uint8) for i in range(100)]
    write_video(path, frames, fps=25, sound=beep(4.0, at=40 / 25))
    for start in (0.0, 0.89):
        window = decode_window(path, probe(path), start=start, seconds=2.4, fps=25, short_side=64)
        flash = int(window.rgb().mean(axis=(1, 2, 3)).argmax()) / 25
        assert window.sound is not None
        assert window.sound.shape == (38400,)
        assert abs(onset(window.sound) - flash) < 0.02
        assert flash == pytest.approx(1.6 - start, abs=0.021)


def test_sound_is_resampled_and_padded(tmp_path: Path) -> None:
    path = tmp_path / "short_sound.mp4"
    t = np.arange(44100) / 44100
    tone = (0.5 * np.sin(2 * np.pi * 440 * t)).astype(np.float32)
    write_video(path, [coded(i) for i in range(50)], fps=25, sound=tone, sample_rate=44100)
    sound = decode_window(path, probe(path), start=0, seconds=2, fps=25, short_side=64).sound
    assert sound is not None
    expected = 0.5 * np.sin(2 * np.pi * 440 * np.arange(16000) / 16000)
    inner = slice(800, 15200)
    assert np.abs(sound[inner] - expected[inner]).max() < 0.05
    assert np.abs(sound[17000:]).max() < 1e-3


def test_silence_counts_as_no_sound(tmp_path: Path) -> None:
    path = tmp_path / "silent.mp4"
    frames = [coded(i) for i in range(25)]
    write_video(path, frames, fps=25, sound=np.zeros(16000, np.float32))
    window = decode_window(path, probe(path), start=0, seconds=1, fps=25, short_side=64)
    assert window.sound is None
    assert window.note is None


@pytest.mark.data
def test_damage_part_way_leaves_the_intact_part(real_data: Path) -> None:
    path = real_data / "odd/decord/corrupted.mp4"
    window = decode_window(path, probe(path), start=0, seconds=10, fps=25, short_side=64)
    assert len(window.frames) == 70
    assert window.note is not None
    assert "decoding stops at 2.80 s" in window.note


def test_a_truncated_file_is_noted(tmp_path: Path) -> None:
    path = tmp_path / "cut.mkv"
    rng = np.random.default_rng(0)
    whole = tmp_path / "whole.mp4"
    noise = [rng.integers(0, 255, (64, 64, 3), dtype=np.uint8) for _ in range(100)]
    write_video(whole, noise, fps=25)
    with av.open(str(whole)) as source, av.open(str(path), "w", format="matroska") as out:
        stream = out.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                out.mux(packet)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    window = decode_window(path, probe(path), start=0, seconds=10, fps=25, short_side=64)
    assert 25 < len(window.frames) < 75
    assert window.note is not None
    assert window.note.startswith("the file ends at ") and " s of 4.0 s" in window.note


@pytest.mark.data
def test_metadata_need_not_be_utf8(real_data: Path) -> None:
    taken = 0
    for path in sorted((real_data / "hmdb51_subset").rglob("*.avi")):
        window = decode_window(path, probe(path), start=0, seconds=1, fps=25, short_side=64)
        taken += len(window.frames) == 25
    assert taken == 6


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.mp4", b"", "it is empty"),
        ("b.avi", b"hello" * 999, "can't be opened"),
        ("c.mp4", None, "No such file"),
    ],
)
def test_what_is_no_video_says_why(
    tmp_path: Path, name: str, content: bytes | None, reason: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(MediaError, match=reason):
        probe(tmp_path / name)


def test_sound_alone_is_no_video(tmp_path: Path) -> None:
    (tmp_path / "tone.xyz").write_bytes(encode_flac(beep(1.0, at=0.2)))
    with pytest.raises(MediaError, match="only sound"):
        probe(tmp_path / "tone.xyz")


def test_a_colon_in_a_name_is_no_protocol(
    film: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a:b.mp4").write_bytes(film.read_bytes())
    monkeypatch.chdir(tmp_path)
    assert probe("a:b.mp4").duration == pytest.approx(4.0)
