"""A run's log.txt: what was said, a line each with the time, and how the run ended."""

from __future__ import annotations

import time
from pathlib import Path

NAME = "log.txt"
ENDED = "ended: "
"""How a log's last line begins once its process has ended by itself."""
FINISHED, INTERRUPTED, FAILED = "finished", "interrupted", "failed"


class RunLog:
    """Appends to ``log.txt`` of a run's folder, once the folder holds a run; lines said before are kept until then.

    A log that can't be written must not end a run: it stops, and ``trouble`` says why.
    """

    def __init__(self, run: Path) -> None:
        self._run, self._waiting = run, list[str]()
        self.trouble = ""

    def write(self, text: str) -> None:
        """Add a line."""
        stamp = time.strftime("%Y-%m-%d %H:%M:%S")
        self._waiting.append(f"{stamp} {plain(text)}\n")
        if self.trouble or not (self._run / "recipe.toml").exists():
            return
        try:
            with (self._run / NAME).open("a", encoding="utf-8") as file:
                file.writelines(self._waiting)
        except OSError as error:
            self.trouble = str(error)
        self._waiting.clear()


def plain(text: str) -> str:
    """One line without control characters: file names may hold them."""
    return "".join(c if c.isprintable() else " " for c in text).strip()


def how_ended(run: Path) -> tuple[str, str] | None:
    """How the last process at work on a run ended, and why; None where the log doesn't say (killed, or at work)."""
    try:
        with (run / NAME).open("rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - 8192))
            lines = file.read().decode("utf-8", errors="replace").splitlines()
    except OSError:
        return None
    last = lines[-1][20:] if lines else ""
    if not last.startswith(ENDED):
        return None
    state, _, reason = last.removeprefix(ENDED).partition(": ")
    return state, reason
