"""Progress of a run: bars on a terminal, plain lines in a log file."""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table


class Display:
    """Shows what is being done, how far it is, the best so far, clips/s and time left.

    Used as a context; on anything but a terminal the bars become a plain line every ``every`` seconds.
    """

    def __init__(self, *, every: float = 10.0) -> None:
        self.console = Console(highlight=False)
        self._plain = not self.console.is_terminal
        self._every, self._last, self._began = every, 0.0, time.monotonic()
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(compact=True),
            console=self.console,
            disable=self._plain,
            transient=True,
        )
        self._task = self._progress.add_task("starting", total=None, note="")

    def __enter__(self) -> Display:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def say(self, text: str) -> None:
        """A line that stays."""
        self.console.print(text, markup=False, soft_wrap=True)

    def start(self, what: str, total: int) -> None:
        """Begin a stage of ``total`` units."""
        self._progress.reset(self._task, description=what, total=total, completed=0, note="")
        self._began = self._last = time.monotonic()
        if self._plain:
            self.say(what)

    def update(self, what: str, done: float, total: int, *, note: str = "") -> None:
        """Where a stage stands."""
        now = time.monotonic()
        self._progress.update(self._task, description=what, completed=done, total=total, note=note)
        if self._plain and now - self._last >= self._every:
            self._last = now
            left = (now - self._began) / done * (total - done) if done > 0 else 0.0
            self.say(f"{what}: {done:.1f}/{total}  {note}  {left:.0f} s left".replace(".0/", "/"))

    def prepare(self, what: str, done: int, total: int) -> None:
        """Progress of making or reading data."""
        if done <= 1 or self._progress.tasks[0].description != what:
            self._progress.reset(self._task, description=what, total=total, completed=0, note="")
            self._began = self._last if self._last else time.monotonic()
        self.update(what, done, total)


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """A table for the terminal: first column to the left, others to the right."""
    result = Table(title=title, title_justify="left", header_style="bold", box=None, pad_edge=False)
    for i, column in enumerate(columns):
        result.add_column(column, justify="left" if i == 0 else "right")
    for row in rows:
        result.add_row(*row)
    return result
