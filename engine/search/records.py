"""A search's records beside its study, and its progress on the display.

The best loss and its network, confirmations, events, time, TensorBoard's curves and the summary.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from engine.core.display import Display, spread_cells
from engine.core.pool import Lost
from engine.core.recipe import Recipe, Search, recipe_hash
from engine.core.run import Events, RunFolder
from engine.core.runtime import Clock
from engine.core.tensors import CheckpointError, load_tensors
from engine.objective.lossfile import save_loss
from engine.search.cohort import MemberResult
from engine.search.effects import as_json, effects_of
from engine.search.members import Trial
from engine.search.study import SearchStudy
from engine.search.worker import Cohort, CohortResult, Progress, candidate

FRESH_SEEDS = 10_000
"""The first of the seeds that confirm the outcome of the search with seed 0."""
SEEDS_A_SEARCH = 1_000
"""Distance from one search's fresh seeds to those of the next: searches of different seeds share none of them."""
LARGEST_SEED = 2**31
"""What fresh seeds stay below: k-means takes seeds of 32 bits."""

CONFIRMATIONS = "confirmations.json"
LEADING = 1
"""Losses to compare with that go on after the first fresh seed: the fittest under it."""


def fresh_seeds(recipe: Recipe) -> range:
    """The seeds that confirm a search's outcome, which neither it nor a search of another seed uses."""
    first = (FRESH_SEEDS + SEEDS_A_SEARCH * recipe.seed) % LARGEST_SEED
    return range(first, first + recipe.search.confirm_seeds)


def drawn_under(seed: int, settings: Search) -> range:
    """The numbers of the random losses that are trained under a fresh seed, each of which draws others."""
    each = max(settings.confirm_seeds, 1)
    return range(seed, seed + each * settings.confirm_random, each)


