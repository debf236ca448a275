"""Zipf's law against the follow-up's formula written out, scipy's entropy and distribution, and its limits."""

from __future__ import annotations

from math import exp, log

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.stats import entropy, zipfian

from engine.core.recipe import Fitness
from engine.features.agreement import cluster_shares, zipf_divergence, zipf_fitness
from engine.features.fitness import cohort_fitness, kmeans_fitness

Array = NDArray[np.float64]


def overlapping(num_clips: int = 40, num_clusters: int = 4, dim: int = 3) -> tuple[Array, Array]:
    rng = np.random.default_rng(7)
    clusters = np.arange(num_clips) % num_clusters
    centres = rng.normal(size=(num_clusters, dim))
    return centres[clusters] + rng.normal(size=(num_clips, dim)), clusters


def shares_by_hand(x: Array, clusters: Array, k: int) -> list[float]:
    """p(c) = mean over clips of p(c | x), Bayes' rule with equal priors, one clip and one cluster at a time."""
    centroids = [
        [sum(row[d] for row in x[clusters == c]) / (clusters == c).sum() for d in range(x.shape[1])]
        for c in range(k)
    ]
    far = [[sum((a - b) ** 2 for a, b in zip(row, c, strict=True)) for c in centroids] for row in x]
    t = sum(row[c] for row, c in zip(far, clusters, strict=True)) / len(x)
    p = [[exp(-d / t) for d in row] for row in far]
    return [sum(row[c] / sum(row) for row in p) / len(x) for c in range(k)]


@pytest.mark.parametrize("exponent", [0.5, 1.0, 2.0])
def test_the_formula_of_the_paper_by_hand(exponent: float) -> None:
    x, clusters = overlapping()
    p = sorted(shares_by_hand(x, clusters, 4), reverse=True)
    harmonic = sum(i**-exponent for i in range(1, 5))
    q = [i**-exponent / harmonic for i in range(1, 5)]
    expected = exp(-sum(a * log(a / b) for a, b in zip(p, q, strict=True)))
    found = zipf_fitness(x, clusters, num_clusters=4, exponent=exponent)
    assert found == pytest.approx(expected, rel=1e-12)
    as_tensor = torch.from_numpy(x).requires_grad_()
    assert zipf_fitness(as_tensor, clusters, num_clusters=4, exponent=exponent) == found


@pytest.mark.parametrize("exponent", [0.7, 1.0, 1.9])
def test_the_divergence_is_scipys(exponent: float) -> None:
    rng = np.random.default_rng(0)
    for k in (2, 5, 51):
        p = rng.dirichlet(np.ones(k))
        law = zipfian.pmf(np.arange(1, k + 1), exponent, k)
        expected = entropy(np.sort(p)[::-1], law)
        assert zipf_divergence(p, exponent=exponent) == pytest.approx(expected, rel=1e-9)


def points_of(sizes: list[int], *, noise: float = 0.0) -> tuple[Array, Array]:
    """Clusters of these sizes, far apart on the axes."""
    clusters = np.repeat(np.arange(len(sizes)), sizes)
    x = 100.0 * np.eye(len(sizes))[clusters]
    return x + noise * np.random.default_rng(0).normal(size=x.shape), clusters


def test_clusters_that_follow_the_law_have_the_highest_fitness() -> None:
    for noise in (0.0, 0.01):
        x, clusters = points_of([60, 30, 20, 15, 12], noise=noise)
        assert zipf_fitness(x, clusters, num_clusters=5) == pytest.approx(1.0, abs=1e-9)
        order = np.random.default_rng(1).permutation(len(x))
        renamed = np.array([3, 0, 4, 1, 2])[clusters]
        again = zipf_fitness(x[order], renamed[order], num_clusters=5)
        assert again == pytest.approx(1.0, abs=1e-9)  # whatever the clusters are called
    x, clusters = points_of([36, 9, 4], noise=0.01)
    assert zipf_fitness(x, clusters, num_clusters=3, exponent=2.0) == pytest.approx(1.0, abs=1e-9)
    assert zipf_fitness(x, clusters, num_clusters=3) < 0.97


