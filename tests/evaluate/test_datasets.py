"""Labelled data sets: which videos are in which part, what is missing, and that nothing straddles parts."""

from __future__ import annotations

import csv
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.data.ingest.run import ingest
from engine.data.ingest.splits import ucf101
from engine.evaluate.datasets import Dataset, IncompleteDataset, find, open_dataset
from tests.labelled import COLOURS, TEST_GROUPS, make_lists, names

COUNTS = {
    "ucf101": {1: (9537, 3783), 2: (9586, 3734), 3: (9624, 3696)},
    "hmdb51": dict.fromkeys((1, 2, 3), (3570, 1530)),
}
"""Train and test videos of each split, by the data sets' own pages."""


def opened(
    root: Path | list[Path], tmp_path: Path, name: str = "ucf101", **more: object
) -> Dataset:
    quiet = {"cache": tmp_path / "cache", "report": lambda *_: None, "short_side": 32, "workers": 1}
    return open_dataset(root, name=name, **{**quiet, **more})  # type: ignore[arg-type]


def sources(dataset: Dataset, clips: np.ndarray) -> set[str]:
    return {dataset.index.facts(int(i))["source"].rsplit("/", 1)[1] for i in clips}


def test_official_splits_are_those_of_the_lists(colour_set: Dataset) -> None:
    assert colour_set.classes == tuple(sorted(COLOURS)) and colour_set.incomplete is None
    assert [fold.name for fold in colour_set.folds] == ["split1", "split2", "split3"]
    for fold, held in zip(colour_set.folds, TEST_GROUPS.values(), strict=True):
        assert sources(colour_set, fold.test) == {n for _, g, n in names() if g in held}
        assert sources(colour_set, fold.train) == {n for _, g, n in names() if g not in held}
        assert not set(colour_set.group[fold.train]) & set(colour_set.group[fold.test])
    for i in range(len(colour_set.index)):
        name = colour_set.index.facts(i)["source"].rsplit("/", 1)[1]
        assert colour_set.classes[colour_set.label[i]] == name.split("_")[1]
        assert colour_set.groups[colour_set.group[i]] == name.split("_g")[1][:2]


@pytest.mark.parametrize("lists", ["UCF-101/ucfTrainTestlist", "lists", "UCF-101/lists"])
@pytest.mark.parametrize("root", ["", "UCF-101"])
def test_lists_are_found_in_and_beside_the_videos(
    colours: Path, tmp_path: Path, lists: str, root: str
) -> None:
    (tmp_path / "UCF-101").symlink_to(colours / "UCF-101")
    if lists.startswith("UCF-101/"):
        (tmp_path / "UCF-101").unlink()
        shutil.copytree(colours / "UCF-101", tmp_path / "UCF-101")
    make_lists(tmp_path / lists)
    found = find([tmp_path / root], name="ucf101")
    assert len(found.sources) == 60 and not found.rejects


def test_no_lists_is_one_line(colours: Path, tmp_path: Path) -> None:
    shutil.copytree(colours / "UCF-101" / "Diving", tmp_path / "in" / "v" / "Diving")
    with pytest.raises(ValueError, match="ucfTrainTestlist") as caught:
        opened(tmp_path / "in" / "v", tmp_path)
    assert "--splits" in str(caught.value) and "\n" not in str(caught.value)


def test_missing_videos_are_counted_and_named_unless_allowed(colours: Path, tmp_path: Path) -> None:
    for folder in ("Archery", "Biking"):
        shutil.copytree(colours / "UCF-101" / folder, tmp_path / "UCF-101" / folder)
    make_lists(tmp_path / "ucfTrainTestlist")
    with pytest.raises(IncompleteDataset) as caught:
        opened(tmp_path, tmp_path)
    said = str(caught.value)
    assert "36 of 60 listed videos are missing" in said and "--allow-missing" in said
    assert "Diving/v_Diving_g01_c01.avi" in said and said.count(".avi") == 5 and "\n" not in said
    dataset = opened(tmp_path, tmp_path, allow_missing=True)
    assert dataset.incomplete == "incomplete: 24 of 60 videos"
    (tmp_path / "UCF101.rar").touch()
    with pytest.raises(IncompleteDataset, match=r"UCF101\.rar is packed still"):
        opened(tmp_path, tmp_path)


