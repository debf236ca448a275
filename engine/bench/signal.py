"""Whether fitness ranks losses on given videos, and at what cost: a search's first losses and presets, several seeds.

Losses are those that a search of the recipe begins with, and trained by its step in cohorts of its size. Each is
looked at after some numbers of steps, and its features are judged by every read-out: training is what is dear, so that
one training answers for all of them. A look before the end sees a learning rate that has not come down. Costs are
seconds of processor time on a CPU, and of the clock on a GPU, with a cohort's input and judging shared out evenly.

Each training is a line of a file, which a later call goes on with.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from msgspec import Struct
from numpy.typing import NDArray
from rich.table import Table
from torch import Tensor

from engine.bench.rows import number
from engine.core.display import table
from engine.core.provenance import provenance
from engine.core.recipe import Recipe, preset_names, recipe_hash
from engine.core.runtime import Runtime, make_deterministic
from engine.data.clip_bank import ClipBank
from engine.data.library import Library
from engine.data.shards.index import data_digest
from engine.features.extract import Cuts, Extractor, LabelledClips
from engine.features.fitness import cohort_fitness
from engine.features.readout import READOUTS
from engine.features.reliability import Reliability, reliability
from engine.model.network_file import Card, card_of
from engine.objective.lossfile import load_loss
from engine.objective.terms import LossWeights
from engine.search.samplers import first_losses
from engine.train.member import Member
from engine.train.trainer import MemberFailed, Trainer

UNTRAINED = "untrained"
SHUFFLED = "labels shuffled"
REPEATS = (1, 2, 4)
"""Trainings a member for which the table says how many members a search needs."""


class Score(Struct, frozen=True):
    """Agreement of clusters with classes, means over k-means runs."""

    value: float
    """By the recipe's ``fitness.metric``."""
    hungarian: float
    nmi: float
    zipf: float = float("nan")
    """What clusters say without labels: how near they are to Zipf's law."""


class Look(Struct, frozen=True):
    """One network's features after some steps."""

    step: int
    core_seconds: float
    """Cost of getting there, judging left out."""
    effective_rank: float
    scores: dict[str, Score]
    """By read-out."""


class Training(Struct, frozen=True, kw_only=True):
    """One loss trained under one seed."""

    key: str
    """Of the recipe and the videos: lines of another key are not looked at."""
    loss: str
    seed: int
    looks: list[Look]
    judging: float = 0.0
    """Core-seconds of its features and of the recipe's own k-means, for one look."""
    terms: dict[str, float] = {}
    """Running means of the terms near the end."""
    failed: str | None = None
    about: dict[str, Any] = {}

    def line(self, readout: str) -> str:
        """The outcome in one line."""
        if self.failed is not None:
            return f"{self.loss}, seed {self.seed}: {self.failed}"
        seen = ", ".join(
            f"{_value(look, readout):.3f} after {look.step} steps" for look in self.looks
        )
        return f"{self.loss}, seed {self.seed}: {seen}, {self.looks[-1].core_seconds:.1f} core-s"


@dataclass(frozen=True)
class Plan:
    """Losses, seeds and steps to measure."""

    drawn: Mapping[str, LossWeights]
    """Losses that a search begins with, by name."""
    presets: Mapping[str, LossWeights]
    """Losses that come along, by name."""
    seeds: tuple[int, ...]
    looks: tuple[int, ...]
    """Steps, rising; the last is the recipe's."""

    @property
    def losses(self) -> dict[str, LossWeights]:
        """All of them, by name."""
        return {**self.drawn, **self.presets}

    @property
    def count(self) -> int:
        """Lines of the file when it is done; an untrained network's is one, too."""
        return (len(self.losses) + 1) * len(self.seeds)


