"""The main job: evolve a loss on unlabelled videos, judged by clustering labelled ones.

One loop, whoever does the work: ask the study for members, pack them into cohorts, submit these to the workers, take
what they give, tell the study, write down what follows from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import torch

from engine.core.display import Display
from engine.core.events import Events
from engine.core.pool import Crew, Done, Job, LocalPool, Lost, Pool
from engine.core.provenance import provenance, write_provenance
from engine.core.ray_pool import RayPool
from engine.core.recipe import Recipe, recipe_hash
from engine.core.runfolder import RunError, RunFolder
from engine.core.runtime import Clock, Runtime
from engine.data.library import Library, fingerprint
from engine.features.extract import LabelledClips
from engine.objective.lossfile import random_weights
from engine.search.cohort import MemberResult
from engine.search.packing import Planner, split
from engine.search.records import Meter, Records, outcome_line
from engine.search.samplers import Proposal, Trial
from engine.search.study import SearchStudy
from engine.search.worker import Cohort, CohortEvaluator, CohortFactory, CohortResult, Progress


@dataclass(frozen=True)
class Data:
    """What a run trains on and is judged by."""

    videos: Library
    labelled: Library
    named: tuple[list[str], list[str]]
    """The videos and labelled folders as the user named them."""


@dataclass(frozen=True)
class Workers:
    """Who trains the members."""

    count: int | None = 0
    """Ray's workers; 0: this process does it all, without Ray. None: as many as the cluster has GPUs."""
    gpus: bool = False
    """A GPU a worker."""
    address: str | None = None
    """Ray's cluster: auto or HOST:PORT; None: Ray is started on this machine."""
    members_at_once: int | None = None
    """Most members of a job; None: a generation is shared out, and memory decides how many are trained at once."""
    time_limit: float = 0.0
    """Seconds that a member may take for each of its trainings; 0: any."""
    max_retries: int = 2
    """How often a member is tried again whose worker was lost."""

    def __post_init__(self) -> None:
        if self.count == 0 and self.time_limit:
            raise ValueError(
                "--time-limit needs a worker that can be ended and replaced: add --gpus N or --workers N"
            )


def evolve(
    recipe: Recipe,
    data: Data,
    *,
    run: RunFolder,
    runtime: Runtime,
    display: Display,
    workers: Workers = Workers(),
) -> dict[str, Any]:
    """Run or continue a search, confirm its outcome with fresh seeds, and return what summary.json holds.

    A kill at any moment loses the members at work and no more: what was begun is continued by the same call.

    Raises ValueError where the data does not fit (see ``LabelledClips``), and RunError where the run began with other
    videos, or rounds were lowered below what is done.
    """
    clock, identity = Clock(), fingerprint(data.videos, data.labelled)
    worker = _worker_here(recipe, data, run, runtime, workers) if workers.count == 0 else None
    labelled = worker.labelled if worker else _labelled_fits(recipe, data)
    resumed = (run.path / "recipe.toml").exists()
    run.begin(lambda: _write_provenance(recipe, data, identity, labelled, run, runtime))
    display.say(f"run folder {run.path}")
    events = Events(run.path)
    if resumed:
        events.add("resumed", f"{workers.count or 'no'} workers")

    study = _open_study(recipe, run, display, events, clock)
    _check_rounds(recipe, run, study)
    records = Records(recipe, run, study, display=display, events=events, clock=clock)
    if not study.finished or records.seeds_to_confirm():  # starting workers takes seconds
        meter = Meter(display)
        factory = _factory(recipe, data, identity, run, workers)
        with closing(_open_pool(worker or factory, workers, display, meter)) as pool:
            crew = _crew(pool, recipe, workers, records)
            planner = _planner(recipe, study, workers, pool, run, clock)
            _search(data, study, planner, crew, records, meter)
            _confirm(data, study, crew, records, meter)
    records.keep_best()  # an interruption may have come between the last member and the file
    summary = records.summary()
    records.close()
    display.note(outcome_line(summary))
    return summary


