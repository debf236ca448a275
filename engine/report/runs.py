"""What the runs in a folder are up to: state, best fitness, members done, age; no run's trouble hides another's."""

from __future__ import annotations

import fcntl
import time
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from engine.core.run import FAILED, how_ended
from engine.report.measures import stat
from engine.report.run import Run, fitness_of, read_run, table_of, whole
from engine.search.members import finite

State = Literal["running", "finished", "interrupted", "failed", "broken"]
STUDIES = ("study.jsonl", "study.db", "storage.json")
"""Where a search keeps its members, or says where."""
OUTCOMES = ("rgb.safetensors", "results.json")
"""What a pretraining and a fine-tuning end with."""
MARKS = ("recipe.toml", "provenance.json", "summary.json", *STUDIES)
"""A folder that holds one of these is a run's."""


@dataclass(frozen=True)
class Row:
    """One run of the list."""

    path: Path
    state: State
    """interrupted: stopped or killed before its end; broken: its folder can't be read."""
    recipe: str = ""
    method: str = ""
    seed: int | None = None
    done: int | None = None
    """Members that ended, failed and pruned ones included; None for a run without a search."""
    total: int | None = None
    failed: int = 0
    best: float | None = None
    """Highest fitness that the search saw."""
    confirmed: float | None = None
    """The best loss's mean fitness with fresh seeds."""
    age_s: float | None = None
    """Seconds since the run began."""
    idle_s: float | None = None
    """Seconds since anything was written."""
    note: str = ""
    """Why it failed or can't be read."""


def list_runs(folder: Path, *, now: float | None = None) -> list[Row]:
    """The runs in a folder, or the one that the folder is, the latest last.

    Raises ValueError where there is no such folder.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; give the folder that holds your runs")
    now = time.time() if now is None else now
    if _is_run(folder):
        return [_row(folder, now)]
    rows = [_row(path, now) for path in sorted(folder.iterdir()) if _is_run(path)]
    return sorted(rows, key=lambda row: -(row.age_s if row.age_s is not None else 0.0))


def _is_run(path: Path) -> bool:
    try:
        return path.is_dir() and any((path / name).exists() for name in MARKS)
    except OSError:  # a folder that may not be entered: its row says so
        return True


def _row(path: Path, now: float) -> Row:
    try:
        return _read(path, now)
    except (OSError, ValueError) as error:
        return Row(path, "broken", note=" ".join(str(error).split()))


def _read(path: Path, now: float) -> Row:
    run = read_run(path)
    lost = [note for note in run.unread if note.startswith(("recipe.toml", "summary.json"))]
    if lost or not run.recipe:
        raise ValueError("; ".join(lost) or "recipe.toml is missing or empty")
    state, note = _state(path, run)
    search = table_of(run.recipe, "search")
    is_search = bool(run.summary) or any((path / name).exists() for name in STUDIES)
    planned = whole(search.get("population"), 0) + whole(search.get("rounds"), 0)
    total = len(run.trials) if state == "finished" else planned
    confirmed = stat(run, "best")
    seed = whole(run.recipe.get("seed"), -1)
    if not note and run.unread:
        note = f"unreadable: {'; '.join(run.unread[:2])}"
    return Row(
        path,
        state,
        recipe=str(run.recipe.get("name", "")),
        method=run.method if is_search else "",
        seed=seed if seed >= 0 else None,
        done=len(run.trials) if is_search else None,
        total=max(total, len(run.trials)) if is_search else None,
        failed=len(run.failed),
        best=fitness_of(run.improvements[-1]) if run.improvements else None,
        confirmed=confirmed.mean if confirmed else None,
        age_s=max(0.0, now - _began(path, run)),
        idle_s=max(0.0, now - _last_write(path)),
        note=note,
    )


def _state(path: Path, run: Run) -> tuple[State, str]:
    """Whether a process holds the run's lock, else how the last one ended."""
    if locked(path):
        return "running", ""
    members = whole(run.summary.get("members"), len(run.trials))
    # a search may go on after its summary
    if run.summary and members >= len(run.trials):
        return "finished", ""
    if any((path / name).exists() for name in OUTCOMES):
        return "finished", ""
    how, reason = how_ended(path) or ("", "")
    return ("failed", reason) if how == FAILED else ("interrupted", "")


def locked(path: Path) -> bool:
    """Whether a process is at work on a run, on this machine or over a file system that shares locks."""
    try:
        with (path / ".lock").open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return False
    except BlockingIOError:
        return True
    except OSError:
        return False


def _began(path: Path, run: Run) -> float:
    """Unix seconds of the start that provenance.json notes, else of the recipe's file."""
    try:
        return datetime.fromisoformat(str(run.provenance.get("started"))).timestamp()
    except ValueError:
        return (path / "recipe.toml").stat().st_mtime


def _last_write(path: Path) -> float:
    names = ("recipe.toml", *STUDIES, "timing.json", "summary.json", "log.txt", "checkpoints")
    times = [p.stat().st_mtime for name in names if (p := path / name).exists()]
    return max(times)


def as_json(row: Row) -> dict[str, Any]:
    """A row's fields for ``--json``; a fitness that is not a number is null."""
    return vars(row) | {"path": str(row.path), "best": finite(row.best)}
