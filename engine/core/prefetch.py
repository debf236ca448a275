"""Doing work ahead of whoever needs it, in a thread of its own."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from typing import TypeVar

Item = TypeVar("Item")

WAIT = 0.1
"""Seconds between two looks at whether the reader is gone."""


def ahead(items: Iterator[Item], *, depth: int, name: str) -> Iterator[Item]:
    """The same items, made up to ``depth`` ahead of the reader in a thread called ``name``.

    An error reaches the reader in its turn. A reader that stops early ends the thread, and closes ``items``.
    """
    ready: queue.Queue[Item | _End] = queue.Queue(maxsize=depth)
    stop = threading.Event()

    def put(item: Item | _End) -> bool:
        while not stop.is_set():
            try:
                ready.put(item, timeout=WAIT)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        end = _End(None)
        try:
            for item in items:
                if not put(item):
                    return
        except BaseException as error:
            end = _End(error)
        finally:
            if hasattr(items, "close"):
                items.close()
        put(end)

    thread = threading.Thread(target=work, name=name, daemon=True)
    thread.start()
    try:
        while not isinstance(item := ready.get(), _End):
            yield item
        if item.error is not None:
            raise item.error
    finally:
        stop.set()
        thread.join()


class _End:
    """Comes after the last item, with the error that there was."""

    def __init__(self, error: BaseException | None) -> None:
        self.error = error
