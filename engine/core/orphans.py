"""Ends the processes that a killed driver leaves behind: those that other programs started on its behalf.

Processes of our own end with their parent (``engine.core.pool.die_with_parent``). Ray's daemons start others, of which
some live on for a minute where their daemon is killed at its start.
"""

from __future__ import annotations

import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager

NAME = "ENGINE_DRIVER"
"""Environment variable that marks processes, and all that they start."""
_GUARD = """
import os, re, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
sys.stdin.buffer.read()
mark, log, left = os.fsencode(sys.argv[1]), re.compile(f"/session_[^/]*_{sys.argv[2]}/logs/"), True
def is_marked(process):
    with open(f"{process}/environ", "rb") as file:
        if mark in file.read().split(b"\\0"):
            return True
    with open(f"{process}/comm") as file:
        if not file.read().startswith("ray::"):
            return False
    files = [f"{process}/fd/{name}" for name in os.listdir(f"{process}/fd")]
    return any(os.lstat(each).st_mode & 0o200 and log.search(os.readlink(each)) for each in files)
while left:
    left = False
    for name in os.listdir("/proc"):
        try:
            if name.isdecimal() and int(name) != os.getpid() and is_marked(f"/proc/{name}"):
                os.kill(int(name), signal.SIGKILL)
                left = True
        except OSError:
            pass
    time.sleep(0.1)
"""
"""A process that waits for its input's end, which comes with its parent's, and kills what is marked.

Ray's agents write their title over their environment. They are known by this title and by the logs that they write:
Ray names a session's folder by the process that started it.
"""


class Guard:
    """Kills the processes that were marked, when this process ends or asks for it; on Linux alone."""

    def __init__(self) -> None:
        self._value = uuid.uuid4().hex
        self._process: subprocess.Popen[bytes] | None = None
        if sys.platform == "linux":
            self._process = subprocess.Popen(
                [
                    sys.executable,
                    "-S",
                    "-E",
                    "-c",
                    _GUARD,
                    f"{NAME}={self._value}",
                    str(os.getpid()),
                ],
                stdin=subprocess.PIPE,
                start_new_session=True,  # Ctrl-C is not for it
            )

    @contextmanager
    def marking(self) -> Iterator[None]:
        """Mark the processes that are started within, and all that these start."""
        os.environ[NAME] = self._value
        try:
            yield
        finally:
            del os.environ[NAME]

    def close(self) -> None:
        """Kill what is left of the marked processes."""
        if self._process is not None:
            self._process.communicate()
