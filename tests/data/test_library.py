"""Several paths opened as one data set of clips."""

from __future__ import annotations

from pathlib import Path

from engine.data.library import Library, open_library
from tests.data.films import texture, write_film


def opened(*paths: Path, cache: Path) -> Library:
    return open_library(paths, cache=cache, report=lambda *told: None, workers=1)


def test_videos_that_two_paths_lead_to_count_once(tmp_path: Path) -> None:
    videos, inside, beside = (tmp_path / name for name in ("videos", "videos/more", "videos-too"))
    for number, folder in enumerate((videos, inside, beside)):
        folder.mkdir(exist_ok=True)
        write_film(folder / f"{number}.mp4", [texture(99 * number + i) for i in range(50)])
    cache = tmp_path / "cache"
    library = opened(inside, videos, beside, videos, cache=cache)
    assert len(library.index) == 3 and len(library.shards) == 2
    (line,) = library.warnings
    assert line.startswith(f"{inside}: ") and str(videos) in line
    shards = opened(videos, cache=cache).shards
    assert (
        len(opened(*shards, beside, cache=cache).index) == 3
    )  # shards in a cache are what they are