def test_uniform_clusters_and_a_single_one() -> None:
    harmonic = sum(1 / i for i in range(1, 7))
    x, clusters = points_of([8] * 6, noise=0.01)
    uniform = exp(log(6) + np.mean([log(1 / i / harmonic) for i in range(1, 7)]))
    assert zipf_fitness(x, clusters, num_clusters=6) == pytest.approx(uniform, rel=1e-9)
    for x in (np.full((48, 3), 7.5), np.random.default_rng(0).normal(size=(48, 3))):
        one = np.zeros(48, int)
        assert zipf_fitness(x, one, num_clusters=6) == pytest.approx(1 / harmonic, rel=1e-12)
    assert 1 / harmonic < uniform < 1.0


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1e3, 1e30])
def test_neither_scale_nor_shift_matters(scale: float) -> None:
    x, clusters = overlapping()
    plain = cluster_shares(x, clusters, num_clusters=4)
    assert 0.0 < plain.min() < plain.max() < 1.0 and plain.sum() == pytest.approx(1.0)
    scaled = cluster_shares(scale * x, clusters, num_clusters=4)
    assert scaled == pytest.approx(plain, rel=1e-9)
    assert cluster_shares(x + 50.0, clusters, num_clusters=4) == pytest.approx(plain, rel=1e-9)


def test_assignment_is_soft_where_clusters_overlap_and_hard_where_they_do_not() -> None:
    rng = np.random.default_rng(0)
    clusters = np.repeat([0, 1], [30, 10])
    noise = rng.normal(size=(40, 2))
    shares = [
        cluster_shares(noise + gap * clusters[:, None], clusters, num_clusters=3).max()
        for gap in (0.0, 1.0, 3.0, 30.0)
    ]
    assert shares == sorted(shares) and shares[0] < 0.6
    assert shares[-1] == pytest.approx(0.75, abs=1e-6)


def blobs(labels: NDArray[np.int64], spread: float) -> NDArray[np.float32]:
    rng = np.random.default_rng(3)
    centres = rng.normal(size=(labels.max() + 1, 16))
    return (centres[labels] + spread * rng.normal(size=(len(labels), 16))).astype(np.float32)


@pytest.mark.parametrize("backend", ["sklearn", "batched"])
def test_a_fitness_without_labels(backend: str) -> None:
    labels = np.repeat(np.arange(6), [24, 12, 8, 6, 5, 4])
    settings = Fitness(metric="zipf", num_clusters=6, kmeans=backend)
    members = [blobs(labels, spread) for spread in (0.05, 1.5)]
    common = {"settings": settings, "seed": 4}
    blind = cohort_fitness(members, None, num_classes=0, **common)
    assert blind == cohort_fitness(members, None, num_classes=0, **common)
    for found, each in zip(blind, members, strict=True):
        assert found.metrics is None and found.value == found.zipf
        assert set(found.measures()) == {"zipf", "effective_rank"}
        # labels that are there are reported, and decide nothing
        seen = kmeans_fitness(each, labels, num_classes=6, **common)
        assert (seen.value, seen.zipf, seen.sd) == (found.value, found.zipf, found.sd)
        assert set(seen.measures()) == {"hungarian", "nmi", "ari", "zipf", "effective_rank"}
    assert blind[0].value > 0.99 > 0.95 > blind[1].value
    assert not settings.uses_labels and Fitness().uses_labels


def test_both_backends_find_the_same_law() -> None:
    labels = np.repeat(np.arange(6), [24, 12, 8, 6, 5, 4])
    found = [
        kmeans_fitness(
            blobs(labels, 0.2), labels, settings=Fitness(kmeans=k), num_classes=6, seed=0
        )
        for k in ("sklearn", "batched")
    ]
    assert found[0].zipf == pytest.approx(found[1].zipf, rel=1e-12)
    assert found[0].metrics == found[1].metrics


def test_what_can_not_be_judged_without_labels() -> None:
    x = blobs(np.arange(20) % 4, 1.0)
    ask = {"num_classes": 0, "seed": 0}
    with pytest.raises(ValueError, match=r"set fitness\.num_clusters"):
        kmeans_fitness(x, None, settings=Fitness(metric="zipf"), **ask)
    with pytest.raises(ValueError, match=r'"nmi" needs labelled clips.*fitness\.metric=zipf'):
        kmeans_fitness(x, None, settings=Fitness(metric="nmi", num_clusters=3), **ask)
    with pytest.raises(ValueError, match="20 clips are too few for 21 clusters"):
        kmeans_fitness(x, None, settings=Fitness(metric="zipf", num_clusters=21), **ask)


def test_more_clusters_than_classes() -> None:
    labels = np.arange(60) % 3
    settings = Fitness(num_clusters=6)
    found = kmeans_fitness(blobs(labels, 0.1), labels, settings=settings, num_classes=3, seed=0)
    assert found.metrics is not None and found.value < 0.9  # three of six clusters stay unmatched
    same = kmeans_fitness(blobs(labels, 0.1), labels, settings=Fitness(), num_classes=3, seed=0)
    assert same.value == 1.0
