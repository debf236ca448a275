"""What a search leaves beside its study, and shows on the way.

The best loss and its network, confirmations, events, time, TensorBoard's curves and the summary; how far it is.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from engine.core.display import Display, spread_cells
from engine.core.events import Events
from engine.core.pool import Done, Lost
from engine.core.recipe import Recipe, recipe_hash
from engine.core.runfolder import RunFolder
from engine.core.runtime import Clock
from engine.objective.lossfile import save_loss
from engine.search.cohort import MemberResult
from engine.search.study import SearchStudy, Trial
from engine.search.worker import Cohort, Progress, candidate

FRESH_SEEDS = 10_000
"""Distance from the search's seed to the first of the seeds that confirm its outcome."""

CONFIRMATIONS = "confirmations.json"


class Records:
    """Keeps a run's folder in step with its study: all but TensorBoard's curves follows from it and can be redone."""

    def __init__(
        self,
        recipe: Recipe,
        run: RunFolder,
        study: SearchStudy,
        *,
        display: Display,
        events: Events,
        clock: Clock,
    ) -> None:
        self.recipe, self.run, self.study = recipe, run, study
        self.display, self.events, self.clock = display, events, clock
        self.hash = recipe_hash(recipe)
        self._began = time.perf_counter()
        self._earlier: dict[str, float] = run.read_json("timing.json") or {}
        self._worked: dict[str, float] = {}
        with clock("logging"):
            self.board = Board(run.tensorboard, before=study.members())
            for left in run.checkpoints.glob(".*.tmp"):  # of a worker that was killed
                left.unlink()

    def close(self) -> None:
        """Write what is left."""
        self.board.close()

    def lost(self, lost: Lost, again: bool) -> None:
        """A worker was lost, with its job if it had one."""
        trials = [] if lost.job is None else [n for n in lost.job.work.numbers if n >= 0]
        what = f"{lost.worker}: {lost.reason}"
        if trials:
            what += f"; at work on {_numbered(trials)}"
        self.display.say(what)
        self.events.add(lost.kind, lost.reason, trials=trials, worker=lost.worker)
        if again and lost.job is not None:
            detail = f"attempt {lost.job.attempt + 1}"
            self.events.add("retry", detail, trials=trials)

    def member(self, number: int, result: MemberResult) -> None:
        """Tell the study what became of a member, and show it."""
        facts, reason = self.facts(result), result.reason or "unknown"
        with self.clock("search"):
            if result.state == "failed":
                trial = self.study.fail(number, reason=reason, attributes=facts)
            elif result.state == "pruned":
                facts["reason"] = reason
                trial = self.study.prune(number, rungs=result.rungs, attributes=facts)
            else:
                assert result.fitness is not None
                trial = self.study.tell(number, fitness=result.fitness, attributes=facts)
        with self.clock("logging"):
            self.board.member(trial)
            if result.state == "failed":
                self._failed(number, reason)

    def _failed(self, number: int, reason: str) -> None:
        self.display.say(f"member {number} failed: {reason}")
        if reason.startswith("out of memory"):
            kind = "out_of_memory"
        else:
            kind = "non_finite" if "finite" in reason or "loss is" in reason else "failed"
        self.events.add(kind, reason, trials=[number])

    def facts(self, result: MemberResult) -> dict[str, Any]:
        """What is noted of a training, beside its fitness."""
        repeats = [each.measures() for each in result.results]
        names = repeats[0] if repeats else ()
        return {
            "metrics": {name: fmean(each[name] for each in repeats) for name in names},
            "repeats": [{"fitness": r.value, **r.measures()} for r in result.results],
            "seeds": list(result.seeds),
            "seconds": round(result.seconds, 3),
            "clips_per_second": round(result.clips_per_second, 2),
            "terms": {},
            "terms_at_start": {},
            "feature_ranks": {},
            **result.learnt,
            "recipe_hash": self.hash,
            "labels_used": self.recipe.fitness.uses_labels,
        }

    def cohort(self, report: Done | Lost, *, workers: int) -> None:
        """Write what follows from a cohort that is done: its seconds count as a worker's share."""
        if isinstance(report, Done):
            for warning in report.result.warnings:
                self.display.say(warning)
            for stage, seconds in report.result.stages.items():
                self._worked[stage] = self._worked.get(stage, 0.0) + seconds / workers
        self.keep_best()
        self.keep_time()

    def keep_best(self) -> None:
        """Write best.toml as the study has it, and take over the best member's network that its worker left."""
        members = self.study.members()
        if all(m.fitness is None for m in members):
            return
        best = self.study.best()
        about = f"best of {len(members)} members: trial {best.number}, fitness {best.fitness:.4f}"
        with self.clock("logging"):
            name, used = f"{self.run.path.name}/best", self.recipe.fitness.uses_labels
            save_loss(best.weights, self.run.best, name=name, about=about, labels_used=used)
            left = candidate(self.run.checkpoints, best.number)
            if left.exists():
                os.replace(left, self.run.checkpoints / "best.safetensors")
            for other in members:
                candidate(self.run.checkpoints, other.number).unlink(missing_ok=True)

    def keep_time(self) -> dict[str, float]:
        """Seconds by stage, those before an interruption included; written to timing.json."""
        spent = {**self._worked, **self.clock.seconds}
        total = time.perf_counter() - self._began
        spent |= {"total": total, "other": total - sum(spent.values())}
        stages = dict.fromkeys((*self._earlier, *spent))
        seconds = {
            name: round(self._earlier.get(name, 0.0) + spent.get(name, 0.0), 3) for name in stages
        }
        self.run.write_json("timing.json", seconds)
        return seconds

    def seeds_to_confirm(self) -> list[int]:
        """The fresh seeds with which the best loss of now was not trained yet."""
        known = self._confirmations()
        return [seed for seed in self._fresh_seeds() if str(seed) not in known]

    def confirmed(
        self, cohort: Cohort, results: Sequence[MemberResult], *, untrained: float | None
    ) -> None:
        """Note what the best loss and a random one came to with a fresh seed."""
        (seed,), (member, random_member) = cohort.seeds, cohort.members
        best, random = (
            {"fitness": r.fitness, "reason": r.reason, **self.facts(r)} for r in results
        )
        record = {
            "trial": member.number,
            "untrained": {"fitness": untrained},
            "best": best,
            "random": {**random, "weights": random_member.weights},
        }
        with self.clock("logging"):
            self.run.write_json(CONFIRMATIONS, {**self._confirmations(), str(seed): record})

    def summary(self) -> dict[str, Any]:
        """The run's outcome; written to summary.json."""
        members, best, known = self.study.members(), self.study.best(), self._confirmations()
        fresh = {
            kind: _spread([known[str(seed)][kind]["fitness"] for seed in self._fresh_seeds()])
            for kind in ("untrained", "best", "random")
        }
        summary = {
            "untrained": fresh["untrained"],
            "initial_population": _spread([m.fitness for m in members if m.round == 0]),
            "best_trial": best.number,
            "best_search_fitness": best.fitness,
            "best": fresh["best"],
            "random": fresh["random"],
            "weights": best.weights,
            "seconds": self.keep_time(),
            "failures": sum(m.state == "failed" for m in members),
            "pruned": sum(m.state == "pruned" for m in members),
            "members": len(members),
            "recipe_hash": self.hash,
            "seed": self.recipe.seed,
        }
        self.run.write_json("summary.json", summary)
        return summary

    def _fresh_seeds(self) -> list[int]:
        count = self.recipe.search.confirm_seeds
        return [self.recipe.seed + FRESH_SEEDS + i for i in range(count)]

    def _confirmations(self) -> dict[str, Any]:
        """Those of the best loss of now, by seed."""
        if self.study.best_fitness() is None:
            return {}
        best, known = self.study.best(), self.run.read_json(CONFIRMATIONS) or {}
        return {seed: record for seed, record in known.items() if record["trial"] == best.number}


