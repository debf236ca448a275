"""What is wrong with a data set's files by their sizes, and which clips take the place of damaged ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

TRIES = 64
"""Clips that are tried in the place of a damaged one."""
STREAM = 0xDA4A
"""Keeps the draws of substitutes apart from every other use of a clip's number."""


class DamagedClip(ValueError):
    """Bytes of a clip that are missing or are not what was written; the message names the shard."""


@dataclass(frozen=True)
class Damage:
    """A file of a data set that is missing or of the wrong size."""

    path: Path
    problem: str
    """In words, such as "is missing"."""
    clips: int
    """Clips that it should hold."""

    def __str__(self) -> str:
        return f"{self.path} {self.problem}"


def index_name(facts: Mapping[str, Any]) -> str:
    """The index's file name in a data set of the facts given."""
    return str(facts.get("index", "index.bin"))


def size_problem(path: Path, size: int) -> str | None:
    """What is wrong with a file that should have this size, in words; None for nothing."""
    try:
        found = path.stat().st_size
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"can't be read: {error.strerror}"
    if found == size:
        return None
    return f"is {'truncated' if found < size else 'too long'}: {found} bytes of {size}"


def damaged_shards(folder: Path, facts: Mapping[str, Any]) -> dict[int, Damage]:
    """Shards that are missing or of the wrong size, by their place in ``dataset.json``."""
    found = {}
    for number, shard in enumerate(facts["shards"]):
        path = folder / shard["file"]
        problem = size_problem(path, shard["bytes"])
        if problem is not None:
            found[number] = Damage(path, problem, shard["clips"])
    return found


def substitutes(clip: int, label: NDArray[np.int32]) -> Iterator[int]:
    """Clips of the same label to try in the place of a damaged one: a pure function of its arguments."""
    same = np.flatnonzero(label == label[clip])
    random = np.random.Generator(np.random.Philox(key=[clip, STREAM]))
    tried = {clip}
    for place in random.integers(0, len(same), 4 * TRIES):
        other = int(same[place])
        if other not in tried:
            tried.add(other)
            yield other
        if len(tried) > TRIES:
            return
