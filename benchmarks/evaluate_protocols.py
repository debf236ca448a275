"""Each protocol on made-up features beside scikit-learn's own time for the same fits, with as many threads.

python benchmarks/evaluate_protocols.py --threads 2 --json benchmarks/results/evaluate_protocols-cpu.jsonl
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import click
import numpy as np
import torch
from rows import JSON, ROUNDS, append
from sklearn.cluster import KMeans
from sklearn.linear_model import LogisticRegression, RidgeClassifier
from sklearn.model_selection import StratifiedGroupKFold
from sklearn.neighbors import KNeighborsClassifier, NearestNeighbors
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

from engine.core.recipe import Evaluation
from engine.core.runtime import choose_runtime, one_thread
from engine.evaluate import baselines, linear
from engine.evaluate.datasets import Dataset, Fold
from engine.evaluate.protocols import Judge, Videos
from engine.model.network_file import Card

SIZES = {
    "120 x 64, 6 classes, 20 groups": (120, 64, 6, 20, 20),
    "1000 x 512, 51 classes": (1000, 512, 51, 25, 1),
}
"""Videos, features, classes, groups, folds."""
PROTOCOLS = ("linear", "kmeans", "retrieval", "ridge", "neighbours")
SETTINGS = Evaluation(views=1, kmeans_seeds=3)
SEED = 0


def problem(n: int, d: int, k: int, groups: int, folds: int) -> tuple[Dataset, Videos]:
    """Overlapping classes; each fold leaves one group out."""
    rng = np.random.default_rng(SEED)
    label, group = np.arange(n) % k, np.arange(n) * groups // n
    x = (rng.normal(0, 0.5, (k, d))[label] + rng.normal(0, 1.0, (n, d))).astype(np.float32)
    parts = tuple(
        Fold(str(g), np.flatnonzero(group != g), np.flatnonzero(group == g)) for g in range(folds)
    )
    names = tuple(map(str, range(n)))
    dataset = Dataset(
        name="made up",
        index=None,  # type: ignore[arg-type]
        classes=tuple(map(str, range(k))),
        label=label,
        group=group,
        groups=names[:groups],
        video=np.arange(n),
        videos=names,
        folds=parts,
        folds_by="one group out",
        rejects=(),
        listed=n,
    )
    views = torch.from_numpy(x)[:, None]
    return dataset, Videos(views[:, 0].double(), views, np.arange(n), label, group, np.arange(n))


def ours(dataset: Dataset, videos: Videos) -> dict[str, Callable[[], object]]:
    """The engine's protocols and baselines."""
    judge = Judge(dataset, videos, SETTINGS, choose_runtime("cpu"), Card(arch="r3d_18"))
    x = videos.features.numpy()

    def trivial(predict: Callable[..., Any]) -> Callable[[], None]:
        def run() -> None:
            for fold in dataset.folds:
                train, test = fold.train, fold.test
                with one_thread(largest_product=len(train) ** 2 * x.shape[1]):
                    predict(x[train], videos.label[train], videos.group[train], x[test], SEED)

        return run

    return {
        **{
            name: lambda name=name: judge.judged(name, [SEED], {})
            for name in ("linear", "kmeans", "retrieval")
        },
        "ridge": trivial(baselines.ridge),
        "neighbours": trivial(baselines.neighbours),
    }


def peers(dataset: Dataset, videos: Videos) -> dict[str, Callable[[], object]]:
    """The same fits by scikit-learn alone, each on its own."""
    x, y, g = videos.features.numpy(), videos.label, videos.group

    def held_out(train: Any, models: list[Any], *, scaled: bool) -> None:
        dealer = StratifiedGroupKFold(4, shuffle=True, random_state=SEED)
        for inside, outside in dealer.split(train, y[train], g[train]):
            a, b = train[inside], train[outside]
            scaler = StandardScaler(with_mean=scaled, with_std=scaled).fit(x[a])
            for model in models:
                model.fit(scaler.transform(x[a]), y[a]).predict(scaler.transform(x[b]))

    def logistic() -> None:
        how = {"tol": linear.TOLERANCE, "max_iter": linear.MAX_ITERATIONS}
        models = [LogisticRegression(C=c, **how) for c in SETTINGS.strengths]
        for fold in dataset.folds:
            held_out(fold.train, models, scaled=True)
            scaler = StandardScaler().fit(x[fold.train])
            model = models[3].fit(scaler.transform(x[fold.train]), y[fold.train])
            for rows in (fold.test, fold.test, fold.train):
                model.decision_function(scaler.transform(x[rows]))

    def kmeans() -> None:
        for fold in dataset.folds:
            for part in (fold.train, fold.test):
                k = len(np.unique(y[part]))
                if len(part) >= 2 * k:
                    for seed in range(SETTINGS.kmeans_seeds):
                        KMeans(k, n_init=SETTINGS.kmeans_init, random_state=seed).fit(x[part])

    def retrieval() -> None:
        for fold in dataset.folds:
            near = NearestNeighbors(n_neighbors=50, metric="cosine").fit(x[fold.train])
            near.kneighbors(x[fold.test])

    def ridge() -> None:
        models = [RidgeClassifier(alpha=alpha) for alpha in baselines.ALPHAS]
        for fold in dataset.folds:
            held_out(fold.train, models, scaled=False)
            models[2].fit(x[fold.train], y[fold.train]).predict(x[fold.test])

    def neighbours() -> None:
        for fold in dataset.folds:
            scaler = StandardScaler().fit(x[fold.train])
            model = KNeighborsClassifier(baselines.NEIGHBOURS, algorithm="brute")
            model.fit(scaler.transform(x[fold.train]), y[fold.train])
            model.predict(scaler.transform(x[fold.test]))

    return {
        "linear": logistic,
        "kmeans": kmeans,
        "retrieval": retrieval,
        "ridge": ridge,
        "neighbours": neighbours,
    }


def seconds(work: Callable[[], object]) -> float:
    """Of one call."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


@click.command()
@click.option("--threads", type=click.IntRange(min=1), default=2, show_default=True)
@ROUNDS
@click.option(
    "--size", "sizes", type=click.Choice(list(SIZES)), multiple=True, help="[default: all]"
)
@click.option(
    "--protocol", "protocols", type=click.Choice(PROTOCOLS), multiple=True, help="[default: all]"
)
@JSON
def main(
    threads: int,
    rounds: int,
    sizes: tuple[str, ...],
    protocols: tuple[str, ...],
    out: Path | None,
) -> None:
    """Print seconds of each protocol, of scikit-learn with as many threads and with one, and ours over the first."""
    warnings.simplefilter("ignore")
    runtime = choose_runtime("cpu")
    for size in sizes or SIZES:
        data = problem(*SIZES[size])
        our, peer = ours(*data), peers(*data)
        for name in protocols or PROTOCOLS:
            taken: dict[str, list[float]] = {}
            for _ in range(rounds):
                for what, work, limit in (
                    ("ours", our[name], threads),
                    ("scikit_learn", peer[name], threads),
                    ("scikit_learn_one_thread", peer[name], 1),
                ):
                    with threadpool_limits(limit):
                        taken.setdefault(what, []).append(seconds(work))
            row = {what: round(median(values), 4) for what, values in taken.items()}
            row["ratio"] = round(row["ours"] / row["scikit_learn"], 3)
            click.echo(f"{size:32s} {name:11s} {row}")
            row = {"benchmark": "evaluate_protocols", "protocol": name, "size": size, **row}
            append(out, [row], runtime, threads=threads, rounds=rounds, seed=SEED)


if __name__ == "__main__":
    main()
