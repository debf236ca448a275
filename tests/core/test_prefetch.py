"""Prefetching: the same items in the same order, a bounded number of them early, errors in their turn."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Iterator

import pytest

from engine.core.prefetch import prefetch


def test_items_come_in_order_from_one_other_thread() -> None:
    threads: list[str] = []

    def items() -> Iterator[int]:
        for i in range(20):
            threads.append(threading.current_thread().name)
            yield i

    assert list(prefetch(items(), depth=3, name="numbers")) == list(range(20))
    assert len(set(threads)) == 1 and threads[0].startswith("numbers")
    assert list(prefetch(iter([]), depth=1, name="none")) == []


@pytest.mark.parametrize("depth", [1, 4])
def test_no_more_than_depth_and_one_are_made_early(depth: int) -> None:
    made = [0]

    def items() -> Iterator[int]:
        for i in range(50):
            made[0] += 1
            yield i

    reader = prefetch(items(), depth=depth, name="numbers")
    for taken in range(1, 20):
        next(reader)
        while made[0] < taken + depth + 1:  # it does work ahead
            time.sleep(0.001)
        time.sleep(0.002)
        assert made[0] == taken + depth + 1
    reader.close()  # type: ignore[attr-defined]


def test_an_error_comes_in_its_turn() -> None:
    def items() -> Iterator[int]:
        yield 0
        yield 1
        raise KeyError("third")

    reader = prefetch(items(), depth=5, name="numbers")
    assert (next(reader), next(reader)) == (0, 1)
    with pytest.raises(KeyError, match="third"):
        next(reader)
    assert list(reader) == []


def test_a_reader_that_stops_early_closes_the_items_in_their_thread() -> None:
    closed: list[str] = []

    def items() -> Iterator[int]:
        try:
            while True:
                yield 1
        finally:
            closed.append(threading.current_thread().name)

    reader = prefetch(items(), depth=2, name="numbers")
    next(reader)
    before = threading.active_count()
    reader.close()  # type: ignore[attr-defined]
    assert closed == ["numbers"] and threading.active_count() == before - 1


def test_readers_in_a_cycle_of_garbage_are_closed() -> None:
    """Whichever of them is collected first, and whatever the collector interrupts."""
    closed: list[int] = []

    class Holder:
        reader: Iterator[int]

    def items(number: int) -> Iterator[int]:
        try:
            while True:
                yield number
        finally:
            closed.append(number)

    for number in range(50):
        holder = Holder()
        inner = prefetch(items(number), depth=1, name="inner")
        holder.reader = prefetch(inner, depth=1, name="outer")
        holder.itself = holder  # type: ignore[attr-defined]
        next(holder.reader)
        del holder, inner
    until = time.monotonic() + 60
    while len(closed) < 50 and time.monotonic() < until:
        gc.collect()  # does nothing while another thread collects
        time.sleep(0.01)
    assert sorted(closed) == list(range(50))


def test_the_collector_waits_for_no_reader() -> None:
    """What it interrupts may hold what the reader's thread needs, as here a lock."""
    lock = threading.Lock()
    closed = threading.Event()

    class Holder:
        reader: Iterator[int]

    def items() -> Iterator[int]:
        try:
            yield 0
            with lock:
                yield 1
        finally:
            closed.set()

    with lock:
        holder = Holder()
        holder.reader = prefetch(items(), depth=1, name="numbers")
        holder.itself = holder  # type: ignore[attr-defined]
        next(holder.reader)
        del holder
        collector = threading.Thread(target=gc.collect)
        collector.start()
        collector.join(20)
        assert not collector.is_alive() and not closed.is_set()
    assert closed.wait(20)
