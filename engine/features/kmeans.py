"""K-means by scikit-learn, by cuML, or by Lloyd's iterations on many problems at once.

The batched one takes every member from every start in one batch of products.
Shape letters: M members, R starts, N clips, D features, K clusters, C candidates. A member's features
enter each product once, whatever the number of starts; its clusters lie beside each other, (M, R*K, D).
No sum depends on the order in which threads end: centres are a product with one-hot assignments.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.cluster import KMeans  # type: ignore[import-untyped]
from sklearn.exceptions import ConvergenceWarning  # type: ignore[import-untyped]
from torch import Tensor

from engine.core.runtime import ieee_products

Floats = NDArray[np.floating[Any]]
Ints = NDArray[np.int64]
Backend = Literal["sklearn", "cuml", "batched"]

AUTO: dict[str, Backend] = {"cpu": "sklearn", "cuda": "batched"}
"""The k-means that ``auto`` stands for, by type of device; a measurement may change it.

A CPU is bound by arithmetic, of which scikit-learn does half: it adds up a cluster's clips where the batched
one multiplies by one-hot assignments. On a GPU one clustering of some thousand clips is bound by launches,
and the batched one needs as many for all members, runs and starts as cuML for a single start.
"""
NAMES: dict[Backend, str] = {
    "sklearn": "scikit-learn's k-means",
    "cuml": "cuML's k-means",
    "batched": "batched Lloyd iterations",
}
"""In words, for a protocol."""
TOLERANCE = 1e-4
"""scikit-learn's: share of the mean variance below which the centres' squared shift ends a run."""
MAX_ITERATIONS = 300
CHECK_EVERY = 4
"""Iterations between two checks, from the host, of what has converged on a GPU."""
NOISE = 32.0
"""Squared distances below this many roundings of the point's squared norm are taken for zero."""
MEMORY = 2**30
"""Bytes that one chunk of problems may take on a GPU."""


class Clusterings(NamedTuple):
    """The clusters of every member from every start."""

    labels: Tensor
    """(M, R, N) int64: each clip's cluster."""
    inertia: Tensor
    """(M, R) float64: sum of squared distances of the clips to their centres, in the features' units."""
    iterations: Tensor
    """(M, R) int64: iterations until convergence."""


def kmeans_backend(device: str, choice: str = "auto") -> Backend:
    """The k-means that a device runs for a choice of ``fitness.kmeans``.

    Raises ValueError for cuML where it is not installed or there is no GPU.
    """
    if choice == "cuml" and (not device.startswith("cuda") or find_spec("cuml") is None):
        lacking = "it is not installed" if device.startswith("cuda") else f"this runs on {device}"
        raise ValueError(
            f'fitness.kmeans = "cuml" needs cuML (extra cuda12 or cuda13) and a GPU, but {lacking}:'
            ' write "auto"'
        )
    own = AUTO.get(device.partition(":")[0], "sklearn")
    return own if choice == "auto" else cast(Backend, choice)


def cluster(
    members: Sequence[Floats | Tensor],
    num_clusters: int,
    *,
    backend: Backend,
    device: str,
    runs: int,
    restarts: int,
    seed: int,
) -> list[Ints]:
    """Clusters (runs, N) of each member's features (N, D), finite: each run's the best of ``restarts`` starts.

    Random numbers depend on ``seed`` and the run alone.
    """
    if not members:
        return []
    if backend == "sklearn":
        return [_by_sklearn(x, num_clusters, runs, restarts, seed) for x in members]
    starts = draws(seed, runs=runs, restarts=restarts, num_clusters=num_clusters)
    tensors = [_on_device(each, device) for each in members]
    if backend == "cuml":
        return [_by_cuml(x, num_clusters, starts, runs) for x in tensors]
    labels, inertia, _ = (each.cpu().numpy() for each in kmeans(tensors, starts))
    return [best_of_runs(*each, runs=runs) for each in zip(labels, inertia, strict=True)]


