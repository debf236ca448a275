"""However an ingest comes to its end, by one run, after kills or by additions, the bytes are the same."""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from engine.core.files import take_lock
from engine.core.pool import Done, LocalPool, Lost
from engine.data.ingest import grouping as groups
from engine.data.ingest import publish as commit
from engine.data.ingest import run as module
from engine.data.ingest.jobs import CutWork, Work
from engine.data.ingest.run import IngestReport, ingest
from engine.data.media.encode import write_video
from engine.data.shards import writer as shard_writer
from engine.data.shards.index import ClipIndex
from engine.data.shards.inspect import verify

ROOT = Path(__file__).resolve().parents[3]
NUM_FILES = 24


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Short films of other shades, two that are broken, and one of several clips."""
    root = tmp_path_factory.mktemp("films") / "videos"
    for i in range(NUM_FILES):
        path = root / f"class{i % 3}" / f"{i:02d}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        shade = np.full((32, 48, 3), 40 + 8 * i, np.uint8)
        write_video(path, [shade] * (140 if i == 5 else 26), fps=25)
    for i in (3, 11):
        (root / f"class{i % 3}" / f"{i:02d}.mp4").write_bytes(b"broken")
    return root


@pytest.fixture(autouse=True)
def small_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(groups, "LEAST", 2)
    monkeypatch.setattr(groups, "ONE_IN", 2)
    monkeypatch.setattr(groups, "MOST", 6)


def run(videos: Path, out: Path, **more: Any) -> IngestReport:
    settings = {"short_side": 32, "clip_seconds": 2.0, "clips_per_video": 2, "workers": 1}
    return ingest([videos], out, **{**settings, **more})


def content(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


@pytest.fixture(scope="module")
def whole(films: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What one run makes of all films."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("LEAST", 2), ("ONE_IN", 2), ("MOST", 6)):
            patch.setattr(groups, name, value)
        out = tmp_path_factory.mktemp("whole") / "set"
        report = run(films, out)
    assert (report.sources, report.clips, report.rejected) == (NUM_FILES, NUM_FILES - 1, 2)
    assert verify(out) == []
    found = content(out)
    assert 5 <= sum(name.startswith("shard-") for name in found) <= 12
    return found


def test_other_tools_read_the_shards(films: Path, tmp_path: Path) -> None:
    """Keys are those of one clip's files alone, over all shards; ``tarfile`` and WebDataset agree on them."""
    webdataset: Any = pytest.importorskip("webdataset")
    run(films, tmp_path / "set")
    index = ClipIndex([tmp_path / "set"])
    facts = json.loads((tmp_path / "set" / "dataset.json").read_text())
    paths = [str(tmp_path / "set" / shard["file"]) for shard in facts["shards"]]
    samples = list(webdataset.WebDataset(paths, shardshuffle=False))
    assert len(samples) == len({s["__key__"] for s in samples}) == len(index)
    told = [json.loads(s["json"])["source"] for s in samples]
    assert told == [index.facts(i)["source"] for i in range(len(index))]
    keys = []
    for path in paths:
        with tarfile.open(path) as tar:
            names = [info.name.split(".", 1) for info in tar.getmembers()]
        keys += [key for key, group in itertools.groupby(names, key=lambda name: name[0])]
        assert all(kind in ("json", "offsets.npy", "mjpg", "flac") for _, kind in names)
    assert keys == [s["__key__"] for s in samples]
    assert samples[3]["mjpg"].startswith(index.read(3, [0]).frames[0].tobytes())


class Killed(BaseException):
    """Ends a run as a kill would, in this process."""


class Dying(LocalPool):
    """Dies before its ``left``-th work; those done are counted in ``did``."""

    left = 0
    did: ClassVar[list[Work]] = []

    def wait(self) -> Sequence[Done | Lost]:
        if Dying.left == 0:
            raise Killed
        Dying.left -= 1
        (report,) = super().wait()
        assert report.job is not None
        Dying.did.append(report.job.work)
        return [report]


