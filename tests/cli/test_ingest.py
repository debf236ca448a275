"""``engine ingest`` as a user types it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from click.testing import CliRunner

from engine.cli.main import main
from engine.data.media.encode import write_video
from engine.report.figures.clips import flow_colours

ROOT = Path(__file__).resolve().parents[2]


def call(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(main, ["ingest", *(str(a) for a in arguments)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.output
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture
def videos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("walk/a", "walk/b", "run/c"):
        path = tmp_path / "videos" / f"{name}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        t = np.arange(32000) / 16000
        sound = (0.3 * np.sin(2000 * t)).astype(np.float32) if name == "walk/b" else None
        frames = [
            np.roll(np.eye(48, dtype=np.uint8)[:, :, None].repeat(3, 2) * 200, i, 1)
            for i in range(50)
        ]
        write_video(path, frames, fps=25, sound=sound)
    (tmp_path / "videos" / "bad.mp4").write_bytes(b"no video")
    return tmp_path / "videos"


def test_files_folders_and_lists_at_once(videos: Path) -> None:
    (videos / "list.csv").write_text(
        "path,label,start,end\nwalk/a.mp4,part,0.5,1.6\nnone.mp4,x,,\n"
    )
    shards = videos.parent / "set"
    command = (videos, videos / "list.csv", "--out", shards, "--short-side", 32, "--workers", 1)
    code, out, err = call(*command)
    assert (code, err) == (0, "")
    assert "rejected none.mp4 (list.csv:3): there is no such file" in out
    assert "rejected bad.mp4: can't be opened as a video" in out
    assert "6 files: 4 clips, 0.00 hours, 2 rejected" in out
    rejects = [json.loads(line) for line in (shards / "rejects.jsonl").read_text().splitlines()]
    assert [(r["path"], r.get("listed")) for r in rejects] == [
        ("none.mp4", "list.csv:3"),
        ("bad.mp4", None),
    ]
    code, out, _ = call(*command)
    assert code == 0 and "sources of an earlier run, kept" in out


def test_progress_in_a_log_is_plain_lines(videos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files, clips, hours, the rate of this run alone, and the time left."""
    from engine.cli import ingest as cli_ingest
    from engine.core import display
    from engine.data.ingest.run import Progress

    clock = [100.0]
    monkeypatch.setattr(display.time, "monotonic", lambda: clock[0])
    told: list[str] = []
    shown = display.Display(every=10.0)
    monkeypatch.setattr(shown, "say", told.append)
    show = cli_ingest._shown(shown)
    show(Progress(400, 1000, 400, 390, 3600.0, 10))
    for _ in range(50):
        clock[0] += 1.0
        done = 400 + 4 * round(clock[0] - 100)
        show(Progress(done, 1000, 400, done - 10, 9.0 * done, 10))
    assert told[0] == "reading videos: 1000, 400 of them done before"
    assert len(told) == 6
    assert (
        told[-1]
        == "reading videos: 600/1000  590 clips  1.50 h  4.0 files/s  10 rejects  100 s left"
    )


def test_what_shards_hold(videos: Path) -> None:
    call(videos, "--out", "set", "--short-side", 32, "--workers", 1)
    code, out, _ = call("--describe", "set")
    assert code == 0
    told = {
        line.rsplit("  ", 1)[0].strip(): line.rsplit("  ", 1)[1].strip()
        for line in out.splitlines()
        if "  " in line
    }
    assert told["clips"] == "3" and told["with sound"] == "1 (33%)"
    assert (told["run"], told["walk"]) == ("1", "2")
    assert told["codec"].endswith("25 frames/s, short side 32")
    assert told["pictures"] == "3 32x32"


def test_verify_names_the_damaged_shard(videos: Path) -> None:
    call(videos, "--out", "set", "--short-side", 32, "--workers", 1)
    code, out, _ = call("--verify", "set")
    assert code == 0 and "set is sound" in out
    (shard,) = Path("set").glob("shard-*.tar")
    data = bytearray(shard.read_bytes())
    data[5000] ^= 4
    shard.write_bytes(data)
    code, out, err = call("--verify", "set")
    assert code == 1
    assert f"{shard} is damaged: its checksum is" in out
    assert len(err.splitlines()) == 1 and "1 files of set are damaged" in err
    shard.unlink()  # as the line says
    call(videos, "--out", "set", "--short-side", 32, "--workers", 1)
    assert call("--verify", "set")[0] == 0
    assert call("--verify", videos)[0] == 2


def test_contact_sheet(videos: Path) -> None:
    call(videos, "--out", "set", "--short-side", 32, "--workers", 1)
    code, out, _ = call("--contact-sheet", "set", "--out", "look.png")
    assert code == 0 and "look.png" in out
    picture = cv2.imread("look.png")
    assert picture.shape[0] > 300 and picture.shape[1] > 1000
    assert call("--contact-sheet", "set")[0] == 0 and Path("set.png").exists()
    code, _, err = call("--contact-sheet", "set", "--out", "look.gif")
    assert code == 2 and "ends in .png" in err


def test_flow_as_colours() -> None:
    flow = np.array([[8, 0], [0, 0], [-8, 0], [4, 0]], np.float32)
    colours = flow_colours(flow)
    np.testing.assert_allclose(colours[0], [1, 0, 0], atol=1e-6)  # right: red
    np.testing.assert_allclose(colours[1], [1, 1, 1], atol=1e-6)  # still: white
    np.testing.assert_allclose(colours[2], [0, 1, 1], atol=1e-6)  # left: red's opposite
    np.testing.assert_allclose(colours[3], [1, 0.5, 0.5], atol=1e-6)  # slower: paler


@pytest.mark.parametrize(
    ("command", "told"),
    [
        (("videos",), "--out is missing"),
        (("--out", "set"), "no videos given"),
        (("videos", "--verify", "set"), "only one of"),
        (("--describe", "videos"), "videos holds no shards"),
        (("--ucf101", "videos", "videos", "--out", "set"), "classInd.txt is missing"),
        (("--hmdb51", "videos", "none", "--out", "set"), "none holds no HMDB51 lists"),
        (("--kinetics", "videos", "none.csv", "--out", "set"), "can't read the list none.csv"),
    ],
)
def test_mistakes_are_one_line(videos: Path, command: tuple[str, ...], told: str) -> None:
    code, _, err = call(*command)
    assert code == 2 and told in err and len(err.splitlines()) == 1


def test_a_full_disk_is_one_line_and_the_command_goes_on(videos: Path) -> None:
    """A limit on the size of files stands for the disk: writes beyond it fail part-way, as on a full one."""
    program = (
        "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (30000, 30000));"
        "from engine.cli.main import main; main()"
    )
    command = ["ingest", str(videos), "--out", "set", "--short-side", "32", "--workers", "1"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.run(
        [sys.executable, "-c", program, *command], env=environment, capture_output=True, text=True
    )
    assert process.returncode == 1
    assert len(process.stderr.splitlines()) == 1
    assert "can't write" in process.stderr and "kept for the same command" in process.stderr
    assert not Path("set/dataset.json").exists()
    assert call(*command[1:])[0] == 0
    assert call("--verify", "set")[0] == 0
