"""The format both ways: what ``ShardWriter`` writes, ``ClipIndex`` reads."""

from __future__ import annotations

import errno
import io
import json
import pickle
import tarfile
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.data.shards import writer as shard_writer
from engine.data.shards import index as shards
from engine.data.media.codecs import JPEG, Pictures
from engine.data.shards.damage import DamagedClip
from engine.data.shards.inspect import verify
from engine.data.shards.record import RECORD
from engine.data.shards.writer import NewClip, ShardWriter
from engine.data.shards.index import ClipIndex, is_shards, read_dataset
from engine.core.files import StorageError


def clip(
    number: int, *, num_frames: int = 5, sound: bool = True, label: str | None = None
) -> NewClip:
    rng = np.random.default_rng(number)
    frames = [b"\xff\xd8" + rng.bytes(20 + 7 * i + number) + b"\xff\xd9" for i in range(num_frames)]
    return NewClip(
        pictures=Pictures(JPEG, tuple(frames)),
        width=170,
        height=128,
        source=f"a/{number}.avi",
        start=float(number),
        sound=b"fLaC" + rng.bytes(33) if sound else None,
        label=label,
        note="the end is missing" if number == 1 else None,
    )


def write(
    folder: Path, clips: list[NewClip], *, fps: float = 25.0, clips_per_shard: int = 2
) -> Path:
    with ShardWriter(
        folder, fps=fps, short_side=128, sample_rate=16000, clips_per_shard=clips_per_shard
    ) as writer:
        for c in clips:
            writer.add(c)
    return folder


CLIPS = [
    clip(0, label="walk"),
    clip(1, num_frames=3, sound=False, label="jump"),
    clip(2, num_frames=9),
    clip(3, label="walk"),
    clip(4, num_frames=1),
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path / "set", CLIPS)


def test_what_is_written_is_read(folder: Path) -> None:
    index = ClipIndex([folder])
    assert (len(index), index.fps, index.sample_rate) == (5, 25.0, 16000)
    assert index.classes == ("jump", "walk")
    assert index.label.tolist() == [1, 0, -1, 1, -1]
    assert index.num_frames.tolist() == [5, 3, 9, 5, 1]
    assert index.has_audio.tolist() == [True, False, True, True, True]
    assert index.width.tolist() == [170] * 5
    assert index.height.tolist() == [128] * 5
    np.testing.assert_allclose(index.duration, [0.2, 0.12, 0.36, 0.2, 0.04])
    for number, expected in enumerate(CLIPS):
        wanted = list(range(len(expected.pictures.pieces)))[::-2]
        found = index.read(number, wanted)
        assert [f.tobytes() for f in found.frames] == [expected.pictures.pieces[i] for i in wanted]
        assert (None if found.sound is None else found.sound.tobytes()) == expected.sound
        facts = index.facts(number)
        assert facts["source"] == expected.source
        assert facts["class"] == expected.label
        assert facts["start"] == expected.start
        assert facts["num_frames"] == len(expected.pictures.pieces)
        assert facts.get("note") == expected.note


def test_a_record_is_small_and_little_endian() -> None:
    assert RECORD.itemsize <= 64
    assert all(RECORD[name].str[0] == "<" for name in RECORD.names or ())


def test_only_the_frames_wanted_are_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = ClipIndex([folder])
    sizes: list[int] = []
    original = shards.os.pread

    def counting(fd: int, size: int, at: int) -> bytes:
        sizes.append(size)
        return original(fd, size, at)

    monkeypatch.setattr(shards.os, "pread", counting)
    index.read(2, [4])
    assert sizes == [4 * 10, len(CLIPS[2].pictures.pieces[4]), len(CLIPS[2].sound or b"")]


def test_shards_are_plain_tars(folder: Path) -> None:
    assert sorted(p.name for p in folder.glob("*.tar")) == [f"shard-0000{i}.tar" for i in range(3)]
    members: dict[str, bytes] = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for info in tar.getmembers():
                assert (info.mtime, info.uid, info.gid) == (0, 0, 0)
                members[info.name] = tar.extractfile(info).read()  # type: ignore[union-attr]
    assert len(members) == 4 * 5 - 1
    offsets = np.load(io.BytesIO(members["000000002.offsets.npy"]))
    blob = members["000000002.mjpg"]
    assert offsets.dtype == np.uint32
    assert [blob[a:b] for a, b in pairwise(offsets)] == list(CLIPS[2].pictures.pieces)
    assert members["000000003.flac"] == CLIPS[3].sound
    assert json.loads(members["000000001.json"])["class"] == "jump"


