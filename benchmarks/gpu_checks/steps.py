"""Training steps on the GPU: one network with labels, and the four networks with all terms, eager and compiled."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.utils.flop_counter import FlopCounterMode

from engine.bench.rows import teraflops
from engine.bench.step import Variant
from engine.core.runtime import make_deterministic
from engine.data.views import Views
from engine.model.resnet3d import ResNet3D
from engine.objective.lossfile import random_weights
from engine.train.compiled import evaluate
from engine.train.trainer import CHECK_EVERY_ON_GPU, Trainer
from gpu_checks.inputs import milliseconds
from gpu_checks.job import Job
from gpu_checks.record import Recorder

MEMBERS, ROUNDS = 4, 3
"""Members that take turns in a compiled step, and steps of each, after which there must be one graph."""


def supervised(job: Job, rec: Recorder) -> None:
    """R3D-18 on a resident batch of 16 x 112 x 112 clips, with labels: what a GPU gives at most."""
    make_deterministic(job.runtime())
    n, frames, size, width = job.size((32, 16, 112, 1.0), (2, 4, 32, 0.0625))
    clips = torch.randn(n, 3, frames, size, size, device=job.device)
    clips = clips.contiguous(memory_format=torch.channels_last_3d)
    labels = torch.arange(n, device=job.device) % 400
    limit = job.bench(job.full()).matrix_peak(job.size(torch.bfloat16, torch.float32))
    for mode in ("off", "default"):
        with rec.check(f"supervised step, {mode}"), cheap_compile(job):
            network = _classifier(job, width)
            optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, fused=True)
            forward = network if mode == "off" else torch.compile(network, dynamic=False)

            def step(network: Any = forward, optimizer: Any = optimizer) -> None:
                with torch.autocast(job.device.type, torch.bfloat16, enabled=job.gpu):
                    loss = F.cross_entropy(network(clips).float(), labels)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()

            if mode == "off":
                with FlopCounterMode(display=False) as counter:
                    step()
                flops = counter.get_total_flops()
            ms = milliseconds(job, step)
            rate, share = n / ms * 1e3, 100 * teraflops(flops, ms) / limit.value
            what = "eager" if mode == "off" else "compiled"
            detail = f"batch {n}, {ms:.1f} ms, {flops / n / 1e9:.0f} GFLOP a clip, of {limit.value:.0f} TFLOP/s"
            rec.row(
                f"supervised step, {what}",
                rate,
                unit="clips/s",
                goal=job.size(171.0, None),
                detail=detail,
            )
            name = f"supervised step, {what}: share of the matrix peak"
            rec.row(name, share, unit="%", goal=job.size(30.0, None), detail=detail)


def _classifier(job: Job, width: float) -> nn.Module:
    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = ResNet3D("r3d_18", 3, width=width, pool=False)
            self.head = nn.Linear(self.body.feature_dim, 400)

        def forward(self, clips: Tensor) -> Tensor:
            return self.head(self.body.forward_features(clips)[-1])

    return Classifier().to(job.device).to(memory_format=torch.channels_last_3d)


@contextmanager
def cheap_compile(job: Job) -> Iterator[None]:
    """On a CPU, where generating code takes minutes: trace and differentiate graphs, but run them as they are."""
    real = torch.compile
    if not job.gpu:

        def traced(function: Any, **options: Any) -> Any:
            kept = {k: v for k, v in options.items() if k in ("fullgraph", "dynamic")}
            return real(function, backend="aot_eager", **kept)

        torch.compile = traced
    try:
        yield
    finally:
        torch.compile = real


@contextmanager
def recordings() -> Iterator[list[int]]:
    """Counts the CUDA graphs that are recorded meanwhile."""
    count = [0]
    try:
        from torch._inductor.cudagraph_trees import CUDAGraphNode
    except ImportError:
        yield count
        return
    real = CUDAGraphNode.__init__

    def counted(self: Any, *args: Any, **kwargs: Any) -> None:
        count[0] += 1
        real(self, *args, **kwargs)

    CUDAGraphNode.__init__ = counted
    try:
        yield count
    finally:
        CUDAGraphNode.__init__ = real


def step(job: Job, rec: Recorder) -> None:
    """The four-network step with all terms: eager and compiled, with members taking turns."""
    make_deterministic(job.runtime())
    amp = job.size("bf16", "off")
    variants = [Variant("off", "off", 1), Variant(amp, "off", 1)]
    variants += [Variant(amp, "default", 1)]  # at this size launches do not count
    took: dict[str, float] = {}
    flops = 0
    for variant in dict.fromkeys(variants):
        with rec.check(f"step: {variant.name}"), cheap_compile(job), recordings() as recorded:
            turns = Turns(job, variant)
            if variant.compile == "off" and not flops:
                with FlopCounterMode(display=False) as counter:
                    turns.once()
                flops = counter.get_total_flops()
            if variant.compile != "off":
                _one_graph(rec, turns, recorded)
            ms = took[variant.name] = milliseconds(job, turns.once)
            n = turns.recipe.optim.batch_size
            peak = job.bench(turns.recipe).matrix_peak(variant.dtype)
            share = 100 * teraflops(flops, ms) / peak.value
            detail = (
                f"{ms:.1f} ms, batch {n}, {flops / 1e12:.2f} TFLOP, {share:.1f} % of {peak.name}"
            )
            detail += "".join(f"; {line}" for line in turns.told)[:300]
            rec.row(f"step: {variant.name}", n / ms * 1e3, unit="clips/s", detail=detail)
    eager = Variant(amp, "off", 1).name
    for mode in ("default",):
        compiled = Variant(amp, mode, 1).name
        if eager in took and compiled in took:
            ratio = took[eager] / took[compiled]
            rec.row(f"step: {mode} over eager AMP", ratio, unit="times", goal=job.size(1.8, None))


def graphs(job: Job, rec: Recorder) -> None:
    """A search's step: what launches cost, and what CUDA graphs save of it."""
    make_deterministic(job.runtime())
    amp = job.size("bf16", "off")
    took: dict[str, float] = {}
    for mode in ("off", "reduce-overhead", "default"):  # the default first, should time run out
        with rec.check(f"search step: {mode}"), cheap_compile(job), recordings() as recorded:
            turns = Turns(job, Variant(amp, mode, 1), small=True)
            if mode != "off":
                _one_graph(rec, turns, recorded)
            took[mode] = milliseconds(job, turns.once)
            host = _host_milliseconds(job, turns)
            detail = f"the host is busy for {host:.2f} ms; batch {turns.recipe.optim.batch_size}"
            detail += "".join(f"; {line}" for line in turns.told)[:300]
            rec.row(f"search step: {mode}", took[mode], unit="ms", detail=detail)
            with rec.check(f"search step: waits of the host, {mode}"):
                _no_waits(job, rec, turns, mode)
            if mode == "off":
                with rec.check("recorded steps on parallel streams"):
                    _parallel(job, rec, turns)
    if {"off", "reduce-overhead"} <= took.keys():
        ratio = took["off"] / took["reduce-overhead"]
        rec.row(
            "search step: CUDA graphs over eager", ratio, unit="times", goal=job.size(2.0, None)
        )


