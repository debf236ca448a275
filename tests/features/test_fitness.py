"""Fitness against hand-made tables, brute force, scikit-learn's own formulas and its threads."""

from __future__ import annotations

import sys
import warnings
from itertools import permutations
from math import log
from types import ModuleType

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans
from threadpoolctl import threadpool_info, threadpool_limits

from engine.core.recipe import Fitness, RecipeError, recipe_from
from engine.features import fitness as fitness_module
from engine.features import kmeans
from engine.features.agreement import agreement
from engine.features.fitness import cohort_fitness, effective_rank, kmeans_fitness
from engine.features.kmeans import kmeans_backend


def blobs(num_clips=90, num_classes=6, dim=24, *, spread=0.5, seed=0):
    """Features (clips, dim) around one centre a class, and the classes."""
    rng = np.random.default_rng(seed)
    labels = np.arange(num_clips) % num_classes
    centres = rng.normal(size=(num_classes, dim))
    features = centres[labels] + spread * rng.normal(size=(num_clips, dim))
    return features.astype(np.float32), labels


def from_table(table):
    """Labels and clusters whose contingency table (classes x clusters) is the one given."""
    rows, columns = np.indices(np.shape(table))
    counts = np.ravel(table)
    return np.repeat(rows.ravel(), counts), np.repeat(columns.ravel(), counts)


def brute_force(labels, clusters, size):
    """The best accuracy over all ways to name ``size`` clusters after ``size`` classes."""
    return max(
        np.mean(np.asarray(names)[clusters] == labels) for names in permutations(range(size))
    )


def mutual_information(table):
    """NMI from its definition, with the arithmetic mean of the entropies."""
    joint = np.asarray(table) / np.sum(table)
    rows, columns = joint.sum(1), joint.sum(0)
    entropy = [-sum(p * log(p) for p in side if p > 0) for side in (rows, columns)]
    shared = sum(
        joint[i, j] * log(joint[i, j] / (rows[i] * columns[j]))
        for i, j in np.ndindex(joint.shape)
        if joint[i, j] > 0
    )
    return shared / (sum(entropy) / 2)


def rand_index(table):
    """ARI from its definition by pairs (Hubert & Arabie 1985)."""

    def pairs(x):
        return (x * (x - 1) / 2).sum()

    table = np.asarray(table)
    both, rows, columns = pairs(table), pairs(table.sum(1)), pairs(table.sum(0))
    expected = rows * columns / pairs(table.sum(keepdims=True))
    return (both - expected) / ((rows + columns) / 2 - expected)


@pytest.mark.parametrize(
    ("table", "accuracy"),
    [
        ([[5, 0], [0, 5]], 1.0),
        ([[0, 5], [5, 0]], 1.0),
        # Taking each cluster's commonest class would give 9/12, but both clusters are class 0's.
        ([[5, 4], [3, 0]], 7 / 12),
        ([[3, 0, 0], [0, 2, 1]], 5 / 6),  # a cluster too many
        ([[3, 0], [0, 2], [1, 1]], 5 / 7),  # a cluster too few
        ([[4], [3], [3]], 0.4),  # collapsed
    ],
)
def test_agreement_of_tables(table, accuracy):
    found = agreement(*from_table(table))
    assert found.hungarian == pytest.approx(accuracy)
    assert found.nmi == pytest.approx(mutual_information(table), abs=1e-12)
    assert found.ari == pytest.approx(rand_index(table), abs=1e-12)


@pytest.mark.parametrize("size", [2, 3, 4, 5])
def test_hungarian_equals_the_best_of_all_permutations(size):
    rng = np.random.default_rng(size)
    for _ in range(20):
        labels, clusters = rng.integers(0, size, (2, 17))
        found = agreement(labels, clusters)
        assert found.hungarian == pytest.approx(brute_force(labels, clusters, size))


def test_agreement_does_not_depend_on_names():
    rng = np.random.default_rng(0)
    labels, clusters = rng.integers(0, 7, (2, 60))
    found = agreement(labels, clusters)
    renamed = agreement(rng.permutation(7)[labels], 100 - 3 * rng.permutation(7)[clusters])
    assert found.hungarian == renamed.hungarian
    assert (found.nmi, found.ari) == pytest.approx((renamed.nmi, renamed.ari))


