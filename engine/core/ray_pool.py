"""Workers that are Ray actors: one process a GPU, or one a CPU, on this machine or on the nodes of a cluster.

Each keeps what it needs warm from job to job. One that dies, hangs or fails is replaced, and its job is reported as
lost. Knows nothing of losses or videos, and imports no torch: what a worker does is its evaluator's.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial
from math import ceil
from pathlib import Path
from typing import Any

import engine
from engine.core import pool
from engine.core.interrupt import handlers_kept
from engine.core.orphans import Guard

WORK = "work"
"""The thread of a worker's process in which it gets ready and does its jobs."""
OBJECT_STORE_BYTES = 100 * 2**20
LOCAL = (None, "local")
"""Addresses that mean this machine alone."""
TOKENS = (
    "; a cluster's nodes and its programs must agree on Ray's tokens: where `ray start` said that token authentication "
    "is enabled, export RAY_AUTH_MODE=token here and on every node, else RAY_AUTH_MODE=disabled"
)
"""What keeps programs out since Ray 2.60: each makes its own guess, by whether its machine has a token."""
START_TRIES = 3
"""Of Ray itself."""
CONNECT_SECONDS = 10.0
"""For a cluster's address to answer."""
GROW_SECONDS = 30.0
"""Between checks whether a cluster has more CPUs than before."""
START_SECONDS = 900.0
"""Longest time that a worker takes to get ready."""
PLACE_SECONDS = 20.0
"""Longest time that the first workers wait for the others' places before they divide each machine's cores."""
MISSING_SECONDS = 600.0
"""Longest time that a run without any worker waits for one: a cluster may be getting a node back."""
STARTS = 3
"""Errors at its start, or losses while others get their work done, after which a worker is given up."""
DEATHS = 10
"""Deaths at its start after which a worker is given up: one may be an accident."""


