from __future__ import annotations

from pathlib import Path

import numpy as np

from engine.data.cut import Settings, find_videos, plan_starts

SETTINGS = Settings(
    fps=25, short_side=32, clip_seconds=10, clips_per_video=None, min_seconds=1, quality=85, seed=0
)


def test_find_videos(tmp_path: Path) -> None:
    names = [
        "b/x.MP4",
        "b/y.unknown",
        "a.avi",
        "a.txt",
        "b/z.jpg",
        ".hidden.mp4",
        ".git/c.mp4",
        "d/e/f.mkv",
    ]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "d" / "loop").symlink_to(tmp_path)
    found = find_videos([tmp_path, tmp_path / "a.avi"])
    assert [(s.relative, s.label) for s in found] == [
        ("a.avi", None),
        ("b/x.MP4", "b"),
        ("b/y.unknown", "b"),
        ("d/e/f.mkv", "e"),
    ]
    assert [s.relative for s in find_videos([tmp_path / "a.txt"])] == ["a.txt"]


def test_starts_depend_on_seed_and_path_alone() -> None:
    assert plan_starts(9.0, SETTINGS, "a") == plan_starts(10.03, SETTINGS, "a") == [0.0]
    starts = plan_starts(605.0, SETTINGS, "a")
    assert len(starts) == 11
    assert starts == sorted(set(starts))
    assert 0 <= starts[0] and starts[-1] <= 595.0
    assert starts == plan_starts(605.0, SETTINGS, "a")
    assert starts != plan_starts(605.0, SETTINGS, "b")
    assert starts != plan_starts(605.0, Settings(**{**vars(SETTINGS), "seed": 1}), "a")
    drawn = [plan_starts(30.0, SETTINGS, str(i))[0] for i in range(400)]
    assert 9.0 < np.mean(drawn) < 11.0  # uniform over [0, 20]