@pytest.mark.parametrize(
    ("labels", "clusters", "message"),
    [
        ([0, -1, 1], [0, 1, 1], r"1 of 3 clips have no label \(-1\)"),
        ([0, 1, 1], [0, 1], "clusters must be 3 integers"),
        ([0, 1], [0.0, 1.0], "clusters must be 2 integers"),
        ([0.0, 1.0], [0, 1], "labels must be integers"),
        ([], [], "labels must be integers"),
    ],
)
def test_agreement_refuses(labels, clusters, message):
    with pytest.raises(ValueError, match=message):
        agreement(np.asarray(labels), np.asarray(clusters))


def test_fitness_is_the_mean_over_runs_of_the_metric():
    features, labels = blobs(spread=1.2)
    settings = Fitness(readout="raw", kmeans_init=1, kmeans_seeds=5)
    runs = [
        agreement(
            labels,
            KMeans(6, n_init=1, random_state=kmeans.run_seed(3, run)).fit_predict(
                features.astype(np.float64)
            ),
        )
        for run in range(5)
    ]
    for metric in ("hungarian", "nmi", "ari"):
        values = [getattr(run, metric) for run in runs]
        assert np.ptp(values) > 0  # else the mean is no test
        settings = Fitness(readout="raw", metric=metric, kmeans_init=1, kmeans_seeds=5)
        found = kmeans_fitness(features, labels, settings=settings, num_classes=6, seed=3)
        assert found.value == pytest.approx(np.mean(values))
        assert found.sd == pytest.approx(np.std(values, ddof=1))
        assert getattr(found.metrics, metric) == found.value
    assert found.backend == "sklearn"
    assert found.effective_rank == effective_rank(features)


def test_fitness_separates_good_features_from_none():
    def value(spread):
        features, labels = blobs(spread=spread)
        return kmeans_fitness(
            features, labels, settings=Fitness(readout="raw"), num_classes=6, seed=0
        ).value

    assert value(0.2) == 1.0
    assert 1 / 6 < value(100.0) < 0.45


@pytest.mark.parametrize("power", [-100, -1, 100])
def test_fitness_does_not_depend_on_scale(power):
    features, labels = blobs(spread=1.2)  # whose squares float32 can't hold at 2^100 and 2^-100

    def value(x):
        return kmeans_fitness(
            x, labels, settings=Fitness(readout="raw"), num_classes=6, seed=0
        ).value

    assert value(np.ldexp(features, power)) == value(features)


@pytest.mark.parametrize("fill", [0.0, 3.5])
def test_collapsed_features_score_one_class_without_a_warning(fill):
    _, labels = blobs()
    features = np.full((90, 8), fill, np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = kmeans_fitness(
            features, labels, settings=Fitness(readout="raw"), num_classes=6, seed=0
        )
    assert found.value == pytest.approx(1 / 6)
    assert found.sd == 0.0
    assert found.effective_rank == pytest.approx(1.0 if fill else 0.0)


def test_fitness_is_bit_equal_for_a_seed_whatever_the_threads():
    # More than 256 clips: scikit-learn deals out blocks of 256 to its threads.
    features, labels = blobs(700, 10, 64, spread=3.0)
    settings = Fitness(readout="raw", kmeans_init=2, kmeans_seeds=2)
    found = []
    for threads in (1, 2, 2):
        with threadpool_limits(threads):
            found.append(
                kmeans_fitness(features, labels, settings=settings, num_classes=10, seed=1)
            )
    assert found[0] == found[1] == found[2]
    other = kmeans_fitness(features, labels, settings=settings, num_classes=10, seed=2)
    assert other.metrics != found[0].metrics


def test_kmeans_runs_on_one_thread_and_gives_the_others_back(monkeypatch):
    seen = []

    class Spy(KMeans):
        def fit_predict(self, *args):
            seen.extend(pool["num_threads"] for pool in threadpool_info())
            return super().fit_predict(*args)

    monkeypatch.setattr(kmeans, "KMeans", Spy)
    features, labels = blobs()
    with threadpool_limits(2):
        before = threadpool_info()
        kmeans_fitness(features, labels, settings=Fitness(readout="raw"), num_classes=6, seed=0)
        assert threadpool_info() == before
    assert set(seen) == {1}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, y: (np.where(np.arange(90)[:, None] == 7, np.nan, x), y), "1 of 90 .* clip 7"),
        (lambda x, y: (np.where(x > 2, np.inf, x), y), "not finite"),
        (lambda x, y: (x, np.where(y == 5, -1, y)), "15 of 90 clips have no label"),
        (lambda x, y: (x, y + 1), "label 6 is not one of 6 classes"),
        (lambda x, y: (x[:5], y[:5]), "5 labelled clips are too few for 6 classes"),
        (lambda x, y: (x[:50], y), "50 clips have features, 90 have labels"),
        (lambda x, y: (x[:, :, None], y), r"shape \(90, 24, 1\)"),
        (lambda x, y: (x.astype(int), y), "must be floats"),
    ],
)
def test_fitness_refuses_in_one_line(change, message):
    features, labels = change(*blobs())
    with pytest.raises(ValueError, match=message) as error:
        kmeans_fitness(features, labels, settings=Fitness(readout="raw"), num_classes=6, seed=0)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("choice", ["auto", "sklearn", "batched"])
