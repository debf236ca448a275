"""A run's events.jsonl: what went wrong and what was done about it, a line each."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

NAME = "events.jsonl"


class Events:
    """Appends events to a run's file; ``counts`` has those of all processes that were at work on the run."""

    def __init__(self, run: Path) -> None:
        self._path = run / NAME
        self.counts: Counter[str] = Counter()
        if self._path.exists():
            for line in self._path.read_text(encoding="utf-8", errors="replace").splitlines():
                try:
                    self.counts[str(json.loads(line)["kind"])] += 1
                except (ValueError, KeyError, TypeError):
                    continue  # a process that was killed left half a line

    def add(self, kind: str, detail: str, *, trials: Sequence[int] = (), worker: str = "") -> None:
        """Write an event; raises OSError where that can't be done."""
        row = {
            "kind": kind,
            "trials": list(trials),
            "time": round(time.time(), 3),
            "worker": worker,
            "detail": " ".join(detail.split()),
        }
        text = json.dumps(row) + "\n"
        with self._path.open("ab+") as file:
            if file.tell():
                file.seek(-1, 2)
                if file.read(1) != b"\n":  # half a line, see above
                    text = "\n" + text
            file.write(text.encode())
        self.counts[kind] += 1
