"""Judges a table's networks by its columns: frozen ones all at once from one decode, fine-tuned ones in turn."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from engine.core.display import Display
from engine.core.runtime import Runtime, is_device_error, is_out_of_memory
from engine.evaluate.datasets import Dataset, Fold
from engine.evaluate.finetune import Finetuning
from engine.evaluate.paper.cells import Cell, Store, digest_of
from engine.evaluate.paper.rows import Column
from engine.evaluate.paper.scale import Scale, drawn
from engine.evaluate.protocols import evaluate_many
from engine.evaluate.scores import Evaluated
from engine.model.network_file import Card, card_of, load_network
from engine.model.resnet3d import ResNet3D
from engine.train.trainer import MemberFailed, device_failed

Ints = NDArray[np.int64]


def seen_groups(dataset: Dataset, scale: Scale) -> Ints:
    """The groups, the first by name, whose clips are among the unlabelled ones; none but with folds by group."""
    if not dataset.folds_by.startswith("leave one group out"):
        return np.array([], np.int64)
    labelled = np.unique(dataset.group[dataset.label >= 0])
    if len(labelled) <= scale.seen_groups:
        raise ValueError(
            f"{dataset.name}: has {len(labelled)} groups, and {scale.seen_groups} of them are to be trained on without"
            " labels, so that none is left to test on: --set seen_groups=N with a smaller number"
        )
    by_name = sorted(labelled.tolist(), key=lambda number: dataset.groups[number])
    return np.array(by_name[: scale.seen_groups], np.int64)


def seen_clips(dataset: Dataset, scale: Scale) -> Ints:
    """The clips of these groups, rising."""
    return np.flatnonzero(np.isin(dataset.group, seen_groups(dataset, scale)))


def dataset_for(column: Column, dataset: Dataset, scale: Scale) -> Dataset:
    """A data set with a column's folds, which say which of its clips were trained on without labels."""
    seen = seen_groups(dataset, scale)
    if not len(seen):
        return dataset
    known = dataset.label >= 0
    inside = np.isin(dataset.group, seen)
    others = len(np.unique(dataset.group[known])) - len(seen)
    names = sorted(dataset.groups[number] for number in seen)
    which = f"{len(seen)} of the groups ({names[0]} to {names[-1]})"
    if not column.unseen:
        words = f"{dataset.folds_by}; clips of {which} were trained on without labels"
        return replace(dataset, folds_by=words)
    fold = Fold("unseen", np.flatnonzero(known & inside), np.flatnonzero(known & ~inside))
    words = (
        f"train on {which}, whose clips were also trained on without labels, test on {others} groups that no training"
        " saw"
    )
    return replace(dataset, folds=(fold,), folds_by=words)


def with_fewer_labels(dataset: Dataset, share: float, *, seed: int) -> Dataset:
    """A share of each class's train videos in each fold, one at least; smaller shares are inside larger ones."""
    if share == 1.0:
        return dataset

    def fewer(clips: Ints) -> Ints:
        kept = []
        for label in np.unique(dataset.label[clips]):
            videos = np.unique(dataset.video[clips[dataset.label[clips] == label]])
            kept.append(videos[drawn(len(videos), share, seed=seed)])
        return clips[np.isin(dataset.video[clips], np.concatenate(kept))]

    folds = tuple(replace(fold, train=fewer(fold.train)) for fold in dataset.folds)
    return replace(
        dataset, folds=folds, folds_by=f"{dataset.folds_by}, {100 * share:g} % of the train labels"
    )