def _host_milliseconds(job: Job, turns: Turns) -> float:
    """Of the host alone, which launches and does not wait."""
    job.wait()
    began = time.perf_counter()
    for _ in range(3):
        turns.once()
    milliseconds_ = (time.perf_counter() - began) / 3 * 1e3
    job.wait()
    return milliseconds_


def _no_waits(job: Job, rec: Recorder, turns: Turns, mode: str) -> None:
    """Steps under PyTorch's watch, which raises where an operation makes the host wait."""
    job.need_gpu()
    member = turns.members[0]
    member.step += -member.step % CHECK_EVERY_ON_GPU + 1  # the loss is looked at just before
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            turns.once()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    rec.row(f"search step: waits of the host, {mode}", 0, goal=0, sense="==")


def _parallel(job: Job, rec: Recorder, turns: Turns) -> None:
    """Forward and backward passes of several members, each recorded with memory of its own: in turn, and at once."""
    job.need_gpu()
    graphs, streams = [], [torch.cuda.Stream(job.device) for _ in range(MEMBERS)]
    for number, stream in enumerate(streams):
        member = turns.trainer.member(random_weights(number), seed=0)

        def step(member: Any = member) -> None:
            member.loss.zero_grad(set_to_none=True)
            evaluate(member, turns.batches[0], buffers=None, runtime=turns.trainer.runtime)[
                0
            ].backward()

        stream.wait_stream(torch.cuda.current_stream(job.device))
        with torch.cuda.stream(stream):
            for _ in range(2):
                step()
        job.wait()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            step()
        graphs.append((graph, member))

    def in_turn() -> None:
        for graph, _ in graphs:
            graph.replay()

    def at_once() -> None:
        main = torch.cuda.current_stream(job.device)
        for (graph, _), stream in zip(graphs, streams, strict=True):
            stream.wait_stream(main)
            with torch.cuda.stream(stream):
                graph.replay()
        for stream in streams:
            main.wait_stream(stream)

    one, many = milliseconds(job, in_turn) / MEMBERS, milliseconds(job, at_once) / MEMBERS
    detail = f"{MEMBERS} members, eager kernels, forward and backward alone"
    rec.row("recorded steps in turn", one, unit="ms a member", detail=detail)
    rec.row("recorded steps on parallel streams", many, unit="ms a member", detail=detail)
    rec.row("parallel streams over turns", one / many, unit="times")


