"""Training on the GPU: the supervised step, the four-network step, cohorts, and a whole small search."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from gpu_checks.inputs import milliseconds
from gpu_checks.job import Job
from gpu_checks.record import ROOT, Absent, Recorder
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.utils.flop_counter import FlopCounterMode

from engine.bench.cohort import possible_gain
from engine.bench.rows import teraflops
from engine.bench.solo import Job as SoloJob
from engine.bench.solo import Soloist, costs, seconds_a_step, trainer_for
from engine.bench.step import Variant
from engine.data.views import Views
from engine.model.resnet3d import ResNet3D
from engine.objective.terms import LossWeights
from engine.recipe import override, random_weights
from engine.runtime import make_deterministic
from engine.train import Member, MemberFailed, Trainer

MEMBERS, ROUNDS = 4, 3
"""Members that take turns in a compiled step, and steps of each, after which there must be one graph."""
COHORTS = (1, 2, 4, 8, 16)


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
            rec.row(f"supervised step, {what}", rate, unit="clips/s", goal=171.0, detail=detail)
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
    variants += [Variant(amp, mode, 1) for mode in ("default", "reduce-overhead")]
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
            detail = f"{ms:.1f} ms, batch {n}, {flops / 1e12:.2f} TFLOP, {share:.1f} % of {peak.name}"
            detail += "".join(f"; {line}" for line in turns.told)[:300]
            rec.row(f"step: {variant.name}", n / ms * 1e3, unit="clips/s", detail=detail)
    eager = Variant(amp, "off", 1).name
    for mode in ("default", "reduce-overhead"):
        compiled = Variant(amp, mode, 1).name
        if eager in took and compiled in took:
            ratio = took[eager] / took[compiled]
            rec.row(f"step: {mode} over eager AMP", ratio, unit="times", goal=job.size(1.8, None))


class Turns:
    """Members of a variant that take turns on two resident batches."""

    def __init__(self, job: Job, variant: Variant) -> None:
        torch._dynamo.reset()
        counters.clear()
        changes = [f"optim.amp={variant.amp}", f"optim.compile={variant.compile}"]
        self.recipe = job.full(*changes)
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
        seat = self.trainer.seat
        return [] if seat is None else [p.data_ptr() for p in seat.loss.parameters()]


def _one_graph(rec: Recorder, turns: Turns, recorded: list[int]) -> None:
    """Members, batches and steps share one graph, one recording and one place."""
    mode = turns.trainer.mode
    rec.row(f"{mode}: first step", turns.first_seconds, unit="s", detail="compiling and checks included")
    if turns.trainer.seat is None:
        raise RuntimeError(f"{mode}: {'; '.join(turns.told) or 'the step was not compiled'}")
    graphs = counters["stats"]["unique_graphs"]
    before = turns.addresses()
    turns.around(ROUNDS)
    name = f"{mode}: graphs after {MEMBERS} members x {ROUNDS} steps"
    detail = f"{turns.trainer.seat.graphs} in the seat, {graphs} after the first step"
    rec.row(name, counters["stats"]["unique_graphs"], goal=1, sense="==", detail=detail)
    first = recorded[0]
    turns.around(2)
    rec.row(f"{mode}: CUDA graphs recorded anew", recorded[0] - first, goal=0, sense="==",
            detail=f"{first} recorded at first; skips {counters['inductor'].get('cudagraph_skips', 0)}")  # fmt: skip
    same = before == turns.addresses()
    rec.row(f"{mode}: networks stay where they are", same, ok=same)


def cohort(job: Job, rec: Recorder) -> None:
    """Members an hour of cohorts and of one process a member, at the size of a search of the built-in videos."""
    make_deterministic(job.runtime())
    mode = job.size("default", "off")
    recipe = job.small(f"optim.compile={mode}")
    runtime, steps = job.runtime(recipe.optim.amp), job.size(10, 2)
    trainer = trainer_for(recipe, job.index, runtime, steps=steps)
    began = time.perf_counter()
    seconds_a_step(trainer, [random_weights(0)])
    rec.row("first member, compiling included", time.perf_counter() - began, unit="s")
    rates: dict[int, float] = {}
    for members in job.size(COHORTS, (1, 2)):
        seconds = seconds_a_step(trainer, [random_weights(i) for i in range(members)])
        rates[members] = 3600 * members / (seconds * recipe.optim.steps)
        detail = f"{1e3 * seconds:.1f} ms a step of all, {recipe.optim.steps} steps a member"
        detail += f"; {job.on_host()}" if job.on_host() else ""
        rec.row(f"cohort of {members}", rates[members], unit="members/h", detail=detail)
    with rec.check("one process a member"):
        _processes(job, rec, rates, SoloJob(recipe, job.index, runtime, None), steps)
    with rec.check("a cohort of 4 is four singles"):
        _singles(job, rec)
    with rec.check("compiled over eager AMP at a search's size"):
        eager = trainer_for(override(recipe, ["optim.compile=off"]), job.index, runtime, steps=8)
        found = [costs(each, random_weights(0), repeats=5)[2:] for each in (eager, trainer)]
        (_, slow), (_, fast) = (map(min, zip(*pairs, strict=True)) for pairs in found)
        detail = f"{slow:.1f} and {fast:.1f} ms"
        name = "compiled over eager AMP at a search's size"
        rec.row(name, slow / fast, unit="times", detail=detail)
    with rec.check("possible gain of 16 at full size"):
        full = trainer_for(job.full("optim.compile=off"), job.index, runtime, steps=8)
        d, c = map(min, zip(*costs(full, random_weights(0), repeats=2), strict=True))
        detail = f"uncompiled; D {d:.1f} ms, C {c:.1f} ms"
        rec.row("possible gain of 16 at full size", possible_gain(16, d, c), unit="times", detail=detail)


def _processes(
    job: Job, rec: Recorder, rates: dict[int, float], solo: SoloJob, steps: int
) -> None:
    """A process of its own trains one member after another; it has the GPU and the cores to itself."""
    with Soloist(solo, steps=steps) as soloist:
        soloist.ask("costs", job.size(8, 2))
        pairs = sorted(soloist.answer())
        d, c = (sorted(column)[len(pairs) // 2] for column in zip(*pairs, strict=True))
        seconds = []
        for number in range(3):
            soloist.ask("train", number)
            seconds.append(soloist.answer())
    alone = 3600 / (sorted(seconds)[1] * solo.recipe.optim.steps)
    rec.row("one process a member", alone, unit="members/h", detail="one after another")
    detail = f"D {d:.1f} ms, C {c:.1f} ms"
    most = max(rates)
    rec.row(f"possible gain of {most}", possible_gain(most, d, c), unit="times", detail=detail)
    name = f"cohort of {most} over one process a member"
    rec.row(name, rates[most] / alone, unit="times", goal=job.size(6.0, None), detail=detail)


def _singles(job: Job, rec: Recorder) -> None:
    """The same losses in a cohort and each alone: on a GPU atomics in cuDNN leave a little between them."""
    steps = 6
    changes = ["optim.compile=off", f"optim.steps={steps}", "optim.warmup_steps=2"]
    recipe = job.small(*changes)
    trainer = Trainer(recipe, job.index, job.runtime(recipe.optim.amp))
    losses = [random_weights(i) for i in range(4)]
    together = _trained(trainer, losses)
    alone = [_trained(trainer, [loss])[0] for loss in losses]
    apart = [
        abs(a - b) / max(abs(b), 1e-2)
        for one, other in zip(together, alone, strict=True)
        for a, b in zip(one.term_values().values(), other.term_values().values(), strict=True)
    ]
    detail = f"largest relative difference of {len(apart)} term values after {steps} steps, uncompiled"
    name = "a cohort of 4 is four singles"
    rec.row(name, max(apart), goal=job.size(0.05, 0.0), sense="<=", detail=detail)


def _trained(trainer: Trainer, losses: Sequence[LossWeights]) -> list[Member]:
    members = [trainer.member(weights, seed=0) for weights in losses]
    for _, views in trainer.rounds(members, seed=0):
        for outcome in trainer.step_all(members, views):
            if isinstance(outcome, MemberFailed):
                raise outcome
    return members


BOOT = "from gpu_checks.job import use_host; use_host(); from engine.cli import main; main()"


def evolve(job: Job, rec: Recorder) -> None:
    """``engine evolve`` from start to report: two generations of four members, and confirmation."""
    run = job.work / "evolve"
    shutil.rmtree(run, ignore_errors=True)
    videos, labelled = job.folders
    changes = [*job.size([], [*TINY_RUN]), "optim.warmup_steps=2", "search.confirm_seeds=1"]
    changes += [f"optim.steps={job.size(20, 3)}", "search.generation=4", "search.tournament=2"]
    changes += [f"search.population={job.size(4, 3)}", f"search.rounds={job.size(4, 1)}"]
    command = [sys.executable, "-c", BOOT, "evolve", "--recipe", "demo", "--run", str(run)]
    command += ["--device", job.device.type]
    for option, folders in (("--videos", videos), ("--labelled", labelled)):
        command += [word for folder in folders for word in (option, str(folder))]
    command += [word for change in changes for word in ("--set", change)]
    path = os.pathsep.join([str(ROOT), str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")])
    began = time.perf_counter()
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": path}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    seconds = time.perf_counter() - began
    (job.work / "logs").mkdir(parents=True, exist_ok=True)
    (job.work / "logs" / "evolve.txt").write_text(done.stdout)
    last = (done.stdout.strip().splitlines() or ["no output"])[-1][:300]
    rec.row("engine evolve ends well", done.returncode, goal=0, sense="==", detail=last)
    rec.row("engine evolve, start to report", seconds, unit="s", detail=job.on_host())
    _outcome(rec, run)


TINY_RUN = (
    "clip.num_frames=4 clip.num_future_frames=2 clip.size=32 model.width=0.0625 optim.batch_size=4 "
    "optim.amp=off fitness.views_per_clip=1 fitness.kmeans_init=2 fitness.kmeans_seeds=1"
).split()


def _outcome(rec: Recorder, run: Path) -> None:
    """What the run's folder says."""
    if not (run / "summary.json").is_file():
        raise Absent("the run left no summary.json")
    summary = json.loads((run / "summary.json").read_text())
    rec.row("members that failed", summary["failures"], goal=0, sense="==",
            detail=f"of {summary['members']}; best fitness {summary['best_search_fitness']:.3f}")  # fmt: skip
    report = (run / "report.html").is_file()
    rec.row("report.html", "written" if report else "missing", ok=report)
    times = json.loads((run / "timing.json").read_text())
    times = {stage: s for stage, s in times.items() if isinstance(s, (int, float))}
    detail = ", ".join(f"{stage} {s:.1f} s" for stage, s in times.items())
    share = 100 * times.get("fitness", 0.0) / max(sum(times.values()), 1e-9)
    rec.row("fitness in the search's time", share, unit="%", detail=detail, figures=times)
