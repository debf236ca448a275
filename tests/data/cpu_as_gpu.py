"""A pipeline that takes itself to be on a GPU, with the CPU's graphs: its choices can be tested anywhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from engine.core.recipe import Clip
from engine.data import pipeline

CLIP = Clip(size=48)
CPU = torch.device("cpu")


class Watched:
    """A graph that writes down when it is asked for what."""

    def __init__(self, graph: Any, order: list[str]) -> None:
        self.graph, self.order = graph, order

    def feed_input(self, name: str, data: Any) -> None:
        self.graph.feed_input(name, data)

    def schedule_run(self) -> None:
        self.order.append("run")
        self.graph.schedule_run()

    def share_outputs(self) -> Any:
        self.order.append("share")
        return self.graph.share_outputs()

    def release_outputs(self) -> None:
        self.order.append("release")
        self.graph.release_outputs()


class Side:
    """In the place of a side stream."""

    def __init__(self, order: list[str]) -> None:
        self.order = order

    @contextmanager
    def work(self) -> Iterator[None]:
        self.order.append("side begins")
        yield
        self.order.append("side ends")

    def mark(self) -> None:
        return None


def as_gpu(monkeypatch: pytest.MonkeyPatch, order: list[str] | None = None) -> list[str]:
    """Put CPU graphs and no stream in a GPU's place; the list that is returned gets the graphs that are built."""
    order, built = [] if order is None else order, []
    real = {name: getattr(pipeline, f"{name}_graph") for name in ("frames", "films", "sound")}

    def builder(name: str) -> Any:
        def build(*, device: torch.device, **options: Any) -> Any:
            built.append(name + " on the host" * options.get("on_host", False))
            return Watched(real[name](device=CPU, **options), order) if name != "flow" else None

        return build

    for name in ("frames", "films", "sound", "flow"):
        monkeypatch.setattr(pipeline, f"{name}_graph", builder(name))
    to_torch = pipeline.to_torch

    def copied(batch: Any) -> Any:
        order.append("copy")
        return to_torch(batch)

    def crossed(holder: Any, ready: Any) -> Any:
        order.append("cross")
        return holder

    monkeypatch.setattr(pipeline, "to_torch", copied)
    monkeypatch.setattr(pipeline, "finish", lambda device: order.append("wait"))
    monkeypatch.setattr(pipeline, "cross", crossed)
    monkeypatch.setattr(pipeline, "upload", lambda tensor, device: tensor)
    monkeypatch.setattr(pipeline, "SideStream", lambda device: Side(order))
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *a, **k: zeros(*a, **{**k, "device": "cpu"}))
    return built
