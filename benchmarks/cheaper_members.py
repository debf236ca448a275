"""What each cheaper way to evaluate a member saves, and whether its fitness ranks losses as the full one does.

    python benchmarks/cheaper_members.py --videos VIDEOS --labelled CLASSES --losses 16 --rows rows.jsonl \
        --json benchmarks/results/cheaper_members-cpu.jsonl

Half of the losses are random, the others children of these with one weight drawn anew. Every cohort of them is
trained in full, in full again with another seed (the noise that no ranking can beat), and in each cheaper way, one
after the other in one process. Children alone have parents to start from, so warm starts are compared on them. Rows
are kept as they come, with parents' ends beside them, and a run that was stopped goes on with those that lack.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import msgspec
import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from rows import CHANGES, JSON, PATH, RECIPE, append
from scipy.stats import kendalltau, spearmanr

from engine.core.recipe import Recipe, load_recipe, override, recipe_hash
from engine.core.runtime import choose_runtime, make_deterministic
from engine.data.library import default_shard_cache, demo_folders, open_library
from engine.data.shards.index import data_digest
from engine.features.extract import LabelledClips
from engine.objective.lossfile import random_weights
from engine.objective.terms import TERM_NAMES, LossWeights
from engine.search.cohort import MemberResult, evaluate_cohort
from engine.search.members import Proposal
from engine.train.memory import CohortMemory
from engine.train.trainer import Trainer

FULL, AGAIN = "full", "full, other seed"
RESAMPLES = 2000


@dataclass(frozen=True)
class Loss:
    """One of the losses compared."""

    name: str
    weights: LossWeights
    parent: str | None


@dataclass(frozen=True)
class Way:
    """How members are evaluated."""

    name: str
    changes: dict[str, Any]
    """Of the recipe's section ``search``."""
    seed: int = 0
    """Added to the recipe's."""
    warm: bool = False
    """Children start from their parents' ends."""