def _numbered(trials: Sequence[int]) -> str:
    if len(trials) == 1:
        return f"member {trials[0]}"
    return f"members {', '.join(map(str, trials))}"


def _spread(values: Sequence[float | None]) -> dict[str, Any]:
    known = [value for value in values if value is not None]
    return {
        "mean": fmean(known) if known else None,
        "sd": stdev(known) if len(known) > 1 else 0.0,
        "n": len(known),
        "values": known,
    }


class Board:
    """A search in TensorBoard: one point a member, at its number.

    ``search/`` fitness, best_so_far, failed, pruned; ``metrics/`` every other measure of the same features;
    ``terms/`` last values of the loss terms; ``ranks/`` how far each network's features spread; ``best/`` the 39
    weights whenever a new best is found; ``throughput/`` clips_per_second and seconds_per_member.
    """

    def __init__(self, folder: Path, *, before: Sequence[Trial] = ()) -> None:
        """``before``: the members that are done already, for a search that goes on."""
        self._writer = SummaryWriter(str(folder))
        self._best = max((m.fitness for m in before if m.fitness is not None), default=None)
        self._ended = {kind: sum(m.state == kind for m in before) for kind in ("failed", "pruned")}

    def member(self, trial: Trial) -> None:
        """Add a member that is done."""
        points: dict[str, float] = {}
        if trial.state in self._ended:
            self._ended[trial.state] += 1
        points |= {f"search/{kind}": count for kind, count in self._ended.items()}
        if trial.fitness is not None:
            points["search/fitness"] = trial.fitness
            points |= {f"metrics/{name}": value for name, value in trial.metrics.items()}
            points |= {f"terms/{name}": value for name, value in trial.terms.items()}
            ranks = trial.attributes.get("feature_ranks", {})
            points |= {f"ranks/{network}": now for network, (_, now) in ranks.items()}
            points["throughput/clips_per_second"] = trial.clips_per_second or 0.0
            points["throughput/seconds_per_member"] = trial.seconds or 0.0
            if self._best is None or trial.fitness > self._best:
                self._best = trial.fitness
                points |= {f"best/{name}": weight for name, weight in trial.weights.items()}
        if self._best is not None:
            points["search/best_so_far"] = self._best
        for name, value in points.items():
            self._writer.add_scalar(name, value, trial.number)

    def close(self) -> None:
        """Write what is left."""
        self._writer.close()