def plan_of(
    recipe: Recipe,
    *,
    losses: int,
    repeats: int,
    looks: Sequence[int],
    presets: bool,
    sound: bool = True,
) -> Plan:
    """A search's first ``losses`` and the presets, under two disjoint sets of ``repeats`` seeds.

    ``sound``: whether the videos have any. Raises ValueError.
    """
    steps = recipe.optim.steps
    wrong = [step for step in looks if not 0 < step <= steps]
    if wrong:
        raise ValueError(f"--looks {wrong[0]}: a member is trained for {steps} steps (optim.steps)")
    first = first_losses(recipe.search, seed=recipe.seed, count=losses, sound=sound)
    drawn = {f"drawn:{recipe.seed}:{number}": loss for number, loss in enumerate(first)}
    named = {name: load_loss(name) for name in preset_names("losses")} if presets else {}
    seeds = tuple(recipe.seed + i for i in range(2 * repeats))
    return Plan(drawn, named, seeds, tuple(sorted({*looks, steps})))


class Signal:
    """Trains what a plan asks for, and keeps a line of each training in ``rows``."""

    def __init__(
        self,
        recipe: Recipe,
        videos: Library,
        labelled: Library,
        *,
        runtime: Runtime,
        rows: Path | None,
        features: Path | None = None,
        warn: Callable[[str], object] = warnings.warn,
    ) -> None:
        """``features``: a folder that keeps each look's features (N, V, D), as .npy. Raises ValueError."""
        make_deterministic(runtime)
        if runtime.device.type == "cpu":
            torch.set_num_threads(1)
        self.recipe, self.rows, self.features, self.runtime = recipe, rows, features, runtime
        self.trainer = Trainer(recipe, videos.index, runtime, warn=warn)
        chosen = LabelledClips(labelled.index, recipe, runtime=runtime)
        if chosen.labels is None:
            raise ValueError("bench signal needs labelled clips: class folders or shards of them")
        self.labels, self.num_classes = chosen.labels, chosen.num_classes
        self.card: Card = card_of(recipe)
        fitness = recipe.fitness
        cuts = Cuts(self.card.input, fitness.views_per_clip, batch_size=fitness.batch_size)
        self._extractor = Extractor(
            labelled.index, chosen.clips, cuts=cuts, runtime=runtime, bank={}
        )
        self.key = f"{recipe_hash(recipe)} {data_digest((*videos.shards, *labelled.shards))}"
        self._about = {**provenance(runtime), "recipe": recipe.name, "clips": len(chosen.clips)}
        self._cut_off = False
        self._done = {(row.loss, row.seed): row for row in self._read()}
        self._warm = False
        self._bank: ClipBank | None = None

    def go(self, plan: Plan) -> Iterator[Training]:
        """Each training of the plan, those that the file has already first."""
        every = [(UNTRAINED, seed) for seed in plan.seeds]
        every += [(loss, seed) for loss in plan.losses for seed in plan.seeds]
        yield from (self._done[each] for each in every if self._knows(each, plan))
        for seed in plan.seeds:
            if not self._knows((UNTRAINED, seed), plan):
                yield self._keep(self._untrained(seed))
        size, losses = self.recipe.search.generation, list(plan.losses.items())
        for first in range(0, len(losses), size):
            for seed in plan.seeds:
                cohort = losses[first : first + size]
                left = {n: loss for n, loss in cohort if not self._knows((n, seed), plan)}
                for row in self._train(left, seed, plan.looks) if left else ():
                    yield self._keep(row)

    def _knows(self, each: tuple[str, int], plan: Plan) -> bool:
        row = self._done.get(each)
        if row is None:
            return False
        wanted = {0} if row.loss == UNTRAINED else set(plan.looks)
        return row.failed is not None or wanted <= {look.step for look in row.looks}

    def _read(self) -> list[Training]:
        if self.rows is None or not self.rows.exists():
            return []
        rows, text = [], self.rows.read_bytes()
        self._cut_off = bool(text) and not text.endswith(b"\n")
        for line in text.splitlines():
            try:
                row = msgspec.json.decode(line, type=Training)
            except msgspec.DecodeError:  # the last line of a run that was killed
                continue
            if row.key == self.key:
                rows.append(row)
        return rows

    def _keep(self, row: Training) -> Training:
        self._done[row.loss, row.seed] = row
        if self.rows is not None:
            with self.rows.open("ab") as file:
                if self._cut_off:
                    file.write(b"\n")
                    self._cut_off = False
                file.write(msgspec.json.encode(row) + b"\n")
        return row

    def _untrained(self, seed: int) -> Training:
        network = self.trainer.initial_loss(seed).rgb
        looks, judging = self._look([network], [UNTRAINED], seed, 0, 0.0)
        return self._row(loss=UNTRAINED, seed=seed, looks=looks, judging=judging)

    def _row(self, **fields: Any) -> Training:
        return Training(key=self.key, about=self._about, **fields)

    def _train(
        self, losses: Mapping[str, LossWeights], seed: int, looks: Sequence[int]
    ) -> list[Training]:
        """A cohort's trainings, looked at on the way."""
        self._warm_up()
        began = self._clock()
        members: dict[str, Member] = {}
        failed: dict[str, str] = {}
        for loss, weights in losses.items():
            try:
                members[loss] = self.trainer.member(weights, seed=seed, bank=self._bank)
            except ValueError as error:  # no sound, say
                failed[loss] = str(error)
        looked: dict[str, list[Look]] = {loss: [] for loss in losses}
        judging, spent = 0.0, 0.0
        rounds = self.trainer.rounds(list(members.values()), seed=seed, bank=self._bank)
        for step, views in rounds if members else ():
            at_work = list(members)
            outcomes = self.trainer.step_all(list(members.values()), views)
            for loss, outcome in zip(at_work, outcomes, strict=True):
                if isinstance(outcome, MemberFailed):
                    failed[loss] = str(outcome)
                    del members[loss]
            if not members:
                break
            if step + 1 in looks:
                spent += (self._clock() - began) / len(losses)
                networks = [member.loss.rgb for member in members.values()]
                seen, judging = self._look(networks, list(members), seed, step + 1, spent)
                for loss, look in zip(list(members), seen, strict=True):
                    looked[loss].append(look)
                    if not look.scores:
                        failed[loss] = f"its features after {step + 1} steps can't be judged"
                        del members[loss]
                began = self._clock()
        return [
            self._row(
                loss=loss,
                seed=seed,
                looks=looked[loss],
                judging=judging,
                terms=members[loss].term_values() if loss in members else {},
                failed=failed.get(loss),
            )
            for loss in losses
        ]

    def _warm_up(self) -> None:
        """Train a member for a step, so that the cost of a process's first step is no measured member's."""
        if self._warm:
            return
        self._warm = True
        if self.recipe.search.clip_bank:
            self._bank = self.trainer.open_bank(self.recipe.search.clip_bank)
        member = self.trainer.member(load_loss("equal"), seed=0, bank=self._bank)
        _, views = next(self.trainer.rounds([member], seed=0, bank=self._bank))
        self.trainer.step_all([member], views)

    def _look(
        self, networks: Sequence[Any], names: Sequence[str], seed: int, step: int, spent: float
    ) -> tuple[list[Look], float]:
        """Scores of the networks' features, and the core-seconds that judging one costs a search."""
        began = self._clock()
        features = self._extractor.outputs(
            networks, [self.card] * len(networks), batch_norm=self.recipe.fitness.batch_norm
        )
        taken = (self._clock() - began) / len(networks)
        looks = []
        for loss, each in zip(names, features, strict=True):
            if self.features is not None:
                self.features.mkdir(parents=True, exist_ok=True)
                name = f"{loss.replace(':', '-')}-{seed}-{step}.npy"
                np.save(self.features / name, each.numpy())
            began = self._clock()
            scores, rank = judged(
                each, self.labels, recipe=self.recipe, num_classes=self.num_classes, seed=seed
            )
            looks.append(Look(step, spent, rank, scores))
        judging = taken + (self._clock() - began) / max(len(scores), 1)
        return looks, judging

    def _clock(self) -> float:
        if self.runtime.device.type == "cpu":
            return time.process_time()
        torch.cuda.synchronize(self.runtime.device)
        return time.perf_counter()


