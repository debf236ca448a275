"""Starting Ray on this machine or joining a cluster, and how many workers it has room for."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import engine

OBJECT_STORE_BYTES = 100 * 2**20
START_TRIES = 3
"""Of Ray itself."""


def start(ray: Any, address: str | None, *, cpus: float, gpus: float) -> None:
    """Join a cluster, or start Ray on this machine: quiet, without a dashboard."""
    root = str(Path(engine.__file__).resolve().parents[1])
    path = os.pathsep.join(p for p in (root, os.environ.get("PYTHONPATH")) if p)
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    # We tell of each worker that dies, in a line; Ray would print a paragraph.
    if hasattr(ray._private.worker, "print_to_stdstream"):
        ray._private.worker.print_to_stdstream = lambda *data, **more: None
    if address is None:
        os.environ["PYTHONPATH"] = path  # what Ray starts inherits it
        own = {"object_store_memory": OBJECT_STORE_BYTES, "include_dashboard": False}
        wanted = {"num_cpus": max(1, -int(-cpus // 1)), "num_gpus": -int(-gpus // 1)}
        _start_here(ray, **quiet, **own, **wanted)
        return
    if ":" in address:
        from engine.data.ray_ingest import check_reachable

        check_reachable(address)
    try:
        nodes = {"env_vars": {"PYTHONPATH": path}}  # they run this very code
        ray.init(address=address, runtime_env=nodes, **quiet)
    except (ConnectionError, ValueError) as error:
        raise ValueError(f"there is no Ray cluster at {address}: {error}") from error


def _start_here(ray: Any, **options: Any) -> None:
    """Start Ray; it gives up after 30 s, which a machine that is busy may need twice. Raises RuntimeError."""
    for attempt in range(START_TRIES):
        try:
            ray.init(address="local", **options)
            return
        except Exception as error:  # Ray's own, without a class
            ray.shutdown()
            if attempt == START_TRIES - 1:
                raise RuntimeError(
                    f"Ray can't be started on this machine: {error}; is it short of memory or very busy?"
                ) from error


def room(ray: Any, size: int | None, *, cpus: float, gpus: float) -> int:
    """How many workers there are to be; raises ValueError where the cluster never has room for one."""
    total = ray.cluster_resources()
    if size is None:
        size = int(total.get("GPU", 0))
        if size == 0:
            raise ValueError("the cluster has no GPUs: say how many workers with --workers N")
    fits = min(total.get(kind, 0.0) / n for kind, n in (("CPU", cpus), ("GPU", gpus)) if n)
    if fits < 1:
        wanted = f"{gpus:g} GPU and {cpus:g} CPU" if gpus else f"{cpus:g} CPU"
        raise ValueError(f"the cluster has no room for a worker ({wanted})")
    return size
