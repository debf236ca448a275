"""The main job: evolve a loss on unlabelled videos, judged by clustering labelled ones."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

import torch

from engine.board import Board
from engine.cohort import MemberResult, evaluate_cohort, untrained_fitness
from engine.data.library import Library, fingerprint
from engine.display import Display, outcome_line
from engine.features import LabelledClips
from engine.fitness import kmeans_backend
from engine.lossfile import random_weights, save_loss
from engine.network_file import card_of, save_network
from engine.objective.terms import LossWeights
from engine.recipe import Recipe, recipe_hash
from engine.runfolder import RunError, RunFolder
from engine.runtime import Clock, Runtime, make_deterministic, provenance
from engine.search import MemberRecord, Proposal, SearchStudy
from engine.train import Trainer

FRESH_SEEDS = 10_000
"""Distance from the search's seed to the first of the seeds that confirm its outcome."""


@dataclass(frozen=True)
class Data:
    """What a run trains on and is judged by."""

    videos: Library
    labelled: Library
    named: tuple[list[str], list[str]]
    """The videos and labelled folders as the user named them."""


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
        members_at_once: int | None = None,
    ) -> None:
        """``members_at_once``: of a generation, on this device; None: as many as fit into memory.

        Raises ValueError where the data does not fit: see ``LabelledClips``.
        """
        make_deterministic(runtime)
        kmeans_backend(runtime.device.type, recipe.fitness.kmeans)  # one that is absent is told now
        self.recipe, self.data, self.run, self.display = recipe, data, run, display
        self.clock, self._began = Clock(), time.perf_counter()
        self._earlier: dict[str, float] = run.read_json("timing.json") or {}
        self.trainer = Trainer(
            recipe, data.videos.index, runtime, self.clock, members_at_once, display.say
        )
        if runtime.device.type == "cpu" and self.trainer.mode == "off":
            torch.set_num_threads(1)  # members take the cores: see Runtime.map
        self.labelled = LabelledClips(data.labelled.index, recipe, runtime=runtime)
        self.hash = recipe_hash(recipe)
        run.begin()
        self._write_provenance(runtime)
        with self.clock("search"):
            self.study = SearchStudy(
                recipe.search,
                storage=run.study,
                name="evolve",
                seed=recipe.seed,
                recipe_hash=self.hash,
            )
        with self.clock("logging"):
            self.board = Board(run.tensorboard, before=self.study.members())

    def go(self) -> dict[str, Any]:
        """Run or continue the search, confirm its outcome with fresh seeds, and write summary.json."""
        self._search()
        confirmed = self._confirm()
        with self.clock("logging"):
            summary = self._summary(confirmed)
            self.run.write_json("summary.json", summary)
            self.board.close()
        self.display.note(outcome_line(summary))
        return summary

    def _search(self) -> None:
        search, what = (
            self.recipe.search,
            "evolving" if self.recipe.search.method == "evolution" else "drawing",
        )
        with self.clock("search"):
            proposals = self.study.ask()
            done = len(self.study.members())
        self.display.start(f"{what} losses", self.study.total)
        while proposals:
            results = self._evaluate(
                [p.weights for p in proposals], self._seeds(), what=f"{what} losses", done=done
            )
            for proposal, result in zip(proposals, results, strict=True):
                self._record(proposal, result)
            done += len(proposals)
            self._keep_best()
            self._keep_time()
            with self.clock("search"):
                proposals = self.study.ask()
        failed = sum(m.state == "failed" for m in self.study.members())
        if failed == self.study.total:
            reason = self.study.members()[0].attributes["reason"]
            raise RuntimeError(f"{self.run.path}: all {failed} members failed; the first: {reason}")
        self._keep_best()  # an interruption may have come between the last member and the file
        if search.population + search.rounds > done:
            raise AssertionError("the study ended before its members were done")

    def _seeds(self) -> list[int]:
        return [self.recipe.seed + repeat for repeat in range(self.recipe.search.repeats)]

    def _evaluate(
        self,
        losses: Sequence[LossWeights],
        seeds: Sequence[int],
        *,
        what: str,
        done: int,
        total: int | None = None,
    ) -> list[MemberResult]:
        """Train and judge a cohort while the display moves; ``done`` members came before it."""
        began, steps, batch = (
            time.perf_counter(),
            self.recipe.optim.steps,
            self.recipe.optim.batch_size,
        )
        taken = 0
        best = max((m.fitness for m in self.study.members() if m.fitness is not None), default=None)
        shown = f"best {best:.3f}  " if best is not None else ""

        def on_step(step: int, values: Sequence[float]) -> None:
            nonlocal taken
            taken += len(values)
            rate = taken * batch / (time.perf_counter() - began)
            place = done + min(taken / (steps * len(seeds)), len(losses))
            self.display.update(
                what, place, total or self.study.total, note=f"{shown}{rate:.0f} clips/s"
            )

        return evaluate_cohort(
            self.trainer, self.labelled, losses=losses, seeds=seeds, on_step=on_step
        )

    def _record(self, proposal: Proposal, result: MemberResult) -> None:
        """Write a member's file, then tell the study: what the study knows is always on disk too."""
        attributes = self._facts(result)
        with self.clock("logging"):
            self._keep_network(proposal, result)
            record = {
                "trial": proposal.trial,
                "state": "failed" if result.fitness is None else "complete",
                "reason": result.reason,
                "weights": proposal.weights,
                "fitness": result.fitness,
                "parent": proposal.parent,
                "mutated": proposal.mutated,
                "round": proposal.round,
                **attributes,
            }
            self.run.write_json(f"members/{proposal.trial:05d}.json", record)
            self.board.member(record)
        with self.clock("search"):
            if result.fitness is None:
                self.study.fail(
                    proposal.trial, reason=result.reason or "unknown", attributes=attributes
                )
            else:
                self.study.tell(proposal.trial, fitness=result.fitness, attributes=attributes)
        if result.fitness is None:
            self.display.say(f"member {proposal.trial} failed: {result.reason}")

    def _facts(self, result: MemberResult) -> dict[str, Any]:
        last = result.results[-1] if result.results else None
        metrics = {} if last is None else {
            "hungarian": fmean(r.metrics.hungarian for r in result.results),
            "nmi": fmean(r.metrics.nmi for r in result.results),
            "ari": fmean(r.metrics.ari for r in result.results),
            "effective_rank": fmean(r.effective_rank for r in result.results),
        }  # fmt: skip
        return {
            "metrics": metrics,
            "seeds": list(result.seeds),
            "seconds": round(result.seconds, 3),
            "clips_per_second": round(result.clips_per_second, 2),
            "terms": result.terms,
            "recipe_hash": self.hash,
            "labels_used": True,
        }

    def _keep_network(self, proposal: Proposal, result: MemberResult) -> None:
        """Keep the RGB network of a member that is fitter than all before it."""
        best = max((m.fitness for m in self.study.members() if m.fitness is not None), default=-1.0)
        if result.fitness is not None and result.rgb is not None and result.fitness > best:
            card = card_of(
                self.recipe,
                labels_used=True,
                loss=proposal.weights,
                recipe_hash=self.hash,
                seed=self.recipe.seed,
                num_clips=len(self.data.videos.index),
            )
            facts = {"trial": proposal.trial, "fitness": result.fitness}
            save_network(self.run.checkpoints / "best.safetensors", result.rgb, card, **facts)

    def _keep_best(self) -> None:
        """Write best.toml as the study has it."""
        members = self.study.members()
        if all(m.fitness is None for m in members):
            return
        best = self.study.best()
        about = f"best of {len(members)} members: trial {best.trial}, fitness {best.fitness:.4f}"
        with self.clock("logging"):
            name = f"{self.run.path.name}/best"
            save_loss(best.weights, self.run.best, name=name, about=about, labels_used=True)

    def _keep_time(self) -> dict[str, float]:
        """Seconds by stage, those before an interruption included; written to timing.json."""
        spent = {**self.clock.seconds, "total": time.perf_counter() - self._began}
        spent["other"] = spent["total"] - sum(self.clock.seconds.values())
        stages = dict.fromkeys((*self._earlier, *spent))
        seconds = {
            name: round(self._earlier.get(name, 0.0) + spent.get(name, 0.0), 3) for name in stages
        }
        self.run.write_json("timing.json", seconds)
        return seconds

    def _confirm(self) -> dict[str, list[float | None]]:
        """Train the best loss and a random one again with seeds that the search never saw."""
        found: dict[str, list[float | None]] = {"untrained": [], "best": [], "random": []}
        best, count = self.study.best(), self.recipe.search.confirm_seeds
        self.display.start("confirming with fresh seeds", 2 * count)
        for i in range(count):
            seed = self.recipe.seed + FRESH_SEEDS + i
            name = f"members/confirm-{seed}.json"
            record = self.run.read_json(name)
            if record is None or record["trial"] != best.trial:
                record = self._confirm_once(best, seed, done=2 * i, total=2 * count)
                with self.clock("logging"):
                    self.run.write_json(name, record)
            for key in found:
                found[key].append(record[key]["fitness"])
        return found

    def _confirm_once(
        self, best: MemberRecord, seed: int, *, done: int, total: int
    ) -> dict[str, Any]:
        random = random_weights(seed)
        results = self._evaluate(
            [best.weights, random],
            [seed],
            what="confirming with fresh seeds",
            done=done,
            total=total,
        )
        untrained = untrained_fitness(self.trainer, self.labelled, seed=seed)
        return {
            "seed": seed,
            "trial": best.trial,
            "untrained": {"fitness": untrained.value},
            "best": {
                "fitness": results[0].fitness,
                "reason": results[0].reason,
                **self._facts(results[0]),
            },
            "random": {
                "fitness": results[1].fitness,
                "reason": results[1].reason,
                "weights": random,
                **self._facts(results[1]),
            },
        }

    def _summary(self, confirmed: dict[str, list[float | None]]) -> dict[str, Any]:
        members, best = self.study.members(), self.study.best()
        initial = [m.fitness for m in members if m.round == 0]
        return {
            "untrained": _spread(confirmed["untrained"]),
            "initial_population": _spread(initial),
            "best_trial": best.trial,
            "best_search_fitness": best.fitness,
            "best": _spread(confirmed["best"]),
            "random": _spread(confirmed["random"]),
            "weights": best.weights,
            "seconds": self._keep_time(),
            "failures": sum(m.state == "failed" for m in members),
            "members": len(members),
            "recipe_hash": self.hash,
            "seed": self.recipe.seed,
        }

    def _write_provenance(self, runtime: Runtime) -> None:
        videos, labelled = self.data.videos, self.data.labelled
        identity = fingerprint(videos, labelled)
        old = self.run.read_json("provenance.json")
        if old is not None and old["data"] != identity:
            raise RunError(
                f"{self.run.path}: the videos are not those that this run began with; "
                "bring them back, or start a new run"
            )
        facts = {
            **provenance(runtime),
            "seed": self.recipe.seed,
            "recipe": self.recipe.name,
            "recipe_hash": self.hash,
            "videos": self.data.named[0],
            "labelled": self.data.named[1],
            "num_clips": len(videos.index),
            "num_clips_with_sound": int(videos.index.has_audio.sum()),
            "hours_of_video": round(float(videos.index.duration.sum()) / 3600, 4),
            "num_labelled": len(self.labelled.clips),
            "num_classes": self.labelled.num_classes,
            "labels_used": True,
            "rejected": [
                f"{r.path}: {r.reason}" for r in dict.fromkeys((*videos.rejects, *labelled.rejects))
            ],
            "data": identity,
        }
        if old is not None:
            facts = {**old, "resumed": [*old.get("resumed", []), facts["started"]]}
        self.run.write_json("provenance.json", facts)


def _spread(values: Sequence[float | None]) -> dict[str, Any]:
    known = [value for value in values if value is not None]
    return {
        "mean": fmean(known) if known else None,
        "sd": stdev(known) if len(known) > 1 else 0.0,
        "n": len(known),
        "values": known,
    }
