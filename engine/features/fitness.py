"""Fitness: how well k-means on clips' features finds their classes, or how near its clusters are to Zipf's law.

Shape letters: M members, S runs, N clips, D features. Nothing here trains or sees a video; labels, where there are
any, are those of the train split, and all that they decide is a number per member.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass
from statistics import fmean, stdev
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.core import recipe
from engine.core.runtime import one_thread
from engine.features import kmeans
from engine.features.agreement import Agreement, Floats, Ints, agreement, check_labels, zipf_fitness
from engine.features.kmeans import Backend
from engine.features.readout import read_out


@dataclass(frozen=True)
class FitnessResult:
    """A member's fitness and what it was made of."""

    value: float
    """Mean of ``settings.metric`` over the k-means runs: what the search maximises."""
    metrics: Agreement | None
    """Means of its measures over the k-means runs; None without labels."""
    zipf: float
    """Mean over the k-means runs of ``zipf_fitness``, which sees no label."""
    sd: float
    """Sample standard deviation of ``settings.metric`` over the k-means runs; 0 for one run."""
    effective_rank: float
    """Effective rank of the features: near 1, they have collapsed."""
    backend: Backend
    """The k-means that was run: scikit-learn's, cuML's or the engine's own batched one."""

    def measures(self) -> dict[str, float]:
        """Every measure by name, for a record."""
        agreed = {} if self.metrics is None else asdict(self.metrics)
        return {**agreed, "zipf": self.zipf, "effective_rank": self.effective_rank}


def kmeans_fitness(
    features: Floats | Tensor,
    labels: Ints | None,
    *,
    settings: recipe.Fitness,
    num_classes: int,
    seed: int,
    device: str = "cpu",
) -> FitnessResult:
    """One member's fitness, as ``cohort_fitness`` gives it; raises ValueError where there is none."""
    (result,) = cohort_fitness(
        [features], labels, settings=settings, num_classes=num_classes, seed=seed, device=device
    )
    if isinstance(result, str):
        raise ValueError(result)
    return result


def cohort_fitness(
    features: Sequence[Floats | Tensor],
    labels: Ints | None,
    *,
    settings: recipe.Fitness,
    num_classes: int,
    seed: int,
    device: str = "cpu",
) -> list[FitnessResult | str]:
    """Cluster each member's features; compare with the classes (the paper) and with Zipf's law (its follow-up).

    ``features`` (N, D) float, an array or a tensor a member, are scaled as ``settings.readout`` says, and then
    clustered; their effective rank is that of the features themselves. ``labels`` (N,) are class ids in
    [0, num_classes), or None where there are none and the metric is zipf. Clusters are ``settings.num_clusters``, or
    as many as classes. Averages ``settings.kmeans_seeds`` runs, each the best of ``settings.kmeans_init`` starts,
    whose random numbers depend on ``seed`` alone. In any company a member's numbers are the same on a CPU, to the bit
    and whatever the number of threads; on a GPU (``device`` "cuda...") up to float32's rounding.

    A member without fitness gets the reason: features that are not finite, or not one row a label. Raises
    ValueError for labels outside the classes, fewer clips than classes or clusters, a metric that wants labels where
    there are none, no number of clusters, and k-means that is not there.
    """
    backend = kmeans.kmeans_backend(device, settings.kmeans)
    num_clusters = settings.clusters_for(num_classes if labels is not None else 0)
    if labels is not None:
        labels = np.asarray(labels)
        check_labels(labels, num_classes)
    faults = [_fault(each, labels) for each in features]
    sound = [each for each, fault in zip(features, faults, strict=True) if fault is None]
    if sound and len(sound[0]) < num_clusters:
        raise ValueError(
            f"fitness: {len(sound[0])} clips are too few for {num_clusters} clusters: "
            "set fitness.num_clusters lower, or give more clips"
        )
    with one_thread():
        scaled = [read_out(each, settings.readout) for each in sound]
        clustered = kmeans.cluster(
            scaled,
            num_clusters,
            backend=backend,
            device=device,
            runs=settings.kmeans_seeds,
            restarts=settings.kmeans_init,
            seed=seed,
        )
        results = iter(
            _result(*each, labels, settings=settings, num_clusters=num_clusters, by=backend)
            for each in zip(scaled, map(effective_rank, sound), clustered, strict=True)
        )
        return [next(results) if fault is None else fault for fault in faults]


