"""Prefetching: items are made in a thread of their own before their reader needs them."""

from __future__ import annotations

import gc
import queue
import threading
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import TypeVar

Item = TypeVar("Item")

POLL_SECONDS = 0.1
"""Between two looks at whether the reader is gone."""


_collecting: int | None = None
"""The thread in which the garbage collector runs."""


def _note_collecting(phase: str, _: dict[str, int]) -> None:
    global _collecting
    _collecting = threading.get_ident() if phase == "start" else None


gc.callbacks.append(_note_collecting)


@dataclass(frozen=True)
class _End:
    """Comes after the last item, with the error that there was."""

    error: BaseException | None = None


def prefetch(items: Iterator[Item], *, depth: int, name: str) -> Generator[Item, None, None]:
    """Yields the same items, of which a thread called ``name`` makes up to ``depth`` + 1 before they are asked for.

    An error reaches the reader in its turn. A reader that stops early ends the thread, which closes ``items``, and
    waits for it. One that the garbage collector closes does not wait: what it interrupts may have to go on first.

    An executor would not do: readers are also closed by the garbage collector, at any moment of any thread, and
    executors take a lock that all of them share.
    """
    ready: queue.Queue[Item | _End] = queue.Queue(maxsize=depth)
    stop = threading.Event()

    def put(item: Item | _End) -> bool:
        while not stop.is_set():
            try:
                ready.put(item, timeout=POLL_SECONDS)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        end = _End()
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
        if _collecting != threading.get_ident():
            thread.join()
