"""Trains a table's networks: all losses of one seed and the same clips are a cohort, which shares every batch.

On a CPU cohorts that leave cores idle are trained side by side. A network depends on its loss, its share of the clips
and its seed alone.
"""

from __future__ import annotations

import shutil
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
from torch import Tensor

from engine.core.display import Display
from engine.core.presets import RecipeError, preset_names
from engine.core.provenance import provenance
from engine.core.recipe import Recipe, load_recipe, recipe_hash
from engine.core.runtime import Runtime, num_cores
from engine.data.shards.index import ClipIndex
from engine.data.views import Views
from engine.evaluate.paper.cells import Store, weights_of
from engine.evaluate.paper.rows import Network
from engine.evaluate.paper.scale import Scale, drawn
from engine.model.network_file import card_of
from engine.objective.lossfile import load_loss
from engine.train.checkpoint import load_last, save_last
from engine.train.member import Member
from engine.train.memory import CohortMemory
from engine.train.trainer import MemberFailed, Trainer

Seeded = tuple[Network, int]
"""A network and its seed."""


@dataclass
class Training:
    """What trainings of one run share."""

    scale: Scale
    index: ClipIndex
    """All unlabelled clips."""
    store: Store
    checkpoints: Path
    runtime: Runtime
    display: Display

    def train(self, networks: Sequence[Seeded]) -> None:
        """Train and keep each network, or keep why it could not be."""
        waiting = deque(self._cohorts(networks))
        total = sum(c.trained * c.trainer.recipe.optim.steps for c in waiting)
        self.display.start("training", total)
        at_once = num_cores() if self.runtime.device.type == "cpu" else 1
        at_work: list[_Cohort] = []
        done = 0
        while waiting or at_work:
            while waiting and sum(len(c.members) for c in at_work) < at_once:
                at_work.append(waiting.popleft())
                at_work[-1].begin(self)
            done += self._step(at_work)
            for cohort in [c for c in at_work if c.ended]:
                cohort.finish(self)
                at_work.remove(cohort)
            note = "  ".join(c.name for c in at_work)
            self.display.update("training", min(done, total), total, note=note)

    def _step(self, at_work: Sequence[_Cohort]) -> int:
        """Step every member of every cohort; returns how many there were."""
        began = time.perf_counter()
        going = [(c, *batch) for c in at_work if (batch := c.next_batch()) is not None]
        keys = [(c, key) for c, members, _ in going for key in members]
        outcomes: list[float | MemberFailed] = []
        if len(going) > 1 and all(c.trainer.mode == "off" for c, *_ in going):
            steps = [(c.trainer, m, views) for c, members, views in going for m in members.values()]
            outcomes = self.runtime.map(lambda step: step[0].attempt(*step[1:]), steps)
        else:
            for cohort, members, views in going:
                outcomes += cohort.trainer.step_all([*members.values()], views)
        for (cohort, key), outcome in zip(keys, outcomes, strict=True):
            if isinstance(outcome, MemberFailed):
                cohort.fail(self, key, str(outcome))
            else:
                cohort.keep(self, key)
        for cohort, *_ in going:
            cohort.seconds += (time.perf_counter() - began) / len(going)
        return len(keys)

    def _cohorts(self, networks: Sequence[Seeded]) -> Iterator[_Cohort]:
        """Networks of one seed, share and schedule together, as many as memory holds."""
        alike: dict[tuple[int, float, bool], list[Seeded]] = {}
        for network, seed in networks:
            alike.setdefault((seed, network.share, network.epochs), []).append((network, seed))
        for (seed, share, epochs), same in alike.items():
            trainer = self._trainer(seed, share, epochs)
            losses = [weights_of(*key) for key in same if key[0].loss is not None]
            fits = CohortMemory().members_that_fit(trainer, losses, seed=seed)
            for first in range(0, len(same), fits):
                name = f"seed{seed}" + (f"-{share:g}" if share < 1 else "") + "-epochs" * epochs
                yield _Cohort(
                    f"{name}-{first}" if first else name, trainer, same[first : first + fits]
                )

    def _trainer(self, seed: int, share: float, epochs: bool) -> Trainer:
        recipe, index = msgspec.structs.replace(self.scale.pretrain, seed=seed), self.index
        if share < 1.0:
            index = index.subset(drawn(len(index), share, seed=seed))
        if epochs:
            optim = recipe.optim
            steps = max(round(optim.steps * share), 1)
            warmup = min(round(optim.warmup_steps * share), steps - 1)
            optim = msgspec.structs.replace(optim, steps=steps, warmup_steps=warmup)
            recipe = msgspec.structs.replace(recipe, optim=optim)
        return Trainer(recipe, index, self.runtime, warn=self.display.say)


