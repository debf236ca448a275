"""What the parts share: device, videos, recipes, and which stages of input are left to the CPU."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from engine.bench.base import Bench
from engine.bench.suite import chosen_recipe
from engine.core.recipe import Recipe, load_recipe, override
from engine.core.runtime import Runtime, choose_runtime, num_cores
from engine.data import pipeline
from engine.data.shards.index import ClipIndex
from gpu_checks.record import Absent

HOST = "GPU_CHECK_HOST"
"""Environment variable: stages of input, ``decode`` and ``flow``, that ended a process, and are left to the CPU."""
TINY = (
    "clip.num_frames=4 clip.num_future_frames=2 clip.size=32 model.width=0.0625 model.pool=true "
    "objective.embed_dim=8 objective.decoder_width=4 objective.order_share=0.5 optim.batch_size=4 "
    "optim.amp=off fitness.views_per_clip=1 fitness.kmeans_init=2 fitness.kmeans_seeds=1"
).split()
"""What every size is on a CPU, where the checks are only tried."""


@dataclass(frozen=True)
class Job:
    """A part's surroundings."""

    device: torch.device
    work: Path
    """Caches, films and runs."""
    shards: tuple[Path, ...] = ()
    """Videos to train on; the built-in ones where none are given."""
    labelled: tuple[Path, ...] = ()
    """Shards with labels; the built-in ones where none are given."""
    said: list[str] = field(default_factory=list)
    """What the engine warned of."""

    @property
    def gpu(self) -> bool:
        """Whether this is a real run."""
        return self.device.type == "cuda"

    def size(self, on_gpu: Any, on_cpu: Any) -> Any:
        """A size of the real run, or of the trial on a CPU."""
        return on_gpu if self.gpu else on_cpu

    @cached_property
    def folders(self) -> tuple[list[Path], list[Path]]:
        """Shards to train on and labelled shards, the built-in ones made on first use."""
        if self.shards and self.labelled:
            return list(self.shards), list(self.labelled)
        from engine.data.demo.demo import make_demo
        from engine.data.ingest.run import ingest

        name = self.size("demo", "demo-tiny")
        counts = self.size((12, 96), (2, 6))
        demo = make_demo(self.work / name, clips_per_class=counts[0], unlabelled_clips=counts[1])
        made = []
        for folder in (demo.unlabelled, demo.labelled):
            out = self.work / f"{name}-shards" / folder.name
            if not (out / "dataset.json").is_file():
                ingest([folder], out, workers=None)
            made.append(out)
        return list(self.shards) or made, list(self.labelled) or made[1:]

    @cached_property
    def index(self) -> ClipIndex:
        """The videos to train on."""
        return ClipIndex(self.folders[0])

    def full(self, *changes: str) -> Recipe:
        """Networks of full size at 112 x 112 pixels (``engine bench``'s default on a GPU)."""
        recipe = chosen_recipe(None, [], gpu=self.gpu)
        return override(recipe, [*self.size([], TINY), *changes])

    def small(self, *changes: str) -> Recipe:
        """What a search of the built-in videos trains."""
        return override(load_recipe("demo"), [*self.size([], TINY), *changes])

    def runtime(self, amp: str = "auto") -> Runtime:
        """The device with a number format."""
        return choose_runtime(str(self.device), amp=amp)

    def bench(self, recipe: Recipe, *, quick: bool = True) -> Bench:
        """A run of the engine's own bench."""
        runtime = self.runtime(recipe.optim.amp)
        return Bench(recipe, runtime, self.index, self.said.append, quick=quick)

    def wait(self) -> None:
        """Until the device has done what it was told."""
        if self.gpu:
            torch.cuda.synchronize(self.device)

    def need_gpu(self) -> None:
        """Raise Absent on a CPU."""
        if not self.gpu:
            raise Absent("no GPU")

    def on_host(self) -> str:
        """Stages of input that the CPU does, in words for a row's detail."""
        if not self.gpu:
            return ""
        faults = {
            "decoding": pipeline.picture_fault(self.device),
            "flow": pipeline.flow_fault(self.device, self.small().clip.size),
        }
        stages = [stage for stage, fault in faults.items() if fault or without_dali()]
        return f"{' and '.join(stages)} by the CPU" if stages else ""


def use_host() -> None:
    """Leave the stages to the CPU that the environment names."""
    stages, fault = os.environ.get(HOST, "").split(","), "it ended a process of this check"
    if "flow" in stages:
        pipeline.flow_fault = lambda device, size: fault
    if "decode" in stages:
        pipeline.picture_fault = lambda device: fault


def without_dali() -> bool:
    """Whether ``gpu_checks.without_dali`` decodes, and not DALI."""
    from engine.data import dali

    return bool(getattr(dali, "STAND_IN", False))


def input_pipeline(job: Job, recipe: Recipe, device: torch.device, **options: Any) -> Any:
    """An ``InputPipeline`` of the recipe's sizes."""
    clip = recipe.clip
    options = {"threads": min(num_cores(), 16), "batch_size": recipe.optim.batch_size, **options}
    frames = clip.num_frames + clip.num_future_frames
    return pipeline.InputPipeline(
        job.index, clip, audio=recipe.audio, device=device, num_frames=frames, **options
    )
