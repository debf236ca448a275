"""Batched k-means against scikit-learn's from the same centres, and its starts against plain NumPy."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans

from engine.features import kmeans
from engine.features.kmeans import centred, draws, lloyd, plus_plus

SHAPES = [
    # clips, features, clusters
    (60, 24, 6),
    (97, 13, 7),
    (33, 1, 5),
    (20, 5, 19),
    (64, 70, 16),
    (12, 3, 1),
    (8, 2, 8),
    (150, 2, 11),
]


def noise(num_clips, dim, *, seed=0, num_distinct=None):
    """Features (clips, dim) far from the origin; of ``num_distinct`` different clips, where given."""
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(num_clips, dim)) * 10 ** rng.uniform(-3, 3) + 5 * rng.normal(
        size=dim
    )
    return features[rng.integers(0, num_distinct, num_clips)] if num_distinct else features


def blobs(num_clips, dim, num_clusters, *, seed=0, spread=0.5):
    rng = np.random.default_rng(seed)
    middles = rng.normal(size=(num_clusters, dim))
    return middles[np.arange(num_clips) % num_clusters] + spread * rng.normal(size=(num_clips, dim))


def of(*members, **keywords):
    return kmeans.kmeans([torch.from_numpy(x) for x in members], **keywords)


def starts_of(x, uniforms):
    """The clips (R, K) that a member starts from."""
    return plus_plus(centred(torch.from_numpy(x), dtype=torch.float64)[0][None], uniforms)[
        0
    ].numpy()


def sklearn_from(x, centres):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fewer distinct clips than clusters
        return KMeans(len(centres), init=centres, n_init=1).fit(x)


def true_inertia(x, labels):
    return sum(((x[labels == k] - x[labels == k].mean(0)) ** 2).sum() for k in np.unique(labels))


def same_partition(one, other):
    pairs = set(zip(one.tolist(), other.tolist(), strict=True))
    return len(pairs) == len(set(one.tolist())) == len(set(other.tolist()))


@pytest.mark.parametrize(("num_clips", "dim", "num_clusters"), SHAPES)
def test_labels_and_inertia_are_scikit_learns_from_the_same_starts(num_clips, dim, num_clusters):
    for seed in range(5):
        x = noise(num_clips, dim, seed=seed)
        uniforms = draws(seed, runs=1, restarts=3, num_clusters=num_clusters)
        found = of(x, uniforms=uniforms)
        for r, start in enumerate(starts_of(x, uniforms)):
            theirs = sklearn_from(x, x[start])
            assert np.array_equal(found.labels[0, r], theirs.labels_)
            assert found.inertia[0, r].item() == pytest.approx(theirs.inertia_, rel=1e-6, abs=1e-12)
            assert found.iterations[0, r] == theirs.n_iter_


@pytest.mark.parametrize(("num_distinct", "num_clusters"), [(15, 6), (8, 8), (3, 7), (1, 4)])
def test_equal_clips_stay_together(num_distinct, num_clusters):
    for seed in range(5):
        x = noise(40, 6, seed=seed, num_distinct=num_distinct)
        uniforms = draws(seed, runs=1, restarts=2, num_clusters=num_clusters)
        found = of(x, uniforms=uniforms)
        for r, start in enumerate(starts_of(x, uniforms)):
            labels = found.labels[0, r].numpy()
            if (
                num_distinct <= num_clusters
            ):  # scikit-learn may split equal clips between equal centres
                theirs = np.unique(x, axis=0, return_inverse=True)[1].ravel()
            else:
                theirs = sklearn_from(x, x[start]).labels_
            assert same_partition(labels, theirs)
            expected = true_inertia(x, labels)
            assert found.inertia[0, r].item() == pytest.approx(expected, rel=1e-6, abs=1e-20)
            if num_distinct <= num_clusters:
                assert expected == pytest.approx(0.0, abs=1e-20)
                assert found.iterations[0, r] <= 3


@pytest.mark.parametrize("num_empty", [1, 2, 4])
def test_empty_clusters_move_as_scikit_learns_do(num_empty):
    """Centres beyond all clips lose every clip at once."""
    for seed in range(10):
        x, _ = centred(torch.from_numpy(noise(50, 4, seed=seed)), dtype=torch.float64)
        rng = np.random.default_rng(seed)
        centres = x.numpy()[rng.choice(50, 6, replace=False)]
        centres[rng.choice(6, num_empty, replace=False)] = 100.0 + np.arange(num_empty)[:, None]
        found = lloyd(x[None], torch.from_numpy(centres)[None, None])
        theirs = sklearn_from(x.numpy(), centres)
        # Which of several empty clusters gets which far clip is an accident of a partial sort.
        assert same_partition(found.labels[0, 0].numpy(), theirs.labels_)
        assert len(found.labels.unique()) == 6
        assert found.inertia.item() == pytest.approx(theirs.inertia_, rel=1e-9)


def test_a_run_ends_at_scikit_learns_tolerance():
    """Clips without clusters, whose labels would still change long after the centres shift little."""
    x = np.random.default_rng(0).uniform(size=(1500, 2))
    uniforms = draws(0, runs=1, restarts=8, num_clusters=5)
    found = of(x, uniforms=uniforms)
    theirs = [sklearn_from(x, x[start]) for start in starts_of(x, uniforms)]
    assert found.iterations[0].tolist() == [fit.n_iter_ for fit in theirs]
    assert np.array_equal(found.labels[0], [fit.labels_ for fit in theirs])
    to_the_end = [
        KMeans(5, init=x[start], n_init=1, tol=0).fit(x) for start in starts_of(x, uniforms)
    ]
    assert sum(a.n_iter_ < b.n_iter_ for a, b in zip(theirs, to_the_end, strict=True)) > 4


def test_no_clip_at_its_centre_moves_and_an_unused_cluster_joins_the_biggest():
    x = torch.tensor([[[0.0], [4.0], [4.0], [7.0]]])
    labels = torch.tensor([[[2, 0, 0, 3]]])
    distances = torch.tensor([[[0.5, 0.0, 0.0, 0.7]]])
    # Clusters 1 and 4 have no clip: the farthest clips go there, but only those not at their centres.
    assert kmeans._relocate(labels, distances, 5).tolist() == [[[4, 0, 0, 1]]]
    distances[..., 0] = 0.0
    assert kmeans._relocate(labels, distances, 5).tolist() == [[[2, 0, 0, 1]]]
    means = kmeans._means(x, labels, torch.full((1, 1, 5, 1), torch.nan))
    assert means.flatten().tolist() == [4.0, 4.0, 0.0, 7.0, 4.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_starts_beyond_the_distinct_clips_are_drawn_from_no_rounding(dtype):
    """With every distinct clip chosen nothing is left to draw from, and the first clip fills up."""
    for seed in range(5):
        x = noise(40, 6, seed=seed, num_distinct=3)
        rows, _ = centred(torch.from_numpy(x), dtype=dtype)
        starts = plus_plus(rows[None], draws(seed, runs=1, restarts=4, num_clusters=7))[0]
        assert [len(np.unique(x[start[:3]], axis=0)) for start in starts] == [3] * 4
        assert (starts[:, 3:] == 0).all()


def numpy_plus_plus(x, uniforms):
    """Greedy k-means++ of one start, from differences and in loops."""
    chosen = [int(uniforms[0, 0] * len(x))]
    nearest = ((x - x[chosen[0]]) ** 2).sum(1)
    for row in uniforms[1:]:
        sums = np.cumsum(nearest)
        candidates = [int(np.argmax(sums >= luck * sums[-1])) for luck in row]
        left = [np.minimum(nearest, ((x - x[candidate]) ** 2).sum(1)) for candidate in candidates]
        # Of two clips that are each other's nearest, either leaves the same sum: the first counts.
        best = np.argmax(
            [rest.sum() <= min(map(np.sum, left)) + 1e-13 * (x**2).sum() for rest in left]
        )
        nearest = left[best]
        chosen.append(candidates[best])
    return chosen


@pytest.mark.parametrize(("num_clips", "dim", "num_clusters"), SHAPES)
def test_starts_are_those_of_plain_numpy(num_clips, dim, num_clusters):
    uniforms = draws(7, runs=2, restarts=3, num_clusters=num_clusters)
    members = [noise(num_clips, dim, seed=seed) for seed in range(6)]
    x = torch.stack([centred(torch.from_numpy(m), dtype=torch.float64)[0] for m in members])
    found = plus_plus(x, uniforms).tolist()
    for member, starts in zip(members, found, strict=True):
        assert starts == [numpy_plus_plus(member - member.mean(0), luck) for luck in uniforms]
        assert all(len(set(start)) == num_clusters for start in starts)


def test_draws_depend_on_seed_run_and_restart_alone():
    few = draws(3, runs=1, restarts=2, num_clusters=9)
    many = draws(3, runs=4, restarts=5, num_clusters=9)
    assert many.shape == (20, 9, 2 + int(math.log(9)))
    assert np.array_equal(few, many[:2])
    assert np.array_equal(many[5:7], draws(3, runs=2, restarts=2, num_clusters=9)[2:])
    assert len(np.unique(many)) == many.size
    assert not np.isin(draws(4, runs=1, restarts=2, num_clusters=9), many).any()


@pytest.mark.parametrize(("num_clips", "dim", "num_clusters"), [(60, 24, 6), (97, 13, 7)])
def test_a_member_gets_the_same_bits_alone_and_in_company(num_clips, dim, num_clusters):
    members = [noise(num_clips, dim, seed=seed) for seed in range(4)]
    uniforms = draws(0, runs=1, restarts=5, num_clusters=num_clusters)
    together = of(*members, uniforms=uniforms)
    for m, member in enumerate(members):
        alone = of(member, uniforms=uniforms)
        assert torch.equal(alone.labels[0], together.labels[m])
        assert torch.equal(alone.inertia[0], together.inertia[m])
    again = of(*members, uniforms=uniforms)
    assert torch.equal(again.labels, together.labels)
    assert torch.equal(again.inertia, together.inertia)


@pytest.mark.parametrize(
    ("chunk", "check_every"),
    [((8, 6), 1), ((8, 6), 4), ((8, 6), 1000), ((1, 6), 4), ((3, 6), 2), ((2, 4), 4), ((5, 1), 4)],
)
def test_one_batch_finds_what_problems_find_one_by_one(chunk, check_every, monkeypatch):
    """Members and starts that need between a few iterations and many, so that the batch narrows."""
    members = [blobs(240, 2, 9, seed=i, spread=0.5**i) for i in range(8)]
    uniforms = draws(1, runs=2, restarts=3, num_clusters=9)
    single = of(*members, uniforms=uniforms, chunk=(1, 1))
    assert single.iterations.min() < 4 < 12 < single.iterations.max()
    whole = lloyd
    monkeypatch.setattr(kmeans, "lloyd", lambda *a: whole(*a, check_every=check_every))
    batched = of(*members, uniforms=uniforms, chunk=chunk)
    assert torch.equal(batched.labels, single.labels)
    assert torch.equal(batched.iterations, single.iterations)
    assert torch.allclose(batched.inertia, single.inertia, rtol=1e-12)


def test_best_of_the_starts_is_as_good_as_scikit_learns():
    ratios = []
    for seed in range(12):
        x = blobs(200, 10, 8, seed=seed, spread=0.7)
        found = (
            of(x, uniforms=draws(seed, runs=1, restarts=10, num_clusters=8)).inertia.min().item()
        )
        ratios.append(found / KMeans(8, n_init=10, random_state=seed).fit(x).inertia_)
    assert max(ratios) < 1.01
    assert abs(np.mean(ratios) - 1) < 1e-3


@pytest.mark.parametrize("power", [-100, 0, 100])
def test_float32_far_from_the_origin_at_any_scale(power):
    """Uncentred, float32 has no digit left of these distances; unscaled, their squares leave its range."""
    x = (blobs(120, 16, 6, spread=0.3) + 3e4).astype(np.float32) * np.float32(2.0) ** power
    uniforms = draws(0, runs=1, restarts=4, num_clusters=6)
    single = of(x, uniforms=uniforms, dtype=torch.float32, chunk=(1, 4))
    double = of(x, uniforms=uniforms)
    assert torch.equal(single.labels, double.labels)
    assert torch.allclose(single.inertia, double.inertia, rtol=1e-5)
    wide = x.astype(np.float64)
    expected = [true_inertia(wide, labels.numpy()) for labels in double.labels[0]]
    assert double.inertia[0].tolist() == pytest.approx(expected, rel=1e-9)


def test_chunks_fit_the_memory_and_change_nothing(monkeypatch):
    shape = (3570, 2048)
    for restarts in (1, 10, 30, 300):
        members, width = kmeans._chunk(shape, restarts, 51, bytes_each=4)
        scores = members * width * 51 * 3570 * 4
        assert members >= 1
        assert 1 <= width <= restarts
        assert 2 * scores + members * math.prod(shape) * 4 <= kmeans.MEMORY
    assert kmeans._chunk(shape, 30, 51, bytes_each=4)[0] >= 4
    assert kmeans._chunk((10**6, 512), 30, 51, bytes_each=4) == (1, 1)
    asked = []
    members = [noise(40, 6, seed=seed) for seed in range(3)]
    uniforms = draws(0, runs=1, restarts=4, num_clusters=5)
    once = of(*members, uniforms=uniforms)
    whole = lloyd
    monkeypatch.setattr(kmeans, "lloyd", lambda x, c: asked.append(c.shape[:2]) or whole(x, c))
    pieces = of(*members, uniforms=uniforms, chunk=(2, 3))
    assert asked == [(2, 3), (2, 1), (1, 3), (1, 1)]
    assert torch.equal(pieces.labels, once.labels)


def test_products_leave_tf32_alone(monkeypatch):
    seen = set()
    whole = torch.baddbmm
    matmul = torch.backends.cuda.matmul
    monkeypatch.setattr(
        torch, "baddbmm", lambda *a, **k: seen.add(matmul.fp32_precision) or whole(*a, **k)
    )
    before = matmul.fp32_precision
    try:
        matmul.fp32_precision = "tf32"
        of(noise(20, 3), uniforms=draws(0, runs=1, restarts=1, num_clusters=3))
        assert matmul.fp32_precision == "tf32"
    finally:
        matmul.fp32_precision = before
    assert seen == {"ieee"}


@pytest.mark.parametrize("name", ["high", "medium"])
def test_products_use_the_interface_that_tf32_was_set_by(monkeypatch, name):
    """Else torch refuses to say what the older one is set to, which compilers ask."""
    seen = set()
    whole = torch.baddbmm
    monkeypatch.setattr(
        torch,
        "baddbmm",
        lambda *a, **k: (
            seen.add((torch.get_float32_matmul_precision(), matmul.fp32_precision))
            or whole(*a, **k)
        ),
    )
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        torch.set_float32_matmul_precision(name)
        of(noise(20, 3), uniforms=draws(0, runs=1, restarts=1, num_clusters=3))
        assert torch.get_float32_matmul_precision() == name and matmul.allow_tf32
    finally:
        torch.set_float32_matmul_precision("highest")
        matmul.fp32_precision = before
    assert seen == {("highest", "ieee")}


def test_rows_are_picked_as_by_their_places():
    rng = np.random.default_rng(0)
    x, which = rng.random((2, 3, 7, 5)), rng.integers(0, 7, (2, 3, 4))
    got = kmeans._picked(torch.from_numpy(x), torch.from_numpy(which), dim=2)
    np.testing.assert_array_equal(got, np.take_along_axis(x, which[..., None], axis=2))


def test_starts_and_iterations_never_wait_for_the_device():
    """Tensors without data, on a device of their own: reading a value or mixing devices raises."""
    x = torch.empty(4, 30, 7, device="meta")
    starts = plus_plus(x, draws(0, runs=2, restarts=3, num_clusters=5))
    assert (starts.shape, starts.device.type) == ((4, 6, 5), "meta")
    work = kmeans._Batch.new(x, torch.empty(4, 6, 5, 7, device="meta"))
    for _ in range(2):
        work = kmeans._iterate(work)
    assert work.centres.dtype == torch.float32
    labels, _ = kmeans._assign(x, work.norms, work.centres)
    assert labels.shape == (4, 6, 30)
    inertia = kmeans._inertia(x, labels, work.centres)
    assert (inertia.shape, inertia.device.type) == ((4, 6), "meta")
    for wait in (lambda: bool(work.active.any()), lambda: x + torch.ones(7)):
        with pytest.raises((RuntimeError, NotImplementedError)):
            wait()


def test_members_of_different_shapes_are_refused():
    with pytest.raises(ValueError, match=r"one shape, not \[\(20, 3\), \(20, 4\)\]"):
        of(noise(20, 3), noise(20, 4), uniforms=draws(0, runs=1, restarts=1, num_clusters=3))


@pytest.mark.gpu
def test_a_gpu_finds_what_a_cpu_finds():
    members = [blobs(300, 64, 9, seed=seed, spread=0.5) for seed in range(5)]
    uniforms = draws(1, runs=2, restarts=4, num_clusters=9)
    expected = of(*members, uniforms=uniforms)
    on_gpu = [torch.from_numpy(member).cuda() for member in members]
    exact = kmeans.kmeans(on_gpu, uniforms, dtype=torch.float64)
    assert torch.equal(exact.labels.cpu(), expected.labels)
    found = kmeans.kmeans(on_gpu, uniforms)
    assert torch.allclose(found.inertia.cpu(), expected.inertia, rtol=1e-3)
    again = kmeans.kmeans(on_gpu, uniforms)
    assert torch.equal(found.labels, again.labels)
    assert torch.equal(found.inertia, again.inertia)


@pytest.mark.parametrize("backend", ["sklearn", "batched"])
def test_clusters_are_as_good_as_scikit_learns(backend: kmeans.Backend) -> None:
    rng = np.random.default_rng(5)
    labels = rng.integers(0, 6, 90)
    x = rng.normal(0, 2, (6, 20))[labels] + rng.normal(0, 1.5, (90, 20))
    how = {"backend": backend, "device": "cpu", "runs": 3, "restarts": 10, "seed": 0}
    (found,) = kmeans.cluster([torch.from_numpy(x)], 6, **how)  # type: ignore[arg-type]
    assert found.shape == (3, 90)
    best = KMeans(6, n_init=30, random_state=0).fit(x).inertia_
    for run in found:
        centres = np.stack([x[run == c].mean(0) for c in range(6)])
        assert np.square(x - centres[run]).sum() <= 1.02 * best
