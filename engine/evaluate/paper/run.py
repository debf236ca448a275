"""Runs a table or figure of the paper: what is missing of it, in a folder that the same command goes on with."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from engine.core.display import Display, duration
from engine.core.provenance import check_same_videos, provenance
from engine.core.runfolder import RunError, RunFolder
from engine.core.runtime import Runtime, make_deterministic
from engine.data.library import Library, fingerprint
from engine.data.shards.index import ClipIndex, data_digest
from engine.evaluate.baselines import baselines
from engine.evaluate.datasets import Dataset
from engine.evaluate.paper.cells import Cell, Store
from engine.evaluate.paper.judging import Judging, dataset_for, seen_clips
from engine.evaluate.paper.rows import Given, columns_of, rows_of
from engine.evaluate.paper.scale import Scale
from engine.evaluate.paper.training import Seeded, Training, check_loss


@dataclass(frozen=True)
class Chosen:
    """Which rows, seeds and protocols of a table are run; empty: all (seeds: the scale's)."""

    rows: Sequence[str] = ()
    seeds: Sequence[int] = ()
    protocols: Sequence[str] = ()


@dataclass
class Reproduction:
    """One table or figure at one scale, on some videos."""

    name: str
    scale: Scale
    given: Given
    videos: Library
    datasets: Sequence[Dataset]
    run: RunFolder
    runtime: Runtime
    display: Display
    chosen: Chosen = field(default_factory=Chosen)
    with_baselines: bool = False

    def __post_init__(self) -> None:
        """Raises ValueError for rows, seeds or protocols that the table has not, and losses that can't be read."""
        for loss in self.given.losses.values():
            check_loss(loss)
        names = [dataset.name for dataset in self.datasets]
        by_group = [d.folds_by.startswith("leave one group out") for d in self.datasets]
        self.all_rows = rows_of(self.name, self.scale, self.given)
        every = columns_of(self.name, self.scale, datasets=names, by_group=by_group)
        _check_known(self.chosen.rows, [row.name for row in self.all_rows], "--rows")
        _check_known(self.chosen.protocols, [c.protocol for c in every], "--protocols")
        self.rows = [r for r in self.all_rows if r.name in self.chosen.rows or not self.chosen.rows]
        wanted = self.chosen.protocols
        self.columns = [c for c in every if c.protocol in wanted or not wanted]
        self.seeds = tuple(self.chosen.seeds) or self.scale.seeds
        self.store = Store(self.run.path)

    @property
    def cells(self) -> list[Cell]:
        """All cells of rows that have a network."""
        here = [row for row in self.rows if row.network is not None]
        return [
            Cell(r, seed, column) for seed in self.seeds for r in here for column in self.columns
        ]

    def to_do(self) -> tuple[list[Seeded], list[Cell]]:
        """Networks to train and cells to fill."""
        cells = [cell for cell in self.cells if self.store.read(cell) is None]
        jobs: dict[Seeded, None] = {}
        for cell in cells:
            network = cell.row.network
            assert network is not None
            missing = not self.store.has(network, cell.seed)
            if missing and self.store.failure(network, cell.seed) is None:
                jobs[network, cell.seed] = None
        return list(jobs), cells

    def plan(self) -> list[str]:
        """What is to do, in lines, with times estimated from what is done."""
        jobs, cells = self.to_do()
        lines = [f"{len(self.cells) - len(cells)} of {len(self.cells)} cells done"]
        trained = self._seconds_trained()
        known = [s for seconds in trained.values() for s in seconds]
        total, guessed = 0.0, True
        for network, seed in jobs:
            seconds = _mean(trained.get(network.name, [])) or _mean(known)
            lines.append(f"train  {network.name}, seed {seed}  {_about(seconds)}")
            total, guessed = total + (seconds or 0.0), guessed and seconds is not None
        spent = self._seconds_judged()
        for cell in cells:
            seconds = _mean(spent.get(cell.column.name, []))
            lines.append(f"judge  {cell}  {_about(seconds)}")
            total, guessed = total + (seconds or 0.0), guessed and seconds is not None
        if cells:
            more = "" if guessed else ", and what no finished cell tells the time of"
            lines.append(f"to do: about {duration(total)}{more}")
        return lines

    def _seconds_trained(self) -> dict[str, list[float]]:
        found: dict[str, list[float]] = {}
        for network, seed in {(c.row.network, c.seed): None for c in self.cells}:
            seconds = None if network is None else self.store.seconds(network, seed)
            if network is not None and seconds is not None:
                found.setdefault(network.name, []).append(seconds)
        return found

    def _seconds_judged(self) -> dict[str, list[float]]:
        found: dict[str, list[float]] = {}
        for cell in self.cells:
            told = self.store.read(cell) or {}
            if "seconds" in told:
                found.setdefault(cell.column.name, []).append(told["seconds"])
        return found

    def go(self, write: Callable[[Reproduction], object], *, retry_failed: bool = False) -> None:
        """Do what is missing; ``write`` writes the table so far, after each seed and at the end."""
        make_deterministic(self.runtime)
        unlabelled = self._unlabelled()
        self.run.begin()
        self._note()
        if retry_failed:
            self.store.forget_failures(self.cells)
        self.store.check_losses([(c.row.network, c.seed) for c in self.cells if c.row.network])
        jobs, cells = self.to_do()
        self.display.say(
            f"{len(cells)} of {len(self.cells)} cells to do, {len(jobs)} networks to train"
        )
        training = Training(
            self.scale,
            unlabelled,
            self.store,
            self.run.checkpoints,
            self.runtime,
            self.display,
        )
        judging = Judging(
            self.scale,
            self.datasets,
            self.store,
            self.run.path / "finetune",
            self.runtime,
            self.display,
        )
        # a seed at a time, so that a table of fewer seeds is there early; Fig. 5's cohorts of one fill cores together
        parts = [list(self.seeds)] if self.name == "fig5" else [[seed] for seed in self.seeds]
        for part in parts:
            mine = [job for job in jobs if job[1] in part]
            if mine:
                training.train(mine)
            judging.judge(
                [cell for cell in cells if cell.seed in part], on_seed=lambda: write(self)
            )
        if self.with_baselines:
            self._find_baselines()
        write(self)

    def _unlabelled(self) -> ClipIndex:
        """The videos, and clips of the labelled data sets' first groups, without labels."""
        seen = [seen_clips(dataset, self.scale) for dataset in self.datasets]
        if not any(map(len, seen)):
            return self.videos.index
        folders, first = [*self.videos.shards], len(self.videos.index)
        chosen = [np.arange(first)]
        for dataset, clips in zip(self.datasets, seen, strict=True):
            if len(clips):
                folders += dataset.index.folders
                chosen.append(first + clips)
                first += len(dataset.index)
        whole = ClipIndex(folders, warn=self.display.say)
        return whole.subset(np.concatenate(chosen))

    def _note(self) -> None:
        """What the run works on, written as it begins; raises RunError where it goes on with something else."""
        facts: dict[str, Any] = {
            "table": self.name,
            "scale": self.scale.name,
            "data": fingerprint(self.videos),
            "labelled": _fingerprint(self.datasets),
            "seen_groups": self.scale.seen_groups,
            "finetune": hashlib.sha256(repr(self.scale.finetune).encode()).hexdigest()[:12],
        }
        old = self.run.read_json("reproduce.json")
        if old is None:
            told = {"facts": facts, "provenance": provenance(self.runtime)}
            self.run.write_json("reproduce.json", told)
            return
        for key, value in facts.items():
            before = old["facts"].get(key)
            if key in ("data", "labelled"):
                check_same_videos(self.run.path, before=before, now=value)
            elif before != value:
                raise RunError(
                    f"{self.run.path}: began with another {key} ({before}, now {value}); go on with what it began with,"
                    " or give another --run"
                )

    def _find_baselines(self) -> None:
        """Baselines of each column's folds, kept in baselines.json."""
        found: dict[str, dict[str, float]] = {}
        for column in self.columns:
            if column.protocol == "kmeans":
                continue  # they are trained with labels
            dataset = dataset_for(column, self.datasets[column.dataset], self.scale)
            for name, value in baselines(dataset, runtime=self.runtime).items():
                found.setdefault(name, {})[column.name] = 100 * value.mean
        self.run.write_json("baselines.json", found)


def _check_known(asked: Sequence[str], known: Sequence[str], what: str) -> None:
    for name in asked:
        if name not in known:
            raise ValueError(f"{what} {name}: unknown; there are {', '.join(dict.fromkeys(known))}")


def _fingerprint(datasets: Sequence[Dataset]) -> str:
    """Of clips and of how they are divided into folds."""
    told = [
        (data_digest(d.index.folders), [(f.name, f.test.tolist()) for f in d.folds])
        for d in datasets
    ]
    return hashlib.sha256(repr(told).encode()).hexdigest()[:12]


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _about(seconds: float | None) -> str:
    return "(no estimate yet)" if seconds is None else f"about {duration(seconds)}"
