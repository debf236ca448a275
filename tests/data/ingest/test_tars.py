"""Videos in tars give the clips that the same files give on the disk."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from engine.core.files import take_lock
from engine.data.ingest import tars
from engine.data.ingest.run import IngestReport, ingest
from engine.data.ingest.sources import find_sources
from engine.data.media.decode import probe
from engine.data.media.part import Part
from engine.data.shards.index import ClipIndex
from engine.data.shards.inspect import verify
from tests.data.films import beep_at, texture, write_film

SUFFIXES = (".mp4", ".mkv", ".avi", ".webm", ".ts")


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Short films with sound of every container."""
    root = tmp_path_factory.mktemp("films")
    for i, suffix in enumerate(SUFFIXES):
        pictures = [texture(i + j) for j in range(40)]
        write_film(root / f"film{i}{suffix}", pictures, sound=beep_at(0.5 + 0.1 * i), sound_to=1.6)
    return root


def pack(path: Path, files: Sequence[tuple[str, bytes]], **how: Any) -> Path:
    with tarfile.open(path, "w", **how) as tar:
        for name, content in files:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def contents(films: Path, prefix: str = "") -> list[tuple[str, bytes]]:
    return [(f"{prefix}{path.name}", path.read_bytes()) for path in sorted(films.iterdir())]


def run(videos: Path, out: Path, **more: Any) -> IngestReport:
    return ingest([videos], out, **{"short_side": 32, "workers": 1, **more})


def clips(folder: Path) -> dict[str, tuple[Any, ...]]:
    """By the file's name: what a clip holds."""
    index = ClipIndex([folder])
    result = {}
    for i in range(len(index)):
        facts = index.facts(i)
        read = index.read(i, list(range(int(index.num_frames[i]))))
        held = [
            bytes(frame) for frame in (*read.frames, read.film, read.sound) if frame is not None
        ]
        name = os.path.basename(facts.pop("source"))
        result[name] = (held, facts["num_frames"], facts["start"], facts.get("note"))
    return result


@pytest.mark.parametrize("codec", ["jpeg", "copy"])
def test_clips_are_those_of_the_files(films: Path, tmp_path: Path, codec: str) -> None:
    name = "a,b:c é.tar"  # which FFmpeg's own names have uses for
    tar = pack(tmp_path / name, contents(films))
    there = run(films, tmp_path / "there", codec=codec)
    here = run(tar, tmp_path / "here", codec=codec)
    assert (here.clips, here.rejected) == (there.clips, there.rejected)
    assert here.clips == (len(SUFFIXES) if codec == "jpeg" else here.clips) > 0
    assert clips(tmp_path / "here") == clips(tmp_path / "there")
    assert verify(tmp_path / "here") == []
    assert {f.name for f in tmp_path.iterdir()} == {name, "here", "there"}


def test_labels_beside_videos(films: Path, tmp_path: Path) -> None:
    film = contents(films)[0][1]
    pack(
        tmp_path / "sub.tar",
        [
            ("000.cls", b"7\n"),
            ("000.mp4", film),
            ("001.mp4", film),
            ("001.json", json.dumps({"label": 3, "caption": "x"}).encode()),
            ("002.json", json.dumps({"class": "ride a bike"}).encode()),
            ("002.rgb.mp4", film),
            ("003.json", b"no json"),
            ("./003.mp4", film),
            ("walk/004.mp4", film),
            ("walk/005.mp4", film),
            ("walk/005.cls", b"run"),
            ("006.jpg", b""),
            ("008.info.json", json.dumps({"label": "dive"}).encode()),
            ("008.mp4.json", json.dumps({"fps": 25}).encode()),
            ("008.mp4", film),
            ("v.9.mp4", film),
            ("v.10.mp4", film),
            ("v.10.cls", b"only ten's"),
            ("._007.mp4", b"left by a Mac"),
        ],
    )
    found = find_sources([tmp_path])
    assert [(source.relative, source.label) for source in found.sources] == [
        ("sub.tar/000.mp4", "7"),
        ("sub.tar/001.mp4", "3"),
        ("sub.tar/002.rgb.mp4", "ride a bike"),
        ("sub.tar/003.mp4", None),
        ("sub.tar/008.mp4", "dive"),
        ("sub.tar/v.10.mp4", "only ten's"),
        ("sub.tar/v.9.mp4", None),
        ("sub.tar/walk/004.mp4", "walk"),
        ("sub.tar/walk/005.mp4", "run"),
    ]
    assert not found.rejects
    assert all(probe(source.media).width == 64 for source in found.sources)


