"""An ingest's jobs on a Ray cluster, whose nodes see the videos and the shards' folder under the same paths.

Clips go to that folder from the node that cut them; only jobs and counts travel.
"""

from __future__ import annotations

import logging
import os
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import engine
from engine.data.executors import rejected, without_crash
from engine.data.parts import Done, Job, ShardJob, run_job

CONNECT_SECONDS = 10.0


class RayCluster:
    """Runs jobs as Ray tasks of one CPU each; a source that kills its worker twice is rejected."""

    def __init__(self, address: str) -> None:
        """Connect to ``auto``, ``HOST:PORT``, or ``local`` for one of this machine's own; raises ValueError."""
        try:
            import ray
        except ImportError:
            raise ValueError("--address needs Ray: pip install ray") from None
        self._ray: Any = ray
        self._own = not ray.is_initialized()
        if self._own and ":" in address:
            check_reachable(address)
        root = str(Path(engine.__file__).resolve().parents[1])
        path = os.pathsep.join(p for p in (root, os.environ.get("PYTHONPATH")) if p)
        if self._own:
            try:
                ray.init(
                    address=address,
                    runtime_env={"env_vars": {"PYTHONPATH": path}},  # nodes run this very code
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                    include_dashboard=False if address == "local" else None,
                )
            except (ConnectionError, ValueError) as error:
                raise ValueError(f"there is no Ray cluster at {address}: {error}") from error
        self._task = ray.remote(num_cpus=1, max_retries=1)(run_job)
        self._running: dict[Any, Job] = {}
        self._cpus = 1

    def has_room(self) -> bool:
        if len(self._running) < self._cpus:  # the cluster may have grown
            self._cpus = max(1, int(self._ray.cluster_resources().get("CPU", 1)))
        return len(self._running) < 2 * self._cpus

    def is_busy(self) -> bool:
        return bool(self._running)

    def submit(self, job: Job) -> None:
        self._running[self._task.remote(_everywhere(job))] = job

    def next(self) -> tuple[Job, Done]:
        while True:
            done, _ = self._ray.wait(list(self._running), num_returns=1)
            job = self._running.pop(done[0])
            try:
                return job, self._ray.get(done[0])
            except self._ray.exceptions.RayTaskError as error:
                raise error.cause from None
            except self._ray.exceptions.WorkerCrashedError:
                again = without_crash(job)
                if again is None:
                    return job, rejected(job)
                self.submit(again)

    def close(self) -> None:
        for reference in self._running:
            self._ray.cancel(reference, force=True)
        if self._own:
            self._ray.shutdown()


def _everywhere(job: Job) -> Job:
    """The job with paths that mean the same in any working folder."""
    if isinstance(job, ShardJob):
        return replace(job, folder=job.folder.absolute(), out=job.out.absolute())
    source = replace(job.source, folder=os.path.abspath(job.source.folder))
    return replace(job, source=source, path=job.path.absolute())


def check_reachable(address: str) -> None:
    """Raise ValueError where nobody listens: Ray itself would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS).close()
    except (OSError, ValueError) as error:
        raise ValueError(f"there is no Ray cluster at {address}: {error}") from None
