"""Fitness against hand-made tables, brute force, scikit-learn's own formulas and its threads."""

from __future__ import annotations

import sys
import warnings
from itertools import permutations
from math import log
from types import ModuleType

import numpy as np
import pytest
from sklearn.cluster import KMeans
from threadpoolctl import threadpool_info, threadpool_limits

from engine import fitness
from engine.fitness import agreement, effective_rank, kmeans_fitness
from engine.recipe import Fitness


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
    settings = Fitness(kmeans_init=1, kmeans_seeds=5)
    runs = [
        agreement(
            labels,
            KMeans(6, n_init=1, random_state=fitness._run_seed(3, run)).fit_predict(
                features.astype(np.float64)
            ),
        )
        for run in range(5)
    ]
    for metric in ("hungarian", "nmi", "ari"):
        values = [getattr(run, metric) for run in runs]
        assert np.ptp(values) > 0  # else the mean is no test
        settings = Fitness(metric=metric, kmeans_init=1, kmeans_seeds=5)
        found = kmeans_fitness(features, labels, settings=settings, num_classes=6, seed=3)
        assert found.value == pytest.approx(np.mean(values))
        assert found.sd == pytest.approx(np.std(values, ddof=1))
        assert getattr(found.metrics, metric) == found.value
    assert found.backend == "sklearn"
    assert found.effective_rank == effective_rank(features)


def test_fitness_separates_good_features_from_none():
    def value(spread):
        features, labels = blobs(spread=spread)
        return kmeans_fitness(features, labels, settings=Fitness(), num_classes=6, seed=0).value

    assert value(0.2) == 1.0
    assert 1 / 6 < value(100.0) < 0.45


@pytest.mark.parametrize("power", [-100, -1, 100])
def test_fitness_does_not_depend_on_scale(power):
    features, labels = blobs(spread=1.2)  # whose squares float32 can't hold at 2^100 and 2^-100

    def value(x):
        return kmeans_fitness(x, labels, settings=Fitness(), num_classes=6, seed=0).value

    assert value(np.ldexp(features, power)) == value(features)


@pytest.mark.parametrize("fill", [0.0, 3.5])
def test_collapsed_features_score_one_class_without_a_warning(fill):
    _, labels = blobs()
    features = np.full((90, 8), fill, np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = kmeans_fitness(features, labels, settings=Fitness(), num_classes=6, seed=0)
    assert found.value == pytest.approx(1 / 6)
    assert found.sd == 0.0
    assert found.effective_rank == pytest.approx(1.0 if fill else 0.0)


def test_fitness_is_bit_equal_for_a_seed_whatever_the_threads():
    # More than 256 clips: scikit-learn deals out blocks of 256 to its threads.
    features, labels = blobs(700, 10, 64, spread=3.0)
    settings = Fitness(kmeans_init=2, kmeans_seeds=2)
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

    monkeypatch.setattr(fitness, "KMeans", Spy)
    features, labels = blobs()
    with threadpool_limits(2):
        before = threadpool_info()
        kmeans_fitness(features, labels, settings=Fitness(), num_classes=6, seed=0)
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
        kmeans_fitness(features, labels, settings=Fitness(), num_classes=6, seed=0)
    assert "\n" not in str(error.value)


def test_cuml_serves_a_gpu_only_where_it_is_installed(monkeypatch):
    monkeypatch.setattr(fitness, "find_spec", lambda name: object())
    assert fitness.kmeans_backend("cuda:1") == "cuml"
    assert fitness.kmeans_backend("cpu") == "sklearn"
    monkeypatch.setattr(fitness, "find_spec", lambda name: None)
    assert fitness.kmeans_backend("cuda") == "sklearn"


def test_cuml_is_asked_for_the_same_clustering(monkeypatch):
    asked = []

    class GpuKMeans:
        def __init__(self, *, n_clusters, n_init, random_state, output_type):
            assert output_type == "numpy"
            asked.append(random_state)
            self.model = KMeans(n_clusters, n_init=n_init, random_state=random_state)

        def fit_predict(self, x):
            assert x.dtype == np.float32
            return self.model.fit_predict(x.astype(np.float64))

    cuml = ModuleType("cuml.cluster")
    cuml.KMeans = GpuKMeans
    monkeypatch.setitem(sys.modules, "cuml", ModuleType("cuml"))
    monkeypatch.setitem(sys.modules, "cuml.cluster", cuml)
    monkeypatch.setattr(fitness, "find_spec", lambda name: object())
    features, labels = blobs(spread=1.2)
    arguments = {"settings": Fitness(kmeans_init=2), "num_classes": 6, "seed": 4}
    gpu = kmeans_fitness(features, labels, device="cuda:0", **arguments)
    cpu = kmeans_fitness(features, labels, **arguments)
    assert gpu.backend == "cuml"
    assert gpu.metrics == cpu.metrics
    assert len(set(asked)) == 3


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