def losses_of(count: int) -> list[Loss]:
    """Random ones, each followed by its child."""
    found: list[Loss] = []
    for number in range(-(-count // 2)):
        weights = random_weights(number)
        rng = np.random.Generator(np.random.Philox(key=[number, 0xC41D]))
        term = TERM_NAMES[int(rng.integers(len(TERM_NAMES)))]
        child = {**weights, term: float(rng.random())}
        found += [
            Loss(f"random {number}", weights, None),
            Loss(f"child {number}", child, f"random {number}"),
        ]
    return found[:count]


def ways_of(*, collapse_rank: float, bank: int | str) -> list[Way]:
    """The full evaluation twice, and each cheaper one."""
    halving, stop, kept = {"halving": True}, {"collapse_rank": collapse_rank}, {"clip_bank": bank}
    return [
        Way(FULL, {}),
        Way(AGAIN, {}, seed=1),
        Way("halving", halving),
        Way("warm start", {}, warm=True),
        Way("collapse stop", stop),
        Way("clip bank", kept),
        Way("all together", {**halving, **stop, **kept}, warm=True),
    ]


class Bench:
    """One run: cohorts in each way, their rows in a file."""

    def __init__(self, recipe: Recipe, data: tuple[Any, Any], *, rows: Path) -> None:
        self.recipe, self.rows, self.ends = recipe, rows, rows.with_suffix(".ends")
        self.videos, self.judges = data
        self.runtime = choose_runtime(amp=recipe.optim.amp)
        make_deterministic(self.runtime)
        if self.runtime.device.type == "cpu":
            torch.set_num_threads(1)
        what = f"{recipe_hash(recipe)} {data_digest((*self.videos.shards, *self.judges.shards))}"
        self.key = hashlib.sha256(what.encode()).hexdigest()[:12]
        self.bank: Any = None
        self._warm_up()

    def _warm_up(self) -> None:
        """What only a process's first step costs is no part of any way."""
        trainer = Trainer(self.recipe, self.videos.index, self.runtime, warn=click.echo)
        member = trainer.member(random_weights(0), seed=0)
        _, views = next(trainer.rounds([member], seed=0))
        trainer.step_all([member], views)

    def known(self) -> list[dict[str, Any]]:
        """Rows of this recipe and these videos, the last of each."""
        if not self.rows.exists():
            return []
        read = [json.loads(line) for line in self.rows.read_text().splitlines()]
        own = [row for row in read if row["key"] == self.key]
        return list({(row["way"], row["way_is"], row["loss"]): row for row in own}.values())

    def evaluate(self, way: Way, cohort: Sequence[Loss]) -> None:
        """Train a cohort in one way, and write a row a loss."""
        jobs, losses = self._jobs(way, cohort)
        if not jobs:
            return
        search = msgspec.structs.replace(self.recipe.search, **way.changes)
        recipe = msgspec.structs.replace(self.recipe, search=search)
        trainer = Trainer(recipe, self.videos.index, self.runtime, warn=click.echo)
        labelled = LabelledClips(self.judges.index, recipe, runtime=self.runtime)
        labelled.features([trainer.initial_loss(0).rgb])  # judged clips are decoded once a search
        bank = self._bank(trainer, search.clip_bank) if search.clip_bank else None
        memory = CohortMemory(bank=bank)
        began, cpu = time.perf_counter(), time.process_time()
        seeds = [recipe.seed + way.seed]
        results = evaluate_cohort(trainer, labelled, members=jobs, seeds=seeds, memory=memory)
        seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
        shares = np.array([result.seconds for result in results])
        shares /= shares.sum()
        for loss, result, share in zip(losses, results, shares, strict=True):
            self._write(way, loss, result, seconds=seconds * share, cpu=cpu * share)

    def _jobs(self, way: Way, cohort: Sequence[Loss]) -> tuple[list[Proposal], list[Loss]]:
        """All of the cohort; of warm starts alone its children, and with all together its parents as initialised."""
        chosen = [loss for loss in cohort if loss.parent or way.name != "warm start"]
        jobs = []
        for loss in chosen:
            start = self.end(loss.parent) if way.warm and loss.parent else None
            keep = self.end(loss.name) if way.name == FULL and not loss.parent else None
            jobs.append(Proposal(0, loss.weights, start=start, keep=keep))
        return jobs, chosen

    def end(self, name: str) -> Path:
        """Where a loss's end state is kept for its children."""
        return self.ends / f"{self.key}-{name.replace(' ', '-')}.safetensors"

    def input_costs(self, size: int | str) -> None:
        """Write a row of what a batch of all modalities costs by the pipeline and from the bank, input alone."""
        if any(row["way"] == "input" and row["way_is"] == str(size) for row in self.known()):
            return
        trainer = Trainer(self.recipe, self.videos.index, self.runtime, warn=click.echo)
        cost: dict[str, float] = {}
        for name, bank in (("pipeline", None), ("bank", self._bank(trainer, size))):
            modalities = ("rgb", "flow", "audio")
            batches = trainer.batches(seed=0, first=0, modalities=modalities, bank=bank)
            next(batches)
            cpu = time.process_time()
            count = sum(1 for _ in batches)
            cost[f"cpu_batch_{name}"] = (time.process_time() - cpu) / count
        self._append({"way": "input", "way_is": str(size), "loss": "", **cost})

    def _bank(self, trainer: Trainer, size: int | str) -> Any:
        if self.bank is None:
            began, cpu = time.perf_counter(), time.process_time()
            self.bank = trainer.open_bank(size)
            seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
            facts = {"clips": len(self.bank), "bytes": self.bank.nbytes, "side": self.bank.side}
            self._append({"way": "bank", "way_is": str(size), "loss": "", **facts,
                          "seconds": seconds, "cpu": cpu})  # fmt: skip
        return self.bank

    def _write(
        self, way: Way, loss: Loss, result: MemberResult, *, seconds: float, cpu: float
    ) -> None:
        last = result.rungs[-1][1] if result.rungs else None
        self._append(
            {
                "way": way.name,
                "way_is": json.dumps(way.changes, sort_keys=True),
                "loss": loss.name,
                "parent": loss.parent,
                "state": result.state,
                "reason": result.reason,
                # a member that is dropped is known by its last rung; one that collapsed before any is the worst
                "score": result.fitness if result.fitness is not None else last or 0.0,
                "rungs": result.rungs,
                "steps": result.steps,
                "seconds": seconds,
                "cpu": cpu,
                "effective_rank": result.results[0].effective_rank if result.results else None,
                "zipf": result.results[0].zipf if result.results else None,
            }
        )

    def _append(self, row: dict[str, Any]) -> None:
        self.rows.parent.mkdir(parents=True, exist_ok=True)
        with self.rows.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"key": self.key, **row}) + "\n")


