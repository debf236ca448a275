"""Subsets of a data set: the same clips under new numbers, and nested draws."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest

from engine.data.shards.index import ClipIndex
from engine.evaluate.paper.scale import drawn


def test_a_subset_holds_the_clips_chosen(tiny_shards: Path) -> None:
    whole = ClipIndex([tiny_shards / "unlabelled", tiny_shards / "labelled"])
    chosen = np.array([1, 5, 9, 20, 31])
    subset = whole.subset(chosen)
    assert len(subset) == 5 and len(whole) == 32
    for new, old in enumerate(chosen.tolist()):
        assert subset.facts(new) == whole.facts(old)
        assert (
            subset.label[new] == whole.label[old]
            and subset.num_frames[new] == whole.num_frames[old]
        )
        a, b = subset.read(new, [0, 3]), whole.read(old, [0, 3])
        assert (
            a.clip == new
            and b.clip == old
            and all(x.tobytes() == y.tobytes() for x, y in zip(a.frames, b.frames, strict=True))
        )
    with pytest.raises(ValueError, match="there is no clip 5"):
        subset.read(5, [0])


def test_subsets_of_subsets_and_of_one_folder(tiny_shards: Path) -> None:
    whole = ClipIndex([tiny_shards / "unlabelled", tiny_shards / "labelled"])
    late = whole.subset(np.array([10, 12, 14]))
    again = late.subset(np.array([0, 2]))
    assert [again.facts(i) for i in range(2)] == [whole.facts(10), whole.facts(14)]
    copied = pickle.loads(pickle.dumps(again))
    assert copied.facts(1) == whole.facts(14)
    with pytest.raises(ValueError, match="a clip at least"):
        whole.subset(np.array([], np.int64))


def test_smaller_draws_are_inside_larger_ones() -> None:
    sizes = {share: drawn(200, share, seed=3) for share in (0.001, 0.1, 0.25, 1.0)}
    assert [len(s) for s in sizes.values()] == [1, 20, 50, 200]
    assert set(sizes[0.001]) <= set(sizes[0.1]) <= set(sizes[0.25])
    assert (np.diff(sizes[0.25]) > 0).all()
    assert not np.array_equal(drawn(200, 0.1, seed=4), sizes[0.1])
