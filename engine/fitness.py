"""Fitness: how well k-means on clips' features finds their classes, or how near its clusters are to Zipf's law.

Shape letters: M members, S runs, N clips, D features. Nothing here trains or sees a video; labels, where there are
any, are those of the train split, and all that they decide is a number per member.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass
from functools import cache
from importlib.util import find_spec
from statistics import fmean, stdev
from typing import Any, Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.cluster import KMeans  # type: ignore[import-untyped]
from sklearn.exceptions import ConvergenceWarning  # type: ignore[import-untyped]
from threadpoolctl import ThreadpoolController  # type: ignore[import-untyped]
from torch import Tensor

from engine import kmeans, recipe
from engine.agreement import Agreement, Ints, agreement, check_labels
from engine.readout import read_out
from engine.zipf import zipf_fitness

Floats = NDArray[np.floating[Any]]
Backend = Literal["sklearn", "cuml", "batched"]

AUTO: dict[str, Backend] = {"cpu": "sklearn", "cuda": "batched"}
"""What ``auto`` stands for, by type of device; a measurement may change it.

A CPU is bound by arithmetic, of which scikit-learn does half: it adds up a cluster's clips where the batched
one multiplies by one-hot assignments. On a GPU one clustering of some thousand clips is bound by launches,
and the batched one needs as many for all members, runs and starts as cuML for a single start.
"""


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
    """Whose k-means was run: scikit-learn's, cuML's or the engine's own batched one."""

    def measures(self) -> dict[str, float]:
        """All that was measured, by name; for a record."""
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
    backend = kmeans_backend(device, settings.kmeans)
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
    if backend != "sklearn":
        sound = [_on_device(each, device) for each in sound]
    cluster = {"sklearn": _cluster_sklearn, "cuml": _cluster_cuml, "batched": _cluster_batched}
    with _one_thread():
        scaled = [read_out(each, settings.readout) for each in sound]
        clustered = cluster[backend](scaled, num_clusters, settings, seed) if sound else []
        ranks = [effective_rank(each) for each in sound]
        results = iter(
            _result(*each, labels, settings=settings, num_clusters=num_clusters, by=backend)
            for each in zip(scaled, ranks, clustered, strict=True)
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
    with _one_thread():
        if isinstance(features, Tensor) and features.is_cuda:
            values = _gram_spectrum(features)
        else:
            values = np.linalg.svd(_float64(features), compute_uv=False)
    total = values.sum()
    if total == 0.0:
        return 0.0
    shares = values[values > 0.0] / total
    shares = shares[shares > 0.0]  # a share can underflow where its singular value does not
    return float(np.exp(-(shares * np.log(shares)).sum()))


def kmeans_backend(device: str, choice: str = "auto") -> Backend:
    """Whose k-means a device gets for a choice of ``fitness.kmeans``.

    Raises ValueError for cuML where it is not installed or there is no GPU.
    """
    if choice == "cuml" and (not device.startswith("cuda") or find_spec("cuml") is None):
        lacking = "it is not installed" if device.startswith("cuda") else f"this runs on {device}"
        raise ValueError(
            f'fitness.kmeans = "cuml" needs cuML (extra cuda12 or cuda13) and a GPU, but {lacking}:'
            ' write "auto"'
        )
    return (
        AUTO.get(device.partition(":")[0], "sklearn") if choice == "auto" else cast(Backend, choice)
    )


def _cluster_sklearn(
    members: Sequence[Any], num_clusters: int, settings: recipe.Fitness, seed: int
) -> list[Ints]:
    # float64: faster than float32 at these sizes, and no square of a finite float32 overflows.
    def one_run(features: Floats, run: int) -> Ints:
        model = KMeans(num_clusters, n_init=settings.kmeans_init, random_state=_run_seed(seed, run))
        clusters: Ints = model.fit_predict(_float64(features))
        return clusters

    with warnings.catch_warnings():
        # Collapsed features have fewer distinct points than clusters: a low fitness, not a warning.
        warnings.simplefilter("ignore", ConvergenceWarning)
        return [
            np.stack([one_run(features, run) for run in range(settings.kmeans_seeds)])
            for features in members
        ]


def _cluster_batched(
    members: Sequence[Any], num_clusters: int, settings: recipe.Fitness, seed: int
) -> list[Ints]:
    found = kmeans.kmeans(members, _draws(num_clusters, settings, seed))
    both = zip(found.labels.cpu().numpy(), found.inertia.cpu().numpy(), strict=True)
    return [kmeans.best_of_runs(*each, runs=settings.kmeans_seeds) for each in both]


def _cluster_cuml(
    members: Sequence[Any], num_clusters: int, settings: recipe.Fitness, seed: int
) -> list[Ints]:
    from cuml.cluster import KMeans as GpuKMeans

    draws = _draws(num_clusters, settings, seed)
    clusters: list[Ints] = []
    for features in members:
        x, _ = kmeans.centred(features, dtype=torch.float32)
        tolerance = kmeans.TOLERANCE * float(x.square().mean())  # cuML's is not relative
        labels, inertia = [], []
        for start in kmeans.plus_plus(x[None], draws)[0]:
            model = GpuKMeans(
                n_clusters=num_clusters,
                init=_cuml_array(x[start]),
                n_init=1,
                max_iter=kmeans.MAX_ITERATIONS,
                tol=tolerance,
                output_type="numpy",
            )
            labels.append(np.asarray(model.fit_predict(_cuml_array(x))).astype(np.int64))
            inertia.append(float(model.inertia_))
        clusters.append(kmeans.best_of_runs(np.stack(labels), inertia, runs=settings.kmeans_seeds))
    return clusters


def _draws(num_clusters: int, settings: recipe.Fitness, seed: int) -> NDArray[np.float64]:
    runs, restarts = settings.kmeans_seeds, settings.kmeans_init
    return kmeans.draws(seed, runs=runs, restarts=restarts, num_clusters=num_clusters)


def _cuml_array(tensor: Tensor) -> Any:
    """The same memory as cuML takes it; cuML works on a stream of its own."""
    if not tensor.is_cuda:
        return tensor.numpy()
    import cupy

    torch.cuda.synchronize(tensor.device)
    return cupy.asarray(tensor)


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
    """Of one member's scaled features (N, D), their rank before that, and their clusters in each run (S, N)."""
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


def _float64(features: Floats | Tensor) -> NDArray[np.float64]:
    if isinstance(features, Tensor):
        features = features.detach().cpu().double().numpy()
    return np.asarray(features, np.float64)


def _on_device(features: Floats | Tensor, device: str) -> Tensor:
    if not isinstance(features, Tensor):
        features = torch.from_numpy(np.ascontiguousarray(features))
    return features.detach().to(device)


def _run_seed(seed: int, run: int) -> int:
    """A seed in [0, 2^31) for one k-means run, unrelated to its neighbours'."""
    return int(np.random.SeedSequence(seed, spawn_key=(run,)).generate_state(1)[0] >> 1)


@cache
def _thread_pools() -> ThreadpoolController:
    return ThreadpoolController()  # cached: finding the loaded libraries takes milliseconds


def _one_thread() -> Any:
    """Limit BLAS and OpenMP to one thread: with more, sums depend on which thread ends first."""
    return _thread_pools().limit(limits=1)


def _fault(features: Any, labels: Ints | None = None) -> str | None:
    """Why features can't be judged, where they can't."""
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
