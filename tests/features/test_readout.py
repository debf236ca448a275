"""Read-outs against scikit-learn's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from sklearn.preprocessing import StandardScaler, normalize

from engine.core.recipe import Fitness
from engine.features.fitness import effective_rank, kmeans_fitness
from engine.features.readout import NAMES, READOUTS, fitted, read_out

RNG = np.random.default_rng(0)
FEATURES = (RNG.normal(size=(37, 5)) @ RNG.normal(size=(5, 9)) + 3).astype(np.float32)
FULL = RNG.normal(size=(37, 9)) * np.arange(1, 10) - 2


def test_raw_features_are_the_same_object() -> None:
    assert read_out(FEATURES, "raw") is FEATURES


def test_unit() -> None:
    expected = normalize(FULL - FULL.mean(0))
    np.testing.assert_allclose(read_out(FULL, "unit"), expected, atol=1e-12)


def test_zscore() -> None:
    expected = StandardScaler().fit_transform(FULL)
    np.testing.assert_allclose(read_out(FULL, "zscore"), expected, atol=1e-12)


@pytest.mark.parametrize("features", [FULL, FEATURES.astype(np.float64)])
def test_white_keeps_the_directions_that_there_are(features: np.ndarray) -> None:
    rank = np.linalg.matrix_rank(features - features.mean(0), tol=1e-3)
    expected = PCA(rank, whiten=True).fit_transform(features)
    found = np.asarray(read_out(features, "white"))
    assert found.shape == expected.shape
    np.testing.assert_allclose(found @ found.T, expected @ expected.T, atol=1e-8)


@pytest.mark.parametrize("how", READOUTS)
def test_arrays_and_tensors_agree_and_collapsed_features_stay_finite(how: str) -> None:
    found = read_out(torch.from_numpy(FEATURES), how)  # type: ignore[arg-type]
    assert isinstance(found, torch.Tensor)
    np.testing.assert_array_equal(found.numpy(), read_out(FEATURES, how))  # type: ignore[arg-type]
    alike = np.full((6, 4), 2.5)
    assert np.isfinite(np.asarray(read_out(alike, how))).all()  # type: ignore[arg-type]
    assert NAMES[how]  # type: ignore[index]


@pytest.mark.parametrize("how", READOUTS)
def test_fitness_clusters_what_is_read_out(how: str) -> None:
    labels = np.arange(37) % 4
    features = FULL + 3 * labels[:, None]
    common = {"num_classes": 4, "seed": 0}
    found = kmeans_fitness(features, labels, settings=Fitness(readout=how), **common)  # type: ignore[arg-type]
    scaled = np.asarray(read_out(features, how))  # type: ignore[arg-type]
    plain = kmeans_fitness(scaled, labels, settings=Fitness(readout="raw"), **common)  # type: ignore[arg-type]
    assert found.metrics == plain.metrics
    assert found.effective_rank == effective_rank(features)


@pytest.mark.parametrize("how", READOUTS)
def test_other_clips_are_scaled_as_those_that_it_was_fitted_to(how: str) -> None:
    rows = torch.from_numpy(FULL)
    scale = fitted(rows[:30], how)  # type: ignore[arg-type]
    torch.testing.assert_close(scale(rows[:30]), read_out(rows[:30], how))  # type: ignore[arg-type]
    torch.testing.assert_close(scale(rows)[:30], scale(rows[:30]))
    assert scale(rows[30:]).shape == (7, 9)