def test_a_run_that_dies_again_and_again_gives_the_bytes_of_one_run(
    films: Path, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LocalPool", Dying)
    Dying.did = []
    rng = random.Random(1)
    deaths = 0
    for _ in range(50):
        Dying.left = rng.randrange(1, 9)
        try:
            report = run(films, tmp_path / "set")
            break
        except Killed:
            deaths += 1
            assert not (tmp_path / "set" / "dataset.json").exists()
    assert deaths >= 4
    assert report.reused > 0
    assert content(tmp_path / "set") == whole
    cut = [work.source.relative for work in Dying.did if isinstance(work, CutWork)]
    assert sorted(cut) == sorted(set(cut)) and len(cut) == NUM_FILES  # nothing was done twice


def test_a_kill_while_the_new_set_takes_the_old_ones_place(
    films: Path, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "set"
    run(films, out, quality=50)
    old = content(out)
    before = len(ClipIndex([out]))
    original = shard_writer.write_atomic

    def die_at_the_last_file(path: Path, data: bytes) -> None:
        if path.name == "dataset.json":
            raise Killed
        original(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(shard_writer, "write_atomic", die_at_the_last_file)
        with pytest.raises(Killed):
            run(films, out)
    assert verify(out) == []
    assert run(films, out, quality=50).reused == NUM_FILES
    assert content(out) == old
    for target in ("write_dataset", "write_rejects", "is_shards"):

        def die(*_: object, **__: object) -> None:
            raise Killed

        with monkeypatch.context() as patch:
            patch.setattr(commit, target, die)
            with pytest.raises(Killed):
                run(films, out)
        assert len(ClipIndex([out])) == before
        assert verify(out) == []
    run(films, out)
    assert content(out) == whole


def finished_in(work: Path) -> set[str]:
    """Names of cuts and of shards' records."""
    return {p.name for p in work.glob("[0-9a-f]*") if p.suffix in (".cut", ".made")}


def processes_in(folder: Path) -> list[str]:
    """Processes whose working folder this is."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if os.readlink(process / "cwd") == str(folder):
                found.append((process / "cmdline").read_bytes().decode())
    return [line for line in found if line and "resource_tracker" not in line]


def test_processes_killed_at_random_moments(
    films: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    program = f"""
from pathlib import Path
from engine.data import groups
from engine.data.ingest.run import ingest
if __name__ == "__main__":
    groups.LEAST, groups.ONE_IN, groups.MOST = 2, 2, 6
    ingest([Path({str(films)!r})], Path("set"), short_side=32, clip_seconds=2.0, clips_per_video=2, workers=2)
"""
    (tmp_path / "program.py").write_text(program)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    rng = random.Random(0)
    finished = kills = 0
    work = tmp_path / "set" / ".ingest"
    for _ in range(2 * NUM_FILES):
        process = subprocess.Popen(
            [sys.executable, "program.py"],
            cwd=tmp_path,
            env=environment,
            stderr=subprocess.DEVNULL,
        )
        seen = finished_in(work)
        left = rng.randrange(1, 6)
        while process.poll() is None and len(finished_in(work) - seen) < left:
            time.sleep(0.001)
        if process.poll() is not None:
            finished = process.returncode == 0
            break
        time.sleep(rng.uniform(0.0, 0.05))
        os.kill(process.pid, signal.SIGKILL)  # its workers follow on their own
        process.wait()
        kills += 1
        deadline = time.monotonic() + 10
        while processes_in(tmp_path) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not processes_in(tmp_path)
        assert not (tmp_path / "set" / "dataset.json").exists() or kills > 1
    assert finished and kills >= 3
    assert content(tmp_path / "set") == whole


def test_added_changed_and_removed_files_cost_their_own_shards_alone(
    films: Path, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, out = tmp_path / "videos", tmp_path / "set"
    shutil.copytree(films, root)
    held = tmp_path / "10.mp4"
    shutil.move(root / "class1" / "10.mp4", held)
    first = run(root, out)
    assert first.clips == NUM_FILES - 2
    before = {p: p.stat().st_ino for p in out.glob("shard-*")}
    shutil.move(held, root / "class1" / "10.mp4")
    Dying.left, Dying.did = 10**6, []
    monkeypatch.setattr(module, "LocalPool", Dying)
    report = run(root, out)
    assert content(out) == whole
    cut = [work for work in Dying.did if isinstance(work, CutWork)]
    assert 1 <= len(cut) <= 6 and report.reused == NUM_FILES - len(cut)
    kept = [p for p, inode in before.items() if p.exists() and p.stat().st_ino == inode]
    assert len(kept) >= len(before) - 2
    Dying.did = []
    assert run(root, out) == report
    assert Dying.did == []
    os.utime(root / "class0" / "00.mp4", ns=(1, 1))
    run(root, out)
    assert 1 <= len(Dying.did) <= 7
    assert verify(out) == []


def test_a_deleted_shard_is_made_again_alone(
    films: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "set"
    run(films, out)
    shard = sorted(out.glob("shard-*"))[1]
    shard.unlink()
    inodes = {p: p.stat().st_ino for p in out.glob("shard-*")}
    run(films, out)
    assert content(out) == whole
    assert all(p.stat().st_ino == inode for p, inode in inodes.items())


@pytest.mark.parametrize("harm", ["cut", "flip", "empty"])
def test_a_damaged_cut_is_made_again(
    films: Path,
    whole: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    harm: str,
) -> None:
    """As a loss of power may leave it: its name is there, and not all of its bytes."""
    out = tmp_path / "set"
    with monkeypatch.context() as patch:
        patch.setattr(module, "LocalPool", Dying)
        Dying.left = 7
        with pytest.raises(Killed):
            run(films, out)
    cuts = sorted((out / ".ingest").glob("*.cut"))
    assert cuts
    for cut in cuts:
        data = bytearray(cut.read_bytes())
        data[len(data) // 2] ^= 1
        cut.write_bytes({"cut": data[:-5], "flip": data, "empty": b""}[harm])
    run(films, out)
    assert content(out) == whole


def test_a_second_run_waits_for_the_first_and_says_so_once(
    films: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    began, seen = threading.Event(), list[module.Progress]()

    def hold(now: module.Progress) -> None:
        if now.done == 3 and not began.is_set():
            began.set()
            while not any(each.waiting for each in seen):
                time.sleep(0.01)

    with ThreadPoolExecutor(1) as threads:
        first = threads.submit(run, films, tmp_path / "set", progress=hold)
        assert began.wait(60)
        second = run(films, tmp_path / "set", progress=seen.append)
    assert first.result() == second and first.result().reused == 0
    assert second.reused == NUM_FILES and sum(now.waiting for now in seen) == 1
    assert content(tmp_path / "set") == whole


def test_complete_shards_need_no_lock(films: Path, tmp_path: Path) -> None:
    """Neither while another process holds it, nor where nothing can be written."""
    first = run(films, tmp_path / "set")
    with take_lock(tmp_path / "set" / ".ingest" / "lock"):
        assert run(films, tmp_path / "set") == first


def test_moved_videos_are_known_again(films: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "one" / "videos", tmp_path / "two" / "videos"
    shutil.copytree(films, first)
    run(first, tmp_path / "set")
    second.parent.mkdir()
    shutil.move(first, second)
    assert run(second, tmp_path / "set").reused == NUM_FILES


def test_a_folder_of_videos_that_goes_away_rejects_nothing(
    films: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "videos"
    shutil.copytree(films, root)

    def unmount(so_far: module.Progress) -> None:
        if so_far.done == 7:
            root.rename(tmp_path / "elsewhere")

    with pytest.raises(OSError, match=r"videos can't be reached any more"):
        run(root, tmp_path / "set", progress=unmount)
    (tmp_path / "elsewhere").rename(root)
    report = run(root, tmp_path / "set")
    assert (report.rejected, report.clips) == (2, NUM_FILES - 1)
    assert report.reused >= 7


def test_groups_change_only_where_sources_do() -> None:
    from engine.data.ingest.cut import Settings
    from engine.data.ingest.sources import Source

    settings = Settings(
        fps=25, short_side=32, clip_seconds=10, clips_per_video=1, min_seconds=1, quality=85, seed=0
    )
    sources = [Source("/nowhere", f"{i:06d}.mp4", None) for i in range(4000)]
    some = groups.group(sources, settings)
    assert [s for g in some for s in g.sources] == sources
    assert all(2 <= len(g.sources) <= 6 for g in some[:-1])
    more = groups.group(
        [*sources[:777], Source("/nowhere", "000776x.mp4", None), *sources[777:]], settings
    )
    known = {g.fingerprint for g in some}
    assert 1 <= sum(g.fingerprint not in known for g in more) <= 8
