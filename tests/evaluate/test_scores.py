"""Metrics against scikit-learn's, and against counting by hand."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans
from sklearn.metrics import confusion_matrix, top_k_accuracy_score, v_measure_score
from sklearn.metrics.cluster import contingency_matrix
from sklearn.neighbors import NearestNeighbors

from engine.evaluate import scores


def blobs(n: int = 120, d: int = 8, k: int = 5, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, k, n)
    return rng.normal(0, 2, (k, d))[labels] + rng.normal(0, 1.5, (n, d)), labels


@pytest.mark.parametrize("k", [1, 2, 5])
def test_top_k_is_scikit_learns(k: int) -> None:
    rng = np.random.default_rng(1)
    values, labels = rng.normal(size=(63, 7)), rng.integers(0, 7, 63)
    expected = top_k_accuracy_score(labels, values, k=k, labels=np.arange(7))
    assert scores.top_k(torch.from_numpy(values), labels, k) == pytest.approx(expected)


def test_equal_scores_do_not_count_as_right_for_all() -> None:
    flat = torch.zeros(10, 5)
    assert scores.top_k(flat, np.arange(10) % 5, 1) == 0.2
    assert scores.top_k(flat, np.arange(10) % 5, 5) == 1.0


def test_confusion_is_scikit_learns() -> None:
    rng = np.random.default_rng(2)
    labels, found = rng.integers(0, 4, 50), rng.integers(0, 4, 50)
    expected = confusion_matrix(labels, found, labels=range(5))
    assert (scores.confusion(found, labels, 5) == expected).all()


def test_a_videos_mean_is_over_its_clips_views() -> None:
    values = torch.tensor([[[1.0], [3.0]], [[5.0], [7.0]], [[100.0], [0.0]]])
    means, first = scores.video_means(values, np.array([9, 4, 9]))
    assert means.flatten().tolist() == [6.0, 26.0] and first.tolist() == [1, 0]


def test_retrieval_is_that_of_scikit_learns_neighbours() -> None:
    gallery, known = blobs(seed=3)
    queries, labels = blobs(40, seed=4)
    near = NearestNeighbors(n_neighbors=50, metric="cosine").fit(gallery).kneighbors(queries)[1]
    right = known[near] == labels[:, None]
    found = scores.retrieval(torch.from_numpy(queries), labels, torch.from_numpy(gallery), known)
    expected = {f"r@{k}": right[:, :k].any(1).mean() for k in (1, 5, 10, 20, 50)}
    assert found == pytest.approx(expected) and 0.2 < found["r@1"] < 0.99


def test_a_gallery_smaller_than_k_is_looked_through_whole() -> None:
    found = scores.retrieval(torch.eye(3), np.array([0, 1, 9]), torch.eye(3), np.array([0, 0, 1]))
    assert found == pytest.approx(
        {"r@1": 1 / 3, "r@5": 2 / 3, "r@10": 2 / 3, "r@20": 2 / 3, "r@50": 2 / 3}
    )


def test_cluster_scores_are_scikit_learns() -> None:
    rng = np.random.default_rng(6)
    labels, found = rng.integers(0, 5, 80), rng.integers(0, 5, 80)
    told = scores.cluster_scores(labels, found)
    counts = contingency_matrix(labels, found)
    assert told["purity"] == pytest.approx(counts.max(0).sum() / 80)
    assert told["v_measure"] == pytest.approx(v_measure_score(labels, found))
    perfect = scores.cluster_scores(labels, (labels + 2) % 5)
    assert all(value == pytest.approx(1.0) for value in perfect.values())


def test_test_videos_go_to_the_trains_clusters() -> None:
    x, labels = blobs(seed=7)
    other, truth = blobs(50, seed=7)
    model = KMeans(5, n_init=10, random_state=0).fit(x)
    told = scores.assigned_accuracy(*map_both(x, labels), model.labels_, *map_both(other, truth))
    nearest = model.predict(other)
    from scipy.optimize import linear_sum_assignment

    counts = contingency_matrix(labels, model.labels_)
    classes, matched = linear_sum_assignment(counts, maximize=True)
    meaning = dict(zip(matched, classes, strict=True))
    assert told == pytest.approx(
        np.mean([meaning[c] == t for c, t in zip(nearest, truth, strict=True)])
    )


def map_both(x: np.ndarray, labels: np.ndarray) -> tuple[torch.Tensor, np.ndarray]:
    return torch.from_numpy(x), labels


def test_spreads() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = scores.spreads([{"a": 1.0, "b": 2.0}, {"a": 3.0, "b": float("nan")}])
    assert (found["a"].mean, found["a"].n) == (2.0, 2)
    assert found["a"].sd == pytest.approx(np.std([1, 3], ddof=1))
    assert (found["b"].mean, found["b"].sd, found["b"].n) == (2.0, 0.0, 1)