@dataclass
class Judging:
    """Fills the cells of one run."""

    scale: Scale
    store: Store
    runtime: Runtime
    display: Display
    datasets: Sequence[Dataset]
    folder: Path
    """For checkpoints of fine-tuning, where the scale asks for some."""
    _digests: dict[Path, str] = field(default_factory=dict)
    """Of the users' files that were loaded."""

    def judge(self, cells: Sequence[Cell], *, on_seed: Callable[[], object] = lambda: None) -> None:
        """Fill cells whose networks are there, or write why they can't be; ``on_seed`` is called after each seed."""
        alike: dict[int, dict[Column, list[Cell]]] = {}
        for cell in cells:
            reason = self.store.failure(cell.network, cell.seed)
            if reason is None:
                alike.setdefault(cell.seed, {}).setdefault(cell.column, []).append(cell)
            else:
                self._fail(cell, f"training failed: {reason}")
        for columns in alike.values():
            for column, same in columns.items():
                (self._tuned if column.protocol == "finetune" else self._frozen)(same)
            on_seed()

    def _frozen(self, cells: Sequence[Cell]) -> None:
        """Cells of one seed and column, from one decode."""
        self.display.start(f"{cells[0].column.title}, seed {cells[0].seed}", len(cells))
        networks = [(cell, self._guarded(cell, partial(self._load, cell))) for cell in cells]
        loaded = [pair for pair in networks if pair[1] is not None]
        if not loaded:
            return
        try:
            self._judged(loaded)
        except (ValueError, RuntimeError) as error:
            if _fatal(error):
                raise device_failed(error) from error
            for pair in loaded:  # one of them spoils it: find out which
                self._guarded(pair[0], partial(self._judged, [pair]))

    def _judged(self, loaded: Sequence[tuple[Cell, tuple[ResNet3D, Card]]]) -> None:
        began, (first, _) = time.perf_counter(), loaded[0]
        results = evaluate_many(
            [network for _, network in loaded],
            self._dataset(first),
            protocols=[first.column.protocol],
            settings=self.scale.pretrain.evaluation,
            runtime=self.runtime,
            seed=first.seed,
            on_progress=self.display.prepare,
        )
        seconds = (time.perf_counter() - began) / len(loaded)
        for (cell, (_, card)), by_protocol in zip(loaded, results, strict=True):
            self._keep(cell, by_protocol[cell.column.protocol], card, seconds)

    def _tuned(self, cells: Sequence[Cell]) -> None:
        what = f"{cells[0].column.title}, seed {cells[0].seed}"
        self.display.start(what, len(cells))
        for number, cell in enumerate(cells, start=1):
            self._guarded(cell, partial(self._tune, cell))
            self.display.update(what, number, len(cells), note=cell.row.name)

    def _tune(self, cell: Cell) -> None:
        began = time.perf_counter()
        network, card = self._load(cell)
        dataset = with_fewer_labels(self._dataset(cell), cell.row.labelled, seed=cell.seed)
        more: dict[str, Any] = {}
        folder = self.folder / cell.row.name / str(cell.seed) / cell.column.name
        if self.scale.checkpoint_every:
            folder.mkdir(parents=True, exist_ok=True)
            more = {"folder": folder, "checkpoint_every": self.scale.checkpoint_every}
        recipe = msgspec.structs.replace(self.scale.finetune, seed=cell.seed)
        work = Finetuning(network, card, dataset, recipe, self.runtime, **more)
        result = work.run([cell.seed])
        self._keep(cell, result, card, time.perf_counter() - began)
        shutil.rmtree(folder, ignore_errors=True)

    def _dataset(self, cell: Cell) -> Dataset:
        return dataset_for(cell.column, self.datasets[cell.column.dataset], self.scale)

    def _load(self, cell: Cell) -> tuple[ResNet3D, Card]:
        path = self.store.network_path(cell.network, cell.seed)
        if cell.network.file is not None:  # before judging, which may take hours
            self._digests[path] = digest_of(path)
        network, card = load_network(path, device=self.runtime.device)
        if cell.network.file is not None:  # judged on the clips of all other rows
            card = msgspec.structs.replace(card, input=card_of(self.scale.pretrain).input)
        return network, card

    def _guarded(self, cell: Cell, work: Callable[[], Any]) -> Any:
        """Do work for a cell; an error fails the cell alone, unless it is the GPU that is at fault."""
        try:
            return work()
        except (ValueError, RuntimeError, MemberFailed) as error:
            if _fatal(error):
                raise device_failed(error) from error
            self._fail(cell, next(iter(str(error).splitlines()), type(error).__name__))
            return None

    def _keep(self, cell: Cell, result: Evaluated, card: Card, seconds: float) -> None:
        trains = [row["train"] for row in result.folds if row.get("train")]
        facts: dict[str, Any] = {
            "value": result.value.mean,
            "over_folds": asdict(result.value),
            "train_videos": float(np.mean(trains)) if trains else None,
            "loss": card.loss,
            "num_clips": card.num_clips,
            "seconds": seconds,
        }
        if cell.network.file is not None:
            facts["file"] = self._digests[cell.network.file]
        large = ("classes", "confusion")
        row = {key: value for key, value in result.row().items() if key not in large}
        self.store.write(cell, facts | row)

    def _fail(self, cell: Cell, reason: str) -> None:
        self.store.write(cell, {"failed": reason})
        self.display.say(f"{cell}: {reason}")


def _fatal(error: BaseException) -> bool:
    return is_device_error(error) and not is_out_of_memory(error)
