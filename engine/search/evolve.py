"""The main job: evolve a loss on unlabelled videos, judged by clustering labelled ones.

One loop, whoever does the work: ask the study for members, pack them into cohorts, submit these to the workers, store
each outcome in the study, and write down what follows from it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import torch

from engine.core.display import Display
from engine.core.pool import Done, Job, JobQueue, LocalPool, Lost, Pool
from engine.core.provenance import provenance, write_provenance
from engine.core.ray_pool import RayPool
from engine.core.recipe import Recipe, Search, recipe_hash
from engine.core.run import Events, RunError, RunFolder
from engine.core.runtime import Clock, Runtime, format_note
from engine.data.library import Library
from engine.data.shards.index import data_digest
from engine.features.extract import LabelledClips
from engine.objective.lossfile import load_loss, random_weights
from engine.search.cohort import MemberResult
from engine.search.members import Proposal, Trial
from engine.search.packing import Planner, split
from engine.search.records import (
    ProgressLine,
    Records,
    confirmation_sizes,
    drawn_under,
    outcome_line,
)
from engine.search.study import SearchStudy
from engine.search.worker import Cohort, CohortEvaluator, CohortFactory, CohortResult, Progress


@dataclass(frozen=True)
class Data:
    """Videos of a run: those to train on, and the labelled ones that judge."""

    videos: Library
    labelled: Library
    named: tuple[list[str], list[str]]
    """The videos and labelled folders as the run notes them."""
    levels: Mapping[str, Sequence[float]] = field(default_factory=dict)
    """Known levels of fitness on the labelled videos, by name."""


@dataclass(frozen=True)
class Workers:
    """Options of the workers that train the members."""

    count: int | None = 0
    """Ray's workers; 0: this process alone, without Ray. None: as many as the cluster has GPUs."""
    gpus: bool = False
    """A GPU a worker."""
    address: str | None = None
    """Ray's cluster: auto or HOST:PORT; None: Ray is started on this machine."""
    members_at_once: int | None = None
    """Most members of a cohort; None: a generation is shared out, and memory decides how many train at once."""
    time_limit: float = 0.0
    """Seconds that a member may take for each of its trainings; 0: any."""
    max_retries: int = 2
    """Further tries of a member whose worker was lost."""

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
    """Run or continue a search, confirm its outcome with fresh seeds, and return the contents of summary.json.

    A kill at any moment loses the members at work and no more: the same call continues the run.

    Raises ValueError where the data does not fit (see ``LabelledClips``), and RunError where the run began with other
    videos, or rounds were lowered below the members that are done.
    """
    if (note := format_note(recipe.optim.amp, runtime)) is not None:
        display.say(note)  # each worker has it too, with its first cohort
    videos, judging = data.videos.index, data.labelled.index
    clock, identity = Clock(), data_digest((*data.videos.shards, *data.labelled.shards))
    factory = CohortFactory(
        recipe,
        videos=tuple(path.absolute() for path in data.videos.shards),
        labelled=tuple(path.absolute() for path in data.labelled.shards),
        data=identity,
        checkpoints=run.checkpoints.absolute(),
        device="cuda" if workers.gpus else "cpu",
        members_at_once=workers.members_at_once,
    )
    here = CohortEvaluator(factory, videos, judging, runtime) if workers.count == 0 else None
    on_cpu = Runtime(torch.device("cpu"), amp=False)
    labelled = here.labelled if here else LabelledClips(judging, recipe, runtime=on_cpu)
    resumed = (run.path / "recipe.toml").exists()
    run.begin(lambda: _write_provenance(recipe, data, identity, labelled, run, runtime))
    display.say(f"run folder {run.path}")
    events = Events(run.path)
    if resumed:
        events.add("resumed", f"{workers.count or 'no'} workers")
    study = _open_study(recipe, run, display, events, clock, sound=bool(videos.has_audio.any()))
    _check_recipe(recipe, run, study)
    said, levels = [note or ""], data.levels
    records = Records(recipe, run, study, display, events, clock, said=said, levels=levels)
    records.keep_best()  # an interruption may have come between a member and the file
    if not study.finished or records.lacks_network() or records.seeds_to_confirm():
        # starting workers takes seconds
        _Search(data, study, records, workers).run(here or factory)
    summary = records.summary()
    records.board.close()
    display.note(outcome_line(summary))
    return summary


