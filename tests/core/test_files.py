"""Files that appear whole or not at all, and locks: kills, full disks, waiting, lock files that are removed."""

from __future__ import annotations

import errno
import os
import pickle
import stat
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from engine.core.files import StorageError, replacing, take_lock, write_atomic, write_text_atomic

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    path = tmp_path / "facts.json"
    write_text_atomic(path, "old")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, call, full)
        with pytest.raises(OSError, match="No space left"):
            write_text_atomic(path, "new")
        with pytest.raises(StorageError, match=r"can't write .*facts\.json: No space left") as told:
            write_atomic(path, b"new")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    assert told.value.errno == errno.ENOSPC
    sent = pickle.loads(pickle.dumps(told.value))
    assert (str(sent), sent.errno) == (str(told.value), errno.ENOSPC)
    write_text_atomic(path, "new ü")
    assert path.read_text(encoding="utf-8") == "new ü"


def test_a_block_that_raises_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "facts.json"
    path.write_text("old")
    with pytest.raises(KeyError), replacing(path) as temporary:
        temporary.write_text("half")
        raise KeyError
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_secret_is_its_owners_alone(tmp_path: Path) -> None:
    write_text_atomic(tmp_path / "secret", "x", mode=0o600)
    assert stat.S_IMODE((tmp_path / "secret").stat().st_mode) == 0o600


def test_a_lock_is_one_processes(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "lock"
    program = (
        "import sys; from pathlib import Path; from engine.core.files import take_lock\n"
        "held = take_lock(Path(sys.argv[1])); print('held', flush=True); sys.stdin.read()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", program, str(path)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        assert other.stdout is not None and other.stdout.readline() == b"held\n"
        with pytest.raises(BlockingIOError):
            take_lock(path)
    finally:
        other.kill()  # its lock goes with it
        other.wait()
    take_lock(path).close()


def test_who_waits_says_so_once_and_is_alone_then_though_the_file_is_removed(
    tmp_path: Path,
) -> None:
    """As an ingest that ends removes its folder, with the lock that others wait for in it."""
    path, said, inside = tmp_path / "work" / "lock", [0] * 6, list[int]()
    most, held = [0], take_lock(path)

    def work(number: int) -> None:
        def on_wait() -> None:
            said[number] += 1

        with take_lock(path, on_wait=on_wait):
            inside.append(number)
            most[0] = max(most[0], len(inside))
            time.sleep(0.02)
            inside.remove(number)
            path.unlink()
            path.parent.rmdir()

    with ThreadPoolExecutor(6) as threads:
        ends = [threads.submit(work, number) for number in range(6)]
        while sum(said) < 6:
            time.sleep(0.01)
        path.unlink()
        path.parent.rmdir()
        held.close()
        for end in ends:
            end.result()
    assert most == [1] and said == [1] * 6
    assert not path.parent.exists()