def effective_rank(features: Floats | Tensor) -> float:
    """Exponential of the entropy of the singular values scaled to sum 1 (Roy & Vetterli 2007).

    ``features`` (N, D), not centred; a tensor on a GPU is judged there. Between 1 (all clips have the same
    features, up to scale) and min(N, D) (all directions equally strong); 0 for features that are all zero.
    Raises ValueError for features that are not finite.
    """
    if (fault := _fault(features)) is not None:
        raise ValueError(fault)
    with one_thread():
        if isinstance(features, Tensor) and features.is_cuda:
            values = _gram_spectrum(features)
        else:
            values = np.linalg.svd(kmeans.float64(features), compute_uv=False)
    total = values.sum()
    if total == 0.0:
        return 0.0
    shares = values[values > 0.0] / total
    shares = shares[shares > 0.0]  # a share can underflow where its singular value does not
    return float(np.exp(-(shares * np.log(shares)).sum()))


def _result(
    features: Floats | Tensor,
    rank: float,
    runs: Ints,
    labels: Ints | None,
    *,
    settings: recipe.Fitness,
    num_clusters: int,
    by: Backend,
) -> FitnessResult:
    """The fitness of a member, of its scaled features (N, D), their rank before that, and its clusters (S, N)."""
    s = settings.zipf_exponent
    zipf = [zipf_fitness(features, run, num_clusters=num_clusters, exponent=s) for run in runs]
    agreed = [] if labels is None else [agreement(labels, run) for run in runs]
    values = [getattr(each, settings.metric) for each in agreed] if settings.uses_labels else zipf
    metrics = Agreement(*map(fmean, zip(*map(astuple, agreed), strict=True))) if agreed else None
    return FitnessResult(
        value=fmean(values),
        metrics=metrics,
        zipf=fmean(zipf),
        sd=stdev(values) if len(values) > 1 else 0.0,
        effective_rank=rank,
        backend=by,
    )


def _gram_spectrum(features: Tensor) -> Floats:
    """Singular values, by way of the smaller Gram matrix: far less work for a GPU than an SVD.

    What squares lose in float64, values under 1e-8 of the largest, is below float32's own rounding.
    """
    wide = features.double()
    gram = wide.T @ wide if wide.shape[0] > wide.shape[1] else wide @ wide.T
    values: Floats = torch.linalg.eigvalsh(gram).clamp(min=0.0).sqrt().cpu().numpy()
    return values


def _fault(features: Any, labels: Ints | None = None) -> str | None:
    """The reason why features can't be judged; None where they can."""
    shape, on_torch = tuple(features.shape), isinstance(features, Tensor)
    library: Any = torch if on_torch else np
    is_float = features.is_floating_point() if on_torch else features.dtype.kind == "f"
    if len(shape) != 2 or 0 in shape or not is_float:
        return (
            "fitness: features must be floats of shape (clips, features),"
            f" not {features.dtype} of shape {shape}"
        )
    finite = library.isfinite(features).all(1)
    bad = ~(finite.cpu().numpy() if on_torch else finite)
    if bad.any():
        return (
            f"fitness: features of {bad.sum()} of {len(features)} clips are not finite"
            f" (the first is clip {int(bad.argmax())})"
        )
    if labels is not None and len(labels) != len(features):
        return f"fitness: {len(features)} clips have features, {len(labels)} have labels"
    return None