def test_webdataset_reads_shards(folder: Path) -> None:
    webdataset: Any = pytest.importorskip("webdataset")
    paths = [str(p) for p in sorted(folder.glob("*.tar"))]
    samples = list(webdataset.WebDataset(paths, shardshuffle=False))
    assert [s["__key__"] for s in samples] == [f"{i:09d}" for i in range(5)]
    assert samples[2]["mjpg"] == b"".join(CLIPS[2].pictures.pieces)
    assert samples[3]["flac"] == CLIPS[3].sound
    assert json.loads(samples[0]["json"])["source"] == "a/0.avi"


def test_equal_clips_give_equal_bytes(tmp_path: Path) -> None:
    one, two = write(tmp_path / "one", CLIPS), write(tmp_path / "two", CLIPS)
    assert sorted(p.name for p in one.iterdir()) == sorted(p.name for p in two.iterdir())
    assert all((two / p.name).read_bytes() == p.read_bytes() for p in one.iterdir())


def test_several_folders_are_one_set(tmp_path: Path) -> None:
    one = write(tmp_path / "one", [clip(0, label="walk"), clip(1, label="run")])
    two = write(tmp_path / "two", [clip(2, label="bend"), clip(3), clip(4, label="walk")])
    index = ClipIndex([one, two])
    assert index.classes == ("bend", "run", "walk")
    assert index.label.tolist() == [2, 1, 0, -1, 2]
    assert [index.facts(i)["source"] for i in range(5)] == [f"a/{i}.avi" for i in range(5)]
    assert index.read(4, [1]).frames[0].tobytes() == clip(4).pictures.pieces[1]


def test_folders_must_agree(tmp_path: Path) -> None:
    one, two = write(tmp_path / "one", CLIPS), write(tmp_path / "two", CLIPS, fps=30)
    with pytest.raises(ValueError, match=r"one and .*two differ in fps \(25.0 and 30\)"):
        ClipIndex([one, two])


def test_an_index_can_be_sent_to_another_process(folder: Path) -> None:
    index = ClipIndex([folder])
    index.read(0, [0])
    data = pickle.dumps(index)
    again = pickle.loads(data)
    assert again.read(2, [3]).frames[0].tobytes() == CLIPS[2].pictures.pieces[3]
    assert again.label.tolist() == index.label.tolist()


def test_few_shards_stay_open(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "OPEN_SHARDS", 1)
    index = ClipIndex([folder])
    for number in (0, 4, 2, 0, 3):
        assert index.read(number, [0]).frames[0].tobytes() == CLIPS[number].pictures.pieces[0]
    assert len(index._files) == 1


def test_what_is_not_there_is_told(folder: Path) -> None:
    index = ClipIndex([folder])
    with pytest.raises(ValueError, match="clips 0 to 4"):
        index.read(5, [0])
    with pytest.raises(ValueError, match="frames 0 to 2, not 0 to 3"):
        index.read(1, [0, 3])


def test_is_shards(folder: Path, tmp_path: Path) -> None:
    assert is_shards(folder)
    (tmp_path / "dataset.json").write_text("[]")
    assert not is_shards(tmp_path)
    assert not is_shards(tmp_path / "absent")
    with pytest.raises(ValueError, match="engine ingest"):
        ClipIndex([tmp_path])


def test_another_format_version_is_refused(folder: Path) -> None:
    facts = json.loads((folder / "dataset.json").read_text())
    (folder / "dataset.json").write_text(json.dumps({**facts, "format": 99}))
    with pytest.raises(ValueError, match="format 99"):
        ClipIndex([folder])


