"""From shards to batches: each stage of ``InputPipeline`` alone, then all of it, as training sees it.

Reading is held against the memory's bandwidth, since files come from memory after a first time. Decoding, flow and
sound are done by threads, and are held against as many times what one thread does. On a GPU, decoding is held
against as many times what one decoder does with one frame (or film) after the other, which is an estimate, since it
waits for each, and flow against the one flow engine with one clip after the other. On a CPU all stages share the
cores, so the whole is held against the sum of one thread's times over the threads; on a GPU against its slowest stage.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from itertools import cycle
from typing import Any

import torch

from engine.bench.base import Bench, Step, shape, timed
from engine.bench.rows import BANDWIDTH, Limit, Row, measured, per_second, quantiles
from engine.core.recipe import override
from engine.data.media.codecs import JPEG
from engine.data.pipeline import ClipBatch, InputPipeline
from engine.data.plan import ClipPlan, plan_batch
from engine.data.shards.index import EncodedClip
from engine.data.views import Views
from engine.train.trainer import Trainer

PLANS = 4
"""Batches that are taken in turn, so that no cache holds just the one."""
UNIT = "clips/s"
VIDEO_DECODERS = {(8, 0): 5, (9, 0): 7}
"""NVDEC units by compute capability: A100 and H100, by their data sheets; elsewhere one is assumed, as below."""
JPEG_DECODERS = {(8, 0): 5, (9, 0): 7, (10, 0): 7}
"""Hardware JPEG decoders by compute capability: A100, H100 and B200."""


def run(bench: Bench) -> Iterator[Row]:
    """Rows of reading, decoding, sound, flow, views, and of all from end to end."""
    stages = Stages(bench)
    many, alone = stages.steps(stages.threads), stages.steps(1)
    times = bench.time({**many, **{f"{name} alone": step for name, step in alone.items()}})
    single = {name: quantiles(times[f"{name} alone"])[1] for name in alone}
    limits = {name: stages.limit(name, ms) for name, ms in single.items() if name != "read"}
    yield stages.memory_row("read", times["read"], bytes=stages.read_bytes, name="read")
    for name, limit in limits.items():
        yield stages.row(name, times[name], limit)
    views = stages.views_row()
    yield views
    yield stages.whole_row(single, limits, views)


class Stages:
    """The stages of input, on the same few batches."""

    def __init__(self, bench: Bench) -> None:
        self.bench, self.recipe = bench, bench.recipe
        self.n = self.recipe.optim.batch_size
        self.threads = bench.runtime.threads
        self.films = JPEG not in bench.videos.codecs
        self.sound = bool(bench.videos.has_audio.any())
        if not self.sound:
            bench.say("input: the videos have no sound: sound is left out")
        self.modalities = ("rgb", "grey", "flow", *(["audio"] if self.sound else []))
        clip = self.recipe.clip
        self.frames = clip.num_frames + clip.num_future_frames
        self.shape = shape(self.n, self.frames, clip.size, clip.size)
        self.trainer = Trainer(self.recipe, bench.videos, bench.runtime)
        settings: dict[str, Any] = {"seed": self.recipe.seed, "batch_size": self.n}
        self.plans = [
            plan_batch(bench.videos, clip, self.recipe.audio, step=step, **settings)
            for step in range(PLANS)
        ]
        self.read_bytes = 0
        """Encoded bytes of a batch, known once ``steps`` has read them."""

    def pipeline(
        self, threads: int, *, batch_size: int | None = None, num_frames: int | None = None
    ) -> InputPipeline:
        """A pipeline that carries all that the videos have, of whole batches where nothing else is asked for."""
        return InputPipeline(
            self.bench.videos,
            self.recipe.clip,
            audio=self.recipe.audio,
            device=self.bench.device,
            batch_size=batch_size or self.n,
            num_frames=num_frames or self.frames,
            threads=threads,
            sound=self.sound,
        )

    def steps(self, threads: int) -> dict[str, Step]:
        """A call a stage; each takes its next batch at each call, whatever the others do.

        With one thread they are what a limit is made of: on a GPU, frames (decoding) and clips (flow) then go
        one after the other, a decoder or the flow engine having one at a time.
        """
        pipeline, plans = self.pipeline(threads), self.plans
        encoded = [pipeline._read(plan) for plan in plans]
        self.read_bytes = sum(_encoded_bytes(clip) for batch in encoded for clip in batch) // PLANS
        heard = [pipeline._heard(batch) for batch in encoded]
        batches = [pipeline.load(plan).rgb for plan in plans]
        stages: dict[str, Callable[[int], Any]] = {
            "read": lambda i: pipeline._read(plans[i]),
            "decode": lambda i: pipeline._start_frames(plans[i], encoded[i])(),
            "sound": lambda i: pipeline._start_sound(plans[i], encoded[i], heard[i])(),
            "flow": lambda i: pipeline._compute_flow(batches[i]),
        }
        if not self.sound:
            del stages["sound"]
        if self.bench.gpu and threads == 1:
            stages |= {"decode": self._one_by_one(), "flow": self._clip_by_clip(batches)}
        return {name: _in_turn(stage) for name, stage in stages.items()}

    def _one_by_one(self) -> Callable[[int], Any]:
        """Decoding of one film, or one JPEG frame, after the other."""
        pipeline = self.pipeline(1, batch_size=1, num_frames=None if self.films else 1)
        single = _clips if self.films else _frames
        encoded = [[(one, pipeline._read(one)) for one in single(plan)] for plan in self.plans]
        return lambda i: [pipeline._start_frames(plan, clips)() for plan, clips in encoded[i]]

    def _clip_by_clip(self, batches: list[torch.Tensor]) -> Callable[[int], Any]:
        """Flow of one clip after the other."""
        pipeline = self.pipeline(1, batch_size=1)
        return lambda i: [pipeline._compute_flow(clip[None]) for clip in batches[i]]

    def limit(self, stage: str, ms: float) -> Limit:
        """A stage's best speed, from one thread's (or decoder's) milliseconds a batch."""
        count, what = self.threads, f"{self.threads} threads x one thread's"
        if self.bench.gpu and stage == "decode":
            decoders = VIDEO_DECODERS if self.films else JPEG_DECODERS
            count = decoders.get(torch.cuda.get_device_capability(self.bench.device), 1)
            what = f"{count} {'video' if self.films else 'JPEG'} decoders x one's"
        if self.bench.gpu and stage == "flow":
            count, what = 1, "the flow engine's, clip by clip"
        return Limit(what, count * per_second(self.n, ms), UNIT)

    def row(self, name: str, samples: list[float], limit: Limit, **fields: Any) -> Row:
        """A stage's row."""
        fields = {"count": self.n, "unit": UNIT, "stage": name, **fields}
        return measured(samples, part="input", name=name, shape=self.shape, limit=limit, **fields)

    def memory_row(self, stage: str, samples: list[float], *, bytes: int, name: str) -> Row:
        """A row of a stage that only moves bytes."""
        moved = {"count": bytes / 1e9, "unit": BANDWIDTH, "bytes": bytes, "stage": stage}
        return self.row(name, samples, self.bench.copy_bandwidth(), **moved)

    def views_row(self) -> Row:
        """Views of all modalities, held against the bandwidth: a batch read once, its views written once."""
        pipeline = self.pipeline(self.threads)
        batches = [pipeline.load(plan) for plan in self.plans]
        moved = _bytes_of(batches[0]) + _bytes_of(self.trainer.views(batches[0], self.modalities))
        step = _in_turn(lambda i: self.trainer.views(batches[i], self.modalities))
        samples = self.bench.time({"views": step}, flush=True)["views"]
        name = f"views of {', '.join(self.modalities)}"
        return self.memory_row("views", samples, bytes=moved, name=name)

    def whole_row(self, single: dict[str, float], limits: dict[str, Limit], views: Row) -> Row:
        """Batches as training gets them, decoded ahead in a thread of their own, views included."""
        repeats = 5 if self.bench.quick else 30
        endless = override(self.recipe, [f"optim.steps={repeats + 3}", "optim.warmup_steps=0"])
        trainer = Trainer(endless, self.bench.videos, self.bench.runtime)
        modalities = self.modalities
        batches = trainer.batches(seed=self.recipe.seed, first=0, modalities=modalities)

        def step() -> None:
            self.trainer.views(next(batches), modalities)

        for _ in range(3):  # those that were decoded ahead
            step()
        samples = [timed(step, self.bench.device) for _ in range(repeats)]
        batches.close()  # type: ignore[attr-defined]
        if self.bench.gpu:
            slowest = min(limits, key=lambda name: limits[name].value)
            limit = Limit(f"its slowest stage, {slowest}", limits[slowest].value, UNIT)
        else:
            cpu = sum(single.values()) + views.ms[1] * torch.get_num_threads()
            what = f"{self.threads} threads x one thread's, all stages"
            limit = Limit(what, self.threads * per_second(self.n, cpu), UNIT)
        return self.row("end to end", samples, limit, stage="input")


def _in_turn(stage: Callable[[int], Any]) -> Step:
    turns = cycle(range(PLANS))
    return lambda: stage(next(turns))


def _clips(plan: ClipPlan) -> Iterator[ClipPlan]:
    """A plan's clips as plans of one clip each."""
    for i in range(len(plan)):
        cut = {field.name: getattr(plan, field.name)[i : i + 1] for field in fields(plan)}
        yield ClipPlan(**cut)


def _frames(plan: ClipPlan) -> Iterator[ClipPlan]:
    """A plan's frames as plans of one clip and one frame each."""
    for clip in _clips(plan):
        for f in range(plan.frames.shape[1]):
            yield replace(clip, frames=clip.frames[:, f : f + 1])


def _encoded_bytes(clip: EncodedClip) -> int:
    sound = 0 if clip.sound is None else clip.sound.nbytes
    film = 0 if clip.film is None else clip.film.nbytes
    return sound + film + sum(frame.nbytes for frame in clip.frames)


def _bytes_of(holder: ClipBatch | Views) -> int:
    """Bytes of the tensors of a batch or of its views, masks and orders aside."""
    if isinstance(holder, ClipBatch):
        parts = [holder.rgb, holder.flow, holder.wave, holder.wave_shifted]
    else:
        parts = [*holder.clip.values(), *holder.future.values(), holder.shifted_audio]
    return sum(x.numel() * x.element_size() for x in parts if x is not None)