@dataclass
class Records:
    """Keeps a run's folder in step with its study: all but TensorBoard's curves follows from it and can be redone."""

    recipe: Recipe
    run: RunFolder
    study: SearchStudy
    display: Display
    events: Events
    clock: Clock
    said: list[str] = field(default_factory=list)
    """Warnings that were shown; they come from every worker, and are shown once."""
    levels: Mapping[str, Sequence[float]] = field(default_factory=dict)
    """Known levels of fitness on the labelled clips, by name."""

    def __post_init__(self) -> None:
        self._began = time.perf_counter()
        self._earlier: dict[str, float] = self.run.read_json("timing.json") or {}
        self._worked: dict[str, float] = {}
        with self.clock("logging"):
            self.board = Board(self.run.tensorboard, before=self.study.members())
            for left in self.run.checkpoints.glob(".*.tmp"):  # of a worker that was killed
                left.unlink()

    def lost(self, lost: Lost, again: bool) -> None:
        """Note that a worker was lost, with its cohort if it had one, and whether that is trained ``again``."""
        trials = [] if lost.job is None else [n for n in lost.job.work.numbers if n >= 0]
        at_work = ""
        if trials:
            at_work = f"; at work on member{'s' * (len(trials) > 1)} {', '.join(map(str, trials))}"
        self.display.say(f"{lost.worker}: {lost.reason}{at_work}")
        self.events.add(lost.kind, lost.reason, trials=trials, worker=lost.worker)
        if again and lost.job is not None:
            self.events.add("retry", f"attempt {lost.job.attempt + 1}", trials=trials)

    def member(self, number: int, result: MemberResult) -> None:
        """Store a member's outcome in the study, and show it."""
        attributes, reason = self.attributes(result), result.reason or "unknown"
        with self.clock("search"):
            if result.state == "failed":
                trial = self.study.fail(number, reason=reason, attributes=attributes)
            elif result.state == "pruned":
                attributes["reason"] = reason
                trial = self.study.prune(number, rungs=result.rungs, attributes=attributes)
            else:
                assert result.fitness is not None
                trial = self.study.tell(number, fitness=result.fitness, attributes=attributes)
        with self.clock("logging"):
            self.board.member(trial)
            if result.state == "failed":
                self.display.say(f"member {number} failed: {reason}")
                not_finite = "finite" in reason or "loss is" in reason
                kind = "non_finite" if not_finite else "failed"
                kind = "out_of_memory" if reason.startswith("out of memory") else kind
                self.events.add(kind, reason, trials=[number])

    def attributes(self, result: MemberResult) -> dict[str, Any]:
        """Attributes of a member that the study keeps beside its fitness."""
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
            "recipe_hash": recipe_hash(self.recipe),
            "labels_used": self.recipe.fitness.uses_labels,
        }

    def cohort(self, result: CohortResult, *, workers: int) -> None:
        """Write what follows from a cohort that is done: its seconds count as a worker's share."""
        for warning in result.warnings:
            if warning not in self.said:
                self.said.append(warning)
                self.display.say(warning)
        for stage, seconds in result.stages.items():
            self._worked[stage] = self._worked.get(stage, 0.0) + seconds / workers
        self.keep_best()
        self.keep_time()

    def keep_best(self) -> None:
        """Write best.toml as the study has it, and take over the best member's network that its worker left."""
        if self.study.best_fitness() is None:
            return
        members, best = self.study.members(), self.study.best()
        about = f"best of {len(members)} members: trial {best.number}, fitness {best.fitness:.4f}"
        with self.clock("logging"):
            name, used = f"{self.run.path.name}/best", self.recipe.fitness.uses_labels
            objective = self.recipe.objective
            means = {"units": objective.units, "distill": objective.distill}
            save_loss(
                best.weights,
                self.run.best,
                name=name,
                about=about,
                labels_used=used,
                objective=means,
            )
            left = candidate(self.run.checkpoints, best.number)
            if left.exists():
                # In a race it may become the best again. A copy that a kill leaves is written over.
                best_so_far = self.run.checkpoints / ".best.copy"
                shutil.copyfile(left, best_so_far)
                os.replace(best_so_far, self.run.checkpoints / "best.safetensors")
            for other in members:  # of a race any may become the outcome
                if self.study.finished or not self.study.is_raced(other.number):
                    candidate(self.run.checkpoints, other.number).unlink(missing_ok=True)

    def lacks_network(self) -> bool:
        """Whether a surrogate's search ended with another member than the one whose network was kept on the way."""
        if self.recipe.search.method != "surrogate" or not self.study.finished:
            return False
        try:
            _, facts = load_tensors(self.run.checkpoints / "best.safetensors")
        except CheckpointError:
            return True
        return bool(facts.get("trial") != self.study.best().number)

    def keep_time(self) -> dict[str, float]:
        """Write seconds by stage to timing.json, those before an interruption included."""
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
        """The fresh seeds that the best loss of now was not trained with yet."""
        known = self._confirmations()
        return [seed for seed in fresh_seeds(self.recipe) if str(seed) not in known]

    def compared_under(self, seed: int) -> tuple[str, ...] | None:
        """The losses to compare with under a fresh seed: all under the first, then the LEADING fittest.

        None while the first seed, which decides, is not done.
        """
        names, first = self.recipe.search.compare, fresh_seeds(self.recipe)[0]
        if seed == first or len(names) <= LEADING:
            return names
        known = self._confirmations().get(str(first))
        if known is None:
            return None
        fitness = {name: known["compared"][name]["fitness"] or 0.0 for name in names}
        leading = sorted(names, key=lambda name: -fitness[name])[:LEADING]
        return tuple(name for name in names if name in leading)

    def confirmed(self, cohort: Cohort, result: CohortResult) -> None:
        """Note the outcome of the best loss and of random ones under a fresh seed."""
        (seed,), (member, *beside) = cohort.seeds, cohort.members
        best, *others = (
            {"fitness": r.fitness, "reason": r.reason, **self.attributes(r)} for r in result.results
        )
        count = self.recipe.search.confirm_random
        drawn = [{**o, "weights": m.weights} for o, m in zip(others[:count], beside, strict=False)]
        trivial = {name: {"fitness": value} for name, value in result.trivial.items()}
        names = self.compared_under(seed) or ()
        record = {
            "trial": member.number,
            "untrained": {"fitness": result.untrained},
            "best": best,
            "random": drawn,
            "compared": trivial | dict(zip(names, others[count:], strict=True)),
        }
        with self.clock("logging"):
            self.run.write_json(CONFIRMATIONS, {**self._confirmations(), str(seed): record})

    def summary(self) -> dict[str, Any]:
        """Write the run's outcome to summary.json, and return it."""
        members, best, known = self.study.members(), self.study.best(), self._confirmations()
        confirmed = [known[str(seed)] for seed in fresh_seeds(self.recipe)]
        fresh = {
            kind: _spread([record[kind]["fitness"] for record in confirmed])
            for kind in ("untrained", "best")
        }
        drawn = [[one["fitness"] for one in record["random"]] for record in confirmed]
        # a seed's value is the mean of its losses: what spreads is what seeds do, to the best loss and to these
        fresh["random"] = _spread([_spread(values)["mean"] for values in drawn])
        trained = [value for values in drawn for value in values if value is not None]
        tables = [record["compared"] for record in confirmed]
        names = dict.fromkeys(name for table in tables for name in table)
        compared = {
            name: _spread([table[name]["fitness"] for table in tables if name in table])
            for name in names
        }
        compared |= {name: _spread(values) for name, values in self.levels.items()}
        summary = {
            "untrained": fresh["untrained"],
            "compared": compared,
            "initial_population": _spread([m.fitness for m in members if m.round == 0]),
            "best_trial": best.number,
            "best_search_fitness": best.fitness,
            "best": fresh["best"],
            "random": {**fresh["random"], "each": self.recipe.search.confirm_random},
            "luckiest_random": {
                **_spread([max(trained, default=None)]),
                "of": sum(map(len, drawn)),
            },
            "weights": best.weights,
            **as_json(effects_of(members)),
            "seconds": self.keep_time(),
            "failures": sum(m.state == "failed" for m in members),
            "pruned": sum(m.state == "pruned" for m in members),
            "members": len(members),
            "recipe_hash": recipe_hash(self.recipe),
            "seed": self.recipe.seed,
        }
        self.run.write_json("summary.json", summary)
        return summary

    def _confirmations(self) -> dict[str, Any]:
        """Those of the best loss of now, by seed."""
        if self.study.best_fitness() is None:
            return {}
        best, known = self.study.best(), self.run.read_json(CONFIRMATIONS) or {}
        return {seed: record for seed, record in known.items() if record["trial"] == best.number}


