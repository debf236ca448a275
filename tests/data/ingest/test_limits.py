"""Long films and large pictures: what is read of them, and how much memory that takes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from engine.data.media import container, sound
from engine.data.media.container import MediaError
from engine.data.media.decode import decode_window, probe
from tests.data.films import beep_at, texture, write_film
from tests.data.ingest.test_fuzz import MEMORY, ROOT, Worker

HOURS = 2.0


def repeat(source: Path, path: Path, *, form: str, seconds: float, piece: float) -> None:
    """Write a film's packets again and again, ``piece`` seconds a time, the last tenth of a second left out."""
    with av.open(str(source)) as film, av.open(str(path), "w", format=form) as out:
        streams = {s.index: out.add_stream_from_template(s) for s in film.streams}
        packets = [
            (p.stream.index, p.pts, p.dts, p.time_base, p.duration, p.is_keyframe, bytes(p))
            for p in film.demux()
            if p.dts is not None
            and 0 <= p.pts * p.time_base <= piece - 0.1 - p.duration * p.time_base
        ]
        for turn in range(round(seconds / piece)):
            for index, pts, dts, base, duration, key, data in packets:
                packet = av.Packet(data)
                shift = round(turn * piece / base)
                packet.pts, packet.dts, packet.time_base = pts + shift, dts + shift, base
                packet.duration, packet.is_keyframe = duration, key
                packet.stream = streams[index]
                out.mux(packet)


