"""A GPU's stream for work beside training, and how tensors cross from it to the stream that trains.

Kernels and copies of one stream run in turn, so what shares the training's stream waits behind whole steps. PyTorch
gives a tensor's memory back by the stream that it was made on, and knows of no other reader: each crossing therefore
takes an event, for which the reader's stream waits, and ``record_stream``. The host waits for neither.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

Holder = TypeVar("Holder")


class SideStream:
    """A stream of a GPU beside the training's; on a CPU everything happens at once, and this does nothing.

    Any thread may work on it: ``with side.work(): ...``.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @contextmanager
    def work(self) -> Iterator[None]:
        """Put what this thread does within the block on the stream."""
        if self._stream is None:
            yield
            return
        with torch.cuda.stream(self._stream):
            yield

    def mark(self) -> torch.cuda.Event | None:
        """Event behind all that has been put on the stream so far."""
        if self._stream is None:
            return None
        event: torch.cuda.Event = self._stream.record_event()
        return event

    def follow(self) -> None:
        """Let the stream wait for what the calling thread's own stream has been given so far."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))


def cross(holder: Holder, ready: torch.cuda.Event | None) -> Holder:
    """Take over a tensor, or what holds tensors, on the calling thread's stream once ``ready`` has happened.

    ``ready`` is a ``SideStream.mark``; None: nothing to wait for. Returns ``holder``.
    """
    tensors = [] if ready is None else [x for x in tensors_in(holder) if x.is_cuda]
    if ready is not None and tensors:
        stream = torch.cuda.current_stream(tensors[0].device)
        stream.wait_event(ready)
        for tensor in tensors:
            tensor.record_stream(stream)
    return holder


class HostLead:
    """Holds the host back where it is more than ``steps`` steps ahead of a GPU, which would keep all their batches."""

    def __init__(self, device: torch.device, *, steps: int = 2) -> None:
        self._device, self._steps = device, steps
        self._ends: deque[torch.cuda.Event] = deque()

    def after_step(self) -> None:
        """Call once a step's work is given to this thread's stream."""
        if self._device.type != "cuda":
            return
        self._ends.append(torch.cuda.current_stream(self._device).record_event())
        if len(self._ends) > self._steps:
            self._ends.popleft().synchronize()


def finish(device: torch.device) -> None:
    """Let this thread, and no other, wait until a GPU has done what the thread's own stream was given."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).record_event().synchronize()


def tensors_in(holder: Any) -> Iterator[Tensor]:
    """Tensors of a dataclass, a mapping, a list or a tuple, and of what these hold."""
    if isinstance(holder, Tensor):
        yield holder
        return
    parts: Iterable[Any] = ()
    if isinstance(holder, Mapping):
        parts = holder.values()
    elif isinstance(holder, (list, tuple)):
        parts = holder
    elif is_dataclass(holder):
        parts = (getattr(holder, field.name) for field in fields(holder))
    for part in parts:
        yield from tensors_in(part)


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a host's tensor to a GPU by way of pinned memory, for which the host doesn't wait; as it is on a CPU."""
    if device.type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
