"""An ingest on a Ray cluster of this machine's own gives the bytes of one process."""

from __future__ import annotations

import os
import signal
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.core.files import StorageError
from engine.data.ingest import run as module
from engine.data.ingest.jobs import Counts, CutWork, Work, do_work
from engine.data.ingest.run import ingest
from engine.data.media.encode import write_video
from engine.data.shards.inspect import verify

ray: Any = pytest.importorskip("ray", reason="Ray is not installed")

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """Two CPUs; started once, since that takes seconds."""
    path = os.pathsep.join(p for p in (str(ROOT), os.environ.get("PYTHONPATH")) if p)
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=80_000_000,
        runtime_env={"env_vars": {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}},
    )
    yield
    ray.shutdown()


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    for i in range(8):
        path = tmp_path / "videos" / f"c{i % 2}" / f"{i}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_video(path, [np.full((32, 48, 3), 30 * i, np.uint8)] * 30, fps=25)
    (tmp_path / "videos" / "bad.mp4").write_bytes(b"no video")
    return tmp_path / "videos"


def content(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def test_the_bytes_are_those_of_one_process(cluster: None, videos: Path, tmp_path: Path) -> None:
    here = ingest([videos], tmp_path / "here", short_side=32, workers=1)
    there = ingest([videos], tmp_path / "there", short_side=32, address="auto")
    assert there == here and there.clips == 8 and there.rejected == 1
    assert content(tmp_path / "there") == content(tmp_path / "here")
    assert verify(tmp_path / "there") == []


def test_videos_in_a_tar(cluster: None, videos: Path, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "videos.tar", "w") as tar:
        tar.add(videos, arcname="")
    here = ingest([tmp_path / "videos.tar"], tmp_path / "here", short_side=32, workers=1)
    there = ingest([tmp_path / "videos.tar"], tmp_path / "there", short_side=32, address="auto")
    assert there == here and there.clips == 8 and there.rejected == 1
    assert content(tmp_path / "there") == content(tmp_path / "here")


def test_a_file_that_kills_its_worker_is_rejected_alone(
    cluster: None, videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die_on_3(work: Work) -> Counts:
        if isinstance(work, CutWork) and work.source.path.name == "3.mp4":
            os.kill(os.getpid(), signal.SIGKILL)
        return do_work(work)

    monkeypatch.setattr(module, "do_work", die_on_3)
    report = ingest([videos], tmp_path / "set", short_side=32, address="auto")
    assert {r.path for r in report.rejects} == {"bad.mp4", "c1/3.mp4"}
    assert report.clips == 7 and "crashed" in report.rejects[-1].reason


def test_paths_may_be_relative(
    cluster: None, videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def elsewhere(work: Work) -> Counts:
        os.chdir("/")
        return do_work(work)

    monkeypatch.setattr(module, "do_work", elsewhere)
    monkeypatch.chdir(tmp_path)
    assert ingest([Path("videos")], Path("set"), short_side=32, address="auto").clips == 8


def test_a_node_that_does_not_see_the_folder_is_one_line(
    cluster: None, videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def on_another_node(work: Work) -> Counts:
        assert isinstance(work, CutWork)
        return do_work(replace(work, path=Path("/nowhere/x.cut")))

    monkeypatch.setattr(module, "do_work", on_another_node)
    with pytest.raises(StorageError, match=r"can't write /nowhere/x.cut: No such file"):
        ingest([videos], tmp_path / "set", short_side=32, address="auto")


def test_no_cluster_is_one_line(videos: Path, tmp_path: Path) -> None:
    if ray.is_initialized():
        ray.shutdown()
    with pytest.raises(ValueError, match=r"there is no Ray cluster at 127.0.0.1:1"):
        ingest([videos], tmp_path / "set", short_side=32, address="127.0.0.1:1")