def judged(
    features: Tensor, labels: NDArray[np.int64], *, recipe: Recipe, num_classes: int, seed: int
) -> tuple[dict[str, Score], float]:
    """Scores of features (N, V, D) by every read-out, and their effective rank.

    Besides the means over views by every read-out: the recipe's read-out with views as rows of their own, with half
    of the clips, and with shuffled labels, which shows what chance gives. No scores where features are not finite.
    """
    own = recipe.fitness.readout
    mean, count = features.mean(1), features.shape[1]
    rng = np.random.Generator(np.random.Philox(key=[seed, 0x51]))
    order = rng.permutation(len(labels))
    half = np.sort(order[: len(labels) // 2])
    ways: dict[str, tuple[Tensor, NDArray[np.int64], str]] = {
        name: (mean, labels, name) for name in READOUTS
    }
    ways[f"{own}, views as rows"] = (features.flatten(0, 1), labels.repeat(count), own)
    if len(np.unique(labels[half])) == num_classes:
        ways[f"{own}, half of the clips"] = (mean[half], labels[half], own)
    ways[f"{own}, {SHUFFLED}"] = (mean, labels[order], own)
    scores, rank = {}, 0.0
    for name, (rows, truth, how) in ways.items():
        settings = msgspec.structs.replace(recipe.fitness, readout=how)
        (result,) = cohort_fitness(
            [rows.contiguous()], truth, settings=settings, num_classes=num_classes, seed=seed
        )
        if isinstance(result, str):
            return {}, 0.0
        assert result.metrics is not None
        agreed = result.metrics
        scores[name] = Score(result.value, agreed.hungarian, agreed.nmi, result.zipf)
        rank = result.effective_rank
    return scores, rank


@dataclass(frozen=True)
class Ranking:
    """Figures of one way of judging after some steps."""

    step: int
    readout: str
    best: float
    """Highest mean over seeds of any drawn loss."""
    mean: float
    untrained: float
    core_seconds: float
    """A member's, judging included."""
    figures: Reliability | None
    """Of the drawn losses; None for fewer than two."""
    without_labels: float
    """Spearman of the losses' fitness, means over seeds, and of what Zipf's law says of them; nan where unknown."""


def measure(
    bench: Signal, plan: Plan, *, say: Callable[[str], object], show: Callable[[Table], object]
) -> None:
    """Train what the plan asks for, say each training in a line, then show what losses reach and how well they rank."""
    readout, trainings = bench.recipe.fitness.readout, list[Training]()
    for row in bench.go(plan):
        trainings.append(row)
        say(f"{len(trainings)} of {plan.count}: {row.line(readout)}")
    show(losses_table(trainings, plan, readout))
    title = f"how well fitness ranks {len(plan.drawn)} losses that a search begins with, {len(plan.seeds)} seeds each"
    show(summary_table(summary(trainings, plan), title))


def summary(trainings: Sequence[Training], plan: Plan) -> list[Ranking]:
    """Each step's and read-out's figures over the drawn losses that every seed was trained for."""
    done = {(row.loss, row.seed): row for row in trainings}
    rows = [[done.get((loss, seed)) for seed in plan.seeds] for loss in plan.drawn]
    whole = [[row for row in each if row is not None and row.failed is None] for each in rows]
    whole = [each for each in whole if len(each) == len(plan.seeds)]
    if not whole:
        return []
    rankings = []
    scored = [look.scores for each in whole for row in each for look in row.looks]
    # which half of the clips is seen depends on the seed, and may lack a class
    names = [name for name in scored[0] if all(name in scores for scores in scored)]
    for step in plan.looks:
        looks = [[_at(row, step) for row in each] for each in whole]
        cost = float(np.mean([look.core_seconds for each in looks for look in each]))
        cost += float(np.mean([row.judging for each in whole for row in each]))
        for name in names:
            scores = np.array([[_value(look, name) for look in each] for each in looks])
            blind = np.array([[_value(look, name, "zipf") for look in each] for each in looks])
            plain = [
                _value(row.looks[0], name)
                for seed in plan.seeds
                if (row := done.get((UNTRAINED, seed))) is not None
            ]
            rankings.append(
                Ranking(
                    step,
                    name,
                    best=float(scores.mean(1).max()),
                    mean=float(scores.mean()),
                    untrained=float(np.mean(plain)) if plain else float("nan"),
                    core_seconds=cost,
                    figures=reliability(scores) if len(scores) > 1 else None,
                    without_labels=_agreement(scores, blind),
                )
            )
    return rankings


def summary_table(rankings: Sequence[Ranking], title: str) -> Table:
    """A row a step and read-out."""
    columns = ["steps", "read-out", "best", "mean", "untrained", "Spearman (95 %)"]
    columns += ["losses' spread", "seeds'", "ratio", "repeats"]
    columns += ["members (1, 2, 4 repeats)", "without labels", "core-s a member"]
    cells = [
        [
            str(row.step),
            row.readout,
            *(f"{value:.3f}" for value in (row.best, row.mean, row.untrained)),
            *_cells(row.figures),
            "-" if np.isnan(row.without_labels) else f"{row.without_labels:.2f}",
            number(row.core_seconds),
        ]
        for row in rankings
    ]
    return table(title, columns, cells)


def losses_table(trainings: Sequence[Training], plan: Plan, readout: str) -> Table:
    """Each loss's fitness by the recipe's read-out, mean over seeds, after each number of steps."""
    rows: dict[str, list[Training]] = {}
    for row in trainings:
        rows.setdefault(row.loss, []).append(row)
    cells = []
    for loss, each in rows.items():
        steps = (0,) if loss == UNTRAINED else plan.looks
        sound = [row for row in each if row.failed is None]
        values = [[_value(_at(row, step), readout) for row in sound] for step in steps]
        means = [f"{np.mean(v):.3f}" if v else "failed" for v in values]
        cells.append([loss, *(means * len(plan.looks) if loss == UNTRAINED else means)])
    return table("", ["loss", *(f"{step} steps" for step in plan.looks)], cells)


def _cells(figures: Reliability | None) -> list[str]:
    if figures is None:
        return ["-"] * 6
    rho = "-"
    if figures.spearman is not None and figures.interval is not None:
        low, high = figures.interval
        rho = f"{figures.spearman:.2f} ({low:.2f} to {high:.2f})"
    members = ", ".join(f"{figures.members(n):.0f}" for n in REPEATS)
    spreads = [f"{figures.loss_spread:.3f}", f"{figures.seed_spread:.3f}", f"{figures.ratio:.2f}"]
    return [rho, *spreads, f"{figures.repeats:.0f}", members]


def _at(row: Training, step: int) -> Look:
    return next(look for look in row.looks if look.step == step)


def _value(look: Look, name: str, measure: str = "value") -> float:
    return getattr(look.scores[name], measure) if name in look.scores else float("nan")


def _agreement(labelled: NDArray[np.float64], blind: NDArray[np.float64]) -> float:
    """Spearman over losses of two tables (losses, seeds), by their means over seeds."""
    from scipy.stats import spearmanr  # type: ignore[import-untyped]  # only here: it takes a second

    one, other = labelled.mean(1), blind.mean(1)
    if len(one) < 3 or not np.isfinite(other).all() or np.ptp(one) == 0 or np.ptp(other) == 0:
        return float("nan")
    return float(spearmanr(one, other).statistic)