class Meter:
    """Shows how far a stage is: members done and at work, the best so far, clips a second over all workers."""

    def __init__(self, display: Display) -> None:
        self._display = display
        self.start("", 0, done=0, best=None, workers=1)

    def start(self, what: str, total: int, *, done: int, best: float | None, workers: int) -> None:
        """Begin a stage."""
        self._what, self._total, self._done, self._best = what, total, done, best
        self._workers = self._ready = workers
        self._at_work: dict[int, Progress] = {}
        self._clips, self._began = 0, time.perf_counter()
        if what:
            self._display.start(what, total, done=done)

    def moved(self, job: int, progress: Progress | None, *, ready: int) -> None:
        """A job at work is so far, if it has said so yet; so many workers are there."""
        self._ready = ready
        if progress is not None:
            self._at_work[job] = progress
        self._show()

    def done(self, job: int, done: int, *, best: float | None) -> None:
        """A job has come to its end."""
        last = self._at_work.pop(job, None)
        self._clips += last.clips if last else 0
        self._done, self._best = done, best
        self._show()

    def _show(self) -> None:
        clips = self._clips + sum(each.clips for each in self._at_work.values())
        place = self._done + sum(each.members for each in self._at_work.values())
        best = "" if self._best is None else f"best {self._best:.3f}"
        rate = f"{clips / (time.perf_counter() - self._began):.0f} clips/s" if clips else ""
        crew = f"{self._ready}/{self._workers} workers" if self._workers > 1 else ""
        note = "  ".join(part for part in (best, rate, crew) if part)
        self._display.update(self._what, min(place, self._total), self._total, note=note)


def outcome_line(summary: Mapping[str, Any]) -> str:
    """A search's outcome for its log: the best loss and random ones with fresh seeds."""
    cells = {key: spread_cells(summary[key]) for key in ("best", "random")}
    best, random = (f"{mean} ± {sd} (n {n})" for mean, sd, n in cells.values())
    return (
        f"{summary['members']} members, {summary['failures']} failed; best: trial {summary['best_trial']},"
        f" {summary['best_search_fitness']:.3f} in the search; with fresh seeds {best}, random losses {random}"
    )
