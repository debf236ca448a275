"""A study of Optuna's in a journal file or a database: one write a finished member, tried again while it is away.

Optuna's own tools open it: weights are parameters, fitness is the value, everything else is user attributes. Members
at work need no place there, since they are proposed again from those that are done.

The journal is one line of JSON a member. A kill or a full disk leaves at most half of the last line, which the next
write cuts off; a database keeps a member whole or not at all.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import sqlite3
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any, TypeVar

import optuna
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.exceptions import StorageInternalError
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.trial import FrozenTrial, TrialState, create_trial
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, PendingRollbackError, SQLAlchemyError

from engine.objective.terms import TERM_NAMES
from engine.search.members import State, Trial

SPACE: dict[str, BaseDistribution] = {name: FloatDistribution(0.0, 1.0) for name in TERM_NAMES}
"""The search space in Optuna's words: every term's weight in [0, 1]."""

STATES: dict[State, TrialState] = {
    "complete": TrialState.COMPLETE,
    "failed": TrialState.FAIL,
    "pruned": TrialState.PRUNED,
}
NAMES: dict[TrialState, State] = {state: name for name, state in STATES.items()}

LINEAGE = ("number", "parent", "mutated", "round")
"""User attributes that are fields of a Proposal."""

BUSY_SECONDS = 5.0
"""Seconds that one try waits for another process that holds an SQLite file."""

PAUSES = (0.1, 5.0)
"""Seconds before the second try, and at most: each pause is twice the one before."""

AWAY = {errno.EIO, errno.ESTALE, errno.ENOLCK, errno.EAGAIN, errno.ETIMEDOUT, errno.EHOSTDOWN}
"""Errors of a journal's file system after which trying again may help."""

AWAY_SQLITE = {
    sqlite3.SQLITE_BUSY,
    sqlite3.SQLITE_LOCKED,
    sqlite3.SQLITE_PROTOCOL,  # locks of a network's file system
    sqlite3.SQLITE_IOERR,
}

AWAY_SERVER = ("08", "40", "57", "53300", "55P03")
"""Beginnings of SQLSTATEs: connection lost, conflict, shut down; too many connections, a lock not to be had."""

T = TypeVar("T")


