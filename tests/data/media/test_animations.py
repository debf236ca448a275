"""Animated GIF and WebP, as Pillow writes them."""

from __future__ import annotations

import tarfile
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from engine.data.ingest.run import ingest
from engine.data.ingest.sources import find_sources
from engine.data.media.decode import decode_window, probe
from engine.data.shards.index import ClipIndex

GREYS = range(20, 220, 10)
MILLISECONDS = [40] * 10 + [200] * 10


def animate(path: Path, *, greys: range = GREYS, **how: object) -> Path:
    frames = [Image.fromarray(np.full((48, 64, 3), grey, np.uint8)) for grey in greys]
    frames[0].save(path, save_all=True, append_images=frames[1:], loop=0, **how)
    return path


@pytest.mark.parametrize("name", ["a.gif", "a.webp"])
def test_each_frame_is_shown_for_its_time(tmp_path: Path, name: str) -> None:
    how = {"lossless": True} if name == "a.webp" else {}
    path = animate(tmp_path / name, duration=MILLISECONDS, **how)
    facts = probe(path)
    assert (facts.duration, facts.width, facts.height) == (pytest.approx(2.4), 64, 48)
    window = decode_window(path, facts, start=0.0, seconds=10.0, fps=25.0, short_side=48)
    shown = [grey for grey, ms in zip(GREYS, MILLISECONDS, strict=True) for _ in range(ms // 40)]
    assert window.frames[:, 0, 0].tolist() == pytest.approx(shown, abs=2)
    assert window.note is None
    late = decode_window(path, facts, start=1.4, seconds=0.2, fps=25.0, short_side=48)
    assert late.frames[:, 0, 0].tolist() == pytest.approx(shown[35:40], abs=2)


@pytest.mark.parametrize("name", ["a.gif", "a.webp"])
def test_what_is_transparent_is_white_and_colours_are_kept(tmp_path: Path, name: str) -> None:
    frames = [Image.new("RGBA", (64, 48), (0, 0, 0, 0)) for _ in range(20)]
    for i, frame in enumerate(frames):
        frame.paste((200, 40, 40, 255), (2 * i, 8, 2 * i + 24, 40))
    frames[0].save(
        tmp_path / name, save_all=True, append_images=frames[1:], duration=80, disposal=2
    )
    facts = probe(tmp_path / name)
    rgb = decode_window(
        tmp_path / name, facts, start=0.0, seconds=2.0, fps=12.5, short_side=48
    ).rgb()
    for i in (0, 10, 19):
        assert rgb[i, 24, 2 * i + 12].tolist() == pytest.approx([200, 40, 40], abs=6)
        assert rgb[i, 2, 2].tolist() == pytest.approx([255, 255, 255], abs=2)


def test_gifs_of_a_folder_become_clips_and_stills_are_named(tmp_path: Path) -> None:
    folder = tmp_path / "memes" / "cats"
    folder.mkdir(parents=True)
    animate(folder / "moving.GIF", duration=80)
    animate(folder / "still.gif", greys=range(20, 30, 10))
    Image.fromarray(np.full((48, 64, 3), 20, np.uint8)).save(folder / "thumbnail.webp")
    report = ingest([tmp_path / "memes"], tmp_path / "set", short_side=32, workers=1)
    index = ClipIndex([tmp_path / "set"])
    assert [index.facts(i)["source"] for i in range(len(index))] == ["cats/moving.GIF"]
    assert [(r.path, r.reason) for r in report.rejects] == [
        ("cats/still.gif", "it is a still picture")
    ]
    first = cv2.imdecode(index.read(0, [0]).frames[0], cv2.IMREAD_GRAYSCALE)
    assert first.mean() == pytest.approx(20, abs=2)


def test_webp_of_folders_and_tars(tmp_path: Path) -> None:
    path = animate(tmp_path / "a.webp", duration=80, lossless=True)
    animate(tmp_path / "still.webp", greys=range(20, 30, 10))
    (tmp_path / "cut.webp").write_bytes(path.read_bytes()[:18])
    (tmp_path / "damaged.webp").write_bytes(path.read_bytes()[:200])
    huge = bytearray(path.read_bytes())
    huge[24:30] = b"\xff\x3f\x00" * 2
    (tmp_path / "huge.webp").write_bytes(huge)
    with tarfile.open(tmp_path / "b.tar", "w") as tar:
        tar.add(path, "a.webp")
        tar.add(tmp_path / "still.webp", "still.webp")
    tried = ["a.webp", "b.tar/a.webp", "damaged.webp", "huge.webp"]
    assert [source.relative for source in find_sources([tmp_path]).sources] == tried
    report = ingest([tmp_path], tmp_path / "set", short_side=32, workers=1)
    reasons = {reject.path: reject.reason for reject in report.rejects}
    assert report.clips == 2 and sorted(reasons) == ["damaged.webp", "huge.webp"]
    assert "can't be decoded" in reasons["damaged.webp"]
    assert "16384x16384 is too large" in reasons["huge.webp"]
