from __future__ import annotations

import json
import os
from pathlib import Path

import cv2
import numpy as np
import pytest

from engine.data.ingest.run import ingest
from engine.data.ingest.sources import find_sources, find_videos, read_list, seconds
from engine.data.media.encode import write_video
from engine.data.shards.index import ClipIndex


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")


def test_find_videos(tmp_path: Path) -> None:
    touch(tmp_path, "b/x.MP4", "b/y.unknown", "a.avi", "a.txt", "b/z.jpg", ".hidden.mp4")
    touch(tmp_path, ".git/c.mp4", "d/e/f.mkv", "shards/index-0.bin")
    (tmp_path / "shards" / "dataset.json").write_text('{"format": 1, "shards": []}')
    (tmp_path / "d" / "loop").symlink_to(tmp_path)
    found = find_videos([tmp_path, tmp_path / "a.avi"])
    assert [(s.relative, s.label) for s in found] == [
        ("a.avi", None),
        ("b/x.MP4", "b"),
        ("b/y.unknown", "b"),
        ("d/e/f.mkv", "e"),
    ]
    assert [s.path for s in found] == [tmp_path / s.relative for s in found]
    with pytest.raises(ValueError, match="does not exist"):
        find_videos([tmp_path / "none"])


def test_files_of_one_name_are_told_apart(tmp_path: Path) -> None:
    touch(tmp_path, "one/a.mp4", "two/a.mp4")
    found = find_videos([tmp_path / "one", tmp_path / "two"])
    assert [(s.relative, s.twin) for s in found] == [("a.mp4", 0), ("a.mp4", 1)]


def test_a_table_with_columns(tmp_path: Path) -> None:
    touch(tmp_path, "v/a b.mp4", "v/c,d.mp4")
    (tmp_path / "list.csv").write_bytes(
        b"\xef\xbb\xbfClass,time_end,video,ignored,time_start\r\n"
        b"walk,4.5,v/a b.mp4,x,1\r\n"
        b"walk,1:02.5,v/a b.mp4,,0:58\r\n"
        b'run,,"v/c,d.mp4",,\r\n'
        b"\r\n"
        b"run,,v/none.mp4,,\r\n"
        b"run,2,v/a b.mp4,,3\r\n"
        b"run,two,v/a b.mp4,,1\r\n"
        b"walk,4.5,v/a b.mp4,x,1\r\n"
        b"run,2,,,1\r\n"
    )
    found = read_list(tmp_path / "list.csv")
    assert [(s.relative, s.label, s.start, s.end, s.listed) for s in found.sources] == [
        ("v/a b.mp4", "walk", 1.0, 4.5, "list.csv:2"),
        ("v/a b.mp4", "walk", 58.0, 62.5, "list.csv:3"),
        ("v/c,d.mp4", "run", None, None, "list.csv:4"),
    ]
    assert [(r.path, r.listed, r.reason) for r in found.rejects] == [
        ("v/none.mp4", "list.csv:6", "there is no such file"),
        ("v/a b.mp4", "list.csv:7", "it ends at 2 s, before it starts at 3 s"),
        ("v/a b.mp4", "list.csv:8", "its end, 'two', is no time in seconds"),
        ("v/a b.mp4", "list.csv:9", "line 2 names the same stretch of the same file"),
        ("", "list.csv:10", "the line names no file"),
    ]


