"""K-means: the engine's batched one beside scikit-learn's and cuML's, from the same starts; and the fitness of 16."""

from __future__ import annotations

import time
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray

from engine.bench.kmeans import Problem, draw
from engine.core.recipe import Fitness
from engine.features import kmeans
from engine.features.fitness import cohort_fitness, effective_rank
from gpu_checks.job import Job
from gpu_checks.record import Absent, Recorder

MEMBERS = 16
CUML_MEMBERS = 2
"""Members that cuML clusters, one by one; its time for all is worked out from theirs."""


def clusters(job: Job, rec: Recorder) -> None:
    """Labels from equal starts, then a cohort's fitness at HMDB51's size."""
    sizes = job.size(Problem(1, 3570, 2048, 51), Problem(1, 96, 64, 8))
    _same_labels(job, rec, sizes)
    sizes = job.size(Problem(MEMBERS, 3570, 2048, 51), Problem(2, 96, 64, 8))
    _fitness(job, rec, sizes)


def _same_labels(job: Job, rec: Recorder, sizes: Problem) -> None:
    (rows,), _ = draw(sizes, seed=0)
    rows = rows * 1.0
    features = torch.from_numpy(rows).to(job.device)
    luck = kmeans.draws(0, runs=1, restarts=1, num_clusters=sizes.classes)
    x, _ = kmeans.centred(features, dtype=torch.float32 if job.gpu else torch.float64)
    starts = kmeans.plus_plus(x[None], luck)
    found = kmeans.lloyd(x[None], x[starts])
    ours = found.labels[0, 0].cpu().numpy()
    inertia = float(found.inertia[0, 0])
    host = x.double().cpu().numpy()
    centres = host[starts[0, 0].cpu().numpy()]
    with rec.check("k-means: labels as scikit-learn's"):
        from sklearn.cluster import KMeans

        began = time.perf_counter()
        model = KMeans(sizes.classes, init=centres, n_init=1, max_iter=300, tol=1e-4).fit(host)
        seconds = time.perf_counter() - began
        _agree(
            rec, "scikit-learn", ours, inertia, model, detail=f"its one start took {seconds:.2f} s"
        )
    with rec.check("k-means: labels as cuML's"):
        if not job.gpu or find_spec("cuml") is None:
            raise Absent("cuML is not installed" if job.gpu else "no GPU")
        from cuml.cluster import KMeans as GpuKMeans

        # cuML's tolerance is not relative
        tolerance = kmeans.TOLERANCE * float(x.square().mean())
        single = {"n_clusters": sizes.classes, "n_init": 1, "max_iter": 300, "tol": tolerance}
        model = GpuKMeans(init=centres.astype(np.float32), output_type="numpy", **single)
        model.fit(host.astype(np.float32))
        _agree(rec, "cuML", ours, inertia, model, detail="")


def _agree(
    rec: Recorder, name: str, ours: NDArray[Any], inertia: float, model: Any, *, detail: str
) -> None:
    """Centres keep their numbers from equal starts, so labels are compared as they are."""
    share = float((np.asarray(model.labels_) == ours).mean())
    ratio = inertia / float(model.inertia_)
    told = f"inertia {ratio:.5f} times its own; {detail}".rstrip("; ")
    rec.row(f"k-means: labels as {name}'s", share, goal=0.99, unit="of clips", detail=told)


def _fitness(job: Job, rec: Recorder, sizes: Problem) -> None:
    rows, labels = draw(sizes, seed=0)
    features = [torch.from_numpy(each).to(job.device) for each in rows]
    settings = job.size(Fitness(), job.small().fitness)

    def run(backend: str, members: int) -> Callable[[], Any]:
        chosen = msgspec.structs.replace(settings, kmeans=backend)
        fixed: dict[str, Any] = {"num_classes": sizes.classes, "seed": 0}
        fixed |= {"settings": chosen, "device": job.device.type}
        return lambda: cohort_fitness(features[:members], labels, **fixed)

    starts = f"{settings.kmeans_seeds} runs of {settings.kmeans_init} starts"
    whole = _seconds(job, run("batched", sizes.members))
    detail = f"{sizes.members} x {sizes.clips} x {sizes.features}, K {sizes.classes}, {starts}"
    rec.row("k-means fitness of the cohort", whole, unit="s", detail=detail)
    one = _seconds(job, lambda: effective_rank(features[0]))
    rank = one * sizes.members
    rec.row("of it, effective ranks", rank, unit="s", detail=f"{one * 1e3:.0f} ms a member")
    with rec.check("one by one"):
        single = _seconds(job, run("batched", 1))
        detail = f"{single * 1e3:.0f} ms a member"
        rec.row("batched, member by member", single * sizes.members, unit="s", detail=detail)
    with rec.check("batched over cuML one by one"):
        if not job.gpu or find_spec("cuml") is None:
            raise Absent("cuML is not installed" if job.gpu else "no GPU")
        cuml = _seconds(job, run("cuml", CUML_MEMBERS)) / CUML_MEMBERS * sizes.members
        detail = f"cuML {cuml:.2f} s, effective ranks included"
        rec.row("fitness, cuML over batched", cuml / whole, unit="times", detail=detail)
        ratio = (cuml - rank) / max(whole - rank, 1e-9)
        rec.row(
            "batched over cuML one by one", ratio, unit="times", goal=5.0,
            detail=f"k-means without effective ranks, {cuml - rank:.2f} against {whole - rank:.2f} s",
        )  # fmt: skip


def _seconds(job: Job, call: Callable[[], Any]) -> float:
    """Of the second call."""
    call()
    job.wait()
    began = time.perf_counter()
    call()
    job.wait()
    return time.perf_counter() - began
