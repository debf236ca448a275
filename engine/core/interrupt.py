"""Ending on Ctrl-C and on SIGTERM, which schedulers send before they kill: within seconds, whatever a process is at."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

GRACE_SECONDS = 8.0
"""For a command to come to its end; then the process is ended as it is, which no state on the disk minds."""
CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}
"""Exit codes: 128 and the signal's number, as shells have them."""


class Terminated(KeyboardInterrupt):
    """Raised where SIGTERM was received; whatever handles Ctrl-C handles it."""


def interrupt_for(number: int) -> KeyboardInterrupt:
    """The exception that a signal raises."""
    return Terminated() if number == signal.SIGTERM else KeyboardInterrupt()


class Interrupts:
    """Signals received since ``interrupts`` was entered."""

    number: int | None = None
    """The first signal's."""

    def code(self, error: BaseException) -> int | None:
        """The exit code where a signal ended what raised ``error``; None where it was something else."""
        if self.number is None and not isinstance(error, KeyboardInterrupt):
            return None
        terminated = self.number == signal.SIGTERM or isinstance(error, Terminated)
        return CODES[signal.SIGTERM if terminated else signal.SIGINT]

    def raised(self, number: int, _: object) -> None:
        """Handle a signal: raise it once; what comes after it changes nothing."""
        self.number = number
        for each in CODES:
            signal.signal(each, signal.SIG_IGN)
        raise interrupt_for(number)


@contextmanager
def interrupts(last_words: Callable[[int], object]) -> Iterator[Interrupts]:
    """Turn SIGINT and SIGTERM into KeyboardInterrupt and Terminated in the main thread; elsewhere do nothing.

    A process that is still there GRACE_SECONDS after a signal, since it computes outside of Python or waits for a
    thread, calls ``last_words`` with the exit code and ends.
    """
    received = Interrupts()
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    handler = received.raised
    before: dict[Any, Any] = {number: signal.signal(number, handler) for number in CODES}
    wakeup = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    watch = threading.Thread(
        target=_watch, args=(reader, received, last_words), name="interrupts", daemon=True
    )
    watch.start()
    try:
        yield received
    finally:
        if received.number is None:
            signal.set_wakeup_fd(wakeup)
            os.close(writer)
            for number, old in before.items():
                signal.signal(number, old)


def _watch(reader: int, received: Interrupts, last_words: Callable[[int], object]) -> None:
    """End the process some time after its first signal; Python tells of one even while the main thread is busy."""
    while number := os.read(reader, 1):
        if number[0] in CODES:
            received.number = received.number or number[0]
            time.sleep(GRACE_SECONDS)
            code = CODES[signal.Signals(received.number)]
            last_words(code)
            os._exit(code)
    os.close(reader)


@contextmanager
def handlers_kept() -> Iterator[None]:
    """Keep the handlers of SIGINT and SIGTERM, which libraries replace by their own."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in CODES}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
