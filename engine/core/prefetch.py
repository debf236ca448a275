"""Prefetching: items are made in a thread of their own before their reader needs them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

Item = TypeVar("Item")


def prefetch(items: Iterator[Item], *, depth: int, name: str) -> Iterator[Item]:
    """Yields the same items, of which one thread makes up to ``depth`` + 1 before the reader asks for them.

    An error reaches the reader in its turn. A reader that stops early closes ``items``, in their thread.
    """
    end = object()
    with ThreadPoolExecutor(1, thread_name_prefix=name) as thread:

        def submit() -> Any:
            return thread.submit(next, items, end)

        made = deque(submit() for _ in range(depth + 1))
        try:
            while (item := made.popleft().result()) is not end:
                made.append(submit())
                yield item
        finally:
            for future in made:
                future.cancel()
            if hasattr(items, "close"):
                thread.submit(items.close).result()
