from __future__ import annotations

import errno
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.core.files import StorageError
from engine.data.ingest import cut
from engine.data.ingest import run as module
from engine.data.ingest.jobs import Counts, CutWork, Work, do_work
from engine.data.ingest.run import IngestError, Progress, ingest
from engine.data.ingest.sources import find_videos
from engine.data.media.encode import write_video
from engine.data.shards import writer as shard_writer
from engine.data.shards.index import ClipIndex
from engine.data.shards.inspect import verify


def film(path: Path, *, seconds: float = 1.2, beep_at: float | None = None, fps: int = 25) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    count = round(seconds * fps)
    shade = [40 if beep_at is None or i != round(beep_at * fps) else 240 for i in range(count)]
    t = np.arange(round(seconds * 16000)) / 16000
    sound = None
    if beep_at is not None:
        sound = (np.sin(6283 * t) * ((t >= beep_at) & (t < beep_at + 0.04))).astype(np.float32)
    frames = (np.full((32, 48, 3), s, np.uint8) for s in shade)
    write_video(path, frames, fps=fps, sound=sound)
    return path


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    root = tmp_path / "videos"
    film(root / "walk" / "b.mp4", beep_at=0.48)
    film(root / "walk" / "a.mp4")
    film(root / "jump" / "c.mp4")
    film(root / "loose.mp4")
    film(root / "tiny.mp4", seconds=0.2)
    (root / "broken.mp4").write_bytes(b"nothing")
    return root


def run(videos: Path, out: Path, **settings: Any) -> module.IngestReport:
    return ingest([videos], out, **{"short_side": 32, "workers": 1, **settings})


def test_every_file_ends_as_clips_or_as_a_reject(videos: Path, tmp_path: Path) -> None:
    seen: list[Progress] = []
    report = run(videos, tmp_path / "set", progress=seen.append)
    assert (report.sources, report.clips) == (6, 4)
    assert report.seconds == pytest.approx(4.8)
    assert {r.path: r.reason for r in report.rejects} == {
        "broken.mp4": "can't be opened as a video: Invalid data found when processing input",
        "tiny.mp4": "only 0.20 s of video, less than 1 s",
    }
    assert (seen[-1].done, seen[-1].total, seen[-1].clips, seen[-1].rejects) == (6, 6, 4, 2)
    assert seen[-1].seconds == pytest.approx(4.8)
    assert report.rejected == 2
    lines = (tmp_path / "set" / "rejects.jsonl").read_text().splitlines()
    assert [json.loads(line)["path"] for line in lines] == ["broken.mp4", "tiny.mp4"]
    index = ClipIndex([tmp_path / "set"])
    assert index.classes == ("jump", "walk")
    found = [(index.facts(i)["source"], index.facts(i)["class"]) for i in range(4)]
    assert found == [
        ("jump/c.mp4", "jump"),
        ("loose.mp4", None),
        ("walk/a.mp4", "walk"),
        ("walk/b.mp4", "walk"),
    ]
    assert index.has_audio.tolist() == [False, False, False, True]
    assert (index.width[0], index.height[0]) == (48, 32)
    assert verify(tmp_path / "set") == []
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_flash_and_beep_stay_within_20_ms(videos: Path, tmp_path: Path) -> None:
    dali_types = pytest.importorskip("nvidia.dali.types")
    from nvidia.dali import fn, pipeline_def

    run(videos, tmp_path / "set")
    encoded = ClipIndex([tmp_path / "set"]).read(3, range(30))
    assert encoded.sound is not None

    @pipeline_def(num_threads=1, device_id=None)
    def pictures() -> Any:
        return fn.decoders.image(fn.external_source(source=lambda: encoded.frames), device="cpu")

    @pipeline_def(num_threads=1, device_id=None)
    def sounds() -> Any:
        flac = fn.external_source(source=lambda: [encoded.sound])
        return fn.decoders.audio(flac, dtype=dali_types.FLOAT, downmix=True)[0]

    graphs = pictures(batch_size=30), sounds(batch_size=1)
    for graph in graphs:
        graph.build()
    images, waves = (graph.run()[0] for graph in graphs)
    frames, sound = np.stack([np.array(images.at(i)) for i in range(30)]), np.array(waves.at(0))
    flash = int(frames.mean(axis=(1, 2, 3)).argmax()) / 25
    beep = int(np.argmax(np.abs(sound) > 0.2)) / 16000
    assert flash == pytest.approx(0.48)
    assert abs(flash - beep) < 0.02


