"""How far a search is, over all workers, for the display."""

from __future__ import annotations

import time

from engine.cohort_worker import Progress
from engine.display import Display
from engine.jobs import Done, Job, Lost, Pool


class Pace:
    """Shows how far a stage is: members done and at work, the best so far, clips a second over all workers."""

    def __init__(self, display: Display) -> None:
        self._display = display

    def start(self, what: str, total: int, *, done: int, best: float | None) -> None:
        """Begin a stage."""
        self._what, self._total, self._done, self._best = what, total, done, best
        self._at_work: dict[int, Progress] = {}
        self._clips, self._began = 0, time.perf_counter()
        self._display.start(what, total, done=done)

    def moved(self, job: Job, news: Progress | None, *, pool: Pool) -> None:
        """A job at work is so far."""
        if news is not None:
            self._at_work[job.number] = news
        self._show(pool)

    def done(self, report: Done | Lost, done: int, *, best: float | None, pool: Pool) -> None:
        """A job has come to its end."""
        assert report.job is not None
        last = self._at_work.pop(report.job.number, None)
        self._clips += last.clips if last else 0
        self._done, self._best = done, best
        self._show(pool)

    def _show(self, pool: Pool) -> None:
        clips = self._clips + sum(each.clips for each in self._at_work.values())
        place = self._done + sum(each.members for each in self._at_work.values())
        best = "" if self._best is None else f"best {self._best:.3f}"
        rate = f"{clips / (time.perf_counter() - self._began):.0f} clips/s" if clips else ""
        crew = f"{pool.ready()}/{pool.size} workers" if pool.size > 1 else ""
        note = "  ".join(part for part in (best, rate, crew) if part)
        self._display.update(self._what, min(place, self._total), self._total, note=note)
