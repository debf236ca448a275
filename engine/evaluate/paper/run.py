"""Runs a table or figure of the paper in a folder, whose missing cells the same command fills after a kill."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import numpy as np

from engine.core.display import Display, duration
from engine.core.provenance import check_same_videos, provenance
from engine.core.run import RunError, RunFolder
from engine.core.runtime import Runtime, make_deterministic
from engine.data.library import Library
from engine.data.shards.index import ClipIndex, data_digest
from engine.evaluate.baselines import baselines
from engine.evaluate.datasets import Dataset
from engine.evaluate.paper.cells import Cell, Store
from engine.evaluate.paper.judging import Judging, dataset_for, seen_clips
from engine.evaluate.paper.rows import Inputs, columns_of, rows_of
from engine.evaluate.paper.scale import Scale
from engine.evaluate.paper.training import Seeded, Training
from engine.objective.lossfile import load_loss


@dataclass(frozen=True)
class Selection:
    """Rows, seeds and protocols of a table to run; empty: all (seeds: the scale's)."""

    rows: Sequence[str] = ()
    seeds: Sequence[int] = ()
    protocols: Sequence[str] = ()


@dataclass
class Reproduction:
    """One table or figure at one scale, on some videos."""

    name: str
    scale: Scale
    inputs: Inputs
    videos: Library
    datasets: Sequence[Dataset]
    run: RunFolder
    runtime: Runtime
    display: Display
    selection: Selection = field(default_factory=Selection)
    with_baselines: bool = False

    def __post_init__(self) -> None:
        """Raises ValueError for rows, seeds or protocols that the table has not, and losses that can't be read."""
        for loss in self.inputs.losses.values():
            load_loss(loss.format(seed=0))
        names = [dataset.name for dataset in self.datasets]
        by_group = [d.folds_by.startswith("leave one group out") for d in self.datasets]
        rows = rows_of(self.name, self.scale, self.inputs)
        columns = columns_of(self.name, self.scale, datasets=names, by_group=by_group)
        asked = self.selection
        _check_known(asked.rows, [row.name for row in rows], "--rows")
        _check_known(asked.protocols, [c.protocol for c in columns], "--protocols")
        self.rows = [r for r in rows if r.name in asked.rows or not asked.rows]
        self.columns = [c for c in columns if c.protocol in asked.protocols or not asked.protocols]
        self.seeds = tuple(asked.seeds) or self.scale.seeds
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
        networks = dict.fromkeys((cell.network, cell.seed) for cell in cells)
        return [
            key for key in networks if not self.store.has(*key) and self.store.failure(*key) is None
        ], cells

    def plan(self) -> list[str]:
        """The networks to train and cells to fill, a line each, with times estimated from those that are done."""
        networks, cells = self.to_do()
        trained, judged = self._seconds_spent()
        known = [s for seconds in trained.values() for s in seconds]
        work = [(f"train  {n.name}, seed {s}", trained.get(n.name, known)) for n, s in networks]
        work += [(f"judge  {cell}", judged.get(cell.column.name, [])) for cell in cells]
        lines = [f"{len(self.cells) - len(cells)} of {len(self.cells)} cells done"]
        for what, seconds in work:
            about = f"about {duration(fmean(seconds))}" if seconds else "(no estimate yet)"
            lines.append(f"{what}  {about}")
        if cells:
            total = sum(fmean(seconds) for _, seconds in work if seconds)
            unknown = not all(seconds for _, seconds in work)
            more = " and those without an estimate" if unknown else ""
            lines.append(
                f"to do: about {duration(total)}{more}" if total else "to do: no estimate yet"
            )
        return lines

    def _seconds_spent(self) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
        """Seconds of what is done: trainings by the network's name, cells by the column's."""
        trained: dict[str, list[float]] = {}
        for network, seed in dict.fromkeys((cell.network, cell.seed) for cell in self.cells):
            seconds = self.store.seconds(network, seed)
            if seconds is not None:
                trained.setdefault(network.name, []).append(seconds)
        judged: dict[str, list[float]] = {}
        for cell in self.cells:
            record = self.store.read(cell) or {}
            if "seconds" in record:
                judged.setdefault(cell.column.name, []).append(record["seconds"])
        return trained, judged

    def go(self, write: Callable[[Reproduction], object], *, retry_failed: bool = False) -> None:
        """Train and judge what is missing; ``write`` writes the table so far, after each seed and at the end."""
        make_deterministic(self.runtime)
        unlabelled = self._unlabelled()
        self.run.begin()
        self._note()
        if retry_failed:
            self.store.forget_failures(self.cells)
        self.store.check_networks(self.cells)
        networks, cells = self.to_do()
        self.display.say(
            f"{len(cells)} of {len(self.cells)} cells to do, {len(networks)} networks to train"
        )
        shared = self.scale, self.store, self.runtime, self.display
        training = Training(*shared, unlabelled, self.run.checkpoints)
        judging = Judging(*shared, self.datasets, self.run.path / "finetune")
        # a seed at a time, so that a table of fewer seeds is there early; Fig. 5's cohorts of one fill cores together
        together = [self.seeds] if self.name == "fig5" else [(seed,) for seed in self.seeds]
        for seeds in together:
            mine = [key for key in networks if key[1] in seeds]
            if mine:
                training.train(mine)
            here = [cell for cell in cells if cell.seed in seeds]
            judging.judge(here, on_seed=lambda: write(self))
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
        """Writes what the run works on as it begins; raises RunError where it is continued with something else."""
        facts: dict[str, Any] = {
            "table": self.name,
            "scale": self.scale.name,
            "data": data_digest(self.videos.shards),
            "labelled": _fingerprint(self.datasets),
            "seen_groups": self.scale.seen_groups,
            "finetune": hashlib.sha256(repr(self.scale.finetune).encode()).hexdigest()[:12],
        }
        old = self.run.read_json("reproduce.json")
        if old is None:
            begun = {"facts": facts, "provenance": provenance(self.runtime)}
            self.run.write_json("reproduce.json", begun)
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
        shares: dict[str, dict[str, float]] = {}
        for column in self.columns:
            dataset = dataset_for(column, self.datasets[column.dataset], self.scale)
            recipe = self.scale.pretrain if column.protocol != "finetune" else self.scale.finetune
            how: dict[str, Any] = {"protocols": [column.protocol], "recipe": recipe}
            try:
                found = baselines(dataset, runtime=self.runtime, **how)
            except ValueError as error:  # clusters of too few videos, say
                self.display.say(f"baselines of {column.title}: {error}")
                continue
            for name, value in found[column.protocol].items():
                shares.setdefault(name, {})[column.name] = 100 * value.mean
        self.run.write_json("baselines.json", shares)


def _check_known(asked: Sequence[str], known: Sequence[str], what: str) -> None:
    for name in asked:
        if name not in known:
            raise ValueError(f"{what} {name}: unknown; there are {', '.join(dict.fromkeys(known))}")


def _fingerprint(datasets: Sequence[Dataset]) -> str:
    """Fingerprint of clips and of their division into folds."""
    content = [
        (data_digest(d.index.folders), [(f.name, f.test.tolist()) for f in d.folds])
        for d in datasets
    ]
    return hashlib.sha256(repr(content).encode()).hexdigest()[:12]