class Turns:
    """Members of a variant that take turns on two resident batches."""

    def __init__(self, job: Job, variant: Variant, *, small: bool = False) -> None:
        """``small``: at the size of a search of the built-in videos."""
        torch._dynamo.reset()
        counters.clear()
        changes = [f"optim.amp={variant.amp}", f"optim.compile={variant.compile}"]
        self.recipe = (job.small if small else job.full)(*changes)
        self.told: list[str] = []
        runtime = job.runtime(variant.amp)
        self.trainer = Trainer(self.recipe, job.index, runtime, warn=self.told.append)
        count = 1 if variant.compile == "off" else MEMBERS
        self.members = [self.trainer.member(random_weights(i), seed=0) for i in range(count)]
        rounds = self.trainer.rounds(self.members, seed=0)
        self.batches: list[Views] = [next(rounds)[1] for _ in range(2)]
        rounds.close()  # type: ignore[attr-defined]
        began = time.perf_counter()
        self.once()
        job.wait()
        self.first_seconds = time.perf_counter() - began

    def once(self) -> None:
        """A step of the first member."""
        self.trainer.step(self.members[0], self.batches[0])

    def around(self, rounds: int) -> None:
        """Steps of all members, batch after batch."""
        for turn in range(rounds):
            for member in self.members:
                self.trainer.step(member, self.batches[turn % 2])

    def addresses(self) -> list[int]:
        """Where the networks lie that compiled code works on."""
        buffers = self.trainer.buffers
        return [] if buffers is None else [p.data_ptr() for p in buffers.loss.parameters()]


def _one_graph(rec: Recorder, turns: Turns, recorded: list[int]) -> None:
    """Members, batches and steps share one graph, one recording and one place."""
    mode = turns.trainer.mode
    rec.row(
        f"{mode}: first step", turns.first_seconds, unit="s", detail="compiling and checks included"
    )
    if turns.trainer.buffers is None:
        raise RuntimeError(f"{mode}: {'; '.join(turns.told) or 'the step was not compiled'}")
    graphs = counters["stats"]["unique_graphs"]
    before = turns.addresses()
    turns.around(ROUNDS)
    name = f"{mode}: graphs after {MEMBERS} members x {ROUNDS} steps"
    detail = f"{turns.trainer.buffers.graphs} in the buffers, {graphs} after the first step"
    rec.row(name, counters["stats"]["unique_graphs"], goal=1, sense="==", detail=detail)
    first = recorded[0]
    turns.around(2)
    rec.row(f"{mode}: CUDA graphs recorded anew", recorded[0] - first, goal=0, sense="==",
            detail=f"{first} recorded at first; skips {counters['inductor'].get('cudagraph_skips', 0)}")  # fmt: skip
    same = before == turns.addresses()
    rec.row(f"{mode}: networks stay where they are", same, ok=same)