@pytest.fixture(scope="module", params=["mp4", "mkv"])
def long_film(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two hours of four seconds."""
    folder = tmp_path_factory.mktemp("long")
    piece = write_film(
        folder / f"piece.{request.param}",
        (np.full((32, 32, 3), 40 + 10 * i, np.uint8) for i in range(20)),
        fps=5,
        gop=10,
        sound=beep_at(1.0),
        sound_to=4.0,
    )
    path = folder / f"long.{request.param}"
    form = {"mp4": "mp4", "mkv": "matroska"}[request.param]
    repeat(piece, path, form=form, seconds=HOURS * 3600, piece=4.0)
    return path


def test_a_clip_of_a_long_film_is_reached_by_seeking(
    long_film: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = 0
    original = container.packets

    def counting(*args: Any) -> Any:
        nonlocal seen
        for packet in original(*args):
            seen += 1
            yield packet

    monkeypatch.setattr(container, "packets", counting)
    monkeypatch.setattr(sound, "packets", counting)
    facts = probe(long_film)
    assert facts.duration == pytest.approx(HOURS * 3600, abs=5)
    window = decode_window(long_film, facts, start=6001.0, seconds=4.0, fps=5, short_side=32)
    brightness = window.frames[:, :32].mean(axis=(1, 2))
    # 6001 s is 1 s into a piece: pictures 5 to 18, then 0 to 4
    assert np.abs(np.diff(brightness) - 10).max() > 100
    assert int(brightness.argmin()) == 15
    assert window.sound is not None
    assert np.abs(window.sound[:640]).max() > 0.5 > 5 * np.abs(window.sound[1600:48000]).max()
    assert seen < 600  # of 36,000 pictures and 230,000 packets of sound


def test_a_long_film_takes_little_memory_and_time(long_film: Path) -> None:
    worker = Worker()
    try:
        found = worker.cut(long_film)
    finally:
        worker.close()
    assert isinstance(found, dict)
    assert [clip[0] for clip in found["clips"]] == [25, 25]
    assert found["peak"] < MEMORY / 2
    assert found["seconds"] < 5


@pytest.mark.parametrize("codec", ["mjpeg", "libvpx"])
def test_large_pictures_take_bounded_memory(tmp_path: Path, codec: str) -> None:
    path = tmp_path / "8k.mkv"
    picture = np.full((4320, 7680, 3), 90, np.uint8)
    options = {"deadline": "realtime", "cpu-used": "8"} if codec == "libvpx" else {}
    pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
    write_film(
        path, [picture] * 2, fps=1, kind="mkv", codec=codec, pix_fmt=pix_fmt, options=options
    )
    worker = Worker()
    try:
        found = worker.cut(path)
    finally:
        worker.close()
    assert isinstance(found, dict)
    assert [clip[0] for clip in found["clips"]] == [25, 25]
    assert found["peak"] < MEMORY


def test_what_needs_more_memory_is_refused(tmp_path: Path) -> None:
    picture = np.full((4320, 7680, 3), 90, np.uint8)
    path = write_film(tmp_path / "8k.mkv", [picture], codec="mjpeg", pix_fmt="yuvj444p")
    with pytest.raises(MediaError, match=r"7680x4320 takes more than"):
        large = probe(path)
        decode_window(path, large, start=0, seconds=1, fps=25, short_side=4320)
    path = write_film(tmp_path / "wide.mkv", [texture(0, height=48, width=640)] * 30)
    with pytest.raises(MediaError, match="cut shorter clips"):
        decode_window(path, probe(path), start=0, seconds=60, fps=25, short_side=480)


def test_a_key_frame_too_far_back_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_film(tmp_path / "one_key.mkv", (texture(i) for i in range(300)), gop=1000)
    monkeypatch.setattr(container, "MAX_LEAD", 5.0)
    facts = probe(path)
    assert len(decode_window(path, facts, start=4, seconds=1, fps=25, short_side=32).frames) == 25
    with pytest.raises(MediaError, match=r"key frame before 10\.00 s lies 10 s back"):
        decode_window(path, facts, start=10, seconds=1, fps=25, short_side=32)


def test_time_is_bounded(tmp_path: Path) -> None:
    path = write_film(tmp_path / "film.mkv", (texture(i) for i in range(50)))
    facts = probe(path)
    with pytest.raises(MediaError, match="more than 0 s"):
        decode_window(path, facts, start=0, seconds=1, fps=25, short_side=32, time_limit=0.0)


STUCK = """
import ctypes, multiprocessing, sys
from engine.data.media import container

def stuck(inside):
    container.GRACE = 0.2
    with container.Clock(0.1):
        if inside:
            ctypes.PyDLL(None).sleep(60)  # never gives the interpreter back, as a decoder in an endless loop
    ctypes.PyDLL(None).sleep(1)

if __name__ == "__main__":
    codes = []
    for inside in (True, False):
        process = multiprocessing.get_context("spawn").Process(target=stuck, args=(inside,))
        process.start()
        process.join(30)
        codes.append(process.exitcode)
    print(codes)
"""


def test_a_decoder_that_never_returns_ends_its_worker_process(tmp_path: Path) -> None:
    script = tmp_path / "stuck.py"
    script.write_text(STUCK)
    done = subprocess.run(
        [sys.executable, str(script)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout.strip() == "[1, 0]"


def test_a_stream_that_cannot_be_seeked_is_read_from_its_key_frame(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where seeking always lands too late, packets are counted to the key frame, and few are decoded."""
    path = write_film(tmp_path / "film.mkv", (texture(i) for i in range(500)), gop=25)
    facts = probe(path)
    expected = decode_window(path, facts, start=18, seconds=1, fps=25, short_side=32).frames
    opened = container.open_media

    class Blind:
        def __init__(self, inner: Any) -> None:
            self.inner = inner

        def __getattr__(self, name: str) -> Any:
            return getattr(self.inner, name)

        def __enter__(self) -> Blind:
            return self

        def __exit__(self, *_: object) -> None:
            self.inner.close()

        def seek(self, *_: object, **__: object) -> None:
            raise av.FFmpegError(1, "can't seek")

    decoded = 0
    timed = container.timed_frames

    def counting(*args: Any, **options: Any) -> Any:
        nonlocal decoded
        for item in timed(*args, **options):
            decoded += 1
            yield item

    monkeypatch.setattr(container, "MAX_LEAD", 5.0)
    monkeypatch.setattr(container, "open_media", lambda path: Blind(opened(path)))
    monkeypatch.setattr(container, "timed_frames", counting)
    found = decode_window(path, facts, start=18, seconds=1, fps=25, short_side=32).frames
    np.testing.assert_array_equal(found, expected)
    assert decoded < 60
