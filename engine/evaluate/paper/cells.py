"""Where a table's results lie: a JSON file a cell, a file a trained network; each is written whole or not at all.

RUN/cells/ROW/SEED/COLUMN.json, RUN/networks/NETWORK/SEED.safetensors. What is there is not done again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from engine.core.files import write_text_atomic
from engine.core.runfolder import RunError
from engine.core.tensors import load_tensors
from engine.evaluate.paper.rows import Column, Network, Row
from engine.model.network_file import Card, load_network, save_network
from engine.model.resnet3d import ResNet3D
from engine.objective.lossfile import load_loss
from engine.objective.terms import LossWeights


@dataclass(frozen=True)
class Cell:
    """A row, a seed and a column."""

    row: Row
    seed: int
    column: Column

    def __str__(self) -> str:
        return f"{self.row.name}, seed {self.seed}, {self.column.name}"


class Store:
    """Cells and networks of a run's folder."""

    def __init__(self, run: Path) -> None:
        self.cells, self.networks = run / "cells", run / "networks"

    def read(self, cell: Cell) -> dict[str, Any] | None:
        """A cell's record, or None where it is not done; a failed one has ``failed``, the reason."""
        try:
            told: dict[str, Any] = json.loads(self._path(cell).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except json.JSONDecodeError:
            return None  # damaged: done again
        return told

    def write(self, cell: Cell, record: Mapping[str, Any]) -> None:
        """Write a cell's record with what it is of."""
        path = self._path(cell)
        path.parent.mkdir(parents=True, exist_ok=True)
        place = {"row": cell.row.name, "seed": cell.seed, "column": cell.column.name}
        write_text_atomic(path, json.dumps({**place, **record}, indent=1) + "\n")

    def forget_failures(self, cells: Sequence[Cell]) -> None:
        """Remove records of failed cells, and of failed trainings, so that they are done again."""
        for cell in cells:
            if "failed" in (self.read(cell) or {}):
                self._path(cell).unlink()
            if cell.row.network is not None:
                self._failure(cell.row.network, cell.seed).unlink(missing_ok=True)

    def _path(self, cell: Cell) -> Path:
        return self.cells / cell.row.name / str(cell.seed) / f"{cell.column.name}.json"

    def network_path(self, network: Network, seed: int) -> Path:
        """The file of a network: the user's, or the run's own."""
        return network.file or self.networks / network.name / f"{seed}.safetensors"

    def has(self, network: Network, seed: int) -> bool:
        """Whether a network is there."""
        return network.file is not None or self.network_path(network, seed).exists()

    def save(
        self,
        network: Network,
        seed: int,
        state: Mapping[str, Tensor],
        card: Card,
        *,
        seconds: float,
    ) -> None:
        """Keep a network that was trained."""
        path = self.network_path(network, seed)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_network(path, state, card, seconds=seconds)

    def load(self, network: Network, seed: int, *, device: Any) -> tuple[ResNet3D, Card]:
        """A network and its card; raises CheckpointError for a file that can't be used."""
        return load_network(self.network_path(network, seed), device=device)

    def seconds(self, network: Network, seed: int) -> float | None:
        """How long its training took, where the run's own file says so."""
        if network.file is not None or not self.has(network, seed):
            return None
        value = load_tensors(self.network_path(network, seed))[1].get("seconds")
        return None if value is None else float(value)

    def fail(self, network: Network, seed: int, reason: str) -> None:
        """Keep why a network could not be trained."""
        path = self._failure(network, seed)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomic(path, json.dumps({"failed": reason}) + "\n")

    def failure(self, network: Network, seed: int) -> str | None:
        """Why a network could not be trained; None where it was not tried, or could be."""
        path = self._failure(network, seed)
        if not path.exists():
            return None
        return str(json.loads(path.read_text(encoding="utf-8"))["failed"])

    def _failure(self, network: Network, seed: int) -> Path:
        return self.networks / network.name / f"{seed}.failed.json"

    def check_losses(self, networks: Sequence[tuple[Network, int]]) -> None:
        """Raise RunError where a network was trained with another loss than the one given now."""
        for network, seed in networks:
            path = self.network_path(network, seed)
            if network.file is not None or network.loss is None or not path.exists():
                continue
            if load_tensors(path)[1].get("loss") != weights_of(network, seed):
                raise RunError(
                    f"{path}: was trained with another loss than {network.loss}; give another --run, or remove"
                    f" {path.parent} and {self.cells / network.name}"
                )


def weights_of(network: Network, seed: int) -> LossWeights:
    """The weights of a network's loss; raises RecipeError for a loss that can't be read."""
    assert network.loss is not None
    return load_loss(network.loss.format(seed=seed))