def test_shards_of_webdataset(films: Path, tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset", reason="webdataset is not installed")
    pattern = f"{tmp_path}/wds/shard-%03d.tar"
    (tmp_path / "wds").mkdir()
    with webdataset.ShardWriter(pattern, maxcount=2, verbose=0) as sink:
        for i, (_, content) in enumerate(contents(films)):
            sink.write({"__key__": f"{i:05d}", "mp4": content, "cls": i % 3, "json": {"id": i}})
    report = run(tmp_path / "wds", tmp_path / "set")
    index = ClipIndex([tmp_path / "set"])
    facts = [index.facts(i) for i in range(len(index))]
    assert report.clips == len(SUFFIXES) and not report.rejects
    assert [(f["source"], f["class"]) for f in facts] == [
        (f"shard-{i // 2:03d}.tar/{i:05d}.mp4", str(i % 3)) for i in range(len(SUFFIXES))
    ]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_in_every_kind_of_tar(films: Path, tmp_path: Path, form: int) -> None:
    name = "d" * 90 + "/" + "n" * (60 if form == tarfile.USTAR_FORMAT else 150) + ".mp4"
    tar = pack(tmp_path / "a.tar", [(name, contents(films)[0][1])], format=form)
    (source,) = find_sources([tar]).sources
    assert source.relative == f"a.tar/{name}"
    assert probe(source.media).width == 64


def test_tars_that_are_cut_off_or_none(films: Path, tmp_path: Path) -> None:
    files = contents(films)
    whole = pack(tmp_path / "whole.tar", files).read_bytes()
    last = find_sources([tmp_path / "whole.tar"]).sources[-1].member
    assert last is not None
    ends = {
        "in-film": last.offset + 5000,
        "in-header": last.offset - 200,
        "before-the-end": last.offset + (last.size + 511) // 512 * 512,
    }
    for name, size in ends.items():
        (tmp_path / f"{name}.tar").write_bytes(whole[:size])
    (tmp_path / "none.tar").write_bytes(b"no tar" * 1000)
    (tmp_path / "no-videos.tar").write_bytes(pack(tmp_path / "x", [("a.txt", b"a")]).read_bytes())
    (tmp_path / "x").unlink()
    found = find_sources([tmp_path])
    count = dict.fromkeys((*ends, "whole", "none", "no-videos"), 0)
    for source in found.sources:
        count[source.relative.partition(".tar")[0]] += 1
    n = len(files)
    assert count == {
        "in-film": n,
        "in-header": n - 1,
        "before-the-end": n,
        "whole": n,
        "none": 0,
        "no-videos": 0,
    }
    reasons = {reject.path: reject.reason for reject in found.rejects}
    assert sorted(reasons) == ["in-film.tar", "in-header.tar", "no-videos.tar", "none.tar"]
    assert reasons["no-videos.tar"] == "it is a tar without videos"
    assert "can't be read as a tar" in reasons["none.tar"]
    assert f"; {n} videos before it are used" in reasons["in-film.tar"]
    assert "damaged or cut off at byte" in reasons["in-header.tar"]


def test_packed_files_are_refused_with_what_to_do(tmp_path: Path) -> None:
    for name in ("a.tar.gz", "b.zip"):
        (tmp_path / name).write_bytes(b"")
        with pytest.raises(ValueError, match="is packed: unpack it"):
            find_sources([tmp_path / name])


def test_what_is_finished_is_kept(films: Path, tmp_path: Path) -> None:
    """As with files: a second run does nothing, and a new tar adds its clips; the bytes are one run's."""
    files = contents(films)
    (tmp_path / "tars").mkdir()
    pack(tmp_path / "tars" / "0.tar", files[:2])
    run(tmp_path / "tars", tmp_path / "set")
    assert run(tmp_path / "tars", tmp_path / "set").reused == 2
    pack(tmp_path / "tars" / "1.tar", files[2:])
    run(tmp_path / "tars", tmp_path / "set", workers=2)
    run(tmp_path / "tars", tmp_path / "once")
    for path in (tmp_path / "once").iterdir():
        assert path.read_bytes() == (tmp_path / "set" / path.name).read_bytes(), path.name


def test_a_long_film_in_a_tar_is_sought_in(tmp_path: Path) -> None:
    """Each clip shows the film's frames at its time."""
    pictures = (np.full((32, 48, 3), 20 + i // 10, np.uint8) for i in range(1500))
    film = write_film(tmp_path / "long.mp4", pictures, gop=25)
    tar = pack(tmp_path / "a.tar", [("x.bin.txt", b"0" * 70_000), ("long.mp4", film.read_bytes())])
    (source,) = find_sources([tar]).sources
    assert isinstance(source.media, Part)
    report = run(tar, tmp_path / "set", clip_seconds=2.0, clips_per_video=3)
    assert report.clips == 3
    index = ClipIndex([tmp_path / "set"])
    for i in range(3):
        start = index.facts(i)["start"]
        grey = cv2.imdecode(index.read(i, [0]).frames[0], cv2.IMREAD_GRAYSCALE)
        assert grey.mean() == pytest.approx(20 + start * 2.5, abs=2)
    assert max(index.facts(i)["start"] for i in range(3)) > 30


def test_a_play_list_in_a_tar_reads_nothing_else(films: Path, tmp_path: Path) -> None:
    other = films / f"film0{SUFFIXES[0]}"
    text = f"#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1:9/{other.name}\n#EXT-X-ENDLIST\n"
    tar = pack(tmp_path / "a.tar", [("list.mp4", text.encode())])
    with pytest.raises(ValueError, match=r"list\.mp4"):
        run(tar, tmp_path / "set")


def test_rows_of_a_list_may_name_tars(films: Path, tmp_path: Path) -> None:
    film = contents(films)[0][1]
    pack(tmp_path / "own.tar", [("0.mp4", film), ("0.cls", b"walk"), ("run/1.mp4", film)])
    pack(tmp_path / "run.tar", [("2.mp4", film), ("2.cls", b"walk")])
    (tmp_path / "none.tar").write_bytes(b"no tar" * 1000)
    (tmp_path / "a.tgz").write_bytes(b"")
    (tmp_path / "c.mp4").write_bytes(film)
    rows = "own.tar,,,\nrun.tar,run,,\nc.mp4,jump,,\nnone.tar,run,,\na.tgz,run,,\nrun.tar,run,,\nown.tar,x,0,1\n"
    (tmp_path / "list.csv").write_text(f"path,label,start,end\n{rows}")
    found = find_sources([tmp_path / "list.csv", tmp_path / "own.tar"])
    assert [(source.relative, source.label, source.listed) for source in found.sources] == [
        ("c.mp4", "jump", "list.csv:4"),
        ("own.tar/0.mp4", "walk", "list.csv:2"),
        ("own.tar/run/1.mp4", "run", "list.csv:2"),
        ("run.tar/2.mp4", "run", "list.csv:3"),
    ]
    reasons = {reject.listed: reject.reason for reject in found.rejects}
    assert "can't be read as a tar" in reasons["list.csv:5"]
    assert reasons["list.csv:6"].startswith("it is packed: unpack it")
    assert reasons["list.csv:7"] == "line 3 names the same file"
    assert "times are those of one video" in reasons["list.csv:8"]
    assert len(reasons) == len(found.rejects) == 4
    report = run(tmp_path / "list.csv", tmp_path / "set")
    index = ClipIndex([tmp_path / "set"])
    labels = {index.facts(i)["source"]: index.facts(i)["class"] for i in range(len(index))}
    assert report.clips == 4 and labels["run.tar/2.mp4"] == "run"


@pytest.fixture
def scans(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the tars that are read from their beginning to their end; all lists are worth keeping."""
    read: list[str] = []
    open_tar = tarfile.open

    def opened(path: Path, mode: str) -> tarfile.TarFile:
        read.append(Path(path).name)
        return open_tar(path, mode)

    monkeypatch.setattr(tars.tarfile, "open", opened)
    monkeypatch.setattr(tars, "KEPT_FROM", 0.0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return read


def aged(path: Path, *, seconds: float = 60.0) -> Path:
    then = path.stat().st_mtime - seconds
    os.utime(path, (then, then))
    return path


def test_a_tar_is_listed_once_until_it_changes(scans: list[str], tmp_path: Path) -> None:
    bad = "b\udcff.mp4"  # a name that is no UTF-8
    tar = aged(pack(tmp_path / "a.tar", [("0.mp4", b"0" * 700), ("0.cls", "é".encode())]))
    scans.clear()
    first = find_sources([tar])
    assert [s.label for s in first.sources] == ["é"] and scans == ["a.tar"]
    assert find_sources([tar]).sources == first.sources and scans == ["a.tar"]
    (kept,) = (tmp_path / "cache" / "evolved-losses" / "tars").glob("*.json")
    whole = kept.read_bytes()
    for damaged in (whole[:-9], b"", b"[]", whole.replace(b"a.tar", b"b.tar")):
        kept.write_bytes(damaged)
        assert find_sources([tar]).sources == first.sources
        assert scans.pop() == "a.tar" and kept.read_bytes() == whole
    aged(pack(tar, [("1.mp4", b"1" * 700), ("1.cls", b"x")]), seconds=30)  # as large as before
    assert [s.relative for s in find_sources([tar]).sources] == ["a.tar/1.mp4"]
    pack(tar, [("2.mp4", b"2" * 700), ("2.cls", b"y")])  # perhaps it is being written
    for name in ("a.tar/2.mp4", "a.tar/2.mp4"):
        scans.clear()
        assert [s.relative for s in find_sources([tar]).sources] == [name] and scans == ["a.tar"]
    aged(pack(tar, [(bad, b"1" * 700)]))
    for _ in range(2):
        assert [s.relative for s in find_sources([tar]).sources] == [f"a.tar/{bad}"]


def test_short_lists_and_a_cache_that_can_not_be_written(
    scans: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tar = aged(pack(tmp_path / "a.tar", [("0.mp4", b"0")]))
    monkeypatch.setattr(tars, "KEPT_FROM", 60.0)
    find_sources([tar])
    assert not (tmp_path / "cache").exists()
    monkeypatch.setattr(tars, "KEPT_FROM", 0.0)
    (tmp_path / "cache").write_text("no folder")
    assert len(find_sources([tar]).sources) == 1


def test_processes_that_list_a_tar_at_once(scans: list[str], tmp_path: Path) -> None:
    """Each has the whole list, and so has what they keep; one that another process keeps is not waited for."""
    tar = aged(pack(tmp_path / "a.tar", [(f"{i}.mp4", b"0") for i in range(300)]))
    there = tmp_path / "cache" / "evolved-losses" / "tars"
    with take_lock(there / ".lock"):
        assert len(find_sources([tar]).sources) == 300
    assert not list(there.glob("*.json"))
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: len(find_sources([tar]).sources), range(40)))
    assert found == [300] * 40
    assert [p.suffix for p in there.iterdir() if p.name != ".lock"] == [".json"]
