"""The store of a table's results: a JSON file a cell, a file a trained network; each is written whole or not at all.

RUN/cells/ROW/SEED/COLUMN.json, RUN/networks/NETWORK/SEED.safetensors. What is there is not done again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.core.files import write_text_atomic
from engine.core.run import RunError
from engine.core.tensors import load_tensors
from engine.evaluate.paper.rows import Column, Network, Row
from engine.model.network_file import file_in
from engine.objective.lossfile import load_loss
from engine.objective.terms import LossWeights


@dataclass(frozen=True)
class Cell:
    """A row, a seed and a column."""

    row: Row
    seed: int
    column: Column

    @property
    def network(self) -> Network:
        """The row's network; only rows that have one have cells."""
        assert self.row.network is not None
        return self.row.network

    def __str__(self) -> str:
        return f"{self.row.name}, seed {self.seed}, {self.column.name}"


class Store:
    """Cells and networks of a run's folder."""

    def __init__(self, run: Path) -> None:
        self.cells, self.networks = run / "cells", run / "networks"

    def read(self, cell: Cell) -> dict[str, Any] | None:
        """A cell's record, or None where it is not done; a failed one has ``failed``, the reason."""
        return _read(self._path(cell))

    def write(self, cell: Cell, record: Mapping[str, Any]) -> None:
        """Write a cell's record with what it is of."""
        place = {"row": cell.row.name, "seed": cell.seed, "column": cell.column.name}
        _write(self._path(cell), {**place, **record})

    def forget_failures(self, cells: Sequence[Cell]) -> None:
        """Remove records of failed cells, and of failed trainings, so that they are done again."""
        for cell in cells:
            if "failed" in (self.read(cell) or {}):
                self._path(cell).unlink()
            self._failure(cell.network, cell.seed).unlink(missing_ok=True)

    def _path(self, cell: Cell) -> Path:
        return self.cells / cell.row.name / str(cell.seed) / f"{cell.column.name}.json"

    def network_path(self, network: Network, seed: int) -> Path:
        """The file of a network: the user's, or the run's own."""
        return network.file or self.networks / network.name / f"{seed}.safetensors"

    def has(self, network: Network, seed: int) -> bool:
        """Whether a network is there."""
        return network.file is not None or self.network_path(network, seed).exists()

    def seconds(self, network: Network, seed: int) -> float | None:
        """Seconds that its training took, where the run's own file says so."""
        if network.file is not None or not self.has(network, seed):
            return None
        value = load_tensors(self.network_path(network, seed))[1].get("seconds")
        return None if value is None else float(value)

    def fail(self, network: Network, seed: int, reason: str) -> None:
        """Write why a network could not be trained."""
        _write(self._failure(network, seed), {"failed": reason})

    def failure(self, network: Network, seed: int) -> str | None:
        """The reason why a network could not be trained; None where it was not tried, or could be."""
        record = _read(self._failure(network, seed))
        return None if record is None else str(record["failed"])

    def _failure(self, network: Network, seed: int) -> Path:
        return self.networks / network.name / f"{seed}.failed.json"

    def check_networks(self, cells: Sequence[Cell]) -> None:
        """Raise RunError where what fills a cell is of another network than the present one.

        That is one trained with another loss, or a user's file that has changed.
        """
        for network, seed in dict.fromkeys((cell.network, cell.seed) for cell in cells):
            same = [cell for cell in cells if cell.network == network]
            path = self.network_path(network, seed)
            records = [self.read(cell) or {} for cell in same if cell.seed == seed]
            folders = " and ".join(str(self.cells / name) for name in {c.row.name: 0 for c in same})
            if network.file is not None:
                known = [record["file"] for record in records if "file" in record]
                if known and path.exists() and set(known) != {digest_of(path)}:
                    raise RunError(
                        f"{path}: is not the file that was judged before; give another --run, or remove {folders}"
                    )
            elif network.loss is not None:
                known = [record["loss"] for record in records if "loss" in record]
                known += [load_tensors(path)[1].get("loss")] if path.exists() else []
                if any(each != weights_of(network, seed) for each in known):
                    raise RunError(
                        f"{path}: was trained with another loss than {network.loss}; give another --run, or remove"
                        f" {path.parent} and {folders}"
                    )


def digest_of(path: Path) -> str:
    """SHA-256, in hexadecimal digits, of a network's file, or of the one in a run's folder."""
    with file_in(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read(path: Path) -> dict[str, Any] | None:
    """A record; None where it is absent, or damaged and so to be made again."""
    with suppress(FileNotFoundError, json.JSONDecodeError):
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return record
    return None


def _write(path: Path, record: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomic(path, json.dumps(record, indent=1) + "\n")


def weights_of(network: Network, seed: int) -> LossWeights:
    """The weights of a network's loss; raises RecipeError for a loss that can't be read."""
    assert network.loss is not None
    return load_loss(network.loss.format(seed=seed))