def _search(
    data: Data, study: SearchStudy, planner: Planner, crew: Crew, records: Records, meter: Meter
) -> None:
    """Train members until all are done."""
    what = "evolving" if study.settings.method == "evolution" else "drawing"
    done, best = len(study.members()), study.best_fitness()
    meter.start(f"{what} losses", study.total, done=done, best=best, workers=crew.pool.size)
    for cohort, report in crew.run(planner.cohorts):  # asked, packed, submitted, and done
        for member, result in zip(cohort.members, _results(cohort, report), strict=True):
            if not study.is_done(member.number):
                records.member(member.number, result)  # told and written
        records.cohort(report, workers=crew.pool.size)
        _count_substitutes(data, report)
        planner.drop_states()
        meter.done(_number(report), len(study.members()), best=study.best_fitness())
    assert study.finished, "the study ended before its members were done"
    members = study.members()
    failed = sum(member.state == "failed" for member in members)
    if failed == len(members):
        raise RuntimeError(
            f"{records.run.path}: all {failed} members failed; the first: {members[0].reason}"
        )


def _confirm(data: Data, study: SearchStudy, crew: Crew, records: Records, meter: Meter) -> None:
    """Train the best loss and a random one again with seeds that the search never saw."""
    best, left = study.best(), records.seeds_to_confirm()
    total = 2 * study.settings.confirm_seeds
    done = total - 2 * len(left)
    meter.start("confirming with fresh seeds", total, done=done, best=None, workers=crew.pool.size)

    def cohorts(idle: int) -> list[Cohort]:
        now, left[:] = left[:idle], left[idle:]
        return [_confirmation(best, seed) for seed in now]

    for cohort, report in crew.run(cohorts):
        untrained = report.result.untrained if isinstance(report, Done) else None
        records.confirmed(cohort, _results(cohort, report), untrained=untrained)
        records.cohort(report, workers=crew.pool.size)
        _count_substitutes(data, report)
        done += 2
        meter.done(_number(report), done, best=None)


def _confirmation(best: Trial, seed: int) -> Cohort:
    members = (Proposal(best.number, best.weights), Proposal(-1, random_weights(seed)))
    return Cohort(members, (seed,), confirm=True)


def _is_one(cohort: Cohort, recipe: Recipe) -> bool:
    """Whether its members are compared with each other, so that they are not tried again one by one."""
    return recipe.search.halving or cohort.confirm


def _number(report: Done | Lost) -> int:
    assert report.job is not None
    return report.job.number


def _results(cohort: Cohort, report: Done | Lost) -> Sequence[MemberResult]:
    """What became of each member; where their worker was lost for good, they failed."""
    if isinstance(report, Done):
        result: CohortResult = report.result
        return result.results
    assert report.job is not None
    attempts = f" ({report.job.attempt} attempts)" if report.job.attempt > 1 else ""
    reason = f"{report.kind.replace('_', ' ')}: {report.reason}{attempts}"
    failed = MemberResult("failed", None, reason, (), cohort.seeds, 0.0, 0.0, {}, None)
    return [failed] * len(cohort.members)


def _count_substitutes(data: Data, report: Done | Lost) -> None:
    """Count the damaged clips that a worker met as if they had been met here."""
    if isinstance(report, Done):
        counts = report.result.substituted
        for library, count in zip((data.videos, data.labelled), counts, strict=True):
            library.index.substituted.update(count)


def _open_study(
    recipe: Recipe, run: RunFolder, display: Display, events: Events, clock: Clock
) -> SearchStudy:
    def storage_away(reason: str) -> None:
        display.say(f"the study's storage is away, waiting for it: {reason}")
        events.add("storage", reason)

    with clock("search"):
        return SearchStudy(
            recipe.search,
            storage=run.storage or run.study,
            name=run.study_name,
            seed=recipe.seed,
            recipe_hash=recipe_hash(recipe),
            on_wait=storage_away,
        )