@pytest.mark.parametrize("problem", ["truncated", "missing"])
def test_shards_that_are_not_whole_are_named_and_left_out(folder: Path, problem: str) -> None:
    path = folder / "shard-00001.tar"
    if problem == "truncated":
        path.write_bytes(path.read_bytes()[:700])
    else:
        path.unlink()
    told: list[str] = []
    index = ClipIndex([folder, folder], warn=told.append)
    assert len(told) == 2
    assert f"shard-00001.tar is {problem}" in told[0] and "its 2 clips are left out" in told[0]
    assert [(d.path, d.clips) for d in index.damaged] == 2 * [(path, 2)]
    assert index.num_frames.tolist() == 2 * [5, 3, 1]
    assert index.label.tolist() == 2 * [1, 0, -1]
    assert index.shard.tolist() == [0, 0, 2, 3, 3, 5]
    assert [index.facts(i)["source"] for i in (2, 5)] == 2 * ["a/4.avi"]
    assert index.read(5, [0]).frames[0].tobytes() == CLIPS[4].pictures.pieces[0]
    again = pickle.loads(pickle.dumps(index))
    assert again.read(4, [1]).frames[0].tobytes() == CLIPS[1].pictures.pieces[1]
    assert problem in verify(folder)[0]


def test_no_shard_left_is_an_error(folder: Path) -> None:
    for path in folder.glob("*.tar"):
        path.unlink()
    with pytest.raises(
        ValueError,
        match=r"shard-00000.tar is missing, and no other shard is left: ingest the videos again",
    ):
        ClipIndex([folder], warn=lambda _: None)


def test_an_index_that_is_not_whole_is_an_error(folder: Path) -> None:
    (path,) = folder.glob("index-*.bin")
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"index-\w+.bin is truncated: 100 bytes of 320"):
        ClipIndex([folder])
    path.unlink()
    with pytest.raises(ValueError, match=r"index-.* is missing"):
        ClipIndex([folder])


def test_verify_finds_a_flipped_bit(folder: Path) -> None:
    assert verify(folder) == []
    for path in (folder / "shard-00002.tar", *folder.glob("index-*.bin")):
        data = bytearray(path.read_bytes())
        data[len(data) // 3] ^= 1
        path.write_bytes(data)
    problems = verify(folder)
    assert len(problems) == 2
    assert any("shard-00002.tar is damaged" in p for p in problems)


def damage(folder: Path, part: bytes) -> None:
    (path,) = (p for p in folder.glob("*.tar") if part in p.read_bytes())
    path.write_bytes(path.read_bytes().replace(part, bytes(len(part))))


@pytest.mark.parametrize("what", ["frame", "sound", "table", "shard"])
def test_a_clip_of_the_same_label_takes_a_damaged_ones_place(tmp_path: Path, what: str) -> None:
    clips = [clip(i, num_frames=3 + i, label="walk" if i % 2 else "jump") for i in range(10)]
    folder = write(tmp_path / "set", clips)
    told: list[str] = []
    index = ClipIndex([folder], warn=told.append)
    if what == "frame":
        damage(folder, clips[4].pictures.pieces[2])
    elif what == "sound":
        damage(folder, clips[4].sound or b"")
    elif what == "table":
        damage(
            folder, np.cumsum([len(f) for f in clips[4].pictures.pieces]).astype("<u4").tobytes()
        )
    else:
        (folder / "shard-00002.tar").unlink()
    wanted = [0, 2, 6]
    found = index.read(4, wanted)
    other = clips[found.clip]
    assert found.clip != 4 and other.label == "jump"
    there = [min(i, len(other.pictures.pieces) - 1) for i in wanted]
    assert [f.tobytes() for f in found.frames] == [other.pictures.pieces[i] for i in there]
    assert found.sound is not None and found.sound.tobytes() == other.sound
    # A fresh process, as after a resume, takes the same one, and whatever was read before doesn't matter.
    fresh = ClipIndex([folder], warn=lambda _: None)
    if what == "shard":
        assert len(fresh) == 8
    else:
        fresh.read(0, [0])
        assert fresh.read(4, wanted).clip == found.clip
    index.read(4, wanted)
    assert index.substituted == {4: 2}
    assert len(told) == 1 and "shard-00002.tar" in told[0] and "takes its place" in told[0]
    with pytest.raises(DamagedClip, match=r"shard-00002\.tar"):
        index.read_strictly(4, wanted)


def test_checking_finds_a_flipped_bit_anywhere(folder: Path) -> None:
    path = folder / "shard-00001.tar"
    at = path.read_bytes().index(CLIPS[2].pictures.pieces[7]) + 9
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)
    index = ClipIndex([folder], warn=lambda _: None)
    assert index.read(2, [0, 7]).clip == 2
    assert index.read(2, [0], check=True).clip == 4  # the other one without a class
    for clip in (0, 1, 3, 4):
        assert index.read(clip, [0], check=True).clip == clip
    with pytest.raises(DamagedClip, match=r"clip 2 is damaged .its checksum."):
        index.read_strictly(2, [0], check=True)


