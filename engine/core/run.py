"""A run's folder, its log and its events; a kill at any moment loses the work since the last save and no more.

runs/NAME/ recipe.toml  provenance.json  study.jsonl (or storage.json: where the study lies)  best.toml
           confirmations.json  checkpoints/  tensorboard/  events.jsonl  log.txt  timing.json  summary.json
           report.html  figures/
"""

from __future__ import annotations

import itertools
import json
import secrets
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import msgspec

from engine.core.files import take_lock, write_text_atomic
from engine.core.recipe import Recipe, load_recipe, recipe_hash, to_toml

STORAGE, LOG, EVENTS = "storage.json", "log.txt", "events.jsonl"


def study_file(run: Path) -> Path:
    """Where a run keeps its study, if no storage.json says otherwise; earlier versions kept an SQLite file."""
    old = run / "study.db"
    return old if old.exists() else run / "study.jsonl"


class RunError(ValueError):
    """A run folder that can't be used as asked: the message names it and says what to do."""


def check_still_there(run: Path, noted: Iterable[str], *, option: str) -> None:
    """Raise RunError where a folder or file that a run noted is gone; ``option`` names one in its place, if any can."""
    for name in noted:
        if not Path(name).exists():
            instead = f", or name it with {option}" if option else ""
            raise RunError(
                f"{run}: the run began with {name}, which is not there any more: bring it back{instead}"
            )


class RunFolder:
    """Paths and records of one run; its lock, held while it is open, keeps a second process out."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.study = study_file(path)
        self.best = path / "best.toml"
        self.checkpoints = path / "checkpoints"
        self.tensorboard = path / "tensorboard"
        self.storage: str | None = None
        """The database that holds the study; None: ``study``, a file here."""
        self.study_name = "evolve"
        self._lock: IO[str] | None = None
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

    def begin(self, first: Callable[[], object] = lambda: None) -> None:
        """Make a new run's folder, once its videos are known to be there; nothing for one that is continued.

        ``first`` is called before the folder counts as a run's: it writes what the run can't be continued without.
        """
        if self._new is None:
            first()
            return
        for folder in (self.checkpoints, self.tensorboard):
            folder.mkdir(parents=True, exist_ok=True)
        self._take_lock()
        self._write_storage()
        (self.path / "provenance.json").unlink(missing_ok=True)  # of a run that was killed here
        first()
        self.save_recipe(self._new)
        self._new = None

    def save_recipe(self, recipe: Recipe) -> None:
        """Write recipe.toml, which makes the folder a run's."""
        write_text_atomic(self.path / "recipe.toml", to_toml(recipe))

    def use_storage(self, url: str | None) -> None:
        """Keep the study in a database; for a run that is continued, where it is now (None: as noted).

        The address is noted in storage.json, which only its owner may read, since it may hold a password. Leave it out
        of the address where the database's own ways (PGPASSWORD, ~/.pgpass) give it. Raises RunError for a run that
        began with its study elsewhere.
        """
        before = None if self._new is not None else self.read_json(STORAGE)
        if before is not None:
            self.storage, self.study_name = url or before["url"], before["study"]
            if url not in (None, before["url"]):
                self._write_storage()
        elif url is not None and self._new is None:
            raise RunError(
                f"{self.path}: keeps its study in {self.study.name}: leave --storage out"
            )
        elif url is not None:
            # Runs of many machines may share a database.
            self.storage, self.study_name = url, f"{self.path.name}-{secrets.token_hex(4)}"

    def _write_storage(self) -> None:
        if self.storage is None:
            return
        text = json.dumps({"url": self.storage, "study": self.study_name}, indent=1)
        write_text_atomic(self.path / STORAGE, text + "\n", mode=0o600)

    @classmethod
    def reopen(cls, path: Path, recipe: Recipe | None) -> tuple[RunFolder, Recipe]:
        """Continue a run; raises RunError where there is none, or it was made with another recipe.

        The recipe may differ in its rounds, which the run's own then takes over: ``save_recipe`` makes that last.
        """
        run = cls(path)
        if not (path / "recipe.toml").exists():
            raise RunError(f"{path}: no run to resume there (it has no recipe.toml)")
        own = load_recipe(path / "recipe.toml")
        if recipe is not None and recipe_hash(recipe) != recipe_hash(own):
            raise RunError(
                f"{path}: was made with recipe {recipe_hash(own)} ({own.name}), not {recipe_hash(recipe)} "
                f"({recipe.name}); resume without --recipe, --set and --seed, or give another --run"
            )
        if recipe is not None and recipe.search.rounds != own.search.rounds:
            search = msgspec.structs.replace(own.search, rounds=recipe.search.rounds)
            own = msgspec.structs.replace(own, search=search)
        run._take_lock()
        return run, own

    @classmethod
    def begun(cls, path: Path, recipe: Recipe) -> RunFolder:
        """The run that an earlier process began with this recipe, or a new one; raises as ``reopen``."""
        old = (path / "recipe.toml").exists()
        return cls.reopen(path, recipe)[0] if old else cls.create(path, recipe)

    def _take_lock(self) -> None:
        for attempt in range(4):
            try:
                self._lock = take_lock(self.path / ".lock")
                return
            except BlockingIOError:  # a list of runs may be looking whether it is held
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
    base = f"{command}-{time.strftime('%Y%m%d-%H%M%S')}"
    names = (base if number == 1 else f"{base}-{number}" for number in itertools.count(1))
    return next(path for name in names if not (path := Path("runs", name)).exists())


def latest_run(command: str) -> Path:
    """The newest run of a command under runs/; raises RunError where there is none."""
    recipes = Path("runs").glob(f"{command}-*/recipe.toml")
    newest = max(recipes, key=lambda path: path.stat().st_mtime, default=None)
    if newest is None:
        raise RunError(f"runs/: no {command} run to resume; name its folder with --run")
    return newest.parent


ENDED = "ended: "
"""Start of a log's last line once its process has ended by itself."""
FINISHED, INTERRUPTED, FAILED = "finished", "interrupted", "failed"


class RunLog:
    """Appends to ``log.txt`` of a run's folder, once the folder holds a run; earlier lines are kept until then.

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
            with (self._run / LOG).open("a", encoding="utf-8") as file:
                file.writelines(self._waiting)
        except OSError as error:
            self.trouble = str(error)
        self._waiting.clear()


def plain(text: str) -> str:
    """One line without control characters: file names may hold them."""
    return "".join(c if c.isprintable() else " " for c in text).strip()


def how_ended(run: Path) -> tuple[str, str] | None:
    """The end of the last process at work on a run, and why; None where the log has none (killed, or at work)."""
    try:
        with (run / LOG).open("rb") as file:
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


class Events:
    """Appends events to a run's ``events.jsonl``: what went wrong and what was done about it, a line each.

    ``counts``: events by kind, those of earlier processes included.
    """

    def __init__(self, run: Path) -> None:
        self._path = run / EVENTS
        self.counts: Counter[str] = Counter()
        if self._path.exists():
            for line in self._path.read_text(encoding="utf-8", errors="replace").splitlines():
                try:
                    self.counts[str(json.loads(line)["kind"])] += 1
                except (ValueError, KeyError, TypeError):
                    continue  # a process that was killed left half a line

    def add(self, kind: str, detail: str, *, trials: Sequence[int] = (), worker: str = "") -> None:
        """Write an event; raises OSError."""
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
