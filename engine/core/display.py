"""Progress of a run: bars on a terminal, plain lines in a log file."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import progress
from rich.console import Console
from rich.table import Table

from engine.core.run import ENDED, FAILED, FINISHED, INTERRUPTED, RunLog


class Display:
    """Shows the stage at work, its progress, a note such as clips/s, and the time left.

    Used as a context; on anything but a terminal the bars become a plain line every ``every`` seconds, and so
    they do in the run's log, wherever they are shown.
    """

    def __init__(
        self, *, every: float = 10.0, log: Path | None = None, quiet: bool = False
    ) -> None:
        """``log``: a run's folder, whose log.txt takes every line; ``quiet``: show nothing (another process does)."""
        self.console = Console(highlight=False, quiet=quiet)
        self._plain = not self.console.is_terminal
        self._every, self._last, self._began = every, 0.0, time.monotonic()
        self._before = 0  # units of the stage that were done when it began
        self._log = None if log is None else RunLog(log)
        self._progress = progress.Progress(
            progress.SpinnerColumn(),
            progress.TextColumn("{task.description}"),
            progress.BarColumn(bar_width=24),
            progress.MofNCompleteColumn(),
            progress.TextColumn("{task.fields[note]}"),
            progress.TimeRemainingColumn(compact=True),
            console=self.console,
            disable=self._plain,
            transient=True,
        )
        self._task = self._progress.add_task("starting", total=None, note="")

    def __enter__(self) -> Display:
        self._progress.start()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._progress.stop()
        if error is None:
            self.note(ENDED + FINISHED)
        elif isinstance(error, KeyboardInterrupt):
            self.note(ENDED + INTERRUPTED)
        else:
            self.note(f"{ENDED}{FAILED}: {error or type(error).__name__}")

    def say(self, text: str) -> None:
        """Print a line that stays."""
        self.console.print(text, markup=False, soft_wrap=True)
        self.note(text)

    def note(self, text: str) -> None:
        """Write a line to the run's log alone."""
        if self._log is None or self._log.trouble:
            return
        self._log.write(text)
        if self._log.trouble:
            self.console.print(f"log.txt ends here: {self._log.trouble}", markup=False)

    def start(self, what: str, total: int, *, done: int = 0) -> None:
        """Begin a stage of ``total`` units, of which ``done`` are done already."""
        self._progress.reset(self._task, description=what, total=total, completed=done, note="")
        self._began = self._last = time.monotonic()
        self._before = done
        (self.say if self._plain else self.note)(what)

    def update(self, what: str, done: float, total: int, *, note: str = "") -> None:
        """Show how far a stage is."""
        now = time.monotonic()
        self._progress.update(self._task, description=what, completed=done, total=total, note=note)
        if total > 0 and now - self._last >= self._every:
            self._last = now
            here = done - self._before
            parts = [f"{what}: {done:.1f}/{total}".replace(".0/", "/"), note]
            if here > min(1.0, total / 50):  # the first of many took what starting took
                parts.append(f"{duration((now - self._began) / here * (total - done))} left")
            (self.say if self._plain else self.note)("  ".join(p for p in parts if p))

    def prepare(self, what: str, done: int, total: int) -> None:
        """Show how far data are made or read; ``total`` 0: ``what`` is waited for."""
        if not total and self._progress.tasks[0].description != what:
            self.say(what)
        if done <= 1 or self._progress.tasks[0].description != what:
            self._progress.reset(self._task, description=what, total=total, completed=0, note="")
            self._began = self._last if self._last else time.monotonic()
            self._before = 0
        self.update(what, done, total)


def duration(seconds: float) -> str:
    """A time in words: ``42 s``, ``12 min`` or ``31.5 h``."""
    if seconds < 300:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 2 * 3600 else f"{seconds / 3600:.1f} h"


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """A table for the terminal: first column to the left, others to the right."""
    result = Table(title=title, title_justify="left", header_style="bold", box=None, pad_edge=False)
    for i, column in enumerate(columns):
        result.add_column(column, justify="left" if i == 0 else "right")
    for row in rows:
        result.add_row(*row)
    return result


def spread_cells(spread: Mapping[str, Any]) -> list[str]:
    """Mean, sd and n of a summary's entry, as a table's cells."""
    if not spread["n"]:
        return ["-", "-", "0"]
    return [f"{spread['mean']:.3f}", f"{spread['sd']:.3f}", str(spread["n"])]