class StudyStorage:
    """The study ``name`` at a place: a Path is a journal file (an SQLite file if it ends in .db), a string a URL.

    A call that meets a place that is away (locked, restarted, not to be reached) calls ``on_wait`` with the reason,
    once, and tries again after growing pauses, for up to ``patience`` seconds. A write whose answer was lost may have
    been done: the next try looks first, and does nothing twice.

    Raises ValueError for a URL that names no database or one whose driver is absent, and without ``create`` for a
    study that is not there; and, as every method does, OSError where the place can't be read or written, with
    ``errno.ENOSPC`` where its disk is full, which is not waited for.
    """

    def __init__(
        self,
        place: str | Path,
        *,
        name: str,
        patience: float = 120.0,
        on_wait: Callable[[str], None] | None = None,
        create: bool = True,
    ) -> None:
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.where = re.sub("://[^/]*@", "://", str(place))  # without a password
        self.name, self._patience, self._on_wait = name, patience, on_wait
        self._unsure = False
        """Whether the last try failed, so that what it was to do may have been done."""
        self._known: set[int] = set()
        """Numbers of the members that are stored."""
        try:
            self._study = self._patiently(lambda: _open(place, name, create=create))
        except ArgumentError as error:
            raise ValueError(f"{self.where}: not the address of a database: {error}") from None
        except ImportError as error:
            raise ValueError(
                f"{self.where}: its driver is not installed ({error.__cause__ or error}); for PostgreSQL"
                " install the extra postgres, and write postgresql+psycopg://"
            ) from None
        except KeyError:
            raise ValueError(f"{self.where}: holds no study {name!r}") from None
        except RuntimeError as error:
            if "optuna storage upgrade" not in str(error):
                raise
            raise ValueError(
                f"{self.where}: its tables are of another version of Optuna: copy the database, then run `optuna"
                " storage upgrade --storage URL`, where a file's URL is sqlite:///PATH"
            ) from None

    def load(self) -> list[Trial]:
        """All members that are done, by number; of several with one number, the first."""
        try:
            stored = [trial_of(trial) for trial in self._patiently(self._stored)]
        except ValueError as error:
            raise ValueError(f"{self.where}: {error}") from None
        trials = {trial.number: trial for trial in reversed(stored)}
        self._known = set(trials)
        return [trials[number] for number in sorted(trials)]

    def claim(self, recipe_hash: str) -> None:
        """Note whose study it is, if it is new; raises ValueError where it belongs to another recipe."""
        owner = self._patiently(lambda: self._study.user_attrs).get("recipe_hash")
        if owner is None and not self._patiently(lambda: self._study.get_trials(deepcopy=False)):
            self._patiently(lambda: self._study.set_user_attr("recipe_hash", recipe_hash))
        elif owner != recipe_hash:
            raise ValueError(
                f"{self.where}: study {self.name!r} belongs to recipe {owner}, not to"
                f" {recipe_hash}: resume it with its own recipe, or start a new run"
            )

    def add(self, trial: Trial) -> None:
        """Store a member; raises RuntimeError where another process has stored members since ``load``."""
        self._patiently(lambda: self._add(trial))
        self._known.add(trial.number)

    def _add(self, trial: Trial) -> None:
        others = [stored for stored in self._stored() if number_of(stored) not in self._known]
        if self._unsure and others and all(_same(trial_of(other), trial) for other in others):
            return
        if others:
            raise RuntimeError(f"{self.where}: another process is at work on this study")
        lineage = {key: getattr(trial, key) for key in LINEAGE}
        self._study.add_trial(
            create_trial(
                state=STATES[trial.state],
                value=trial.fitness,
                params=trial.weights,
                distributions=SPACE,
                intermediate_values=dict(trial.rungs),
                user_attrs={**lineage, **trial.attributes},
            )
        )

    def _stored(self) -> list[FrozenTrial]:
        return self._study.get_trials(deepcopy=False, states=tuple(NAMES))

    def _patiently(self, action: Callable[[], T]) -> T:
        """Run ``action``, again and again while its place is away, and return its result."""
        began, (pause, longest) = time.monotonic(), PAUSES
        while True:
            try:
                result = action()
                self._unsure = False
                return result
            except ArgumentError:
                raise
            except (OSError, StorageInternalError, SQLAlchemyError) as error:
                self._unsure = True
                left = began + self._patience - time.monotonic()
                full, away = _judge(_cause(error))
                reason = " ".join(str(_cause(error)).split())
                if full or left <= 0 or not away:
                    raise self._error(reason, full=full) from error
            if self._on_wait is not None and pause == PAUSES[0]:
                self._on_wait(f"{self.where}: {reason}")
            time.sleep(min(pause, left))
            pause = min(2 * pause, longest)

    def _error(self, reason: str, *, full: bool) -> OSError:
        error = OSError(f"{self.where}: the study can't be read or written ({reason})")
        advice = "check the folder, its permissions, the free space, and that no other process holds the study"
        if "://" in self.where and not self.where.startswith("sqlite"):
            advice = "check that its server runs and lets this user in"
        if not full:
            return OSError(f"{error}: {advice}")
        error.errno = errno.ENOSPC
        return error


class JournalLock(JournalFileOpenLock):
    """A lock on the journal itself, which a kill gives back; whoever takes it cuts off half a line at the end."""

    def __init__(self, file: Path) -> None:
        super().__init__(str(file))
        self._path = file
        self._held: IO[bytes] | None = None

    def acquire(self) -> bool:
        """Wait for the lock."""
        self._held = self._path.open("r+b")
        fcntl.flock(self._held, fcntl.LOCK_EX)
        if size := self._held.seek(0, os.SEEK_END):
            self._held.seek(size - 1)
            if self._held.read() != b"\n":
                self._held.seek(0)
                self._held.truncate(self._held.read().rfind(b"\n") + 1)
        return True

    def release(self) -> None:
        """Give it back."""
        if self._held is not None:
            self._held.close()


def number_of(stored: FrozenTrial) -> int:
    """A member's number; in studies of earlier versions it is Optuna's own."""
    return int(stored.user_attrs.get("number", stored.number))


