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
import os, shutil, subprocess, sys, time
from pathlib import Path
from engine.core.orphans import Guard
guard = Guard()
def sleeper():
    shell = ["sh", "-c", "sleep 300 & echo $!; wait"]
    process = subprocess.Popen(shell, stdout=subprocess.PIPE, text=True, start_new_session=True)
    return int(process.stdout.readline())
with guard.marking():
    marked = sleeper()
logs = Path(sys.argv[2]) / f"session_2026-01-01_00-00-00_{os.getpid()}" / "logs"
logs.mkdir(parents=True)
log = open(logs / "driver.log", "w")  # as Ray's library does
reader = subprocess.Popen(["/bin/sleep", "300"], env={}, stderr=log, start_new_session=True).pid
name = shutil.copy("/bin/sleep", Path(sys.argv[2]) / "ray::agent")
agent = subprocess.Popen([name, "300"], env={}, stderr=log, start_new_session=True).pid  # whose environment is gone
print(marked, agent, sleeper(), reader, flush=True)
if sys.argv[1] == "close":
    guard.close()
    print("closed", flush=True)
sys.stdin.read()
"""


def alive(pid: int) -> bool:
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    return False


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
@pytest.mark.parametrize("how", ["wait", "close"])
def test_marked_processes_end_with_their_driver(how: str, tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", DRIVER, how, tmp_path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as driver:
        assert driver.stdout is not None
        *marked, other, reader = map(int, driver.stdout.readline().split())
        try:
            if how == "wait":
                assert all(map(alive, marked))
                driver.kill()
            until = time.monotonic() + 10
            while any(map(alive, marked)):
                assert time.monotonic() < until
                time.sleep(0.02)
            assert alive(other) and alive(reader)
            if how == "close":
                assert driver.stdout.readline() == "closed\n" and driver.poll() is None
        finally:
            driver.kill()
            for pid in (other, reader):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


RAY_DRIVER = """
import os, signal, sys, time
from engine.core import ray_pool
pool = ray_pool.RayPool(object, size=1)
def titles():
    for name in filter(str.isdecimal, os.listdir("/proc")):
        try:
            with open(f"/proc/{name}/stat") as stat, open(f"/proc/{name}/comm") as comm:
                yield int(name), int(stat.read().rsplit(")", 1)[1].split()[1]), comm.read().strip()
        except OSError:
            pass
def below(pid):
    for child, parent, title in list(titles()):
        if parent == pid:
            yield child, title
            yield from below(child)
found = {}
while not {"ray::DashboardA", "ray::RuntimeEnv"} <= set(found.values()):  # their environment is overwritten by then
    found = dict(below(os.getpid()))
    time.sleep(0.1)
print(*found, flush=True)
if sys.argv[1] == "wait":
    time.sleep(300)
pool.close()
print("closed", flush=True)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
@pytest.mark.parametrize("how", ["wait", "close"])
def test_ray_ends_with_its_driver(how: str) -> None:
    pytest.importorskip("ray")
    with subprocess.Popen(
        [sys.executable, "-c", RAY_DRIVER, how], stdout=subprocess.PIPE, text=True
    ) as driver:
        assert driver.stdout is not None
        left = set(map(int, driver.stdout.readline().split()))
        assert len(left) > 4
        if how == "wait":
            driver.kill()
        else:
            assert driver.stdout.readline() == "closed\n", "its own end is its own"
            assert driver.wait(timeout=20) == 0
        until = time.monotonic() + 10
        while left := {pid for pid in left if alive(pid)}:
            assert time.monotonic() < until, left
            time.sleep(0.05)


def test_the_mark_does_not_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    guard = Guard()
    with guard.marking():
        assert NAME in os.environ
    assert NAME not in os.environ
    guard.close()
