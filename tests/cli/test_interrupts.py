"""Ctrl-C, SIGTERM and SIGKILL on long commands: how soon they end, what they say, and that no process is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.data.films import texture, write_film
from tests.runs import TINY, command, one_line

ENDED_SECONDS = 12.0
"""For a command to end after a signal: the grace that it has, and some time on a busy machine."""
LEFT_SECONDS = 10.0
"""For its processes to end after it was killed; alone they take half a second."""
MARK = "ENGINE_TEST_MARK"


def marked(mark: str) -> set[int]:
    """All processes that inherited ``mark``, zombies aside."""
    found = set()
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if mark.encode() in (entry / "environ").read_bytes():
                found.add(int(entry.name))
    return found


def said(mark: str) -> list[str]:
    """The command lines of the processes that are left."""
    lines = []
    for pid in marked(mark):
        with suppress(OSError):
            line = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
            lines.append(f"{pid}: {line[:200]}")
    return lines


@contextmanager
def started(*arguments: object) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A command in a process, and the mark of all processes that it starts."""
    mark = uuid.uuid4().hex
    process = subprocess.Popen(
        [sys.executable, "-m", "engine", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, MARK: mark, "OMP_NUM_THREADS": "1"},
    )
    try:
        yield process, mark
    finally:
        for pid in marked(mark):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.communicate()


def wait_for(done: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    until = time.monotonic() + 400  # workers of a busy machine take minutes to start
    while not done():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.02)


def end(process: subprocess.Popen[str], mark: str, number: int) -> str:
    """Send the signal; returns what the command said on its end."""
    began = time.monotonic()
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    took = time.monotonic() - began
    assert process.returncode == 128 + number, (process.returncode, err)
    assert took < ENDED_SECONDS
    until = time.monotonic() + 1
    while marked(mark) and time.monotonic() < until:
        time.sleep(0.05)
    assert not marked(mark)
    lines = err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("engine: interrupted; "), err
    return lines[0]


def left_after_kill(process: subprocess.Popen[str], mark: str) -> float:
    """Kill the command alone; returns the seconds until all of its processes were gone."""
    began = time.monotonic()
    process.kill()
    while marked(mark):
        assert time.monotonic() - began < LEFT_SECONDS, said(mark)
        time.sleep(0.05)
    return time.monotonic() - began


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("videos")
    film = write_film(root / "0.mp4", (texture(i) for i in range(250)))
    for i in range(1, 200):
        os.link(film, root / f"{i}.mp4")
    return root


def cuts(out: Path) -> int:
    return len(list((out / ".ingest").glob("*.cut")))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("workers", [1, 2])
def test_an_ingest(videos: Path, tmp_path: Path, number: int, workers: int) -> None:
    out = tmp_path / "shards"
    with started("ingest", videos, "--out", out, "--workers", workers) as (process, mark):
        wait_for(lambda: cuts(out) > 2, process)
        line = end(process, mark, number)
    assert "the same command goes on from there" in line
    assert 2 < cuts(out) < 200


def test_a_killed_ingest_leaves_no_process(videos: Path, tmp_path: Path) -> None:
    out = tmp_path / "shards"
    with started("ingest", videos, "--out", out, "--workers", 2) as (process, mark):
        wait_for(lambda: cuts(out) > 2, process)
        left_after_kill(process, mark)


def training(name: str, shards: Path, run: Path, *more: object) -> tuple[object, ...]:
    data: tuple[object, ...] = ("--videos", shards / "unlabelled")
    if name == "evolve":
        data = (*data, "--labelled", shards / "labelled")
    else:
        data = (*data, "--loss", "random:3", "--checkpoint-every", 2, "--set", "optim.steps=500")
    return (name, *data, "--recipe", TINY, "--run", run, "--device", "cpu", *more)


def at_work(name: str, run: Path) -> bool:
    if name == "pretrain":
        return (run / "checkpoints" / "last.safetensors").exists()
    journal = run / "study.jsonl"
    return journal.exists() and b'"number"' in journal.read_bytes()


@pytest.mark.parametrize(
    ("name", "workers", "number"),
    [
        pytest.param("evolve", 2, signal.SIGINT, marks=pytest.mark.slow),
        ("pretrain", 2, signal.SIGTERM),
        pytest.param("pretrain", 2, signal.SIGKILL, marks=pytest.mark.slow),
    ],
)
@pytest.mark.timeout(600)
def test_a_training(
    tiny_shards: Path, tmp_path: Path, name: str, workers: int | None, number: int
) -> None:
    run = tmp_path / "run"
    more = () if workers is None else ("--workers", workers)
    with started(*training(name, tiny_shards, run, *more)) as (process, mark):
        wait_for(lambda: at_work(name, run), process)
        if number == signal.SIGKILL:
            print("all gone after", left_after_kill(process, mark))
            return
        assert "--resume goes on from there" in end(process, mark, number)


def test_a_process_that_computes_outside_of_python_ends_too(tmp_path: Path) -> None:
    """As one in a long fit or a compiler does: no handler of Python's is called there."""
    script = tmp_path / "script.py"
    script.write_text(
        "import ctypes, time\n"
        "import engine.core.interrupt as interrupt\n"
        "interrupt.GRACE_SECONDS = 0.5\n"
        "def stuck():\n"
        "    until = time.monotonic() + 60\n"
        "    while time.monotonic() < until:\n"
        "        try:\n"
        "            print('stuck', flush=True); time.sleep(60)\n"
        "        except KeyboardInterrupt:\n"
        "            pass\n"
        "with interrupt.interrupts(lambda code: print('last words', code, flush=True)):\n"
        "    stuck()\n"
    )
    with subprocess.Popen(
        [sys.executable, script], stdout=subprocess.PIPE, text=True, env={**os.environ}
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "stuck\n"
        process.terminate()
        out = process.communicate(timeout=20)[0]
    assert process.returncode == 143 and out.endswith("last words 143\n")


def test_an_interrupt_without_a_signal_is_ctrl_c(monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.getsignal(signal.SIGTERM)

    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("engine.cli.doctor.diagnose", interrupted)
    assert "run the same command again" in one_line(command("doctor"), code=130)
    assert signal.getsignal(signal.SIGTERM) is before
