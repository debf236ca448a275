"""A search in TensorBoard: fitness, best so far, terms, weights of the best, throughput, failures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from engine.search import MemberRecord


class Board:
    """Writes one point a member, at its trial's number.

    ``search/`` fitness, best_so_far, failed, pruned; ``metrics/`` every other measure of the same features;
    ``terms/`` last values of the loss terms; ``ranks/`` how far each network's features spread; ``best/`` the 39
    weights whenever a new best is found; ``throughput/`` clips_per_second and seconds_per_member.
    """

    def __init__(self, folder: Path, *, before: Sequence[MemberRecord] = ()) -> None:
        """``before``: the members that are done already, for a search that goes on."""
        self._writer = SummaryWriter(str(folder))
        self._best = max((m.fitness for m in before if m.fitness is not None), default=None)
        self._ended = {kind: sum(m.state == kind for m in before) for kind in ("failed", "pruned")}

    def member(self, record: Mapping[str, Any]) -> None:
        """A member that is done: what its file in ``members/`` holds."""
        trial, fitness, state = record["trial"], record["fitness"], record["state"]
        points: dict[str, float] = {}
        if state in self._ended:
            self._ended[state] += 1
        points |= {f"search/{kind}": count for kind, count in self._ended.items()}
        if state == "complete":
            points["search/fitness"] = fitness
            points |= {f"metrics/{name}": value for name, value in record["metrics"].items()}
            points |= {f"terms/{name}": value for name, value in record["terms"].items()}
            points |= {f"ranks/{m}": now for m, (_, now) in record.get("feature_ranks", {}).items()}
            points["throughput/clips_per_second"] = record["clips_per_second"]
            points["throughput/seconds_per_member"] = record["seconds"]
            if self._best is None or fitness > self._best:
                self._best = fitness
                points |= {f"best/{name}": weight for name, weight in record["weights"].items()}
        if self._best is not None:
            points["search/best_so_far"] = self._best
        for name, value in points.items():
            self._writer.add_scalar(name, value, trial)

    def close(self) -> None:
        """Write what is left."""
        self._writer.close()
