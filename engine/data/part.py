"""A part of a data set, for whoever takes a whole one: some clips of opened shards, numbered anew."""

from __future__ import annotations

import copy
from collections import Counter

import numpy as np
from numpy.typing import NDArray

from engine.data.record import codec_of
from engine.data.shards import ClipIndex


def part_of(index: ClipIndex, clips: NDArray[np.int64]) -> ClipIndex:
    """The clips with these numbers, rising, as a data set of their own; nothing is copied on disk.

    A damaged clip's place is taken by another of the part. Raises ValueError for no clips.
    """
    if not len(clips):
        raise ValueError("a part of a data set needs a clip at least")
    assert (np.diff(clips) > 0).all() and 0 <= clips[0] and clips[-1] < len(index)
    part = copy.copy(index)
    for name in (
        "label",
        "shard",
        "flags",
        "num_frames",
        "width",
        "height",
        "has_audio",
        "duration",
    ):
        setattr(part, name, getattr(index, name)[clips])
    part._rows = []
    for number, rows in enumerate(index._rows):
        first, end = index._first[number : number + 2]
        inside = clips[(clips >= first) & (clips < end)] - first
        part._rows.append(inside if rows is None else rows[inside])
    part._first = np.cumsum([0, *map(len, (r for r in part._rows if r is not None))])
    part.codecs = {codec_of(flags) for flags in np.unique(part.flags)}
    part.substituted, part._warn = Counter(), index._warn
    return part


def drawn(count: int, share: float, *, seed: int) -> NDArray[np.int64]:
    """A share of ``count`` things, rising; of one seed, a smaller share is inside a larger one."""
    rng = np.random.Generator(np.random.Philox(key=[seed, 0x5A4E]))
    return np.sort(rng.permutation(count)[: max(round(share * count), 1)])