def comparison(
    way: str, rows: dict[str, dict[str, Any]], full: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    """One way beside the full evaluation, over the losses that both have."""
    names = [name for name in full if name in rows]
    scores = np.array([[full[n]["score"], rows[n]["score"]] for n in names])
    rng = np.random.Generator(np.random.Philox(0))
    drawn = (spearman(scores[rng.integers(len(names), size=len(names))]) for _ in range(RESAMPLES))
    draws = [rho for rho in drawn if rho is not None]
    top = max(len(names) // 4, 1)
    best = [set(np.argsort(-column, kind="stable")[:top]) for column in scores.T]
    states = [rows[n]["state"] for n in names]
    return {
        "way": way,
        "losses": len(names),
        **{
            f"{kind}_share": sum(rows[n][kind] for n in names) / sum(full[n][kind] for n in names)
            for kind in ("cpu", "seconds", "steps")
        },
        "spearman": spearman(scores),
        "spearman_90": np.percentile(draws, [5, 95]).tolist() if draws else None,
        "kendall": kendall(scores),
        "top_quarter_recall": len(best[0] & best[1]) / top,
        "states": {state: states.count(state) for state in sorted(set(states))},
        "cpu_full_member": sum(full[n]["cpu"] for n in names) / len(names),
    }


def noise(*ways: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Mean and sd of the full scores over losses, what of the sd a seed makes, and how the first rung ranks them.

    Of the full evaluation, of that with another seed, and of halving; empty where one of them lacks.
    """
    names = [name for name in ways[0] if all(name in way for way in ways)]
    if len(names) < 2:
        return {}
    full, again = (np.array([way[n]["score"] for n in names]) for way in ways[:2])
    rung = [ways[2][n]["rungs"][0][1] if ways[2][n]["rungs"] else 0.0 for n in names]
    return {
        "mean": float(full.mean()),
        "sd": float(full.std(ddof=1)),
        "sd_other_seed": float(again.std(ddof=1)),
        "sd_of_a_seed": float((full - again).std(ddof=1) / np.sqrt(2)),
        "spearman_first_rung": spearman(np.stack([full, rung], axis=1)),
    }


def spearman(scores: np.ndarray[Any, Any]) -> float | None:
    """Rank correlation of two columns; None where one does not vary."""
    return float(spearmanr(*scores.T).statistic) if _varies(scores) else None


def kendall(scores: np.ndarray[Any, Any]) -> float | None:
    """Kendall's tau-b of two columns; None where one does not vary."""
    return float(kendalltau(*scores.T).statistic) if _varies(scores) else None


def _varies(scores: np.ndarray[Any, Any]) -> bool:
    return all(len(np.unique(column)) > 1 for column in scores.T)


def summary(bench: Bench, ways: Sequence[Way]) -> list[dict[str, Any]]:
    """A row a way, of what has been measured so far."""
    known = bench.known()
    by_way = {
        way.name: {
            row["loss"]: row
            for row in known
            if row["way"] == way.name and row["way_is"] == json.dumps(way.changes, sort_keys=True)
        }
        for way in ways
    }
    full = by_way[FULL]
    found = [comparison(name, rows, full) for name, rows in by_way.items() if name != FULL and rows]
    found += [{"way": "scores", **noise(full, by_way.get(AGAIN, {}), by_way.get("halving", {}))}]
    complete = [row for row in full.values() if row["zipf"] is not None]
    pairs = np.array([[row["score"], row["zipf"]] for row in complete])
    facts = {"losses": len(pairs), "spearman": spearman(pairs), "way": "zipf beside agreement"}
    ranks = [round(row["effective_rank"], 2) for row in complete]
    banks = [row for row in known if row["way"] in ("bank", "input")]
    return [*found, {**facts, "effective_ranks": sorted(ranks)}, *banks]


def _two(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def show(rows: Sequence[dict[str, Any]]) -> None:
    """Print the table."""
    shares = ("CPU time", "time", "steps")
    table = Table("way", "losses", *shares, "Spearman (90 %)", "Kendall", "top quarter", "states")
    for row in (row for row in rows if "cpu_share" in row):
        low, high = row["spearman_90"] or (None, None)
        table.add_row(
            row["way"],
            str(row["losses"]),
            *(f"{row[f'{kind}_share']:.2f}" for kind in ("cpu", "seconds", "steps")),
            f"{_two(row['spearman'])} ({_two(low)} to {_two(high)})",
            _two(row["kendall"]),
            f"{row['top_quarter_recall']:.2f}",
            ", ".join(f"{n} {state}" for state, n in row["states"].items()),
        )
    Console(width=140).print(table)
    for row in (row for row in rows if "cpu_share" not in row):
        click.echo(json.dumps(row))


@click.command()
@click.option("--videos", multiple=True, type=PATH, help="Else the demo's.")
@click.option("--labelled", multiple=True, type=PATH)
@RECIPE
@CHANGES
@click.option("--losses", "count", type=click.IntRange(min=4), default=16, show_default=True)
@click.option("--cohort", "size", type=click.IntRange(min=2), default=8, show_default=True)
@click.option("--collapse-rank", type=float, default=4.0, show_default=True)
@click.option("--clip-bank", default="64", show_default=True, help="Clips, or a size such as 2GiB.")
@click.option("--rows", type=PATH, required=True, help="Kept, and gone on with.")
@JSON
def main(
    videos: tuple[Path, ...],
    labelled: tuple[Path, ...],
    recipe_name: str,
    assignments: tuple[str, ...],
    count: int,
    size: int,
    collapse_rank: float,
    clip_bank: str,
    rows: Path,
    out: Path | None,
) -> None:
    """Print, for each way, its share of the full evaluation's time and the rank correlation with it."""
    if not videos:
        made = demo_folders(lambda *_: None)
        videos, labelled = tuple(made[0]), tuple(made[1])
    recipe = override(load_recipe(recipe_name), list(assignments))
    cache = default_shard_cache()
    data = [open_library(p, cache=cache, report=lambda *_: None) for p in (videos, labelled)]
    bank: int | str = int(clip_bank) if clip_bank.isdigit() else clip_bank
    ways, losses = ways_of(collapse_rank=collapse_rank, bank=bank), losses_of(count)
    bench = Bench(recipe, (data[0], data[1]), rows=rows)
    for first in range(0, len(losses), size):
        cohort = losses[first : first + size]
        for way in pending(bench, ways, cohort):
            click.echo(f"losses {first} to {first + len(cohort) - 1}: {way.name}")
            bench.evaluate(way, cohort)
    bench.input_costs(bank)
    found = summary(bench, ways)
    show(found)
    about = {"seed": recipe.seed, "recipe_hash": recipe_hash(recipe), "labels_used": True}
    append(out, found, bench.runtime, **about)


def pending(bench: Bench, ways: Sequence[Way], cohort: Sequence[Loss]) -> list[Way]:
    """Ways that the cohort has not been through; warm starts need the ends of the full one first."""
    done = {(row["way"], row["way_is"], row["loss"]) for row in bench.known()}
    left = []
    for way in ways:
        wanted = [loss for loss in cohort if loss.parent or way.name != "warm start"]
        is_ = json.dumps(way.changes, sort_keys=True)
        if any((way.name, is_, loss.name) not in done for loss in wanted):
            left.append(way)
    parents = [loss.parent for loss in cohort if loss.parent]
    if any(way.warm for way in left) and not all(bench.end(p).exists() for p in parents):
        left = [ways[0], *(way for way in left if way.name != FULL)]
    return left


if __name__ == "__main__":
    main()
