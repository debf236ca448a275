"""Starting the processes of one training: here, with torch's elastic launcher, or by torchrun."""

from __future__ import annotations

import logging
import os
import pickle
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from engine.core.interrupt import interrupt_for
from engine.core.ranks import Ranks


def ranks_of_environment() -> Ranks | None:
    """The place that torchrun gave this process; None where it did not start it."""
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return None
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    return Ranks(*(int(os.environ.get(n, d)) for n, d in zip(names, "0101", strict=True)))


OWN_STORE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
"""Set to 1, the launcher gives processes that start again a new place to meet, without the old ones' addresses."""


def may_miss_each_other() -> bool:
    """Whether processes that torchrun starts again may find the addresses of those before them, and fail."""
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0"))
    return restarts > 0 and os.environ.get(OWN_STORE) != "1"


def restarts_so_far() -> int:
    """How often this machine's launcher started its processes again after one of them died."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


class Ended(RuntimeError):
    """Processes ended, again after every restart; the message says which and how."""


_START = """
import pickle, sys
with open(sys.argv[1], "rb") as file:
    sys.path[:] = pickle.load(file)
    work, arguments = pickle.load(file)
work(*arguments)
"""
"""What each process runs: it needs nothing of the program that started it, such as a guard of its main module."""


def launch(work: Callable[..., None], *arguments: Any, processes: int, restarts: int) -> None:
    """Run ``work(*arguments, notes)`` in so many processes of this machine, and all again when one of them dies.

    ``notes`` is a folder for the reasons of a failure: one in ``final`` ends the job, and is raised as ValueError.
    Raises Ended once restarts are used up, and KeyboardInterrupt. ``work`` and its arguments are pickled.
    """
    from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ[OWN_STORE] = "1"
    for name in logging.root.manager.loggerDict:  # each has a level of its own
        if name.startswith("torch.distributed.elastic"):
            logging.getLogger(name).setLevel(logging.CRITICAL)  # ``Ended`` reports it
    with tempfile.TemporaryDirectory(prefix="engine-") as folder:
        notes = Path(folder)
        with (notes / "work").open("wb") as file:
            pickle.dump(sys.path, file)
            pickle.dump((work, (*arguments, notes)), file)
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=processes,
            run_id=notes.name,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            max_restarts=restarts,
            logs_specs=DefaultLogsSpecs(log_dir=str(notes / "logs")),
        )
        try:
            elastic_launch(config, sys.executable)("-c", _START, str(notes / "work"))
        except SignalException as error:
            raise interrupt_for(error.sigval) from None
        except ChildFailedError as error:
            rank, failure = error.get_first_failure()
            raise Ended(_reason(rank, failure.exitcode, notes, restarts)) from None
        if (notes / "final").exists():
            raise ValueError((notes / "final").read_text(encoding="utf-8"))


def _reason(rank: int, code: int, notes: Path, restarts: int) -> str:
    note = notes / f"rank-{rank}"
    if note.exists():
        reason = note.read_text(encoding="utf-8")
    elif code < 0:
        reason = f"killed by {signal.Signals(-code).name}"
    else:
        reason = f"exit code {code}"
    times = f", again after {restarts} restarts" if restarts else ""
    return f"process {rank} ended{times}: {reason}; what was saved is kept, and --resume goes on from there"