def confirmation_sizes(search: Search) -> list[int]:
    """Losses trained under each fresh seed: the best, random ones, and those to compare with."""
    count, always = len(search.compare), 1 + search.confirm_random
    return [always + (min(count, LEADING) if i else count) for i in range(search.confirm_seeds)]


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
        if trial.state in self._ended:
            self._ended[trial.state] += 1
        points: dict[str, float] = {f"search/{kind}": n for kind, n in self._ended.items()}
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


@dataclass
class ProgressLine:
    """Shows a stage's progress: members done and at work, the best so far, clips a second over all workers."""

    display: Display
    stage: str
    total: int
    """Members of the stage."""
    done: int
    workers: int
    best: float | None = None
    """The fittest member's fitness so far."""

    def __post_init__(self) -> None:
        self._ready = self.workers
        self._at_work: dict[int, Progress] = {}
        self._clips, self._began = 0, time.perf_counter()
        self.display.start(self.stage, self.total, done=self.done)

    def moved(self, job: int, progress: Progress | None, *, ready: int) -> None:
        """Show a job's progress, if it sent any yet, and how many workers are ready."""
        self._ready = ready
        if progress is not None:
            self._at_work[job] = progress
        self._show()

    def ended(self, job: int) -> None:
        """Take a job off the work; its members are in ``done``."""
        last = self._at_work.pop(job, None)
        self._clips += last.clips if last else 0
        self._show()

    def _show(self) -> None:
        clips = self._clips + sum(each.clips for each in self._at_work.values())
        place = self.done + sum(each.members for each in self._at_work.values())
        best = "" if self.best is None else f"best {self.best:.3f}"
        rate = f"{clips / (time.perf_counter() - self._began):.0f} clips/s" if clips else ""
        ready = f"{self._ready}/{self.workers} workers" if self.workers > 1 else ""
        note = "  ".join(part for part in (best, rate, ready) if part)
        self.display.update(self.stage, min(place, self.total), self.total, note=note)


def outcome_line(summary: Mapping[str, Any]) -> str:
    """A search's outcome for its log: the best loss and random ones with fresh seeds."""
    cells = {key: spread_cells(summary[key]) for key in ("best", "random")}
    best, random = (f"{mean} ± {sd} (n {n})" for mean, sd, n in cells.values())
    return (
        f"{summary['members']} members, {summary['failures']} failed; best: trial {summary['best_trial']},"
        f" {summary['best_search_fitness']:.3f} in the search; with fresh seeds {best}, random losses {random}"
    )
