"""Crossing from a GPU's side stream, without a GPU: a model of its streams that runs work late and reuses memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest
import torch

from engine.core import streams
from engine.core.streams import HostLead, SideStream, cross, finish, tensors_in

GPU, CPU = torch.device("cuda:0"), torch.device("cpu")


@dataclass
class Event:
    log: list[str]
    name: str

    def synchronize(self) -> None:
        self.log.append(f"host waits for {self.name}")


@dataclass
class Stream:
    """Writes down what it is given."""

    name: str
    log: list[str]
    device: torch.device = GPU
    events: int = 0

    def record_event(self) -> Event:
        self.events += 1
        return Event(self.log, f"{self.name}{self.events}")

    def wait_event(self, event: Event) -> None:
        self.log.append(f"{self.name} waits for {event.name}")

    def wait_stream(self, other: Stream) -> None:
        self.log.append(f"{self.name} waits for {other.name}")


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What streams are told; the thread's own is ``training`` outside of ``SideStream.work``."""
    said: list[str] = []
    own = [Stream("training", said)]

    @contextmanager
    def using(stream: Stream) -> Iterator[None]:
        own.append(stream)
        yield
        own.pop()

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream("side", said, device))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: own[-1])
    monkeypatch.setattr(torch.cuda, "stream", using)
    return said


@dataclass
class OnGpu:
    """In the place of a GPU's tensor."""

    log: list[str]
    is_cuda: bool = True
    device: torch.device = GPU

    def record_stream(self, stream: Stream) -> None:
        self.log.append(f"memory is kept for {stream.name}")


@dataclass(frozen=True)
class Holder:
    one: torch.Tensor
    none: None = None
    more: dict[str, torch.Tensor] = field(default_factory=dict)
    rest: tuple[torch.Tensor, ...] = ()


def test_a_batch_crosses_by_an_event_and_the_host_does_not_wait(
    log: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    side = SideStream(GPU)
    side.follow()
    with side.work():
        assert torch.cuda.current_stream() is not None
        ready = side.mark()
    monkeypatch.setattr(streams, "tensors_in", lambda holder: iter([OnGpu(log), OnGpu(log)]))
    assert cross("batch", ready) == "batch"
    kept = ["memory is kept for training"] * 2
    assert log == ["side waits for training", "training waits for side1", *kept]


def test_finish_waits_for_the_threads_own_stream(log: list[str]) -> None:
    side = SideStream(GPU)
    finish(GPU)
    with side.work():
        finish(GPU)
    assert log == ["host waits for training1", "host waits for side1"]


def test_the_host_is_two_steps_ahead_at_most(log: list[str]) -> None:
    lead = HostLead(GPU, steps=2)
    for _ in range(4):
        lead.after_step()
    assert log == ["host waits for training1", "host waits for training2"]


def test_on_a_cpu_nothing_happens(log: list[str]) -> None:
    side, batch = SideStream(CPU), Holder(torch.ones(2))
    side.follow()
    with side.work():
        assert side.mark() is None
    assert cross(batch, side.mark()) is batch
    finish(CPU)
    HostLead(CPU).after_step()
    assert log == []
    assert streams.upload(batch.one, CPU) is batch.one


def test_every_tensor_of_a_holder_is_found() -> None:
    a, b, c = (torch.zeros(1) for _ in range(3))
    found = list(tensors_in([Holder(a, None, {"b": b}, (c,)), "text", 3]))
    assert [id(x) for x in found] == [id(a), id(b), id(c)]


@pytest.mark.gpu
def test_memory_that_crossed_is_not_given_away_while_it_is_read() -> None:
    """A tensor made on the side is let go of while the training's stream has yet to read it."""
    side, outs = SideStream(GPU), []
    for number in range(20):
        with side.work():
            made, ready = torch.full((1 << 20,), float(number), device=GPU), side.mark()
        torch.cuda._sleep(20_000_000)
        cross(made, ready)
        outs.append(made.clone())
        del made
    with side.work():
        torch.full((1 << 20,), -1.0, device=GPU)
    torch.cuda.synchronize()
    assert [float(out.min()) for out in outs] == [float(out.max()) for out in outs]
    assert [float(out[0]) for out in outs] == [float(number) for number in range(20)]