@dataclass
class _Cohort:
    """Networks that are trained on the same batches."""

    name: str
    trainer: Trainer
    networks: list[Seeded]
    members: dict[Seeded, Member] = field(default_factory=dict)
    ended: bool = False
    seconds: float = 0.0
    rounds: Iterator[tuple[int, Views]] = field(default_factory=lambda: iter(()))

    @property
    def trained(self) -> int:
        """Networks that are trained; others stay as they begin."""
        return sum(network.loss is not None for network, _ in self.networks)

    def begin(self, of: Training) -> None:
        """Make the members, from their last checkpoint if there is one; untrained networks are done with that."""
        seed = self.networks[0][1]
        for key in self.networks:
            if key[0].loss is None:
                self._save(of, key, self.trainer.initial_loss(seed).rgb.state_dict())
                continue
            try:
                self.members[key] = self.trainer.member(weights_of(*key), seed=seed)
            except ValueError as error:
                of.store.fail(*key, str(error))
        digest = recipe_hash(self.trainer.recipe)
        resumed = [
            load_last(self._folder(of, key), member, recipe_hash=digest, warn=of.display.say)
            for key, member in self.members.items()
        ]
        if any(resumed):
            step = min(member.step for member in self.members.values())
            of.display.say(f"{self.name}: going on from step {step}")
        if self.members:
            self.rounds = self.trainer.rounds(list(self.members.values()), seed=seed)

    def next_batch(self) -> tuple[dict[Seeded, Member], Views] | None:
        """The members that stand at the next step, and its views; None at the end of training."""
        batch = next(self.rounds, None) if self.members else None
        self.ended = batch is None
        if batch is None:
            return None
        step, views = batch
        return {key: member for key, member in self.members.items() if member.step == step}, views

    def fail(self, of: Training, key: Seeded, reason: str) -> None:
        """Leave a member out from here on."""
        of.store.fail(*key, reason)
        of.display.say(f"{key[0].name}, seed {key[1]}: {reason}")
        del self.members[key]

    def keep(self, of: Training, key: Seeded) -> None:
        """Save a member's state after a step, where it is time for it."""
        every, recipe, member = of.scale.checkpoint_every, self.trainer.recipe, self.members[key]
        if every and member.step % every == 0 and member.step < recipe.optim.steps:
            facts = {"recipe_hash": recipe_hash(recipe), "seed": recipe.seed}
            save_last(self._folder(of, key), member, facts=facts)

    def _folder(self, of: Training, key: Seeded) -> Path:
        return of.checkpoints / self.name / key[0].name

    def finish(self, of: Training) -> None:
        """Keep the trained networks."""
        for key, member in self.members.items():
            self._save(of, key, member.loss.rgb.state_dict())
        shutil.rmtree(of.checkpoints / self.name, ignore_errors=True)

    def _save(self, of: Training, key: Seeded, state: dict[str, Tensor]) -> None:
        network, seed = key
        facts = provenance(of.runtime)
        card = card_of(
            self.trainer.recipe,
            loss=None if network.loss is None else weights_of(network, seed),
            labels_used=network.loss is not None and labels_chose(network.loss),
            recipe_hash=recipe_hash(self.trainer.recipe),
            seed=seed,
            num_clips=0 if network.loss is None else len(self.trainer.index),
            git_sha=facts["git_sha"],
            versions=facts["versions"],
        )
        seconds = 0.0 if network.loss is None else self.seconds / self.trained
        of.store.save(network, seed, state, card, seconds=seconds)


def labels_chose(loss: str) -> bool:
    """Whether labels had a part in choosing a loss: not in a preset or a random one, nor in a search by Zipf's law.

    For a file that no run's recipe lies beside, they are taken to have had.
    """
    if loss.startswith("random:") or loss in preset_names("losses"):
        return False
    try:
        recipe = load_recipe(Path(loss).parent / "recipe.toml")
    except RecipeError:
        return True
    return str(recipe.fitness.metric) != "zipf"


def check_loss(loss: str) -> None:
    """Raise RecipeError for a loss that can't be read."""
    load_loss(loss.format(seed=0))


def recipe_of(scale: Scale, seed: int) -> Recipe:
    """The recipe that fine-tuning follows, with a seed."""
    return msgspec.structs.replace(scale.finetune, seed=seed)