def _by_sklearn(
    features: Floats | Tensor, num_clusters: int, runs: int, restarts: int, seed: int
) -> Ints:
    # float64: faster than float32 at these sizes, and no square of a finite float32 overflows.
    x = float64(features)
    seeds = [run_seed(seed, run) for run in range(runs)]
    with warnings.catch_warnings():
        # Collapsed features have fewer distinct points than clusters: a low fitness, not a warning.
        warnings.simplefilter("ignore", ConvergenceWarning)
        models = [KMeans(num_clusters, n_init=restarts, random_state=each) for each in seeds]
        return np.stack([model.fit_predict(x) for model in models]).astype(np.int64)


def _by_cuml(features: Tensor, num_clusters: int, starts: NDArray[np.float64], runs: int) -> Ints:
    from cuml.cluster import KMeans as GpuKMeans

    x, _ = centred(features, dtype=torch.float32)
    how: dict[str, Any] = {"n_clusters": num_clusters, "n_init": 1, "max_iter": MAX_ITERATIONS}
    how["tol"] = TOLERANCE * float(x.square().mean())  # cuML's is not relative
    labels, inertia = [], []
    for start in plus_plus(x[None], starts)[0]:
        model = GpuKMeans(**how, init=_cuml_array(x[start]), output_type="numpy")
        labels.append(np.asarray(model.fit_predict(_cuml_array(x))).astype(np.int64))
        inertia.append(float(model.inertia_))
    return best_of_runs(np.stack(labels), inertia, runs=runs)


def _cuml_array(tensor: Tensor) -> Any:
    """The same memory as cuML takes it; cuML works on a stream of its own."""
    if not tensor.is_cuda:
        return tensor.numpy()
    import cupy

    torch.cuda.synchronize(tensor.device)
    return cupy.asarray(tensor)


def run_seed(seed: int, run: int) -> int:
    """A seed in [0, 2^31) for one of scikit-learn's runs, unrelated to its neighbours'."""
    return int(np.random.SeedSequence(seed, spawn_key=(run,)).generate_state(1)[0] >> 1)


def float64(features: Floats | Tensor) -> NDArray[np.float64]:
    """An array on the CPU."""
    if isinstance(features, Tensor):
        features = features.detach().cpu().double().numpy()
    return np.asarray(features, np.float64)


def _on_device(features: Floats | Tensor, device: str) -> Tensor:
    if not isinstance(features, Tensor):
        features = torch.from_numpy(np.ascontiguousarray(features))
    return features.detach().to(device)


def draws(seed: int, *, runs: int, restarts: int, num_clusters: int) -> NDArray[np.float64]:
    """Uniform numbers in [0, 1) for the starts: (runs * restarts, num_clusters, C), a run after the other.

    A start's depend on seed, run and restart alone, so every member starts with the same luck, in any company
    and on any device. C is scikit-learn's number of candidates per centre, 2 + floor(log K).
    """
    shape = (num_clusters, 2 + int(math.log(num_clusters)))
    keys = [(run, restart) for run in range(runs) for restart in range(restarts)]
    streams = [np.random.Philox(np.random.SeedSequence(seed, spawn_key=key)) for key in keys]
    return np.stack([np.random.Generator(stream).random(shape) for stream in streams])


def centred(features: Tensor, *, dtype: torch.dtype) -> tuple[Tensor, float]:
    """Features (N, D) less their mean, over a power of two that brings them within [-1, 1]; and that power.

    K-means is blind to both, and in float32 distances are then exact enough and never overflow.
    """
    wide = features.double()
    wide = wide - wide.mean(0)
    exponent = max(-1000, min(1000, math.frexp(float(wide.abs().max()))[1]))
    return wide.mul_(math.ldexp(1.0, -exponent)).to(dtype), math.ldexp(1.0, exponent)