def test_workers_do_not_change_a_byte(videos: Path, tmp_path: Path) -> None:
    film(videos / "long.mp4", seconds=11)
    settings = {"clip_seconds": 2.0, "clips_per_video": 3}
    one = run(videos, tmp_path / "one", workers=1, **settings)
    two = run(videos, tmp_path / "two", workers=2, **settings)
    assert one == two
    assert one.clips == 7
    for path in sorted((tmp_path / "one").iterdir()):
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes(), path.name


def die_on_b(work: Work) -> Counts:
    """A worker whose process dies of one file, as of a fault in a decoder."""
    if isinstance(work, CutWork) and work.source.path.name == "b.mp4":
        os.kill(os.getpid(), signal.SIGKILL)
    return do_work(work)


def test_a_worker_that_dies_rejects_its_file_alone(
    videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "do_work", die_on_b)
    report = run(videos, tmp_path / "set", workers=2)
    assert report.clips == 3
    assert {r.path for r in report.rejects} == {"broken.mp4", "tiny.mp4", "walk/b.mp4"}
    assert "crashed" in report.rejects[-1].reason


def die_at_the_third_clip(work: Work) -> Counts:
    """A worker whose process dies at one clip of a film."""
    if isinstance(work, CutWork) and work.source.path.name == "long.mp4":
        original, count = cut._cut, iter(set(range(9)) - set(work.skip))

        def cut_or_die(*args: Any) -> Any:
            if next(count) == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args)

        cut._cut = cut_or_die
    return do_work(work)


