"""The comparison of decoders: who takes part, that they decode the same frames, and what is written down."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks" / "input_peers.py"


@pytest.fixture(scope="module")
def peers(request: pytest.FixtureRequest):
    patch = pytest.MonkeyPatch()
    patch.syspath_prepend(str(SCRIPT.parent))
    request.addfinalizer(patch.undo)
    return importlib.import_module("input_peers")


@pytest.fixture(scope="module")
def films(peers, tiny_demo: Path, tmp_path_factory: pytest.TempPathFactory):
    """Two clips, a folder with their shards and files, and asks for both."""
    clips = peers.make_clips(tiny_demo / "labelled", 2)
    folder = tmp_path_factory.mktemp("films")
    sizes = peers.write_all(clips, folder)
    draw = np.random.default_rng(0)
    return clips, folder, sizes, [peers.ask(draw, clips) for _ in range(3)]


def test_every_kind_of_file_is_measured_in_bytes_a_frame(films) -> None:
    _, _, sizes, _ = films
    assert sizes["jpeg shards"] > sizes["H.264, key frame every 16"] > sizes["H.264"] > 0
    assert sizes["VP9 of our shards"] == pytest.approx(sizes["vp9 shards"], rel=0.2)


@pytest.mark.parametrize("kind", ["jpeg", "vp9"])
def test_ours_and_the_libraries_of_the_engine_decode_the_frames_asked_for(
    peers, films, kind
) -> None:
    clips, folder, _, asks = films
    steps = peers.all_steps(folder, 3)
    wanted = [f"ours | {kind} shards", *(n for n in steps if n.startswith(("PyAV", "OpenCV")))]
    assert len(wanted) == 17  # two peers, four kinds of files, two ways of using threads
    for name in wanted:
        assert peers.agrees(steps[name], asks, clips) >= peers.AGREE, name


def test_who_decodes_other_frames_is_left_out_with_the_reason(peers, films, capsys) -> None:
    clips, folder, _, asks = films
    reader = peers.find_peers()["PyAV"]

    def backwards(file, frames, threads):
        return reader(file, frames, threads)[::-1]

    def short(file, frames, threads):
        return reader(file, frames, threads)[:-1]

    steps = {
        "right | H.264": peers.parallel(reader, folder, ".mp4", files=1),
        "backwards | H.264": peers.parallel(backwards, folder, ".mp4", files=1),
        "short | H.264": peers.parallel(short, folder, ".mp4", files=2),
        "absent | H.264": peers.parallel(reader, folder, ".avi", files=2),
    }
    capsys.readouterr()
    kept, quality = peers.check(steps, asks, clips)
    assert list(kept) == ["right | H.264"] and quality["right | H.264"] >= peers.AGREE
    other_line, short_line, absent_line = capsys.readouterr().out.splitlines()
    assert "other frames" in other_line
    assert "45 frames instead of" in short_line
    assert ".avi" in absent_line


def test_absent_peers_are_named_with_how_to_install_them(peers, monkeypatch, capsys) -> None:
    for module in ("torchcodec", "torchcodec.decoders", "decord"):
        monkeypatch.setitem(sys.modules, module, None)
    assert set(peers.find_peers()) == {"PyAV", "OpenCV"}
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["torchcodec", "decord"]
    assert all("pip install torchcodec==0.13.0 decord2" in line for line in lines)


def test_only_the_faster_way_of_using_threads_stays(peers, films, monkeypatch) -> None:
    rates = {"A | VP9": [5.0, 9.0], "A, one file | VP9": [8.0, 7.0], "ours | vp9 shards": [1.0]}
    found = {name: np.array(rate) for name, rate in rates.items()}
    monkeypatch.setattr(peers, "measure", lambda steps, plans, rounds: found)
    kept = peers.faster_ways(dict.fromkeys(rates), [])
    assert set(kept) == {"A | VP9", "ours | vp9 shards"}


def test_a_run_prints_a_table_and_writes_a_row_a_decoder(
    peers, tiny_demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one peer and two batches."""
    found, threads = peers.find_peers(), torch.get_num_threads()
    monkeypatch.setattr(peers, "find_peers", lambda: {"PyAV": found["PyAV"]})
    monkeypatch.setattr(peers, "BATCHES", 2)
    out = tmp_path / "rows.jsonl"
    arguments = ["--videos", tiny_demo / "labelled", "--clips", 2, "--batch", 2, "--rounds", 1]
    done = CliRunner().invoke(peers.main, [*map(str, arguments), "--json", str(out)])
    torch.set_num_threads(threads)
    assert done.exit_code == 0, done.output
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    kinds = {(row["decoder"].split(",")[0], row["files"]) for row in rows}
    assert {("ours", "jpeg shards"), ("ours", "vp9 shards"), ("PyAV", "H.264")} <= kinds
    for row in rows:
        assert 0 < row["clips_per_second"] <= row["best_clips_per_second"]
        assert row["threads"] == 2 and row["git_sha"] and row["peers"]["av"]
        assert str(tiny_demo) not in json.dumps(row)
    assert "jpeg shards:" in done.output and "times the best peer" in done.stdout


def test_videos_that_are_too_short_are_one_line(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--videos", str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=100,
    )
    assert done.returncode == 2
    assert "holds no video that is long enough" in done.stderr.splitlines()[-1]