@torch.no_grad()
def plus_plus(x: Tensor, uniforms: NDArray[np.float64]) -> Tensor:
    """Greedy k-means++ (Arthur & Vassilvitskii 2007): the clips (M, R, K) int64 to start from.

    ``x`` (M, N, D) is centred; ``uniforms`` (R, K, C) are from ``draws``. Each centre after the first is the
    one of C candidates, drawn in proportion to the squared distance to the nearest centre, that leaves the
    least sum of such distances.
    """
    num_clips = x.shape[1]
    luck = torch.from_numpy(uniforms).to(x.device)
    norms = x.square().sum(-1)
    slack = NOISE * torch.finfo(x.dtype).eps * norms.sum(1)[:, None, None]
    first = (luck[:, :1, 0] * num_clips).long().clamp_(max=num_clips - 1)  # (R, 1)
    chosen = [first.expand(len(x), -1, -1)]
    with ieee_products():
        nearest = _to_clips(x, norms, chosen[0]).squeeze(2)  # (M, R, N)
        for step in range(1, luck.shape[1]):
            sums = nearest.cumsum(-1, dtype=torch.float64)
            targets = luck[:, step] * sums[..., -1:]
            candidates = torch.searchsorted(sums, targets).clamp_(max=num_clips - 1)  # (M, R, C)
            left = torch.minimum(nearest.unsqueeze(2), _to_clips(x, norms, candidates))
            rest = left.sum(-1, dtype=torch.float64)
            # Of two clips that are each other's nearest, either leaves the same: take the first.
            best = (rest <= rest.amin(2, keepdim=True) + slack).int().argmax(2, keepdim=True)
            nearest = _picked(left, best, dim=2).squeeze(2)
            chosen.append(candidates.gather(2, best))
    return torch.cat(chosen, dim=2)


def kmeans(
    features: Sequence[Tensor],
    uniforms: NDArray[np.float64],
    *,
    dtype: torch.dtype | None = None,
    chunk: tuple[int, int] | None = None,
) -> Clusterings:
    """Cluster every member's features from every start of ``plus_plus``.

    ``features`` are M float tensors (N, D), finite, of one shape, on one device; ``uniforms`` (R, K, C) are
    from ``draws``. ``dtype`` is float32 on a GPU and float64 on a CPU by default. ``chunk``, (members,
    starts) computed at once, is what ``MEMORY`` holds; on a CPU it is one member, whose bits are then the same
    in any company. On a GPU they can differ with the company, for a library may choose another kernel for
    a batch of another size. Raises ValueError for members of different shapes.
    """
    shapes = sorted({tuple(rows.shape) for rows in features})
    if len(shapes) != 1:
        raise ValueError(f"k-means: members' features must have one shape, not {shapes}")
    on_cpu = features[0].device.type == "cpu"
    dtype = dtype or (torch.float64 if on_cpu else torch.float32)
    restarts, num_clusters, _ = uniforms.shape
    members, width = chunk or _chunk(shapes[0], restarts, num_clusters, bytes_each=dtype.itemsize)
    if on_cpu and chunk is None:
        members = 1
    results = []
    for first in range(0, len(features), members):
        scaled = [centred(rows, dtype=dtype) for rows in features[first : first + members]]
        x = torch.stack([rows for rows, _ in scaled])
        at = torch.arange(len(x), device=x.device)[:, None, None]
        starts = plus_plus(x, uniforms)
        runs = [lloyd(x, x[at, starts[:, i : i + width]]) for i in range(0, restarts, width)]
        whole = _joined(runs, dim=1)
        scale = torch.tensor([[by] for _, by in scaled], dtype=torch.float64, device=x.device)
        results.append(whole._replace(inertia=whole.inertia * scale * scale))
    return _joined(results, dim=0)


@torch.no_grad()
def lloyd(x: Tensor, centres: Tensor, *, check_every: int | None = None) -> Clusterings:
    """Lloyd's iterations from some centres, to scikit-learn's rules; inertia in the units of ``x``.

    ``x`` (M, N, D) is centred; ``centres`` (M, R, K, D) are in its dtype, K at most N. An empty cluster gets
    the clip farthest from its centre; a run ends when no label changes, when the centres shift by less than
    ``TOLERANCE`` allows, or after ``MAX_ITERATIONS``. A problem that has converged no longer changes, and
    leaves the batch at the next check, every ``check_every`` iterations.
    """
    every = check_every or (1 if x.device.type == "cpu" else CHECK_EVERY)
    with ieee_products():
        whole = work = _Batch.new(x, centres)
        for iteration in range(1, MAX_ITERATIONS + 1):
            work = _iterate(work)
            if iteration % every == 0:
                left: list[int] = work.active.sum(1).tolist()  # the only wait for the device
                if not any(left):
                    break
                if min(left) == 0 or max(left) < work.active.shape[1]:
                    _write_back(work, whole)
                    work = _narrow(work, left)
        _write_back(work, whole)
        # Centres may coincide: with rounding taken as no distance, equal clips go to the same one.
        labels = _distances(_scores(x, whole.centres), whole.norms[:, None, None]).min(dim=2)[1]
        return Clusterings(labels, _inertia(x, labels, whole.centres), whole.iterations)


