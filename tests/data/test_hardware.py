"""What a GPU lacks is found out before a run, by name, and the CPU takes its place."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine.core.recipe import Audio
from engine.data import hardware, pipeline
from engine.data.flow import dis_flow
from engine.data.hardware import FILM_LIBRARY, FLOW_LIBRARY, fault, flow_fault, missing
from engine.data.media.codecs import H264, VP9, VP9_MP4
from engine.data.pipeline import InputPipeline
from engine.data.plan import plan_batch
from engine.data.shards.index import ClipIndex
from tests.data.cpu_as_gpu import CLIP, as_gpu

GPU = torch.device("cuda:0")


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The driver's libraries that can be loaded."""
    names = {FLOW_LIBRARY, FILM_LIBRARY}

    def load(name: str, *rest: Any) -> object:
        if name not in names:
            raise OSError(f"{name}: cannot open shared object file")
        return object()

    monkeypatch.setattr(ctypes, "CDLL", load)
    hardware.flow_fault.cache_clear()
    hardware.picture_fault.cache_clear()
    return names


def test_an_absent_library_is_named_with_what_to_do(
    loaded: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(hardware.CAPABILITIES, "compute,utility")
    assert missing(FLOW_LIBRARY) == missing(FILM_LIBRARY) == ""
    loaded.clear()
    for library in (FLOW_LIBRARY, FILM_LIBRARY):
        assert library in missing(library) and "compute,video,utility" in missing(library)
        assert "(now compute,utility)" in missing(library)
    assert FLOW_LIBRARY in flow_fault(GPU, 48)


def test_a_flow_engine_that_does_not_know_the_grid_is_a_fault(
    loaded: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Turing's: the library loads, and the first run fails."""

    class Graph:
        def feed_input(self, name: str, data: Any) -> None:
            assert name == "clip" and data.shape == (1, 2, 48, 48, 3)

        def run(self) -> None:
            raise RuntimeError("\nAssert on output_grid 1 not supported\nmore")

    stream = type("Stream", (), {"synchronize": lambda self: None})()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch, "zeros", lambda *shape, **_: np.zeros(shape))
    monkeypatch.setattr(hardware, "flow_graph", lambda **sizes: Graph())
    assert flow_fault(GPU, 48) == "Assert on output_grid 1 not supported"


def test_a_cpu_decodes_the_trial_picture() -> None:
    """The graph and its inputs fit each other."""
    hardware.picture_fault.cache_clear()
    assert hardware.picture_fault(torch.device("cpu")) == ""


def test_faults_are_first_lines() -> None:
    def fail() -> None:
        raise RuntimeError("\n  first\nsecond")

    assert fault(fail) == "first" and fault(lambda: None) == ""


@pytest.fixture
def index(tiny_shards: Path) -> ClipIndex:
    return ClipIndex([tiny_shards / "labelled"])


def make(index: ClipIndex, warnings: list[str], **options: Any) -> InputPipeline:
    sizes = {"batch_size": 4, "num_frames": 12, "threads": 1, **options}
    return InputPipeline(index, CLIP, audio=Audio(), device=GPU, warn=warnings.append, **sizes)


def test_without_the_drivers_libraries_the_cpu_does_it_and_says_so_once(
    index: ClipIndex, loaded: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A container with no video capability, and a GPU that decodes no JPEG: the batch is the CPU's, bit for bit."""
    loaded.clear()
    built = as_gpu(monkeypatch)
    monkeypatch.setattr(pipeline, "picture_fault", lambda device: "no nvJPEG")
    warnings: list[str] = []
    made = make(index, warnings)
    assert len(warnings) == 2 and built == ["frames on the host", "sound"]
    assert "JPEG" in warnings[0] and "no nvJPEG" in warnings[0]
    assert "flow" in warnings[1] and FLOW_LIBRARY in warnings[1]
    plan = plan_batch(index, CLIP, Audio(), seed=0, step=0, batch_size=4)
    cpu = torch.device("cpu")
    want = InputPipeline(
        index, CLIP, audio=Audio(), device=cpu, batch_size=4, num_frames=12, threads=1
    ).load(plan)
    for got in (made.load(plan), *made.batches([plan])):
        for name in ("rgb", "flow", "wave", "wave_shifted", "order"):
            assert torch.equal(getattr(got, name), getattr(want, name)), name
        np.testing.assert_array_equal(got.flow, dis_flow(got.rgb.numpy(), preset=CLIP.flow))
    assert len(warnings) == 2


def test_with_all_of_them_the_gpu_does_it(
    index: ClipIndex, loaded: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    built, warnings = as_gpu(monkeypatch), []
    monkeypatch.setattr(pipeline, "picture_fault", lambda device: "")
    monkeypatch.setattr(pipeline, "flow_fault", lambda device, size: "")
    make(index, warnings)
    assert warnings == [] and built == ["frames", "sound", "flow"]


def test_films_without_a_video_decoder(
    index: ClipIndex, loaded: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    built, warnings = as_gpu(monkeypatch), []
    index.codecs, index.width, index.height = {VP9}, index.width * 9, index.height * 9
    make(index, warnings, flow=False, sound=False)
    assert (built, warnings) == (["films"], [])
    loaded.clear()
    make(index, warnings, flow=False, sound=False)
    assert built == ["films", "films on the host"]
    assert "VP9" in warnings[0] and FILM_LIBRARY in warnings[0]
    index.codecs = {H264, VP9_MP4}
    with pytest.raises(ValueError, match=rf"h264.*{FILM_LIBRARY}.*--codec jpeg or vp9"):
        make(index, warnings, flow=False, sound=False)


def test_copies_are_made_before_dali_may_write_again(
    index: ClipIndex, loaded: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the copy of a graph's outputs and their release the host waits for the copy."""
    order: list[str] = []
    as_gpu(monkeypatch, order)
    monkeypatch.setattr(pipeline, "picture_fault", lambda device: "")
    monkeypatch.setattr(pipeline, "flow_fault", lambda device, size: "absent")
    made = make(index, [], sound=False)
    made.load(plan_batch(index, CLIP, Audio(), seed=0, step=0, batch_size=4))
    assert order == ["side begins", "run", "share", "copy", "wait", "release", "side ends"] + [
        "side begins",
        "side ends",
        "cross",
    ]