def test_other_lists(tmp_path: Path) -> None:
    touch(tmp_path, "#a (1)!;.avi", "b.avi", "sub/c.avi")
    (tmp_path / "names.txt").write_text(f"#a (1)!;.avi\n\n  ./b.avi \n{tmp_path}/sub/c.avi\n")
    (tmp_path / "plain.csv").write_text("b.avi,walk,1,2\nsub/c.avi\n")
    (tmp_path / "table.tsv").write_text("path\tstart\nb.avi\t3\n")
    told = [
        (s.relative, s.label, s.start, s.end) for s in read_list(tmp_path / "names.txt").sources
    ]
    assert told == [
        ("#a (1)!;.avi", None, None, None),
        ("b.avi", None, None, None),
        (f"{tmp_path}/sub/c.avi", None, None, None),
    ]
    assert all(s.path.is_file() for s in read_list(tmp_path / "names.txt").sources)
    told = [
        (s.relative, s.label, s.start, s.end) for s in read_list(tmp_path / "plain.csv").sources
    ]
    assert told == [("b.avi", "walk", 1.0, 2.0), ("sub/c.avi", None, None, None)]
    assert read_list(tmp_path / "table.tsv").sources[0].start == 3.0
    assert len(find_sources([tmp_path / "names.txt", tmp_path / "table.tsv"]).sources) == 4
    (tmp_path / "ids.csv").write_text("label,youtube_id,time_start,time_end,split\nx,y,1,2,train\n")
    with pytest.raises(ValueError, match=r"ids.csv has no column .*--kinetics"):
        read_list(tmp_path / "ids.csv")


def test_names_that_are_no_utf8(tmp_path: Path) -> None:
    name = b"caf\xe9.mp4"
    with open(os.fsencode(tmp_path) + b"/" + name, "wb"):
        pass
    (tmp_path / "list.txt").write_bytes(name + b"\n")
    (source,) = read_list(tmp_path / "list.txt").sources
    assert source.path.is_file()
    assert os.fsencode(source.relative) == name


@pytest.mark.parametrize("text", ["-1", "1e3", "1:2:3:4", "nan", "1,5"])
def test_what_is_no_time(text: str) -> None:
    with pytest.raises(ValueError, match="no time"):
        seconds(text, what="start")


def test_stretches_become_clips(tmp_path: Path) -> None:
    """A film that brightens with time tells by its frames which stretch a clip shows."""
    frames = (np.full((32, 48, 3), 10 + i, np.uint8) for i in range(200))
    write_video(tmp_path / "film.mp4", frames, fps=25)
    (tmp_path / "list.csv").write_text(
        "path,start,end,label\n"
        "film.mp4,2,4,a\n"
        "film.mp4,1.0,2.5,b\n"
        "film.mp4,6,,c\n"
        "film.mp4,7.5,20,d\n"
        "film.mp4,3,3.5,e\n"
        "film.mp4,9,11,f\n"
    )
    settings = {"short_side": 32, "clip_seconds": 3.0, "workers": 1, "quality": 95}
    report = ingest([tmp_path / "list.csv"], tmp_path / "set", **settings)
    index = ClipIndex([tmp_path / "set"])
    facts = [index.facts(i) for i in range(len(index))]
    told = [(f["class"], f["start"], f["num_frames"]) for f in facts]
    assert told == [("b", 1.0, 37 + 1), ("a", 2.0, 50), ("c", 6.0, 50)]
    assert {(r.where, r.listed, r.reason) for r in report.rejects} == {
        ("7.500 to 20.000 s", "list.csv:5", told_short(12)),
        ("3.000 to 3.500 s", "list.csv:6", "only 0.50 s of it are asked for, less than 1 s"),
        ("9.000 to 11.000 s", "list.csv:7", "it is 8.00 s long and the stretch starts at 9.00 s"),
    }
    assert (report.sources, report.clips, report.rejected) == (6, 3, 3)
    shade = [brightness(index, i, 0) for i in range(3)]
    assert shade == pytest.approx([10 + 25, 10 + 50, 10 + 150], abs=3)
    lines = [json.loads(x) for x in (tmp_path / "set" / "rejects.jsonl").read_text().splitlines()]
    assert {line["listed"] for line in lines} == {"list.csv:5", "list.csv:6", "list.csv:7"}


def told_short(frames: int) -> str:
    return f"only {frames / 25:.2f} s of video, less than 1 s"


def brightness(index: ClipIndex, clip: int, frame: int) -> float:
    jpeg = index.read(clip, [frame]).frames[0]
    return float(cv2.imdecode(jpeg, cv2.IMREAD_GRAYSCALE).mean())