def best_of_runs(
    labels: NDArray[np.int64], inertia: Sequence[float] | NDArray[np.float64], *, runs: int
) -> NDArray[np.int64]:
    """Labels (runs, N) of each run's start with the least inertia, of a member's labels (runs * restarts, N)."""
    best = np.reshape(inertia, (runs, -1)).argmin(1)
    chosen: NDArray[np.int64] = labels[best + len(labels) // runs * np.arange(runs)]
    return chosen


@dataclass(frozen=True)
class _Batch:
    """Problems at work, and where each is in the whole: members (m,), restarts (m, r)."""

    x: Tensor
    norms: Tensor
    """(m, N): squared norms of x."""
    centres: Tensor
    """(m, r, K, D)."""
    active: Tensor
    """(m, r) bool: not converged."""
    iterations: Tensor
    """(m, r) int64."""
    members: Tensor
    restarts: Tensor

    @staticmethod
    def new(x: Tensor, centres: Tensor) -> _Batch:
        """All problems, before the first iteration."""
        m, r = centres.shape[:2]
        at = x.device
        return _Batch(
            x=x,
            norms=x.square().sum(-1),
            centres=centres.clone(),
            active=torch.ones(m, r, dtype=torch.bool, device=at),
            iterations=torch.zeros(m, r, dtype=torch.int64, device=at),
            members=torch.arange(m, device=at),
            restarts=torch.arange(r, device=at).expand(m, r),
        )


def _iterate(work: _Batch) -> _Batch:
    labels, distances = _assign(work.x, work.norms, work.centres)
    centres = _means(work.x, _relocate(labels, distances, work.centres.shape[2]), work.centres)
    # Labels that no longer change leave the centres where they are: no shift at all.
    shift = (centres - work.centres).square_().sum((2, 3))
    # The mean over features of their variance, for x is centred.
    limit = TOLERANCE * work.norms.mean(1, keepdim=True) / work.x.shape[2]
    return replace(
        work,
        centres=torch.where(work.active[..., None, None], centres, work.centres),
        iterations=work.iterations + work.active,
        active=work.active & (shift > limit),
    )


def _assign(x: Tensor, norms: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
    """Nearest centres (m, r, N), the first of equals, and the squared distances to them."""
    values, labels = _scores(x, centres).min(dim=2)
    return labels, _distances(values, norms.unsqueeze(1))


def _scores(x: Tensor, centres: Tensor) -> Tensor:
    """|c|^2 - 2 c.x (m, r, K, N): what |x - c|^2 is but for |x|^2, the same for all centres."""
    m, r, k, d = centres.shape
    flat = centres.reshape(m, r * k, d)
    lengths = flat.square().sum(2, keepdim=True)
    return torch.baddbmm(lengths, flat, x.transpose(1, 2), alpha=-2.0).view(m, r, k, -1)


def _to_clips(x: Tensor, norms: Tensor, clips: Tensor) -> Tensor:
    """Squared distances (M, R, C, N) of all clips to some (M, R, C)."""
    m, r, c = clips.shape
    flat = clips.reshape(m, r * c)
    rows = _picked(x, flat, dim=1)
    lengths = norms.gather(1, flat).unsqueeze(2)
    scores = torch.baddbmm(lengths, rows, x.transpose(1, 2), alpha=-2.0).view(m, r, c, -1)
    return _distances(scores, norms[:, None, None])


def _distances(scores: Tensor, norms: Tensor) -> Tensor:
    """|c|^2 - 2 c.x + |x|^2, and zero where that is nothing but rounding."""
    distances = scores + norms
    noise = NOISE * torch.finfo(norms.dtype).eps * norms
    return torch.where(distances > noise, distances, 0.0)


def _relocate(labels: Tensor, distances: Tensor, num_clusters: int) -> Tensor:
    """Labels (m, r, N) after each empty cluster has taken one of the clips farthest from their centres.

    Without waiting for the host: as many clips as could ever be needed are found every time.
    """
    most = num_clusters - 1
    if most == 0:
        return labels
    empty = ~_one_hot(labels, num_clusters).any(3)
    names = empty.int().argsort(dim=2, descending=True, stable=True)[..., :most]  # empty ones first
    far = distances.topk(most, dim=2)
    needed = torch.arange(most, device=labels.device) < empty.sum(2, keepdim=True)
    old = labels.gather(2, far.indices)
    return labels.scatter(2, far.indices, torch.where(needed & (far.values > 0), names, old))


def _means(x: Tensor, labels: Tensor, before: Tensor) -> Tensor:
    """Means (m, r, K, D) of the clusters; a cluster that stays empty goes to the biggest one's."""
    m, r, k, d = before.shape
    one_hot = _one_hot(labels, k).to(x.dtype)
    counts = one_hot.sum(3)
    means = torch.bmm(one_hot.view(m, r * k, -1), x).view(m, r, k, d)
    means /= counts.clamp(min=1).unsqueeze(3)
    source = torch.where(
        counts > 0, torch.arange(k, device=x.device), counts.argmax(2, keepdim=True)
    )
    return _picked(means, source, dim=2)


def _picked(x: Tensor, which: Tensor, *, dim: int) -> Tensor:
    """Whole rows of x (..., D) by their places (..., n) in dimension ``dim``, the one before the last.

    ``take_along_dim`` gives the same and takes three times as long.
    """
    return x.gather(dim, which.unsqueeze(-1).expand(*which.shape, x.shape[-1]))


def _one_hot(labels: Tensor, num_clusters: int) -> Tensor:
    """(m, r, K, N) bool."""
    return labels.unsqueeze(2) == torch.arange(num_clusters, device=labels.device)[:, None]


def _inertia(x: Tensor, labels: Tensor, centres: Tensor) -> Tensor:
    """Sums (M, R) of squared distances, from differences: expanded products would lose digits."""
    sums = []
    for r in range(labels.shape[1]):
        own = _picked(centres[:, r], labels[:, r], dim=1)
        sums.append(own.sub_(x).square_().sum((1, 2), dtype=torch.float64))
    return torch.stack(sums, dim=1)


def _write_back(work: _Batch, whole: _Batch) -> None:
    where = (work.members[:, None], work.restarts)
    whole.centres[where], whole.iterations[where] = work.centres, work.iterations


def _narrow(work: _Batch, left: list[int]) -> _Batch:
    """The members with work left, and of each as many restarts as the busiest has left."""
    rows = torch.tensor([i for i, count in enumerate(left) if count], device=work.x.device)
    order = work.active[rows].int().argsort(dim=1, descending=True, stable=True)[:, : max(left)]
    all_stay = len(rows) == len(left)
    where = (rows[:, None], order)
    problems = ("centres", "active", "iterations", "restarts")
    return replace(
        work,
        x=work.x if all_stay else work.x[rows],
        norms=work.norms[rows],
        members=work.members[rows],
        **{name: getattr(work, name)[where] for name in problems},
    )


def _chunk(
    shape: tuple[int, ...], restarts: int, num_clusters: int, *, bytes_each: int
) -> tuple[int, int]:
    """Members and starts whose scores, one-hot assignments, centres and features fit ``MEMORY``."""
    num_clips, dim = shape
    problem = num_clusters * (num_clips * (2 * bytes_each + 1) + 5 * dim * bytes_each)
    member = 3 * num_clips * dim * bytes_each  # features, a copy when others leave, differences
    width = max(1, min(restarts, (MEMORY - member) // problem))
    return max(1, MEMORY // (member + width * problem)), width


def _joined(parts: Sequence[Clusterings], *, dim: int) -> Clusterings:
    return Clusterings(*(torch.cat(tensors, dim) for tensors in zip(*parts, strict=True)))