class _Actor:
    """A worker's process: evaluates in one thread and answers how far it is in another."""

    def __init__(self) -> None:
        self._evaluator: pool.Evaluator | None = None
        self._progress: Any = None
        # Ray's daemon; else it would hold its GPU for a while after its driver was killed
        pool.die_with_parent()

    def place(self) -> tuple[str, str, int]:
        """Host, node and process number."""
        import ray

        return socket.gethostname(), ray.get_runtime_context().get_node_id(), os.getpid()

    def prepare(self, factory: pool.Factory, workers_here: int) -> None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
        os.environ["OMP_NUM_THREADS"] = str(max(1, cores // workers_here))
        self._evaluator = factory(workers_here)

    def progress(self) -> Any:
        return self._progress

    def evaluate(self, work: Any) -> Any:
        assert self._evaluator is not None
        self._progress = None
        return self._evaluator(work, partial(setattr, self, "_progress"))


def in_turn(method: Any) -> Any:
    """An actor's method, to be called in the thread for jobs."""
    return method.options(concurrency_group=WORK)


@dataclass
class _Slot(pool.Worker):
    """A worker as an actor. Stages: placing, placed, preparing, idle, busy, given up."""

    actor: Any = None
    reference: Any = None
    """The process's answer that is waited for."""
    asked: Any = None
    """The answer to how far it is, while that is waited for."""
    checked: float = 0.0
    node: str = ""
    host: str = ""
    failures: int = 0
    """Starts that failed, or jobs that were lost, since the last job that was done."""

    @property
    def title(self) -> str:
        return f"{self.name} (process {self.pid} on {self.host})" if self.pid else self.name


class RayPool(pool.Pool):
    """``size`` workers as Ray actors; behaves as ``engine.core.pool.Pool`` says.

    Joins the cluster at ``address`` (``auto`` or ``HOST:PORT``), or starts Ray on this machine alone. Each worker
    takes ``gpus`` GPUs and ``cpus`` of Ray's CPUs. Raises ValueError where Ray or the cluster is absent, or the
    cluster has no room for one worker.
    """

    workers: list[_Slot]

    def __init__(
        self,
        factory: pool.Factory,
        *,
        size: int | None,
        address: str | None = None,
        gpus: float = 0.0,
        cpus: float = 1.0,
        on_news: pool.OnNews = lambda job, news: None,
    ) -> None:
        """``size`` None: as many as the cluster has GPUs, or, for workers without, CPUs, also when it grows."""
        self._ray = _import_ray()
        self._own, self.workers = not self._ray.is_initialized(), []
        self._joined = self._own and address not in LOCAL
        self._guard = Guard() if self._own and not self._joined else None
        if self._own:
            here = os.cpu_count() or 1 if size is None else size
            with self._guard.marking() if self._guard else nullcontext():
                start(self._ray, address, cpus=here * cpus, gpus=here * gpus)
        try:
            self.size = room(self._ray, size, cpus=cpus, gpus=gpus)
        except ValueError:
            self.close()
            raise
        self._factory, self._on_news = factory, on_news
        self._cpus, self._grows = cpus, size is None and not gpus
        options = {
            "num_cpus": cpus,
            "num_gpus": gpus,
            "max_restarts": 0,  # we replace them, since a new one has to be prepared
            # Of its own methods: how far a job is. Jobs have a thread to themselves, always the same one, since
            # PyTorch keeps the CUDA graphs that it recorded by thread.
            "max_concurrency": 1,
            "scheduling_strategy": "SPREAD",
        }
        self._actor = self._ray.remote(concurrency_groups={WORK: 1})(_Actor).options(**options)
        self._began = self._seen = self._counted = time.monotonic()
        self._together, self._reason = False, ""
        self._add(self.size)

    def _begin(self, worker: _Slot, job: pool.Job) -> None:
        worker.checked = time.monotonic()
        self._ask(worker, "busy", in_turn(worker.actor.evaluate).remote(job.work))

    def wait(self) -> Sequence[pool.Done | pool.Lost]:
        self._check_any_left()
        waiting = {s.reference: s for s in self.workers if s.reference is not None}
        reports: list[pool.Done | pool.Lost] = []
        if references := list(waiting):
            self._ray.wait(references, num_returns=1, timeout=pool.POLL_SECONDS)
            done, _ = self._ray.wait(references, num_returns=len(references), timeout=0)
            for reference in done:
                reports += self._answered(waiting[reference])
        for slot in self.workers:
            reports += self._check(slot)
        self._grow()
        self._divide_cores()
        return reports

    def close(self) -> None:
        for slot in self.workers:
            self._kill(slot)
        if self._own:
            self._ray.shutdown()
        if self._guard is not None:
            self._guard.close()

    def _ask(self, slot: _Slot, stage: str, reference: Any) -> None:
        slot.stage, slot.reference, slot.since = stage, reference, time.monotonic()

    def _add(self, count: int) -> None:
        for _ in range(count):
            self.workers.append(_Slot(f"worker {len(self.workers)}"))
            self._place(self.workers[-1])

    def _place(self, slot: _Slot) -> None:
        slot.actor, slot.pid, slot.node = self._actor.remote(), 0, ""
        self._ask(slot, "placing", slot.actor.place.remote())

    def _answered(self, slot: _Slot) -> Iterator[pool.Done | pool.Lost]:
        reference, slot.reference, job = slot.reference, None, slot.job
        try:
            answer = self._ray.get(reference)
        except self._ray.exceptions.RayError as error:
            yield from self._lost(slot, self._explained(error, slot))
            return
        if slot.stage == "placing":
            slot.host, slot.node, slot.pid = answer
            slot.stage = "placed"
        elif slot.stage == "preparing":
            slot.stage = "idle"
        else:
            assert job is not None
            slot.stage, slot.job, slot.asked, slot.failures = "idle", None, None, 0
            self._seen = time.monotonic()
            yield pool.Done(job, answer, slot.title)

    def _explained(self, error: Any, slot: _Slot) -> pool.Lost:
        """The loss that an error of Ray's reports; raises an error of the disk."""
        known, text = self._ray.exceptions, " ".join(str(error).split())
        if isinstance(error, known.RayTaskError):
            return pool.lost_by_error(slot.job, error.cause, slot.title)
        if isinstance(error, known.OutOfMemoryError) or "OOM" in text.split("Some common")[0]:
            kind, reason = "out_of_memory", "its process was ended for want of memory"
        elif "node has died" in text or "node died" in text or "owner" in text:
            kind, reason = "node_lost", "its node was lost"
        else:
            kind, reason = "worker_died", "its process ended unexpectedly"
        return pool.Lost(slot.job, kind, reason, slot.title)

    def _lost(self, slot: _Slot, lost: pool.Lost) -> Iterator[pool.Lost]:
        """Report it and put a new process in the worker's place, or give the place up."""
        self._kill(slot)
        slot.failures += 1
        others = any(s is not slot and s.failures == 0 and s.stage == "busy" for s in self.workers)
        self._reason = lost.reason
        failed_start = lost.job is None and lost.kind == "error"
        most = DEATHS if lost.job is None and not failed_start else STARTS
        if slot.failures >= most and (lost.job is None or others):
            slot.stage = "given up"
            given_up = f"; {slot.name} is given up after {slot.failures} losses in a row"
            lost = replace(lost, reason=lost.reason + given_up)
        else:
            self._place(slot)
        yield replace(lost, kind="start_failed") if failed_start else lost

    def _kill(self, slot: _Slot) -> None:
        if slot.actor is not None:
            with suppress(Exception):
                self._ray.kill(slot.actor)
        if slot.pid and slot.host == socket.gethostname():  # one that is stopped hears nothing else
            with suppress(ProcessLookupError, PermissionError):
                os.kill(slot.pid, signal.SIGKILL)
        slot.actor, slot.reference, slot.asked, slot.job, slot.pid = None, None, None, None, 0

    def _check(self, slot: _Slot) -> Iterator[pool.Lost]:
        """Asks for a job's progress, and ends a job or a start whose time is up."""
        now = time.monotonic()
        if slot.job is not None and slot.asked is not None:
            done, _ = self._ray.wait([slot.asked], timeout=0)
            if done:
                with suppress(self._ray.exceptions.RayError):  # the job's own answer says it
                    self._on_news(slot.job, self._ray.get(slot.asked))
                slot.asked = None
        elif slot.stage == "busy" and now - slot.checked >= pool.POLL_SECONDS:
            slot.asked, slot.checked = slot.actor.progress.remote(), now
        limit = START_SECONDS if slot.stage == "preparing" else slot.job.seconds if slot.job else 0
        if 0 < limit < now - slot.since:
            reason = f"not done in its time limit of {limit:g} s"
            yield from self._lost(slot, pool.Lost(slot.job, "time_limit", reason, slot.title))

    def _grow(self) -> None:
        """Take the CPUs that a cluster has got since, where as many workers as it has were asked for."""
        now = time.monotonic()
        if self._grows and now - self._counted >= GROW_SECONDS:
            self._counted, size = now, self.size
            with suppress(ValueError):  # it may also have lost its nodes for a while
                size = room(self._ray, None, cpus=self._cpus, gpus=0.0)
            self._add(size - self.size)
            self.size = len(self.workers)

    def _divide_cores(self) -> None:
        """Prepare workers that have their places: those of one machine share its cores."""
        now = time.monotonic()
        placing = any(slot.stage == "placing" for slot in self.workers)
        if not self._together and placing and now - self._began < PLACE_SECONDS:
            return
        here = Counter(slot.node for slot in self.workers if slot.pid)
        for slot in self.workers:
            if slot.stage == "placed":
                self._together = True
                count = here[slot.node]
                self._ask(
                    slot, "preparing", in_turn(slot.actor.prepare).remote(self._factory, count)
                )

    def _check_any_left(self) -> None:
        now = time.monotonic()
        if any(slot.stage in ("idle", "busy", "preparing", "placed") for slot in self.workers):
            self._seen = now
        if all(slot.stage == "given up" for slot in self.workers):
            hint = TOKENS if self._joined and not self._together else ""
            raise RuntimeError(f"no worker is left, and none can be started: {self._reason}{hint}")
        if now - self._seen > MISSING_SECONDS:
            raise RuntimeError(
                f"no worker for {MISSING_SECONDS:.0f} s: the cluster has no room for one; what was finished is kept"
            )


def _import_ray() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
        import ray.exceptions
    except ImportError:
        raise ValueError("--gpus, --workers and --address need Ray: pip install ray") from None
    return ray


def start(ray: Any, address: str | None, *, cpus: float, gpus: float) -> None:
    """Join a cluster, or start Ray on this machine: quiet, without a dashboard."""
    root = str(Path(engine.__file__).resolve().parents[1])
    path = os.pathsep.join(p for p in (root, os.environ.get("PYTHONPATH")) if p)
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    # The pool reports each worker that dies in a line; Ray would print a paragraph.
    if hasattr(ray._private.worker, "print_to_stdstream"):
        ray._private.worker.print_to_stdstream = lambda *data, **more: None
    if address in LOCAL:
        os.environ["PYTHONPATH"] = path  # what Ray starts inherits it
        own = {"object_store_memory": OBJECT_STORE_BYTES, "include_dashboard": False}
        _start_here(ray, **quiet, **own, num_cpus=max(1, ceil(cpus)), num_gpus=ceil(gpus))
        return
    if ":" in address:
        _check_reachable(address)
    try:
        nodes = {"env_vars": {"PYTHONPATH": path}}  # they run this very code
        with handlers_kept():
            ray.init(address=address, runtime_env=nodes, **quiet)
    except (ConnectionError, ValueError) as error:
        raise ValueError(f"can't join a Ray cluster at {address}: {error}{TOKENS}") from error


def _start_here(ray: Any, **options: Any) -> None:
    """Start Ray; it gives up after 30 s, which a machine that is busy may need twice. Raises RuntimeError."""
    for attempt in range(START_TRIES):
        try:
            with handlers_kept():
                ray.init(address="local", **options)
            return
        except Exception as error:  # Ray's own, without a class
            ray.shutdown()
            if "AF_UNIX path" in str(error):
                raise ValueError(
                    "Ray can't be started here: the path of its folder is too long for sockets; set RAY_TMPDIR to a"
                    " shorter one, such as /tmp"
                ) from error
            if attempt == START_TRIES - 1:
                raise RuntimeError(
                    f"Ray can't be started on this machine: {error}; is it short of memory or very busy?"
                ) from error


def room(ray: Any, size: int | None, *, cpus: float, gpus: float) -> int:
    """The number of workers to start; raises ValueError where the cluster never has room for one."""
    total = ray.cluster_resources()
    if size is None and gpus:
        size = int(total.get("GPU", 0) / gpus)
        if size == 0:
            raise ValueError("the cluster has no GPUs: say how many workers with --workers N")
    size = size or max(1, int(total.get("CPU", 0.0) / cpus))
    fits = min(total.get(kind, 0.0) / n for kind, n in (("CPU", cpus), ("GPU", gpus)) if n)
    if fits < 1:
        needs = f"{gpus:g} GPU and {cpus:g} CPU" if gpus else f"{cpus:g} CPU"
        raise ValueError(f"the cluster has no room for a worker ({needs})")
    return size


def _check_reachable(address: str) -> None:
    """Raise ValueError where nobody listens: Ray itself would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS).close()
    except (OSError, ValueError) as error:
        raise ValueError(f"there is no Ray cluster at {address}: {error}") from None