def test_a_clip_that_kills_its_worker_is_rejected_alone(
    videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    film(videos / "long.mp4", seconds=11)
    settings = {"clip_seconds": 2.0, "clips_per_video": 5}
    whole = run(videos, tmp_path / "whole", **settings)
    monkeypatch.setattr(module, "do_work", die_at_the_third_clip)
    report = run(videos, tmp_path / "set", workers=2, **settings)
    assert report.clips == whole.clips - 1
    index = ClipIndex([tmp_path / "whole"])
    facts = [index.facts(i) for i in range(len(index))]
    starts = [f["start"] for f in facts if f["source"] == "long.mp4"]
    (crashed,) = (r for r in report.rejects if "crashed" in r.reason)
    assert (crashed.path, crashed.where, crashed.partial) == (
        "long.mp4",
        f"{starts[2]:.3f} s",
        True,
    )
    assert verify(tmp_path / "set") == []


def test_an_unexpected_error_rejects_its_file_alone(
    videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = cut.probe

    def failing(path: Path) -> Any:
        if path.name == "a.mp4":
            raise UnicodeDecodeError("utf-8", b"\xff", 0, 1, "odd byte")
        return original(path)

    monkeypatch.setattr(cut, "probe", failing)
    report = run(videos, tmp_path / "set")
    assert report.clips == 3
    assert "UnicodeDecodeError" in next(r.reason for r in report.rejects if r.path == "walk/a.mp4")


def test_ingested_shards_are_kept(
    videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "set"
    first = run(videos, out)
    began = (out / "dataset.json").stat().st_mtime_ns
    assert run(videos, out) == first
    assert (out / "dataset.json").stat().st_mtime_ns == began
    for changed in ({"quality": 50}, {"seed": 1}):
        run(videos, out, **changed)
        now = (out / "dataset.json").stat().st_mtime_ns
        assert now != began
        began = now
    film(videos / "walk" / "more.mp4")
    assert run(videos, out, seed=1).clips == 5
    assert len(ClipIndex([out])) == 5
    (shard,) = out.glob("shard-*.tar")
    shard.write_bytes(b"")
    assert run(videos, out, seed=1).clips == 5
    assert verify(out) == []


def test_other_files_in_the_way_are_not_touched(videos: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"holds notes\.txt"):
        run(videos, tmp_path)
    with pytest.raises(ValueError, match="is a file"):
        run(videos, tmp_path / "notes.txt")


def test_nothing_to_ingest_is_one_line(tmp_path: Path) -> None:
    root = tmp_path / "videos"
    root.mkdir()
    with pytest.raises(IngestError, match=r"no videos found in .*videos"):
        run(root, tmp_path / "set")
    (root / "a.mp4").write_bytes(b"x")
    (root / "b.avi").write_bytes(b"y")
    with pytest.raises(
        IngestError, match=r"all 2 files were rejected; the first, a.mp4: can't"
    ) as caught:
        run(root, tmp_path / "set")
    assert "\n" not in str(caught.value)
    assert len((tmp_path / "set.rejects.jsonl").read_text().splitlines()) == 2
    assert not (tmp_path / "set").exists()
    with pytest.raises(ValueError, match="does not exist"):
        run(root / "absent", tmp_path / "set")


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_loses_nothing(
    videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    out = tmp_path / "set"
    run(videos, out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(shard_writer.os, call, full)
        with pytest.raises(StorageError, match="No space left on device"):
            run(videos, out, seed=5)
    assert {p.name: p.read_bytes() for p in out.iterdir() if p.is_file()} == before
    assert len(ClipIndex([out])) == 4
    run(videos, out, seed=5)
    assert verify(out) == []


def test_a_folder_that_cant_be_written_is_one_line(videos: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"can't write .*file/set: Not a directory"):
        run(videos, tmp_path / "file" / "set")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("fps", 0),
        ("quality", 0),
        ("short_side", 31),
        ("clips_per_video", 0),
        ("min_seconds", 11),
        ("workers", 0),
    ],
)
def test_settings_out_of_range_are_named(
    videos: Path, tmp_path: Path, key: str, value: int
) -> None:
    with pytest.raises(ValueError, match=key):
        run(videos, tmp_path / "set", **{key: value})


def check_all(root: Path, out: Path, **settings: Any) -> module.IngestReport:
    report = ingest([root], out, **{"short_side": 32, "workers": 1, **settings})
    index = ClipIndex([out])
    told = {index.facts(i)["source"] for i in range(len(index))} | {r.path for r in report.rejects}
    assert told == {source.relative for source in find_videos([root])}
    assert all(r.reason and "unexpected" not in r.reason for r in report.rejects)
    return report


@pytest.mark.data
def test_odd_real_files(real_data: Path, tmp_path: Path) -> None:
    report = check_all(real_data / "odd", tmp_path / "odd", clip_seconds=1.0)
    assert report.clips == 49
    assert {Path(r.path).name for r in report.rejects} == {
        "nasa_13013_rotated.mp4",
        "sine_mono_mp3.swf",
        "test_non_zero_start.mp4",
        "testsrc2_mpeg4.mp4",
        "testsrc2_odd_height_and_width_mpeg2.mp4",
        "testsrc2_odd_width_mpeg2.mp4",
        "unordered.mov",
        "video_0.mov",
        "video_180.mov",
        "video_270.mov",
        "video_90.mov",
    }


@pytest.mark.data
def test_hmdb51_files_are_all_taken(real_data: Path, tmp_path: Path) -> None:
    report = check_all(real_data / "hmdb51_subset", tmp_path / "set")
    assert (report.clips, report.rejects) == (6, [])


@pytest.mark.data
@pytest.mark.slow
def test_whole_odd_files(real_data: Path, tmp_path: Path) -> None:
    report = check_all(real_data / "odd", tmp_path / "odd", short_side=128)
    assert report.clips == 49
    index = ClipIndex([tmp_path / "odd"])
    notes = {index.facts(i)["source"]: index.facts(i).get("note") for i in range(len(index))}
    assert "stops at 2.80 s" in (notes["decord/corrupted.mp4"] or "")


def test_a_broken_film_gives_its_intact_head(tmp_path: Path) -> None:
    whole = film(tmp_path / "whole.mp4", seconds=30)
    cut = tmp_path / "in" / "cut.mp4"
    cut.parent.mkdir()
    shutil.copy(whole, cut)
    data = bytearray(cut.read_bytes())
    begin = data.index(b"mdat") + 4
    end = data.index(b"moov") - 4
    assert begin < end
    third = begin + (end - begin) // 6
    data[third:end] = bytes(end - third)
    cut.write_bytes(data)
    report = ingest(
        [cut.parent], tmp_path / "set", short_side=32, workers=1, clip_seconds=10, clips_per_video=3
    )
    index = ClipIndex([tmp_path / "set"])
    assert report.clips >= 1
    assert all(index.facts(i).get("note") for i in range(len(index)))
    (reject,) = report.rejects
    assert reject.reason.endswith("of 30.0 s: it is cut off") and reject.partial
