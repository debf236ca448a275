"""While a database is away: which errors pass by themselves, how long to try again, what to say at the end."""

from __future__ import annotations

import errno
import os
import re
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from optuna.exceptions import StorageInternalError
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError, SQLAlchemyError

PAUSES = (0.1, 5.0)
"""Seconds before the second try, and at most: each pause is twice the one before."""

PASSING = (
    sqlite3.SQLITE_BUSY,
    sqlite3.SQLITE_LOCKED,
    sqlite3.SQLITE_PROTOCOL,  # locks of a network's file system
    sqlite3.SQLITE_IOERR,
)
"""SQLite's errors after which trying again may help."""

T = TypeVar("T")


class Patience:
    """Does something with a database, again and again while it is away, for up to ``seconds``.

    ``where`` names the database, ``file`` is SQLite's. ``on_wait`` is told once a call why it waits. ``opening`` is
    true until the caller says that the database was there: a missing folder is then no outage but a mistake.
    """

    def __init__(
        self, where: str, *, file: str | None, seconds: float, on_wait: Callable[[str], None] | None
    ) -> None:
        self.where, self.file, self.seconds, self.on_wait = where, file, seconds, on_wait
        self.opening = True
        self.unsure = False
        """Whether the last try failed, so that what it was to do may have been done."""

    def __call__(self, action: Callable[[], T]) -> T:
        """What ``action`` returns, which may be run several times.

        Raises OSError where the database stays away or its error is not of the kind that passes; its ``errno`` is
        ENOSPC where the disk is full.
        """
        began, (pause, longest) = time.monotonic(), PAUSES
        told = False
        while True:
            try:
                result = action()
                self.unsure = False
                return result
            except (StorageInternalError, SQLAlchemyError) as error:
                self.unsure = True
                reason = _reason(error)
                full = _is_full(error, self.file)
                left = began + self.seconds - time.monotonic()
                if full or left <= 0 or not _may_pass(error, opening=self.opening):
                    raise self._error(reason, full=full) from error
            if self.on_wait is not None and not told:
                self.on_wait(f"{self.where}: {reason}")
                told = True
            time.sleep(min(pause, left))
            pause = min(2 * pause, longest)

    def _error(self, reason: str, *, full: bool) -> OSError:
        advice = (
            "the folder, its permissions, the free space, and that no other process holds the study"
            if self.file
            else "that its server runs and lets this user in"
        )
        told = f"{self.where}: the study can't be read or written ({reason})"
        error = OSError(told if full else f"{told}: check {advice}")
        if full:
            error.errno = errno.ENOSPC
        return error


def _cause(error: BaseException) -> BaseException:
    """The error of SQLAlchemy's that Optuna wrapped, if it did."""
    cause = error.__cause__ if isinstance(error, StorageInternalError) else error
    return cause or error


def _reason(error: BaseException) -> str:
    cause = _cause(error)
    return " ".join(str(getattr(cause, "orig", None) or cause).split())


def _is_full(error: BaseException, file: str | None) -> bool:
    """Whether the disk under the database is full."""
    original = getattr(_cause(error), "orig", None)
    code = getattr(original, "sqlite_errorcode", None)
    if code is None:
        return getattr(original, "sqlstate", None) == "53100"
    if code & 0xFF == sqlite3.SQLITE_FULL:
        return True
    # An I/O error, or a journal that can't be opened, may come of it too.
    if code & 0xFF in (sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN) and file:
        try:
            space = os.statvfs(Path(file).parent)
        except OSError:
            return False
        return space.f_bavail * space.f_frsize < 1 << 16
    return False


def _may_pass(error: BaseException, *, opening: bool) -> bool:
    """Whether trying again may help: the database is busy, restarting or not to be reached."""
    cause = _cause(error)
    if not isinstance(cause, DBAPIError):
        return False
    code = getattr(cause.orig, "sqlite_errorcode", None)
    if code is not None:
        went_away = code & 0xFF == sqlite3.SQLITE_CANTOPEN and not opening
        return code & 0xFF in PASSING or went_away
    state = getattr(cause.orig, "sqlstate", None)
    if state:  # connection lost, conflict, shut down; too many connections, a lock not to be had
        return state[:2] in ("08", "40", "57") or state in ("53300", "55P03")
    refused = "FATAL" in str(cause.orig)  # the server answered: a wrong password, say, or not yet
    passing = re.search(
        "starting up|shutting down|recovery|too many|clients already", str(cause.orig)
    )
    lost = cause.connection_invalidated or isinstance(cause, OperationalError | InterfaceError)
    return lost and (not refused or passing is not None)
