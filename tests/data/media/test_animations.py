"""Animated GIF and WebP, as Pillow writes them."""

from __future__ import annotations

import tarfile
from pathlib import Path

import cv2
import numpy as np
import pytest

from engine.data.ingest.run import ingest
from engine.data.ingest.sources import find_sources
from engine.data.media.decode import MediaError, decode_window, probe
from engine.data.shards.index import ClipIndex

Image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")

GREYS = range(20, 220, 10)
MILLISECONDS = [40] * 10 + [200] * 10


def animate(path: Path, *, greys: range = GREYS, **how: object) -> Path:
    frames = [Image.fromarray(np.full((48, 64, 3), grey, np.uint8)) for grey in greys]
    frames[0].save(path, save_all=True, append_images=frames[1:], loop=0, **how)
    return path


def test_a_gif_shows_each_frame_for_its_time(tmp_path: Path) -> None:
    path = animate(tmp_path / "a.gif", duration=MILLISECONDS)
    facts = probe(path)
    assert (facts.duration, facts.width, facts.height) == (pytest.approx(2.4), 64, 48)
    window = decode_window(path, facts, start=0.0, seconds=10.0, fps=25.0, short_side=48)
    shown = [grey for grey, ms in zip(GREYS, MILLISECONDS, strict=True) for _ in range(ms // 40)]
    assert window.frames[:, 0, 0].tolist() == pytest.approx(shown, abs=1)
    late = decode_window(path, facts, start=1.4, seconds=0.2, fps=25.0, short_side=48)
    assert late.frames[:, 0, 0].tolist() == pytest.approx(shown[35:40], abs=1)


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


def test_animated_webp_is_named(tmp_path: Path) -> None:
    path = animate(tmp_path / "a.webp", duration=40, lossless=True)
    animate(tmp_path / "still.webp", greys=range(20, 30, 10))
    (tmp_path / "cut.webp").write_bytes(path.read_bytes()[:18])
    with tarfile.open(tmp_path / "b.tar", "w") as tar:
        tar.add(path, "a.webp")
        tar.add(tmp_path / "still.webp", "still.webp")
    assert [s.relative for s in find_sources([tmp_path]).sources] == ["a.webp", "b.tar/a.webp"]
    with pytest.raises(MediaError, match="convert it to GIF or MP4"):
        probe(path)