def test_a_damaged_video_makes_the_set_incomplete(colours: Path, tmp_path: Path) -> None:
    shutil.copytree(colours / "UCF-101", tmp_path / "UCF-101")
    make_lists(tmp_path / "ucfTrainTestlist")
    (tmp_path / "UCF-101" / "Diving" / "v_Diving_g01_c01.avi").write_bytes(b"no video" * 100)
    dataset = opened(tmp_path, tmp_path)
    assert dataset.incomplete == "incomplete: 59 of 60 videos"
    assert [r.path for r in dataset.rejects] == ["UCF-101/Diving/v_Diving_g01_c01.avi"]


def test_shards_are_taken_as_they_are(colours: Path, tmp_path: Path, colour_set: Dataset) -> None:
    found = ucf101(colours / "UCF-101", colours / "ucfTrainTestlist")
    ingest(found, tmp_path / "set", short_side=32, min_seconds=0.0, workers=1)
    dataset = opened(tmp_path / "set", tmp_path)
    for own, other in zip(dataset.folds, colour_set.folds, strict=True):
        assert sources(dataset, own.test) == sources(colour_set, other.test)


@pytest.mark.parametrize("pattern", [r"_g(\d+)_", r"(?<=_g)\d+", r"actor(\w+)|_g(\d+)_"])
def test_leave_one_group_out(colours: Path, tmp_path: Path, pattern: str) -> None:
    settings = {"name": "folders", "group_pattern": pattern}
    dataset = opened(colours / "UCF-101", tmp_path, **settings)
    assert [fold.name for fold in dataset.folds] == [f"{g:02d}" for g in range(1, 7)]
    assert "leave one group out, 6 folds" in dataset.folds_by
    for fold in dataset.folds:
        assert {n.split("_g")[1][:2] for n in sources(dataset, fold.test)} == {fold.name}
        assert len(np.union1d(fold.train, fold.test)) == 60 == len(fold.train) + len(fold.test)
        assert not set(dataset.video[fold.train]) & set(dataset.video[fold.test])


@pytest.mark.parametrize(
    ("train", "test"), [("train.csv", "test.csv"), ("k_train_list_videos.txt", "k_val_list.txt")]
)
def test_any_videos_by_lists_of_their_parts(
    colours: Path, tmp_path: Path, train: str, test: str
) -> None:
    """As PySlowFast and MMAction2 have them: PATH LABEL, from the videos' folder."""
    videos = sorted(path.relative_to(colours) for path in colours.glob("UCF-101/*/*.avi"))
    numbers = {name: i for i, name in enumerate(sorted({v.parent.name for v in videos}))}
    lines = [f"{video} {numbers[video.parent.name]}\n" for video in videos]
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / train).write_text("".join(lines[::2]))
    (tmp_path / "lists" / test).write_text("".join(lines[1::2]))
    (tmp_path / "lists" / "classids.json").write_text("{}")
    settings: dict[str, Any] = {"name": "folders", "splits": tmp_path / "lists"}
    dataset = opened(colours, tmp_path, **settings)
    (fold,) = dataset.folds
    assert sources(dataset, fold.train) == {video.name for video in videos[::2]}
    assert sources(dataset, fold.test) == {video.name for video in videos[1::2]}
    assert dataset.classes == tuple(map(str, sorted(numbers.values())))
    assert dataset.folds_by == "trained and tested by lists" and not dataset.incomplete

    # one video in both parts, and one that is not there
    (tmp_path / "lists" / test).write_text("".join([lines[0], *lines[1::2], "gone.avi 0\n"]))
    with pytest.raises(IncompleteDataset, match=r"gone\.avi"):
        opened(colours, tmp_path, **settings)
    dataset = opened(colours, tmp_path, allow_missing=True, **settings)
    assert sources(dataset, dataset.folds[0].test) == {video.name for video in videos[1::2]}
    assert {reject.listed for reject in dataset.rejects} == {
        f"{test}:1",
        f"{test}:{len(lines) // 2 + 2}",
    }


