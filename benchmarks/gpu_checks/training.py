"""Members on the GPU: cohorts beside one process a member, and a whole small search."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from engine.bench.cohort import (
    Solo,
    ask,
    costs,
    possible_gain,
    seconds_a_step,
    trainer_for,
)
from engine.core.pool import ProcessPool
from engine.core.recipe import override
from engine.core.runtime import make_deterministic
from engine.data.shards.index import ClipIndex
from engine.features.extract import LabelledClips
from engine.objective.lossfile import random_weights
from engine.objective.terms import LossWeights
from engine.train.trainer import Member, MemberFailed, Trainer
from gpu_checks.commands import engine, fresh, options, settings
from gpu_checks.job import Job
from gpu_checks.record import Absent, Recorder

COHORTS = (1, 2, 4, 8, 16)


def cohort(job: Job, rec: Recorder) -> None:
    """Members an hour of cohorts and of one process a member, at the size of a search of the built-in videos."""
    make_deterministic(job.runtime())
    mode = job.size("auto", "off")
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
        _processes(job, rec, rates, Solo(recipe, job.index, runtime, steps))
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


def _processes(job: Job, rec: Recorder, rates: dict[int, float], solo: Solo) -> None:
    """A process of its own trains one member after another; it has the GPU and the cores to itself."""
    with closing(ProcessPool(solo, size=1)) as pool:
        (pairs,) = ask([pool], "costs", [job.size(8, 2)])
        d, c = (sorted(column)[len(pairs) // 2] for column in zip(*pairs, strict=True))
        seconds = [ask([pool], "train", [number])[0] for number in range(3)]
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


def first(job: Job, rec: Recorder) -> None:
    """Does it run at all: two members trained for a few steps on batches of the videos, and judged."""
    make_deterministic(job.runtime())
    changes = ["optim.compile=off", "optim.steps=6", "optim.warmup_steps=2"]
    recipe = job.small(*changes)
    trainer = Trainer(recipe, job.index, job.runtime(), warn=job.said.append)
    began = time.perf_counter()
    members = _trained(trainer, [random_weights(i) for i in range(2)])
    job.wait()
    detail = "; ".join(job.said)[:300] or "no warning"
    rec.row("members trained", time.perf_counter() - began, unit="s", detail=detail)
    values = [value for member in members for value in member.term_values().values()]
    sound = all(math.isfinite(value) for value in values)
    rec.row("terms are finite", len(values), ok=sound, detail=f"after {recipe.optim.steps} steps")
    labelled = LabelledClips(ClipIndex(job.folders[1]), recipe, runtime=job.runtime())
    began = time.perf_counter()
    found = labelled.fitness([member.loss.rgb for member in members], seed=0)
    words = [each if isinstance(each, str) else f"{each.value:.3f}" for each in found]
    good = not any(isinstance(each, str) for each in found)
    seconds = time.perf_counter() - began
    rec.row("members judged", seconds, unit="s", ok=good, detail=f"fitness {', '.join(words)}")


def evolve(job: Job, rec: Recorder) -> None:
    """``engine evolve`` from start to report: two generations of four members, and confirmation."""
    run, (videos, labelled) = fresh(job, "evolve"), job.folders
    changes = ["optim.warmup_steps=2", "search.confirm_seeds=1", f"optim.steps={job.size(20, 3)}"]
    changes += ["search.generation=4", "search.tournament=2"]
    changes += [f"search.population={job.size(4, 3)}", f"search.rounds={job.size(4, 1)}"]
    with rec.check("outcome"):
        engine(
            job, rec, "engine evolve", "evolve", "--recipe", "demo", "--run", str(run), "--device",
            job.device.type, *options("--videos", videos), *options("--labelled", labelled),
            *settings(job, *changes),
        )  # fmt: skip
        _outcome(rec, run)


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