def test_a_cohort_gets_what_each_of_its_members_gets_alone(choice):
    members = [blobs(spread=spread, seed=seed)[0] for seed, spread in enumerate((0.5, 1.2, 3.0))]
    _, labels = blobs()
    common = {
        "settings": Fitness(readout="raw", kmeans_init=4, kmeans=choice),
        "num_classes": 6,
        "seed": 2,
    }
    cohort = cohort_fitness(members, labels, **common)
    assert cohort == [kmeans_fitness(member, labels, **common) for member in members]
    assert len({result.value for result in cohort}) == 3
    tensors = [torch.from_numpy(member) for member in members]
    assert cohort_fitness(tensors, labels, **common) == cohort
    assert {each.backend for each in cohort} == {"sklearn" if choice == "auto" else choice}


@pytest.mark.parametrize("choice", ["auto", "batched"])
def test_a_member_without_fitness_says_why_and_changes_no_other(choice):
    (good, labels), (other, _) = blobs(), blobs(seed=1, spread=1.2)
    common = {
        "settings": Fitness(readout="raw", kmeans_init=2, kmeans=choice),
        "num_classes": 6,
        "seed": 2,
    }
    broken = good.copy()
    broken[7, 3] = np.nan
    members = [broken, good, good[:50], torch.from_numpy(broken), other]
    found = cohort_fitness(members, labels, **common)
    reason = "fitness: features of 1 of 90 clips are not finite (the first is clip 7)"
    assert found[0] == found[3] == reason
    assert found[2] == "fitness: 50 clips have features, 90 have labels"
    assert [found[1], found[4]] == cohort_fitness([good, other], labels, **common)
    assert cohort_fitness([broken], labels, **common) == [reason]
    assert cohort_fitness([], labels, **common) == []


def test_batched_fitness_is_the_mean_over_runs_of_the_best_start():
    """Every start clustered by scikit-learn; another run's better start must not count."""
    features, labels = blobs(spread=1.2)
    settings = Fitness(readout="raw", kmeans_init=3, kmeans_seeds=4, kmeans="batched")
    uniforms = kmeans.draws(5, runs=4, restarts=3, num_clusters=6)
    wide = features.astype(np.float64)
    x, _ = kmeans.centred(torch.from_numpy(wide), dtype=torch.float64)
    fits = [
        KMeans(6, init=wide[start], n_init=1).fit(wide)
        for start in kmeans.plus_plus(x[None], uniforms)[0].numpy()
    ]
    runs = [min(fits[i : i + 3], key=lambda fit: fit.inertia_) for i in range(0, 12, 3)]
    values = [agreement(labels, run.labels_).hungarian for run in runs]
    assert np.ptp(values) > 0
    found = kmeans_fitness(features, labels, settings=settings, num_classes=6, seed=5)
    assert found.value == pytest.approx(np.mean(values))
    assert found.sd == pytest.approx(np.std(values, ddof=1))


def test_batched_fitness_is_bit_equal_whatever_the_threads():
    features, labels = blobs(num_clips=400, dim=64, spread=1.5)
    common = {"settings": Fitness(readout="raw", kmeans="batched"), "num_classes": 6, "seed": 7}
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(kmeans_fitness(features, labels, **common))
    finally:
        torch.set_num_threads(before)
    assert found[0] == found[1]


