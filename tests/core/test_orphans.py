"""What a killed driver's programs started is ended; what it started otherwise is not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from engine.core.orphans import NAME, Guard

DRIVER = """
import subprocess, sys, time
from engine.core.orphans import Guard
guard = Guard()
def sleeper():
    shell = ["sh", "-c", "sleep 300 & echo $!; wait"]
    process = subprocess.Popen(shell, stdout=subprocess.PIPE, text=True, start_new_session=True)
    return int(process.stdout.readline())
with guard.marking():
    marked = sleeper()
print(marked, sleeper(), flush=True)
sys.stdin.read() if sys.argv[1] == "wait" else guard.close()
"""


def alive(pid: int) -> bool:
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    return False


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
@pytest.mark.parametrize("how", ["wait", "close"])
def test_marked_processes_end_with_their_driver(how: str) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", DRIVER, how],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as driver:
        assert driver.stdout is not None
        marked, other = map(int, driver.stdout.readline().split())
        try:
            if how == "wait":
                assert alive(marked)
                driver.kill()
            until = time.monotonic() + 10
            while alive(marked):
                assert time.monotonic() < until
                time.sleep(0.02)
            assert alive(other)
        finally:
            with suppress(ProcessLookupError):
                os.kill(other, signal.SIGKILL)


def test_the_mark_does_not_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    guard = Guard()
    with guard.marking():
        assert NAME in os.environ
    assert NAME not in os.environ
    guard.close()