def test_intact_frames_of_a_damaged_clip_are_read(folder: Path) -> None:
    damage(folder, CLIPS[0].pictures.pieces[2])
    found = ClipIndex([folder]).read(0, [1, 3])
    assert found.clip == 0 and found.frames[1].tobytes() == CLIPS[0].pictures.pieces[3]


def test_nothing_in_a_damaged_clips_place_is_an_error(folder: Path) -> None:
    damage(folder, CLIPS[1].pictures.pieces[0])  # the only one of its class
    with pytest.raises(ValueError, match="clip 1 is damaged"):
        ClipIndex([folder]).read(1, [0])


def test_splits_are_in_the_index_and_in_the_facts(tmp_path: Path) -> None:
    parts = [("train", "", "test"), ("test", "train", ""), (), ("validation",)]
    clips = [replace(clip(i), splits=splits) for i, splits in enumerate(parts)]
    index = ClipIndex([write(tmp_path / "set", clips)])
    assert index.in_split(1, "train").tolist() == [True, False, False, False]
    assert index.in_split(1, "test").tolist() == [False, True, False, False]
    assert index.in_split(1, "validation").tolist() == [False, False, False, True]
    assert index.in_split(2, "train").tolist() == [False, True, False, False]
    assert index.in_split(3, "test").tolist() == [True, False, False, False]
    assert index.facts(0)["splits"] == {"1": "train", "3": "test"}
    assert "splits" not in index.facts(2)
    assert index.has_audio.all()
    with pytest.raises(ValueError, match="no part 'all' of split 1"):
        index.in_split(1, "all")


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_is_one_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    writer = ShardWriter(
        tmp_path / "set", fps=25, short_side=128, sample_rate=16000, clips_per_shard=2
    )
    for c in CLIPS[:3]:
        writer.add(c)
    monkeypatch.setattr(shard_writer.os, call, full)
    with pytest.raises(
        StorageError, match=r"shard-00001.tar: No space left on device; free"
    ) as caught:
        writer.add(CLIPS[3])
    assert caught.value.errno == errno.ENOSPC
    assert "\n" not in str(caught.value)
    assert [p.name for p in (tmp_path / "set").iterdir()] == ["shard-00000.tar"]


def test_an_interrupted_writer_leaves_no_data_set(tmp_path: Path) -> None:
    writer = ShardWriter(
        tmp_path / "set", fps=25, short_side=128, sample_rate=16000, clips_per_shard=2
    )
    with pytest.raises(KeyboardInterrupt), writer:
        for c in CLIPS[:3]:
            writer.add(c)
        raise KeyboardInterrupt
    assert not is_shards(tmp_path / "set")
    assert [p.name for p in (tmp_path / "set").iterdir()] == ["shard-00000.tar"]


def test_an_empty_set_opens(tmp_path: Path) -> None:
    assert len(ClipIndex([write(tmp_path / "empty", [])])) == 0
    assert read_dataset(tmp_path / "empty")["classes"] == []


def test_a_million_clips_open_in_a_second(tmp_path: Path) -> None:
    write(tmp_path, CLIPS[:1])
    (path,) = tmp_path.glob("index-*.bin")
    np.tile(np.fromfile(path, RECORD), 1_000_000).tofile(path)
    facts = json.loads((tmp_path / "dataset.json").read_text())
    (tmp_path / "dataset.json").write_text(json.dumps({**facts, "clips": 1_000_000}))
    began = time.perf_counter()
    index = ClipIndex([tmp_path])
    assert time.perf_counter() - began < 1.0
    assert index.read(999_999, [2]).frames[0].tobytes() == CLIPS[0].pictures.pieces[2]