def _open_pool(
    worker: CohortEvaluator | CohortFactory, workers: Workers, display: Display, meter: Meter
) -> Pool:
    """This process as the only worker, or Ray's workers, which a factory makes."""

    def on_news(job: Job, progress: Progress | None) -> None:
        meter.moved(job.number, progress, ready=pool.ready())

    pool: Pool
    if isinstance(worker, CohortEvaluator):
        pool = LocalPool(worker, on_news=on_news)
        return pool
    display.say("starting workers")
    pool = RayPool(
        worker,
        size=workers.count,
        address=workers.address,
        gpus=float(workers.gpus),
        on_news=on_news,
    )
    return pool


def _crew(pool: Pool, recipe: Recipe, workers: Workers, records: Records) -> Crew:
    return Crew(
        pool,
        workers.max_retries,
        split=lambda cohort: [cohort] if _is_one(cohort, recipe) else split(cohort),
        limit=lambda cohort: workers.time_limit * len(cohort.members) * len(cohort.seeds),
        on_lost=records.lost,
    )


def _planner(
    recipe: Recipe, study: SearchStudy, workers: Workers, pool: Pool, run: RunFolder, clock: Clock
) -> Planner:
    return Planner(
        recipe,
        study,
        workers=pool.size,
        members_at_once=workers.members_at_once,
        checkpoints=run.checkpoints,
        clock=clock,
    )


def _worker_here(
    recipe: Recipe, data: Data, run: RunFolder, runtime: Runtime, workers: Workers
) -> CohortEvaluator:
    return CohortEvaluator(
        recipe,
        data.videos.index,
        data.labelled.index,
        runtime=runtime,
        checkpoints=run.checkpoints,
        members_at_once=workers.members_at_once,
    )


def _labelled_fits(recipe: Recipe, data: Data) -> LabelledClips:
    on_cpu = Runtime(torch.device("cpu"), amp=False)
    return LabelledClips(data.labelled.index, recipe, runtime=on_cpu)


def _factory(
    recipe: Recipe, data: Data, identity: str, run: RunFolder, workers: Workers
) -> CohortFactory:
    return CohortFactory(
        recipe,
        videos=tuple(path.absolute() for path in data.videos.shards),
        labelled=tuple(path.absolute() for path in data.labelled.shards),
        data=identity,
        checkpoints=run.checkpoints.absolute(),
        device="cuda" if workers.gpus else "cpu",
        members_at_once=workers.members_at_once,
    )


def _check_rounds(recipe: Recipe, run: RunFolder, study: SearchStudy) -> None:
    """Take over rounds that were changed for a run that goes on."""
    done = len(study.members())
    if done > study.total:
        least = done - recipe.search.population
        raise RunError(
            f"{run.path}: {done} members are done already, so --rounds must be {least} or more"
        )
    if done < study.total:
        (run.path / "summary.json").unlink(missing_ok=True)
    run.save_recipe(recipe)


def _write_provenance(
    recipe: Recipe,
    data: Data,
    identity: str,
    labelled: LabelledClips,
    run: RunFolder,
    runtime: Runtime,
) -> None:
    videos, judged_by = data.videos, data.labelled
    facts = {
        **provenance(runtime),
        "seed": recipe.seed,
        "recipe": recipe.name,
        "recipe_hash": recipe_hash(recipe),
        "videos": data.named[0],
        "labelled": data.named[1],
        "num_clips": len(videos.index),
        "num_clips_with_sound": int(videos.index.has_audio.sum()),
        "hours_of_video": round(float(videos.index.duration.sum()) / 3600, 4),
        "num_labelled": len(labelled.clips),
        "num_classes": labelled.num_classes,
        "labels_used": recipe.fitness.uses_labels,
        "rejected": [
            f"{r.path}: {r.reason}" for r in dict.fromkeys((*videos.rejects, *judged_by.rejects))
        ],
        "data": identity,
    }
    write_provenance(run, facts)
