"""Which part of which split a clip is in, as bits of the index and as words in a clip's facts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

SHIFT, MAX_SPLITS = 8, 12
"""From bit SHIFT of a record's flags on, two bits say a clip's part in each split of its data set."""
PARTS = ("", "train", "test", "validation")


def split_bits(splits: Sequence[str]) -> int:
    """A clip's parts in splits 1, 2 ... as bits of ``flags``."""
    assert len(splits) <= MAX_SPLITS
    return sum(PARTS.index(part) << (SHIFT + 2 * i) for i, part in enumerate(splits))


def told_splits(splits: Sequence[str]) -> dict[str, str]:
    """A clip's parts by the number of the split, as its facts tell them: ``{"1": "train", "3": "test"}``."""
    return {str(i): part for i, part in enumerate(splits, start=1) if part}


def in_part(flags: NDArray[np.uint32], number: int, part: str) -> NDArray[np.bool_]:
    """Which clips are in a part of split 1, 2 ...: bool (clips,). Raises ValueError for another part or number."""
    if part not in PARTS[1:] or not 1 <= number <= MAX_SPLITS:
        raise ValueError(f"there is no part {part!r} of split {number}: {', '.join(PARTS[1:])}")
    return np.asarray((flags >> (SHIFT + 2 * (number - 1))) & 3 == PARTS.index(part))
