"""What the parts share: device, videos, recipes, and stand-ins for a GPU's decoder and flow engine."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.bench.base import Bench
from engine.bench.suite import chosen_recipe
from engine.core.recipe import Recipe, load_recipe, override
from engine.core.runtime import Runtime, choose_runtime, num_cores
from engine.data import pipeline
from engine.data.flow import dis_flow
from engine.data.shards.index import ClipIndex
from gpu_checks.record import Absent

HOST = "GPU_CHECK_HOST"
"""Environment variable: stages of input, ``decode`` and ``flow``, that the host does for the GPU."""
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

    def ready_input(self) -> None:
        """Let the host decode or compute flow where this GPU can't, so that other parts still run."""
        if not self.gpu:
            return
        asked = set(filter(None, os.environ.get(HOST, "").split(",")))
        for stage, probe in (("decode", _probe_decode), ("flow", _probe_flow)):
            try:
                if stage not in asked:
                    probe(self)
            except Exception as error:
                reason = (str(error).strip().splitlines() or ["?"])[0]
                print(f"{stage} by the host, for on the GPU: {reason}", flush=True)
                asked.add(stage)
        os.environ[HOST] = ",".join(sorted(asked))  # for processes of this one
        use_host()

    def on_host(self) -> str:
        """What the host stands in for, in words for a row's detail."""
        stages = os.environ.get(HOST, "")
        return f"{stages.replace(',', ' and ')} by the host" if stages else ""


def use_host() -> None:
    """Put the stand-ins in place that the environment asks for."""
    stages = os.environ.get(HOST, "").split(",")
    if "flow" in stages:
        pipeline.flow_graph = lambda *, batch_size, device, threads: _HostFlow(device, threads)
    if "decode" in stages and not isinstance(pipeline.frames_graph, _HostDecoding):
        pipeline.frames_graph = _HostDecoding(pipeline.frames_graph)


@dataclass
class _Held:
    """A batch as ``InputPipeline`` takes it from DALI."""

    tensor: Tensor

    def as_tensor(self) -> Tensor:
        return self.tensor


class _HostFlow:
    """In the place of DALI's flow graph: OpenCV's flow, clip by clip on the host's cores."""

    def __init__(self, device: torch.device, threads: int) -> None:
        self.device, self.pool = device, ThreadPoolExecutor(threads, "flow")

    def feed_input(self, name: str, clips: Tensor) -> None:
        assert name == "clip"
        self.clips = clips

    def run(self) -> tuple[_Held]:
        flow = dis_flow(self.clips.cpu().numpy(), pool=self.pool)
        return (_Held(torch.from_numpy(flow).to(self.device)),)


class _HostDecoding:
    """In the place of DALI's frames graph on a GPU: the one on the host, and a copy."""

    def __init__(self, build: Callable[..., Any]) -> None:
        self.build = build

    def __call__(self, *, device: torch.device, **sizes: Any) -> Any:
        graph = self.build(device=torch.device("cpu"), **sizes)
        return graph if device.type == "cpu" else _Uploading(graph, device)


@dataclass
class _Uploading:
    graph: Any
    device: torch.device

    def feed_input(self, name: str, data: Any) -> None:
        self.graph.feed_input(name, data)

    def schedule_run(self) -> None:
        self.graph.schedule_run()

    def share_outputs(self) -> tuple[_Held]:
        (images,) = self.graph.share_outputs()
        return (_Held(pipeline.to_torch(images).to(self.device)),)

    def release_outputs(self) -> None:
        self.graph.release_outputs()


def input_pipeline(job: Job, recipe: Recipe, device: torch.device, **options: Any) -> Any:
    """An ``InputPipeline`` of the recipe's sizes."""
    clip = recipe.clip
    options = {"threads": min(num_cores(), 16), "batch_size": recipe.optim.batch_size, **options}
    frames = clip.num_frames + clip.num_future_frames
    return pipeline.InputPipeline(
        job.index, clip, audio=recipe.audio, device=device, num_frames=frames, **options
    )


def _probe_decode(job: Job) -> None:
    from engine.data.plan import plan_batch

    recipe = job.small("optim.batch_size=2")
    settings: dict[str, Any] = {"seed": 0, "step": 0, "batch_size": 2}
    plan = plan_batch(job.index, recipe.clip, recipe.audio, **settings)
    input_pipeline(job, recipe, job.device, flow=False, sound=False).load(plan)


def _probe_flow(job: Job) -> None:
    recipe = job.small("optim.batch_size=2")
    clips = torch.randint(0, 256, (2, 3, 64, 64, 3), dtype=torch.uint8, device=job.device)
    input_pipeline(job, recipe, job.device, flow=True, sound=False)._compute_flow(clips)
    job.wait()