def test_a_table_with_a_column_of_parts(colours: Path, tmp_path: Path) -> None:
    videos = sorted(path.relative_to(colours) for path in colours.glob("UCF-101/*/*.avi"))
    parts = ("train", "val", "Train", "validation")
    rows = [f"{v},{v.parent.name},{parts[i % 4]}" for i, v in enumerate(videos)]
    (tmp_path / "all.csv").write_text("\n".join(["video_path,label,split", *rows]))
    dataset = opened(colours, tmp_path, name="folders", splits=tmp_path / "all.csv")
    (fold,) = dataset.folds
    assert sources(dataset, fold.train) == {video.name for video in videos[::2]}
    assert sources(dataset, fold.test) == {video.name for video in videos[1::2]}
    (tmp_path / "all.csv").write_text(
        "\n".join(["video_path,label,split", *rows, f"{videos[0]},a,x"])
    )
    reject = find([colours], name="folders", splits=tmp_path / "all.csv").rejects[0]
    assert reject.reason == "its split, 'x', is none of train, val and test"


def test_stretches_and_repeated_rows_make_no_set_incomplete(colours: Path, tmp_path: Path) -> None:
    videos = sorted(colours.glob("UCF-101/*/*_c01.avi"))
    rows = [f"{v},{v.parent.name},{start}" for v in videos for start in (0, 0.2)]
    path = tmp_path / "list.csv"
    path.write_text("\n".join(["path,label,start", *rows, rows[0]]))
    dataset = opened(path, tmp_path, name="folders", group_pattern=r"_g(\d+)_")
    assert len(dataset.videos) == len(videos) < len(dataset.label) == len(rows)
    assert [reject.listed for reject in dataset.rejects] == [f"list.csv:{len(rows) + 2}"]
    assert not dataset.incomplete


def test_stretches_of_one_film_in_two_parts_are_two_videos(colours: Path, tmp_path: Path) -> None:
    """Features are means over a video: one that is trained and tested on would be found again."""
    videos = sorted(colours.glob("UCF-101/*/*_c01.avi"))
    rows = [
        f"{v},{v.parent.name},{start},{part}"
        for v in videos
        for start, part in ((0, "train"), (0.2, "test"))
    ]
    (tmp_path / "all.csv").write_text("\n".join(["path,label,start,split", *rows]))
    dataset = opened(colours, tmp_path, name="folders", splits=tmp_path / "all.csv")
    (fold,) = dataset.folds
    assert len(fold.train) == len(fold.test) == len(videos)
    assert not set(dataset.video[fold.train]) & set(dataset.video[fold.test])


def test_a_group_without_which_one_class_is_left_is_told(colours: Path, tmp_path: Path) -> None:
    classes = sorted(path.name for path in (colours / "UCF-101").iterdir() if path.is_dir())[:2]
    rows = [f"{v},{c}" for c in classes for v in sorted(colours.glob(f"UCF-101/{c}/*.avi"))[:2]]
    (tmp_path / "list.csv").write_text("\n".join(["path,label", *rows]))
    with pytest.raises(ValueError, match=f"only class '{classes[1]}' is left to train on"):
        opened(tmp_path / "list.csv", tmp_path, name="folders", group_pattern=r"v_([A-Za-z]+)_")


