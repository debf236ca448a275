from types import SimpleNamespace

import msgspec
import numpy as np
import pytest

from engine.core.recipe import Audio, Clip
from engine.data.plan import plan_batch, plan_views, square_boxes

CLIP, AUDIO = Clip(), Audio()
FACTS = SimpleNamespace(num_frames=np.array([250, 40, 23, 10, 100, 61, 75], np.int32), fps=25.0)


def plan(step: int, **kwargs):
    return plan_batch(FACTS, CLIP, AUDIO, **{"seed": 0, "batch_size": 4, **kwargs}, step=step)


def rows(p) -> list:
    return [getattr(p, name) for name in p.__dataclass_fields__]


def test_a_plan_depends_on_nothing_but_its_arguments() -> None:
    first = [plan(step) for step in range(5)]
    for step in reversed(range(5)):  # another order, as after a resume
        for a, b in zip(rows(first[step]), rows(plan(step)), strict=True):
            np.testing.assert_array_equal(a, b)
    assert any(
        not np.array_equal(a, b) for a, b in zip(rows(plan(0)), rows(plan(0, seed=1)), strict=True)
    )


def test_ranks_share_the_batch_of_one_process() -> None:
    whole = plan(3, batch_size=4)
    halves = [plan(3, batch_size=2, rank=rank, world=2) for rank in (0, 1)]
    for together, *parts in zip(rows(whole), *(rows(h) for h in halves), strict=True):
        np.testing.assert_array_equal(together[0::2], parts[0])
        np.testing.assert_array_equal(together[1::2], parts[1])


def test_every_clip_comes_once_an_epoch() -> None:
    n = len(FACTS.num_frames)
    seen = np.concatenate([plan(step, batch_size=1).clip for step in range(3 * n)])
    orders = seen.reshape(3, n)
    np.testing.assert_array_equal(np.sort(orders, axis=1), np.tile(np.arange(n), (3, 1)))
    assert not np.array_equal(orders[0], orders[1])


SHARDED = SimpleNamespace(
    num_frames=np.full(203, 50, np.int32),
    shard=np.repeat([0, 1, 3, 4, 7, 8, 9], [40, 1, 60, 30, 12, 50, 10]).astype(np.int32),
    fps=25.0,
)
"""Seven shards of several sizes; those left out for damage leave gaps in the numbers."""


def epochs(shards: int, *, seed: int = 0, count: int = 2) -> np.ndarray:
    clip = msgspec.structs.replace(CLIP, shuffle_shards=shards)
    n = len(SHARDED.num_frames)
    steps = [
        plan_batch(SHARDED, clip, AUDIO, seed=seed, step=step, batch_size=7).clip
        for step in range(count * n // 7)
    ]
    return np.concatenate(steps).reshape(count, n)


@pytest.mark.parametrize("shards", [1, 2, 3, 7, 100])
def test_shuffling_by_shards_visits_each_clip_once_an_epoch(shards: int) -> None:
    seen = epochs(shards)
    np.testing.assert_array_equal(np.sort(seen, axis=1), np.tile(np.arange(203), (2, 1)))
    assert not np.array_equal(seen[0], seen[1])
    assert not np.array_equal(seen, epochs(shards, seed=1))
    np.testing.assert_array_equal(seen, epochs(shards))
    for order in seen:  # shards come in windows: all of the first few, then all of the next few
        numbers = SHARDED.shard[order]
        place = 0
        while place < len(order):
            inside: set[int] = set()
            while place < len(order) and (len(inside) < shards or numbers[place] in inside):
                inside.add(int(numbers[place]))
                place += 1
            assert not inside & set(numbers[place:].tolist())


def test_clips_of_shards_that_are_read_together_are_mixed() -> None:
    (order,) = epochs(7, count=1)
    assert not np.array_equal(order, np.sort(order))
    assert len(set(SHARDED.shard[order[:30]].tolist())) >= 4


def test_shuffling_by_shards_is_off_by_default() -> None:
    assert CLIP.shuffle_shards == 0
    with_shards = SimpleNamespace(**vars(FACTS), shard=np.zeros(7, np.int32))
    a = plan_batch(with_shards, CLIP, AUDIO, seed=0, step=3, batch_size=4)
    for x, y in zip(rows(a), rows(plan(3)), strict=True):
        np.testing.assert_array_equal(x, y)


def test_cuts_stay_inside_the_clip() -> None:
    for step in range(60):
        p = plan(step)
        stored = FACTS.num_frames[p.clip]
        assert (p.frames >= 0).all()
        assert (p.frames < stored[:, None]).all()
        whole = stored >= 23
        assert (np.diff(p.frames[whole], axis=1) == CLIP.frame_stride).all()
        boxes = square_boxes(p, np.full(4, 160, np.int32), np.full(4, 90, np.int32))
        assert (boxes >= 0).all() and (boxes <= 1 + 1e-6).all()
        sides = (boxes[:, 2:] - boxes[:, :2]) * [160, 90]
        np.testing.assert_allclose(sides[:, 0], sides[:, 1], rtol=1e-4)  # square in pixels
        assert (sides[:, 0] >= np.sqrt(CLIP.min_area) * 90 - 1e-3).all()


def test_shifts_are_long_enough_and_have_room() -> None:
    window = 12 * 2 / 25.0
    shifts = []
    for step in range(100):
        p = plan(step)
        duration = FACTS.num_frames[p.clip] / FACTS.fps
        moved = p.shift != 0
        assert (np.abs(p.shift[moved]) >= AUDIO.min_shift).all()
        starts = (p.sound_start + p.shift)[moved]
        assert (starts >= -1e-9).all()
        assert (starts + window <= duration[moved] + 1e-6).all()
        assert not moved[FACTS.num_frames[p.clip] <= 36].any()  # 1.44 s: no room for 0.96 s + 0.5 s
        assert moved[FACTS.num_frames[p.clip] >= 75].all()  # from any start one side has room
        shifts.extend(p.shift[moved])
    assert min(shifts) < 0 < max(shifts)


def test_shuffled_orders_are_permutations_and_never_in_order() -> None:
    orders = np.concatenate([plan(step).order for step in range(100)])
    np.testing.assert_array_equal(np.sort(orders, axis=1), np.tile(np.arange(8), (len(orders), 1)))
    assert not (orders == np.arange(8)).all(axis=1).any()


@pytest.mark.parametrize(("num_views", "starts"), [(1, [[117]]), (2, [[58], [176]])])
def test_views_are_spread_over_the_clip(num_views: int, starts: list) -> None:
    for view, expected in enumerate(starts):
        p = plan_views(FACTS, CLIP, clips=np.array([0]), view=view, num_views=num_views)
        np.testing.assert_array_equal(p.frames[:, 0], expected)
        box = square_boxes(p, np.array([200], np.int32), np.array([100], np.int32))
        np.testing.assert_allclose(box, [[0.25, 0.0, 0.75, 1.0]])
