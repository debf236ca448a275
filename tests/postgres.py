"""A PostgreSQL server of a test's own: Debian's programs on a private folder and a free port."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
from pathlib import Path

FOLDERS = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda p: float(p.parent.name))
PROGRAMS = (
    FOLDERS[-1] if FOLDERS else Path(found).parent if (found := shutil.which("pg_ctl")) else None
)
"""The folder of initdb and pg_ctl; None where there are none."""


def why_not() -> str:
    """Why no server can be started here; empty if one can."""
    if PROGRAMS is None:
        return "PostgreSQL's server is not installed"
    if os.geteuid() == 0 and not shutil.which("setpriv"):
        return "PostgreSQL refuses root, and setpriv is absent"
    return ""


class Server:
    """A running server; used as a context. Its data goes with it."""

    def __init__(self) -> None:
        # Not below pytest's folder, which other users may not enter.
        self._folder = Path(tempfile.mkdtemp(prefix="postgres-", dir="/tmp"))
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self._as: list[str] = []
        if os.geteuid() == 0:  # initdb refuses root
            shutil.chown(self._folder, "postgres", "postgres")
            self._as = ["setpriv", "--reuid=postgres", "--regid=postgres", "--init-groups"]
        self._run(
            "initdb", "--auth=trust", "--username=engine", "--no-sync", "--no-locale", "-E", "UTF8"
        )
        self.start()

    @property
    def url(self) -> str:
        """As Optuna takes it."""
        return f"postgresql+psycopg://engine:secret@127.0.0.1:{self.port}/postgres"

    def start(self) -> None:
        options = (
            f"-p {self.port} -k {self._folder} -c listen_addresses=127.0.0.1 -c shared_buffers=16MB"
        )
        self._run("pg_ctl", "start", "-w", "-l", str(self._folder / "log"), "-o", options)

    def stop(self, *, mode: str = "immediate") -> None:
        """Immediate: as if killed, all connections cut."""
        self._run("pg_ctl", "stop", "-w", "-m", mode)

    def close(self) -> None:
        """Stop it if it runs, and delete its data."""
        if (self._folder / "data" / "postmaster.pid").exists():
            self.stop()
        shutil.rmtree(self._folder)

    def _run(self, program: str, *options: str) -> None:
        assert PROGRAMS is not None
        data = ["-D", str(self._folder / "data")]
        command = [*self._as, str(PROGRAMS / program), *data, *options]
        # The server keeps what it inherits: a pipe of ours would never end.
        done = subprocess.run(command, cwd="/", stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                              stderr=subprocess.DEVNULL, check=False)  # fmt: skip
        assert done.returncode == 0, f"{command} ended with {done.returncode}"