@dataclass
class _Search:
    """The loop of a search and of its confirmation, in this process or on Ray's workers."""

    data: Data
    study: SearchStudy
    records: Records
    workers: Workers
    progress: ProgressLine = field(init=False)
    """Progress of the stage at work."""

    def run(self, worker: CohortEvaluator | CohortFactory) -> None:
        """Train all members that are not done, then confirm the best; a factory makes Ray's workers."""
        with closing(self._open_pool(worker)) as pool:
            queue = JobQueue(
                pool,
                self.workers.max_retries,
                split=lambda cohort: [cohort] if self._compares(cohort) else split(cohort),
                limit=lambda c: self.workers.time_limit * len(c.members) * len(c.seeds),
                on_lost=self.records.lost,
            )
            self._search(queue)
            self._keep_outcome(queue)
            self._confirm(queue)

    def _open_pool(self, worker: CohortEvaluator | CohortFactory) -> Pool:
        def on_news(job: Job, progress: Progress | None) -> None:
            self.progress.moved(job.number, progress, ready=pool.ready())

        pool: Pool
        if isinstance(worker, CohortEvaluator):
            pool = LocalPool(worker, on_news=on_news)
        else:
            self.records.display.say("starting workers")
            size, address = self.workers.count, self.workers.address
            gpus = float(self.workers.gpus)
            pool = RayPool(worker, size=size, address=address, gpus=gpus, on_news=on_news)
        return pool

    def _compares(self, cohort: Cohort) -> bool:
        """Whether its members are compared with each other, so that they are not tried again one by one."""
        return self.study.settings.halving or cohort.confirm

    def _search(self, queue: JobQueue) -> None:
        """Train members until all are done."""
        study, records = self.study, self.records
        planner = Planner(
            records.recipe,
            study,
            workers=queue.pool.size,
            members_at_once=self.workers.members_at_once,
            checkpoints=records.run.checkpoints,
            clock=records.clock,
        )
        if line := planner.idle():
            records.display.say(line)
        draws = study.settings.method in ("random", "grid")
        stage = "drawing losses" if draws else "evolving losses"
        done, best = len(study.members()), study.best_fitness()
        self.progress = ProgressLine(
            records.display, stage, study.total, done, queue.pool.size, best
        )
        for cohort, result in self._outcomes(queue, planner.cohorts):
            for member, each in zip(cohort.members, result.results, strict=True):
                if not study.is_done(member.number):
                    records.member(member.number, each)
            planner.drop_states()
            self.progress.done, self.progress.best = len(study.members()), study.best_fitness()
        assert study.finished, "the study ended before its members were done"
        members = study.members()
        failed = all(member.state == "failed" for member in members)
        if failed or study.best_fitness() is None:
            how = "failed" if failed else "failed or were pruned"
            raise RuntimeError(
                f"{records.run.path}: all {len(members)} members {how}; the first: {members[0].reason}"
            )

    def _keep_outcome(self, queue: JobQueue) -> None:
        """Train the outcome once more, with its own seeds and so to the same bits, where another's network was kept."""
        if not self.records.lacks_network():
            return
        best = self.study.best()
        seeds = tuple(best.attributes["seeds"])
        left = [Cohort((best.proposal,), seeds, keep_from=float("-inf"))]
        stage = "training the best loss's network"
        self.progress = ProgressLine(self.records.display, stage, 1, 0, queue.pool.size)

        def cohorts(idle: int) -> list[Cohort]:
            now, left[:] = left[:idle], left[idle:]
            return now

        for _ in self._outcomes(queue, cohorts):
            self.progress.done = 1

    def _confirm(self, queue: JobQueue) -> None:
        """Train the best loss and random ones again with seeds that the search never saw."""
        best, left = self.study.best(), self.records.seeds_to_confirm()
        sizes = confirmation_sizes(self.study.settings)
        stage, done = "confirming with fresh seeds", sum(sizes[: len(sizes) - len(left)])
        self.progress = ProgressLine(self.records.display, stage, sum(sizes), done, queue.pool.size)

        def cohorts(idle: int) -> list[Cohort]:
            asked: list[Cohort] = []
            while left and len(asked) < idle:
                names = self.records.compared_under(left[0])
                if names is None:
                    break
                asked.append(_confirmation(best, left.pop(0), names, self.study.settings))
            return asked

        for cohort, result in self._outcomes(queue, cohorts):
            self.records.confirmed(cohort, result)
            self.progress.done += len(cohort.members)

    def _outcomes(
        self, queue: JobQueue, feed: Callable[[int], list[Cohort]]
    ) -> Iterator[tuple[Cohort, CohortResult]]:
        """Cohorts as they are done: asked for, submitted, waited for, and, once taken in, recorded."""
        for cohort, report in queue.run(feed):
            assert report.job is not None
            result = report.result if isinstance(report, Done) else _all_failed(cohort, report)
            yield cohort, result
            self.records.cohort(result, workers=queue.pool.size)
            # a worker's damaged clips count as if they had been met here
            videos, labelled = result.substituted
            self.data.videos.index.substituted.update(videos)
            self.data.labelled.index.substituted.update(labelled)
            self.progress.ended(report.job.number)


def _confirmation(best: Trial, seed: int, names: Sequence[str], settings: Search) -> Cohort:
    losses = [random_weights(n, sparsity=settings.sparsity) for n in drawn_under(seed, settings)]
    losses += [load_loss(name) for name in names]
    members = (best.proposal, *(Proposal(-1 - i, loss) for i, loss in enumerate(losses)))
    return Cohort(members, (seed,), confirm=True)


def _all_failed(cohort: Cohort, lost: Lost) -> CohortResult:
    """The outcome of a cohort whose worker was lost for good."""
    assert lost.job is not None
    attempts = f" ({lost.job.attempt} attempts)" if lost.job.attempt > 1 else ""
    reason = f"{lost.kind.replace('_', ' ')}: {lost.reason}{attempts}"
    failed = MemberResult("failed", None, reason, (), cohort.seeds, 0.0, 0.0, {}, None)
    return CohortResult((failed,) * len(cohort.members))


def _open_study(
    recipe: Recipe,
    run: RunFolder,
    display: Display,
    events: Events,
    clock: Clock,
    *,
    sound: bool,
) -> SearchStudy:
    def on_wait(reason: str) -> None:
        display.say(f"the study's storage is away, waiting for it: {reason}")
        events.add("storage", reason)

    with clock("search"):
        return SearchStudy(
            recipe.search,
            storage=run.storage or run.study,
            name=run.study_name,
            seed=recipe.seed,
            recipe_hash=recipe_hash(recipe),
            sound=sound,
            on_wait=on_wait,
        )


def _check_recipe(recipe: Recipe, run: RunFolder, study: SearchStudy) -> None:
    """Take over the rounds of a run that goes on with other ones; a loss to compare with that is none raises now."""
    for name in recipe.search.compare:
        load_loss(name)
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
