"""The main job: evolve a loss on unlabelled videos, judged by clustering labelled ones.

One loop, whoever does the work: the study is asked, its members are packed into cohorts, workers train them, and what
comes of them is written down and told as it comes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from engine.cohort import MemberJob, MemberResult
from engine.cohort_worker import Cohort, CohortEvaluator, CohortFactory, Outcome, Progress
from engine.data.library import Library, fingerprint
from engine.display import Display, outcome_line
from engine.evolve_pace import Pace
from engine.evolve_plan import Planner, split
from engine.evolve_record import Records
from engine.extract import LabelledClips
from engine.jobs import Crew, Done, Job, LocalPool, Lost, Pool
from engine.lossfile import random_weights
from engine.provenance import provenance, write_provenance
from engine.recipe import Recipe
from engine.runfolder import RunError, RunFolder
from engine.runtime import Clock, Runtime
from engine.search import Proposal, SearchStudy
from engine.workers import RayPool

FRESH_SEEDS = 10_000
"""Distance from the search's seed to the first of the seeds that confirm its outcome."""


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


class Evolution:
    """One run of the search, from its first member to the report's numbers; each stage can be repeated."""

    def __init__(
        self,
        recipe: Recipe,
        data: Data,
        *,
        run: RunFolder,
        runtime: Runtime,
        display: Display,
        workers: Workers = Workers(),
    ) -> None:
        """Raises ValueError where the data does not fit (see ``LabelledClips``), or rounds were lowered too far."""
        self.recipe, self.data, self.run, self.display = recipe, data, run, display
        self.runtime, self.workers, self.clock = runtime, workers, Clock()
        self._identity = fingerprint(data.videos, data.labelled)
        self._evaluator: CohortEvaluator | None = None
        if workers.count == 0:
            self._evaluator = CohortEvaluator(
                recipe,
                data.videos.index,
                data.labelled.index,
                runtime=runtime,
                checkpoints=run.checkpoints,
                members_at_once=workers.members_at_once,
            )
            self.labelled = self._evaluator.labelled
        else:  # only to know that it fits
            on_cpu = Runtime(torch.device("cpu"), amp=False)
            self.labelled = LabelledClips(data.labelled.index, recipe, runtime=on_cpu)
        self.records = Records(recipe, run, display, self.clock)
        run.begin(self._write_provenance)
        with self.clock("search"):
            self.study = SearchStudy(
                recipe.search,
                storage=run.storage or run.study,
                name=run.study_name,
                seed=recipe.seed,
                recipe_hash=self.records.hash,
                on_wait=self.records.away,
            )
        self._check_rounds()
        self.records.open(self.study)
        self._pace = Pace(display)
        self._pool: Pool | None = None

    def go(self) -> dict[str, Any]:
        """Run or continue the search, confirm its outcome with fresh seeds, and write summary.json."""
        try:
            self._search()
            confirmed = self._confirm()
        finally:
            if self._pool is not None:
                self._pool.close()
        with self.clock("logging"):
            summary = self.records.summary(confirmed)
            self.records.board.close()
        self.display.note(outcome_line(summary))
        return summary

    @cached_property
    def _crew(self) -> Crew:
        """Made when there is work: starting Ray takes seconds."""
        if self._evaluator is not None:
            self._pool = LocalPool(self._evaluator, on_news=self._on_news)
        else:
            self.display.say("starting workers")
            self._pool = RayPool(
                self._factory(),
                size=self.workers.count,
                address=self.workers.address,
                gpus=float(self.workers.gpus),
                on_news=self._on_news,
            )
        return Crew(
            self._pool,
            self.workers.max_retries,
            split=self._parts,
            limit=self._seconds,
            on_lost=self.records.lost,
        )

    def _factory(self) -> CohortFactory:
        videos, labelled = self.data.videos, self.data.labelled
        return CohortFactory(
            self.recipe,
            videos=tuple(path.absolute() for path in videos.shards),
            labelled=tuple(path.absolute() for path in labelled.shards),
            data=self._identity,
            checkpoints=self.run.checkpoints.absolute(),
            device="cuda" if self.workers.gpus else "cpu",
            members_at_once=self.workers.members_at_once,
        )

    def _parts(self, cohort: Cohort) -> list[Cohort]:
        """How a lost cohort is tried again: its members alone, unless they are compared with each other."""
        whole = self.recipe.search.halving or cohort.confirm
        return [cohort] if whole else split(cohort)

    def _seconds(self, cohort: Cohort) -> float:
        return self.workers.time_limit * len(cohort.members) * len(cohort.seeds)

    def _on_news(self, job: Job, news: Progress) -> None:
        assert self._pool is not None
        self._pace.moved(job, news, pool=self._pool)

    def _search(self) -> None:
        done = {member.trial for member in self.study.members()}
        if not self.study.finished:
            what = "evolving" if self.recipe.search.method == "evolution" else "drawing"
            planner = self._planner()
            pool = self._crew.pool
            self._pace.start(f"{what} losses", self.study.total, done=len(done), best=self._best())
            for cohort, report in self._crew.run(planner.cohorts):
                self._take(cohort, report, planner.out, done)
                self._pace.done(report, len(done), best=self._best(), pool=pool)
                planner.drop_states()
        members = self.study.members()
        failed = sum(member.state == "failed" for member in members)
        if failed == len(members):
            reason = members[0].attributes["reason"]
            raise RuntimeError(f"{self.run.path}: all {failed} members failed; the first: {reason}")
        self.records.keep_best()  # an interruption may have come between the last member and the file
        assert self.study.finished, "the study ended before its members were done"
        self.study.best()

    def _planner(self) -> Planner:
        assert self._crew.pool is not None
        return Planner(
            self.recipe,
            self.study,
            workers=self._crew.pool.size,
            members_at_once=self.workers.members_at_once,
            checkpoints=self.run.checkpoints,
            clock=self.clock,
        )

    def _take(
        self, cohort: Cohort, report: Done | Lost, out: dict[int, Proposal], done: set[int]
    ) -> None:
        """Write down and tell what became of a cohort, as far as it was not known."""
        results = self._results(cohort, report)
        for trial, result in zip(cohort.trials, results, strict=True):
            if trial not in done:
                self.records.member(out.pop(trial), result)
                done.add(trial)
        self.records.keep_best()
        self.records.keep_time()

    def _results(self, cohort: Cohort, report: Done | Lost) -> Sequence[MemberResult]:
        if isinstance(report, Lost):
            assert report.job is not None
            attempts = f" ({report.job.attempt} attempts)" if report.job.attempt > 1 else ""
            reason = f"{report.kind.replace('_', ' ')}: {report.reason}{attempts}"
            failed = MemberResult("failed", None, reason, (), cohort.seeds, 0.0, 0.0, {}, None)
            return [failed] * len(cohort.trials)
        outcome: Outcome = report.result
        assert self._pool is not None
        self.records.outcome(outcome, workers=self._pool.size)
        for library, counts in zip(
            (self.data.videos, self.data.labelled), outcome.substituted, strict=True
        ):
            library.index.substituted.update(counts)
        return outcome.results

    def _best(self) -> float | None:
        return max((m.fitness for m in self.study.members() if m.fitness is not None), default=None)

    def _confirm(self) -> dict[str, list[float | None]]:
        """Train the best loss and a random one again with seeds that the search never saw."""
        best, count = self.study.best(), self.recipe.search.confirm_seeds
        seeds = [self.recipe.seed + FRESH_SEEDS + i for i in range(count)]
        records = {seed: self.run.read_json(f"members/confirm-{seed}.json") for seed in seeds}
        known = {s: r for s, r in records.items() if r is not None and r["trial"] == best.trial}
        left = [seed for seed in seeds if seed not in known]
        if left:
            pool, done = self._crew.pool, 2 * (count - len(left))
            self._pace.start("confirming with fresh seeds", 2 * count, done=done, best=None)

            def feed(idle: int) -> list[Cohort]:
                now, left[:] = left[:idle], left[idle:]
                return [_confirmation(best.weights, best.trial, seed) for seed in now]

            for cohort, report in self._crew.run(feed):
                (seed,) = cohort.seeds
                known[seed] = self._confirmed(cohort, report)
                with self.clock("logging"):
                    self.run.write_json(f"members/confirm-{seed}.json", known[seed])
                self._pace.done(report, 2 * len(known), best=None, pool=pool)
        names = ("untrained", "best", "random")
        return {name: [known[seed][name]["fitness"] for seed in seeds] for name in names}

    def _confirmed(self, cohort: Cohort, report: Done | Lost) -> dict[str, Any]:
        best, random = self._results(cohort, report)
        untrained = report.result.untrained if isinstance(report, Done) else None

        def told(result: MemberResult) -> dict[str, Any]:
            return {
                "fitness": result.fitness, "reason": result.reason, **self.records.facts(result)
            }  # fmt: skip

        return {
            "seed": cohort.seeds[0],
            "trial": cohort.trials[0],
            "untrained": {"fitness": untrained},
            "best": told(best),
            "random": {**told(random), "weights": cohort.members[1].weights},
        }

    def _check_rounds(self) -> None:
        """Take over rounds that were changed for a run that goes on."""
        done = len(self.study.members())
        if done > self.study.total:
            least = done - self.recipe.search.population
            raise RunError(
                f"{self.run.path}: {done} members are done already, so --rounds must be {least} or more"
            )
        if done < self.study.total:
            (self.run.path / "summary.json").unlink(missing_ok=True)
        self.run.save_recipe(self.recipe)

    def _write_provenance(self) -> None:
        videos, labelled = self.data.videos, self.data.labelled
        facts = {
            **provenance(self.runtime),
            "seed": self.recipe.seed,
            "recipe": self.recipe.name,
            "recipe_hash": self.records.hash,
            "videos": self.data.named[0],
            "labelled": self.data.named[1],
            "num_clips": len(videos.index),
            "num_clips_with_sound": int(videos.index.has_audio.sum()),
            "hours_of_video": round(float(videos.index.duration.sum()) / 3600, 4),
            "num_labelled": len(self.labelled.clips),
            "num_classes": self.labelled.num_classes,
            "labels_used": self.recipe.fitness.uses_labels,
            "rejected": [
                f"{r.path}: {r.reason}" for r in dict.fromkeys((*videos.rejects, *labelled.rejects))
            ],
            "data": self._identity,
        }
        if "resumed" in write_provenance(self.run, facts):
            self.records.events.add("resumed", f"{self.workers.count or 'no'} workers")


def _confirmation(weights: dict[str, float], trial: int, seed: int) -> Cohort:
    members = (MemberJob(weights), MemberJob(random_weights(seed)))
    return Cohort(members, (trial, -1), (seed,), confirm=True)
