"""What a search writes down: a file a member, the best loss and its network, events, time, provenance, the summary."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

from engine.board import Board
from engine.cohort import MemberResult
from engine.cohort_worker import Outcome, candidate
from engine.display import Display
from engine.events import Events
from engine.jobs import Lost
from engine.lossfile import save_loss
from engine.recipe import Recipe, recipe_hash
from engine.runfolder import RunFolder
from engine.runtime import Clock
from engine.search import Proposal, SearchStudy


class Records:
    """Keeps a run's folder in step with its study: what the study knows is always on disk too."""

    def __init__(self, recipe: Recipe, run: RunFolder, display: Display, clock: Clock) -> None:
        self.recipe, self.run, self.display, self.clock = recipe, run, display, clock
        self.hash = recipe_hash(recipe)
        self.events = Events(run.path)
        self._began = time.perf_counter()
        self._earlier: dict[str, float] = run.read_json("timing.json") or {}
        self._worked: dict[str, float] = {}

    def open(self, study: SearchStudy) -> None:
        """Begin with a study, which may have members already."""
        self.study = study
        with self.clock("logging"):
            self.board = Board(self.run.tensorboard, before=study.members())
            for left in self.run.checkpoints.glob(".*.tmp"):  # of a worker that was killed
                left.unlink()

    def away(self, reason: str) -> None:
        """The study's storage can't be reached for now."""
        self.display.say(f"the study's storage is away, waiting for it: {reason}")
        self.events.add("storage", reason)

    def lost(self, lost: Lost, again: bool) -> None:
        """A worker was lost, with its job if it had one."""
        trials = [] if lost.job is None else [t for t in lost.job.work.trials if t >= 0]
        what = f"{lost.worker}: {lost.reason}"
        if trials:
            what += f"; at work on {_numbered(trials)}"
        self.display.say(what)
        self.events.add(lost.kind, lost.reason, trials=trials, worker=lost.worker)
        if again and lost.job is not None:
            detail = f"attempt {lost.job.attempt + 1}"
            self.events.add("retry", detail, trials=trials)

    def member(self, proposal: Proposal, result: MemberResult) -> None:
        """Write a member's file, then tell the study."""
        attributes = self.facts(result)
        partial = result.rungs[-1][1] if result.state == "pruned" and result.rungs else None
        record = {
            "trial": proposal.trial,
            "state": result.state,
            "reason": result.reason,
            "weights": proposal.weights,
            "fitness": partial if result.state == "pruned" else result.fitness,
            "parent": proposal.parent,
            "mutated": proposal.mutated,
            "round": proposal.round,
            **attributes,
        }
        with self.clock("logging"):
            self.run.write_json(f"members/{proposal.trial:05d}.json", record)
            self.board.member(record)
            if result.state == "failed":
                self._failed(proposal.trial, result.reason or "unknown")
        with self.clock("search"):
            self._tell(proposal.trial, result, attributes)

    def _tell(self, trial: int, result: MemberResult, attributes: dict[str, Any]) -> None:
        if result.state == "failed":
            self.study.fail(trial, reason=result.reason or "unknown", attributes=attributes)
        elif result.state == "pruned":
            told = {**attributes, "reason": result.reason}
            self.study.prune(trial, rungs=result.rungs, attributes=told)
        else:
            assert result.fitness is not None
            self.study.tell(trial, fitness=result.fitness, attributes=attributes)

    def _failed(self, trial: int, reason: str) -> None:
        self.display.say(f"member {trial} failed: {reason}")
        if reason.startswith("out of memory"):
            kind = "out_of_memory"
        else:
            kind = "non_finite" if "finite" in reason or "loss is" in reason else "failed"
        self.events.add(kind, reason, trials=[trial])

    def facts(self, result: MemberResult) -> dict[str, Any]:
        """What is noted of a training, beside its fitness."""
        repeats = [each.measures() for each in result.results]
        names = repeats[0] if repeats else ()
        return {
            "metrics": {name: fmean(each[name] for each in repeats) for name in names},
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

    def outcome(self, outcome: Outcome, *, workers: int) -> None:
        """What a cohort's worker had to say, beside its members' results: seconds count as a worker's share."""
        for warning in outcome.warnings:
            self.display.say(warning)
        for stage, seconds in outcome.stages.items():
            self._worked[stage] = self._worked.get(stage, 0.0) + seconds / workers

    def keep_best(self) -> None:
        """Write best.toml as the study has it, and take over the best member's network that its worker left."""
        members = self.study.members()
        if all(m.fitness is None for m in members):
            return
        best = self.study.best()
        about = f"best of {len(members)} members: trial {best.trial}, fitness {best.fitness:.4f}"
        with self.clock("logging"):
            name, used = f"{self.run.path.name}/best", self.recipe.fitness.uses_labels
            save_loss(best.weights, self.run.best, name=name, about=about, labels_used=used)
            left = candidate(self.run.checkpoints, best.trial)
            if left.exists():
                os.replace(left, self.run.checkpoints / "best.safetensors")
            for other in members:
                candidate(self.run.checkpoints, other.trial).unlink(missing_ok=True)

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

    def summary(self, confirmed: Mapping[str, Sequence[float | None]]) -> dict[str, Any]:
        """The run's outcome; written to summary.json."""
        members, best = self.study.members(), self.study.best()
        summary = {
            "untrained": _spread(confirmed["untrained"]),
            "initial_population": _spread([m.fitness for m in members if m.round == 0]),
            "best_trial": best.trial,
            "best_search_fitness": best.fitness,
            "best": _spread(confirmed["best"]),
            "random": _spread(confirmed["random"]),
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
