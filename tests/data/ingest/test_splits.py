"""The official lists, against facts that others published and the real lists and files where they are present."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from engine.data.ingest.run import ingest
from engine.data.ingest.sources import Found
from engine.data.ingest.splits import MISSING, hmdb51, kinetics, ucf101
from engine.data.media.encode import write_video
from engine.data.shards.index import ClipIndex

UCF101 = {1: (9537, 3783), 2: (9586, 3734), 3: (9624, 3696)}
"""Train and test videos of each split, by the data set's own page."""


def film(path: Path, *, seconds: float = 2.0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_video(path, [np.full((32, 48, 3), 90, np.uint8)] * round(25 * seconds), fps=25)
    return path


def shards(found: Found, out: Path) -> ClipIndex:
    ingest(found, out, short_side=32, workers=1)
    return ClipIndex([out])


@pytest.mark.data
def test_all_of_ucf101s_lists_and_the_files_that_are_there(real_data: Path, tmp_path: Path) -> None:
    folder = real_data / "ucf101_subset"
    found = ucf101(folder, folder / "lists")
    assert len(found.sources) == 117 and len({s.label for s in found.sources}) == 65
    assert len(found.sources) + len(found.rejects) == 13320
    assert all(r.reason.startswith(MISSING) and r.listed for r in found.rejects)
    assert found.unlisted == 0
    by_hand = {}
    for split in UCF101:
        for part in ("train", "test"):
            lines = (folder / "lists" / f"{part}list0{split}.txt").read_text().split("\n")
            names = {line.split()[0] for line in lines if line.strip()}
            by_hand[split, part] = names
            assert len(names) == UCF101[split][part == "test"]
    index = shards(found, tmp_path / "set")
    for (split, part), names in by_hand.items():
        inside = index.in_split(split, part)
        told = {index.facts(i)["source"] for i in np.flatnonzero(inside)}
        assert told == {s.relative for s in found.sources} & names
        assert all(index.facts(i)["splits"][str(split)] == part for i in np.flatnonzero(inside))
    # What is held out goes by groups: no group of a class is in both parts.
    for split in UCF101:
        groups = [
            {name.rsplit("_", 1)[0] for name in by_hand[split, part]} for part in ("train", "test")
        ]
        assert not groups[0] & groups[1]


@pytest.mark.data
def test_all_of_hmdb51s_lists_and_the_files_that_are_there(real_data: Path, tmp_path: Path) -> None:
    found = hmdb51(real_data / "hmdb51_subset", real_data / "hmdb51_splits")
    on_disk = {p.name for p in (real_data / "hmdb51_subset").rglob("*.avi")}
    assert len(found.sources) + len(found.rejects) == 6766
    listed = {s.path.name for s in found.sources}
    # Others gave the remaining two names of their own.
    assert on_disk - listed == {
        "cartwheel.avi",
        "hmdb51_Turnk_r_Pippi_Michel_cartwheel_f_cm_np2_le_med_6.avi",
    }
    assert found.unlisted == 2
    index = shards(found, tmp_path / "set")
    assert len(index) == 4 and index.classes == ("pour", "wave")
    for i in range(4):
        facts = index.facts(i)
        name = facts["source"].rsplit("/", 1)[1]
        for split in (1, 2, 3):
            text = (
                real_data / "hmdb51_splits" / f"{facts['class']}_test_split{split}.txt"
            ).read_text()
            (code,) = (line.split()[1] for line in text.splitlines() if line.startswith(f"{name} "))
            assert facts["splits"].get(str(split), "") == {"0": "", "1": "train", "2": "test"}[code]


@pytest.mark.data
def test_hmdb51s_splits_have_3570_and_1530_videos(real_data: Path, tmp_path: Path) -> None:
    """As the data set's paper says; empty files stand for the videos."""
    splits = real_data / "hmdb51_splits"
    for path in splits.glob("*_test_split1.txt"):
        folder = tmp_path / path.name.removesuffix("_test_split1.txt")
        folder.mkdir()
        for line in path.read_text().splitlines():
            (folder / line.rsplit(maxsplit=1)[0]).touch()
    found = hmdb51(tmp_path, splits)
    assert len(found.sources) == 6766 and not found.rejects and not found.unlisted
    for split in range(3):
        parts = Counter(source.splits[split] for source in found.sources)
        assert (parts["train"], parts["test"]) == (3570, 1530)
    assert all(s.path.parent.name == s.label for s in found.sources)


def test_hmdb51_names_are_taken_as_they_are(tmp_path: Path) -> None:
    names = ["#122_Sword_(Kata)_u_nm.avi", "a!b;c_(x).avi", "gone.avi", "two words.avi"]
    splits = tmp_path / "splits"
    splits.mkdir()
    for split, codes in ((1, "1200"), (2, "0111"), (3, "2010")):
        text = "".join(f"{n} {c} \n" for n, c in zip(names, codes, strict=True))
        (splits / f"draw_sword_test_split{split}.txt").write_text(text)
    film(tmp_path / "v" / "draw_sword" / names[0])
    film(tmp_path / "v" / "draw_sword" / "draw_sword" / names[1])  # as the archive unpacks
    film(tmp_path / "v" / "other" / names[3])
    film(tmp_path / "v" / "extra.avi")
    found = hmdb51(tmp_path / "v", splits)
    assert {s.path.name: s.splits for s in found.sources} == {
        names[0]: ("train", "", "test"),
        names[1]: ("test", "train", ""),
        names[3]: ("", "train", ""),
    }
    assert {s.label for s in found.sources} == {"draw_sword"}
    assert [(r.path, r.listed) for r in found.rejects] == [
        ("draw_sword/gone.avi", "draw_sword_test_split1.txt:3")
    ]
    assert found.unlisted == 1
    index = shards(found, tmp_path / "set")
    assert index.in_split(1, "train").sum() == 1 and index.in_split(2, "train").sum() == 2
    (splits / "draw_sword_test_split1.txt").write_text("x.avi 3\n")
    with pytest.raises(ValueError, match=r"draw_sword_test_split1.txt:1 .*0, 1 or 2"):
        hmdb51(tmp_path / "v", splits)
    shutil.rmtree(splits)
    with pytest.raises(ValueError, match="holds no HMDB51 lists"):
        hmdb51(tmp_path / "v", splits)


def test_ucf101_lists_that_are_wrong(tmp_path: Path) -> None:
    (tmp_path / "v").mkdir()
    with pytest.raises(ValueError, match=r"classInd.txt is missing"):
        ucf101(tmp_path / "v", tmp_path)
    (tmp_path / "classInd.txt").write_text("1 Walk\r\n2 Run\r\n")
    for split in (1, 2, 3):
        (tmp_path / f"trainlist0{split}.txt").write_text("Walk/a.avi 1\r\n")
        (tmp_path / f"testlist0{split}.txt").write_text("Run/b.avi\r\nRun/c.avi 2\r\n")
    found = ucf101(tmp_path / "v", tmp_path)
    assert [r.path for r in found.rejects] == ["Walk/a.avi", "Run/b.avi", "Run/c.avi"]
    (tmp_path / "testlist02.txt").write_text("Walk/a.avi\n")
    with pytest.raises(
        ValueError, match=r"a.avi is in both the train and the test part of split 2"
    ):
        ucf101(tmp_path / "v", tmp_path)
    (tmp_path / "testlist02.txt").write_text("Swim/a.avi\n")
    with pytest.raises(ValueError, match=r"testlist02.txt:1 .*'Swim' is no UCF101 class"):
        ucf101(tmp_path / "v", tmp_path)


def test_kinetics(tmp_path: Path) -> None:
    videos = tmp_path / "v"
    film(videos / "air_drumming" / "-3B32lodo2M.mp4", seconds=6)
    film(videos / "train" / "air drumming" / "abc_def-123_000010_000020.mp4", seconds=3)
    film(videos / "trimmed00ab.mkv", seconds=2)
    film(videos / "spare.mp4")
    (tmp_path / "train.csv").write_text(
        "label,youtube_id,time_start,time_end,split\n"
        "air drumming,-3B32lodo2M,1,4,train\n"
        "air drumming,abc_def-123,10,20,train\n"
        '"air drumming, loud",trimmed00ab,59,61,train\n'
        "air drumming,gone,3,13,train\n"
        "air drumming,spare,13,3,train\n"
    )
    (tmp_path / "val.csv").write_text(
        "youtube_id,time_start,time_end,split\n-3B32lodo2M,0,2,validate\n"
    )
    found = kinetics(videos, [tmp_path / "train.csv", tmp_path / "val.csv"])
    assert [(r.path, r.listed) for r in found.rejects] == [
        ("gone", "train.csv:5"),
        ("spare", "train.csv:6"),
    ]
    assert found.unlisted == 1
    index = shards(found, tmp_path / "set")
    facts = [index.facts(i) for i in range(len(index))]
    told = {
        (Path(f["source"]).name, f["class"], f["start"], f["duration"], f["splits"]["1"])
        for f in facts
    }
    assert told == {
        ("-3B32lodo2M.mp4", None, 0.0, 2.0, "validation"),
        ("-3B32lodo2M.mp4", "air drumming", 1.0, 3.0, "train"),
        ("abc_def-123_000010_000020.mp4", "air drumming", 0.0, 3.0, "train"),
        ("trimmed00ab.mkv", "air drumming, loud", 0.0, 2.0, "train"),
    }
    (tmp_path / "val.csv").write_text("path,label\n")
    with pytest.raises(ValueError, match=r"val.csv has no column time_end"):
        kinetics(videos, [tmp_path / "val.csv"])
