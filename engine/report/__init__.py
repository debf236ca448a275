"""A run's folder as one page: its facts, what they come to, sentences about them, and its figures."""

from __future__ import annotations

from pathlib import Path


def write_report(run: Path) -> Path:
    """Write ``report.html`` and ``figures/`` into a run's folder, finished or not; see ``report.page``."""
    from engine.report import page  # only here: a list of runs needs neither matplotlib nor Jinja

    return page.write_report(run)