@pytest.mark.parametrize("device", ["cpu", "cuda:1"])
def test_which_kmeans_a_device_gets(device, monkeypatch):
    monkeypatch.setattr(kmeans, "find_spec", lambda name: object())
    assert kmeans_backend(device) == ("sklearn" if device == "cpu" else "batched")
    assert kmeans_backend(device, "batched") == "batched"
    assert kmeans_backend(device, "sklearn") == "sklearn"
    if device == "cpu":
        with pytest.raises(ValueError, match=r"needs cuML .* and a GPU, but this runs on cpu"):
            kmeans_backend(device, "cuml")
    else:
        assert kmeans_backend(device, "cuml") == "cuml"
    monkeypatch.setattr(kmeans, "find_spec", lambda name: None)
    assert kmeans_backend(device) != "cuml"
    with pytest.raises(ValueError, match=r"fitness.kmeans = \"cuml\" needs cuML"):
        kmeans_backend(device, "cuml")


def test_cuml_clusters_from_the_same_starts(monkeypatch):
    """A stand-in with cuML's arguments, whose tolerance is not relative: scikit-learn's fit does the rest."""
    features, labels = blobs(spread=1.2)
    asked = []

    class GpuKMeans:
        def __init__(self, *, n_clusters, init, n_init, max_iter, tol, output_type):
            assert (init.dtype, init.shape, output_type) == (np.float32, (6, 24), "numpy")
            asked.append(init)
            self.tol = tol
            self.model = KMeans(n_clusters, init=init, n_init=n_init, max_iter=max_iter)

        def fit_predict(self, x):
            assert x.dtype == np.float32
            assert self.tol == pytest.approx(1e-4 * x.var(axis=0).mean(), rel=1e-5)
            found = self.model.fit_predict(x)
            self.inertia_ = self.model.inertia_
            return found

    cuml = ModuleType("cuml.cluster")
    cuml.KMeans = GpuKMeans
    monkeypatch.setitem(sys.modules, "cuml", ModuleType("cuml"))
    monkeypatch.setitem(sys.modules, "cuml.cluster", cuml)
    monkeypatch.setattr(kmeans, "kmeans_backend", lambda device, choice: choice)
    results = [
        kmeans_fitness(
            features,
            labels,
            settings=Fitness(readout="raw", kmeans_init=4, kmeans=k),
            num_classes=6,
            seed=4,
        )
        for k in ("cuml", "batched")
    ]
    assert [result.backend for result in results] == ["cuml", "batched"]
    assert results[0].metrics == results[1].metrics
    assert results[0].sd > 0
    assert len(np.unique(asked, axis=0)) == 3 * 4


def test_the_kmeans_of_a_recipe():
    assert recipe_from({"fitness": {"kmeans_init": 3}}, where="r.toml").fitness.kmeans == "auto"
    values = {"fitness": {"kmeans": "batched"}}
    assert recipe_from(values, where="r.toml").fitness.kmeans == "batched"
    with pytest.raises(RecipeError, match=r"r\.toml: fitness\.kmeans"):
        recipe_from({"fitness": {"kmeans": "faiss"}}, where="r.toml")


@pytest.mark.parametrize(("num_clips", "dim"), [(90, 24), (20, 60), (50, 1)])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_a_gpus_way_to_singular_values_gives_the_same(num_clips, dim, scale):
    rng = np.random.default_rng(0)
    features = (scale * rng.normal(size=(num_clips, 7)) @ rng.normal(size=(7, dim))).astype(
        np.float32
    )
    expected = np.linalg.svd(features.astype(np.float64), compute_uv=False)
    found = fitness_module._gram_spectrum(torch.from_numpy(features))[::-1]
    assert found / found[0] == pytest.approx(expected / expected[0], abs=1e-6)
    assert fitness_module._gram_spectrum(torch.zeros(num_clips, dim)).tolist() == [0.0] * min(
        num_clips, dim
    )


def test_effective_rank_of_known_spectra():
    rng = np.random.default_rng(0)
    left = np.linalg.qr(rng.normal(size=(40, 40)))[0]
    right = np.linalg.qr(rng.normal(size=(12, 12)))[0]

    def rank(*values):
        spectrum = np.zeros((40, 12))
        np.fill_diagonal(spectrum, [*values, *[0.0] * (12 - len(values))])
        return effective_rank(left @ spectrum @ right)

    assert rank(2.0) == pytest.approx(1.0)
    assert rank(*[3.0] * 12) == pytest.approx(12.0)
    assert rank(*[1e-3] * 5) == pytest.approx(5.0)
    # Shares 1/2, 1/4, 1/4: entropy 1.5 bits.
    assert rank(2.0, 1.0, 1.0) == pytest.approx(2**1.5)
    with pytest.raises(ValueError, match="not finite"):
        effective_rank(np.array([[1.0, np.nan]]))
