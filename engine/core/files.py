"""Files that appear whole or not at all, and locks among processes."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import IO


class StorageError(OSError):
    """A file that can't be written: the message names it and says why, in one line."""

    def __str__(self) -> str:
        return str(self.strerror)


def user_cache() -> Path:
    """The engine's folder in the user's cache: ($XDG_CACHE_HOME or ~/.cache)/evolved-losses."""
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (base if base.is_absolute() else Path.home() / ".cache") / "evolved-losses"


@contextmanager
def storing(path: Path) -> Iterator[None]:
    """Turn an OSError of the block into a StorageError about ``path``."""
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        hint = "; free some space or choose another folder" if error.errno == errno.ENOSPC else ""
        text = f"can't write {path}: {error.strerror or error}{hint}"
        raise StorageError(error.errno, text) from error


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A hidden file beside ``path``, for the block to write; it is then on the disk and in the place of ``path``.

    A kill at any moment leaves the old file or the new one; a block that raises leaves the old one.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        yield temporary
        descriptor = os.open(temporary, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(temporary, path)
    finally:
        with suppress(OSError):
            temporary.unlink()


def write_text_atomic(path: Path, text: str, *, mode: int = 0o666) -> None:
    """Write text whole or not at all; ``mode``: who may read it, as of a new file."""
    with replacing(path) as temporary:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)


def write_atomic(path: Path, data: bytes) -> None:
    """Write bytes whole or not at all; raises StorageError."""
    with storing(path), replacing(path) as temporary:
        temporary.write_bytes(data)


def take_lock(path: Path, *, on_wait: Callable[[], object] | None = None) -> IO[str]:
    """Lock a file among processes until it is closed or this process ends, however it ends; makes it and its folder.

    Where another process holds it, raises BlockingIOError, or calls ``on_wait`` once and waits. On a file system
    without locks every process gets it. The holder may remove the file: others then lock a new one.
    """
    wait = None if on_wait is None else cache(on_wait)  # called once
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            file = path.open("w")
        except FileNotFoundError:  # its folder was removed just now
            continue
        try:
            _lock(file, wait)
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                    return file
        except BaseException:
            file.close()
            raise
        file.close()


def _lock(file: IO[str], wait: Callable[[], object] | None) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        if wait is None:
            raise
        wait()
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError:  # a file system without locks
        pass
