"""Members on the GPU: cohorts beside one process a member, and a whole small search."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from engine.bench.cohort import (
    SoloJob,
    SoloProcess,
    costs,
    possible_gain,
    seconds_a_step,
    trainer_for,
)
from engine.core.recipe import override
from engine.core.runtime import make_deterministic
from engine.objective.lossfile import random_weights
from engine.objective.terms import LossWeights
from engine.train.trainer import Member, MemberFailed, Trainer
from gpu_checks.job import Job
from gpu_checks.record import ROOT, Absent, Recorder

COHORTS = (1, 2, 4, 8, 16)


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
        rec.row(
            "possible gain of 16 at full size", possible_gain(16, d, c), unit="times", detail=detail
        )


def _processes(job: Job, rec: Recorder, rates: dict[int, float], solo: SoloJob, steps: int) -> None:
    """A process of its own trains one member after another; it has the GPU and the cores to itself."""
    with SoloProcess(solo, steps=steps) as process:
        process.ask("costs", job.size(8, 2))
        pairs = sorted(process.answer())
        d, c = (sorted(column)[len(pairs) // 2] for column in zip(*pairs, strict=True))
        seconds = []
        for number in range(3):
            process.ask("train", number)
            seconds.append(process.answer())
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
    detail = (
        f"largest relative difference of {len(apart)} term values after {steps} steps, uncompiled"
    )
    name = "a cohort of 4 is four singles"
    rec.row(name, max(apart), goal=job.size(0.05, 0.0), sense="<=", detail=detail)


def _trained(trainer: Trainer, losses: Sequence[LossWeights]) -> list[Member]:
    members = [trainer.member(weights, seed=0) for weights in losses]
    for _, views in trainer.rounds(members, seed=0):
        for outcome in trainer.step_all(members, views):
            if isinstance(outcome, MemberFailed):
                raise outcome
    return members


BOOT = "from gpu_checks.job import use_host; use_host(); from engine.cli.main import main; main()"


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
    with rec.check("outcome"):
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
