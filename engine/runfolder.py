"""A run's folder: what is written when, so that a kill at any moment loses one generation at most.

runs/NAME/ recipe.toml  provenance.json  study.db  best.toml  members/  checkpoints/  tensorboard/
           summary.json  report.html  figures/
"""

from __future__ import annotations

import fcntl
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from engine.recipe import Recipe, load_recipe, recipe_hash, to_toml, write_text_atomic


class RunError(ValueError):
    """A run folder that can't be used as asked: the message names it and says what to do."""


class RunFolder:
    """Paths and records of one run; holds a lock while it is open, so that two processes can't mix."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.study = path / "study.db"
        self.best = path / "best.toml"
        self.members = path / "members"
        self.checkpoints = path / "checkpoints"
        self.tensorboard = path / "tensorboard"
        self._lock: TextIO | None = None
        self._new: Recipe | None = None

    @classmethod
    def create(cls, path: Path, recipe: Recipe) -> RunFolder:
        """A new run, not on disk before ``begin``; raises RunError where the folder holds one already."""
        run = cls(path)
        run._new = recipe
        if (path / "recipe.toml").exists():
            raise RunError(
                f"{path}: holds a run already; continue it with --resume, or give another --run"
            )
        return run

    def begin(self) -> None:
        """Make a new run's folder, once its videos are known to be there; nothing for one that is continued."""
        if self._new is None:
            return
        for folder in (self.members, self.checkpoints, self.tensorboard):
            folder.mkdir(parents=True, exist_ok=True)
        self._take_lock()
        write_text_atomic(self.path / "recipe.toml", to_toml(self._new))
        self._new = None

    @classmethod
    def reopen(cls, path: Path, recipe: Recipe | None) -> tuple[RunFolder, Recipe]:
        """Continue a run; raises RunError where there is none, or it was made with another recipe."""
        run = cls(path)
        if not (path / "recipe.toml").exists():
            raise RunError(f"{path}: no run to resume there (it has no recipe.toml)")
        own = load_recipe(path / "recipe.toml")
        if recipe is not None and recipe_hash(recipe) != recipe_hash(own):
            raise RunError(
                f"{path}: was made with recipe {recipe_hash(own)} ({own.name}), not {recipe_hash(recipe)} "
                f"({recipe.name}); resume without --recipe, --set and --seed, or give another --run"
            )
        run._take_lock()
        return run, own

    def _take_lock(self) -> None:
        self._lock = (self.path / ".lock").open("w")
        for attempt in range(4):
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except OSError:  # a list of runs may be looking whether it is held
                if attempt == 3:
                    raise RunError(f"{self.path}: another process is at work on this run") from None
                time.sleep(0.05)

    def close(self) -> None:
        """Give the lock back."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        """Write a JSON file of the run, whole or not at all."""
        write_text_atomic(self.path / name, json.dumps(value, indent=1, sort_keys=False) + "\n")

    def read_json(self, name: str) -> dict[str, Any] | None:
        """Read a JSON file of the run; None where it is absent."""
        path = self.path / name
        if not path.exists():
            return None
        value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return value


def new_run_path(command: str) -> Path:
    """A name that is not taken: runs/evolve-20260131-120000."""
    base = Path("runs") / f"{command}-{time.strftime('%Y%m%d-%H%M%S')}"
    path, number = base, 1
    while path.exists():
        number += 1
        path = base.with_name(f"{base.name}-{number}")
    return path


def latest_run(command: str) -> Path:
    """The newest run of a command under runs/; raises RunError where there is none."""
    found = sorted(
        Path("runs").glob(f"{command}-*/recipe.toml"), key=lambda path: path.stat().st_mtime
    )
    if not found:
        raise RunError(f"runs/: no {command} run to resume; name its folder with --run")
    return found[-1].parent
