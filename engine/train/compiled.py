"""Compiled steps: one set of networks at fixed addresses, which members use in turn."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.core.files import take_lock
from engine.core.recipe import Optim
from engine.core.runtime import Runtime
from engine.data.views import Views
from engine.objective.loss import Branches, EvolvedLoss
from engine.train.member import FlatState, Member

MAX_GRAPHS = 256
"""Graphs that a process may compile: far more than the branches that one search's losses have."""


GRAPHS = "reduce-overhead"
"""torch.compile's mode that records CUDA graphs."""
RUNS_TO_REPLAY = 3
"""Runs of a step after which a CUDA graph has been replayed: the first warms up, the second records."""


def compile_mode(settings: Optim, device: torch.device, *, whole: bool) -> str:
    """``optim.compile`` as torch.compile's mode, or "off".

    "auto" compiles on a GPU alone, since that takes a CPU minutes; and with CUDA graphs where a step is ``whole``, in
    one process and one microbatch. At a search's sizes launches, which graphs save, take most of a step.
    """
    if settings.compile != "auto":
        return str(settings.compile)
    if device.type == "cpu":
        return "off"
    return GRAPHS if whole else "default"


@contextmanager
def compiling() -> Iterator[None]:
    """Let processes that share a compiler's cache compile in turn: the first one does the work, others find it done."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    with take_lock(Path(cache_dir()) / "engine.lock", on_wait=lambda: None):
        yield


class StepBuffers:
    """Networks and optimizer of compiled code; a member's state is copied in before a step, and out after it.

    Compiled code then sees the same addresses for every member: it is compiled once, and its CUDA graphs are recorded
    once. The copies take a few per cent of a step; a run's only member can lend its own ``loss`` and ``optimizer``,
    and nothing is copied.
    """

    def __init__(
        self, loss: EvolvedLoss, optimizer: torch.optim.Optimizer, state: FlatState, *, mode: str
    ) -> None:
        """``mode``: "default", or GRAPHS."""
        self.loss, self.optimizer, self.state, self.mode = loss, optimizer, state, mode
        torch._dynamo.config.recompile_limit = MAX_GRAPHS
        self._compiled: dict[Branches, Callable[..., tuple[Tensor, Tensor]]] = {}

    def without_graphs(self) -> None:
        """Compile anew from now on, without CUDA graphs."""
        self.mode = "default"
        self._compiled.clear()

    @property
    def runs_to_check(self) -> int:
        """Runs of a step of which the last is as all that follow."""
        return RUNS_TO_REPLAY if self.mode == GRAPHS else 1

    @property
    def graphs(self) -> int:
        """Networks' branches compiled so far, one graph each."""
        return len(self._compiled)

    def evaluate(
        self, views: Views, weights: Tensor, *, alive: Branches, active: tuple[str, ...]
    ) -> tuple[Tensor, Tensor]:
        """``EvolvedLoss.evaluate`` in the graph of ``alive``; ``active`` are all terms of these branches."""
        compiled = self._compiled.get(alive)
        if compiled is None:
            compiled = self._compiled[alive] = self._compile(active)
        if self.mode == GRAPHS and views.order.is_cuda:
            torch.compiler.cudagraph_mark_step_begin()
        return compiled(alive.views(views), weights)

    def _compile(self, active: tuple[str, ...]) -> Callable[..., Any]:
        loss = self.loss

        def evaluate(views: Views, weights: Tensor) -> tuple[Tensor, Tensor]:
            return loss.evaluate(views, weights, active)

        return torch.compile(evaluate, mode=self.mode, fullgraph=True, dynamic=False)


def evaluate(
    member: Member,
    views: Views,
    *,
    buffers: StepBuffers | None,
    runtime: Runtime,
    weights: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Eq. 1 in the run's number format, of the member in the buffers or, without them, by its own networks.

    ``weights`` (computed,): other than the member's own. Returns what ``EvolvedLoss.evaluate`` does. A CUDA graph's
    next run overwrites it.
    """
    weights = member.ordered if weights is None else weights
    with torch.autocast(runtime.device.type, torch.bfloat16, runtime.amp):
        if buffers is None:
            return member.loss.evaluate(views, weights, member.computed)
        return buffers.evaluate(views, weights, alive=member.alive, active=member.computed)