def trial_of(stored: FrozenTrial) -> Trial:
    """A finished member from Optuna's record; raises ValueError where that is no member of a search."""
    if missing := set(TERM_NAMES) - set(stored.params):
        few = ", ".join(sorted(missing)[:3]) + (", ..." if len(missing) > 3 else "")
        raise ValueError(
            f"trial {stored.number} has no weight for {len(missing)} terms ({few}): it is no member of a search, and"
            " has to be deleted, or the study kept elsewhere"
        )
    attributes = dict(stored.user_attrs)
    lineage = {key: attributes.pop(key, None) for key in LINEAGE}
    lineage["number"], lineage["round"] = number_of(stored), lineage["round"] or 0
    return Trial(
        weights={name: float(stored.params[name]) for name in TERM_NAMES},
        **lineage,
        state=NAMES[stored.state],
        fitness=stored.value if stored.state == TrialState.COMPLETE else None,
        rungs=tuple(sorted(stored.intermediate_values.items())),
        attributes=attributes,
    )


def _same(one: Trial, other: Trial) -> bool:
    """Whether two members are equal as text, since NaN differs from itself."""
    texts = [json.dumps(asdict(each), sort_keys=True, default=str) for each in (one, other)]
    return texts[0] == texts[1]


def _open(place: str | Path, name: str, *, create: bool) -> optuna.Study:
    if isinstance(place, Path) and place.suffix != ".db":
        storage: BaseStorage = _journal(place)
    elif isinstance(place, Path):
        storage = _database(URL.create("sqlite", database=str(place.absolute())))
    else:
        storage = _database(make_url(place))
    try:
        return optuna.load_study(storage=storage, study_name=name)
    except KeyError:
        if not create:
            raise
        return optuna.create_study(
            storage=storage, study_name=name, direction="maximize", load_if_exists=True
        )


def _journal(path: Path) -> JournalStorage:
    if path.exists():
        with path.open("rb") as file:
            if file.read(1) not in (b"", b"{"):
                raise OSError(f"{path.name} is no study's journal")
    try:
        return JournalStorage(JournalFileBackend(str(path), lock_obj=JournalLock(path)))
    except (ValueError, KeyError) as error:
        raise OSError(_damage(path) or f"{path.name} is damaged: {error}") from error


def _damage(path: Path) -> str | None:
    """Which line of a journal is no line of JSON, as a network's file system may leave it, and what to do; or None."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                json.loads(line.decode())
            except ValueError:
                return (
                    f"{path.name} is damaged in line {number}: with that line deleted (sed -i {number}d) the rest is"
                    " read, and its member is trained again"
                )
    return None


def _database(url: URL) -> RDBStorage:
    url.get_dialect()  # raises for a name that is none
    options: dict[str, Any] = {"pool_pre_ping": True}  # connections idle for hours may be gone
    if url.get_backend_name() == "sqlite":
        options = {"connect_args": {"timeout": BUSY_SECONDS}}
    elif url.get_backend_name() == "postgresql" and url.get_driver_name().startswith("psycopg"):
        # Without these, a server that vanished from the network is waited for two hours.
        options["connect_args"] = {
            "connect_timeout": 10,
            "keepalives_idle": 10,
            "keepalives_interval": 5,
            "keepalives_count": 3,
            "tcp_user_timeout": 25_000,
        }
    return RDBStorage(url.render_as_string(hide_password=False), engine_kwargs=options)


def _cause(error: BaseException) -> BaseException:
    """The driver's error, where SQLAlchemy, and Optuna around it, wrapped one."""
    inner = error.__cause__ if isinstance(error, StorageInternalError) else error
    # Optuna asked again in a session whose connection was lost
    if isinstance(inner, PendingRollbackError):
        inner = inner.__context__ or inner
    return getattr(inner, "orig", None) or inner or error


def _judge(error: BaseException) -> tuple[bool, bool]:
    """Whether the disk is full, and whether trying again may help: busy, restarting or not to be reached."""
    code = getattr(error, "sqlite_errorcode", None)
    if code is not None:
        return code & 0xFF == sqlite3.SQLITE_FULL, code & 0xFF in AWAY_SQLITE
    state = getattr(error, "sqlstate", None)
    if state:
        return state == "53100", state.startswith(AWAY_SERVER)
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT), error.errno in AWAY
    refused = "FATAL" in str(error)  # the server answered: a wrong password, say, or not yet
    words = "starting up|shutting down|recovery|too many|clients already"
    kinds = {kind.__name__ for kind in type(error).__mro__}  # every driver has its own classes
    lost = bool(kinds & {"OperationalError", "InterfaceError", "PendingRollbackError"})
    return False, lost and (not refused or re.search(words, str(error)) is not None)