def test_lists_of_parts_that_can_not_be_used(colours: Path, tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("a.avi 0\n")
    settings: dict[str, Any] = {"name": "folders", "splits": tmp_path}
    with pytest.raises(ValueError, match="one to test by"):
        opened(colours, tmp_path, **settings)
    for name in ("test.csv", "test2.csv"):
        (tmp_path / name).write_text("b.avi 0\n")
    with pytest.raises(ValueError, match=r"test\.csv and test2\.csv"):
        opened(colours, tmp_path, **settings)
    (tmp_path / "test2.csv").unlink()
    with pytest.raises(ValueError, match="one --root"):
        opened([colours, tmp_path], tmp_path, **settings)


def test_long_videos_are_several_clips_of_one_video(colours: Path, tmp_path: Path) -> None:
    found = ucf101(colours / "UCF-101", colours / "ucfTrainTestlist")
    cuts = {"clip_seconds": 0.2, "min_seconds": 0.0, "clips_per_video": 2}
    ingest(found, tmp_path / "set", short_side=32, workers=1, **cuts)
    dataset = opened(tmp_path / "set", tmp_path)
    assert len(dataset.index) > len(dataset.videos) == 60
    for fold in dataset.folds:
        assert not set(dataset.video[fold.train]) & set(dataset.video[fold.test])


def test_what_can_not_be_used_is_one_line(colours: Path, tmp_path: Path) -> None:
    videos = colours / "UCF-101"
    wrong: dict[str, dict[str, object]] = {
        "unknown data set 'ucf'": {"name": "ucf"},
        "is left out once: say by --group-pattern": {"name": "folders"},
        "no regular expression": {"name": "folders", "group_pattern": "("},
        "finds nothing in 60 of 60 names": {"name": "folders", "group_pattern": "actor"},
        "'x\\*' finds nothing in 60": {"name": "folders", "group_pattern": "x*"},
        "without it nothing is left": {"name": "folders", "group_pattern": "^v"},
        "no official split": {"name": "folders", "folds": "official", "group_pattern": "x"},
        "holds no HMDB51 lists|its lists": {"name": "hmdb51"},
    }
    for reason, settings in wrong.items():
        with pytest.raises(ValueError, match=reason) as caught:
            opened(videos, tmp_path, **settings)  # type: ignore[arg-type]
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="no such file or folder"):
        opened(tmp_path / "none", tmp_path)


def test_kinetics_trains_on_train_and_tests_on_validation(colours: Path, tmp_path: Path) -> None:
    files = sorted((colours / "UCF-101").rglob("*.avi"))[:20]
    for part, some in (("train", files[:12]), ("validate", files[12:])):
        (tmp_path / part).mkdir()
        with (tmp_path / f"{part}.csv").open("w") as file:
            out = csv.writer(file)
            out.writerow(["label", "youtube_id", "time_start", "time_end", "split"])
            for i, path in enumerate(some):
                shutil.copy(path, tmp_path / part / f"{path.stem}_000010_000020.avi")
                out.writerow([f"class {i % 2}", path.stem, 10, 20, part])
    dataset = opened(tmp_path, tmp_path, "kinetics")
    (fold,) = dataset.folds
    assert (len(fold.train), len(fold.test)) == (12, 8) and dataset.incomplete is None


@pytest.mark.data
@pytest.mark.parametrize("name", ["ucf101", "hmdb51"])
def test_whole_data_sets_of_the_real_names_have_the_official_counts(
    real_data: Path, tmp_path: Path, name: str
) -> None:
    """Every listed name as an empty file, in the folders that the archives unpack to: all found, none confused."""
    lists = real_data / ("ucf101_subset/lists" if name == "ucf101" else "hmdb51_splits")
    listed: set[tuple[str, str]] = set()
    if name == "ucf101":
        for path in lists.glob("t*list0*.txt"):
            lines = [line.split()[0] for line in path.read_text().splitlines() if line.strip()]
            listed |= {tuple(line.split("/")) for line in lines}  # type: ignore[misc]
    else:
        for path in lists.glob("*_test_split*.txt"):
            label = path.name.split("_test_split")[0]
            listed |= {(label, x.split()[0]) for x in path.read_text().splitlines() if x.strip()}
    for label, file in listed:
        # UCF-101 unpacks HandstandPushups with files v_HandStandPushups_*
        (tmp_path / label).mkdir(exist_ok=True)
        (tmp_path / label / file).touch()
    found = find([tmp_path], name=name, splits=lists)
    assert not found.rejects and found.unlisted == 0 and len(found.sources) == len(listed)
    assert len({source.relative for source in found.sources}) == len(found.sources)
    assert all(s.relative.split("/")[0] == s.label for s in found.sources)
    for split, counts in COUNTS[name].items():
        parts = Counter(source.splits[split - 1] for source in found.sources)
        assert (parts["train"], parts["test"]) == counts
    odd = [s.relative for s in found.sources if any(c in s.relative for c in "()!;#&")]
    assert name == "ucf101" or len(odd) > 50
