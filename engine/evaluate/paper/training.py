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
from typing import Any

import msgspec
from torch import Tensor

from engine.core.display import Display
from engine.core.provenance import provenance
from engine.core.recipe import RecipeError, load_recipe, preset_names, recipe_hash
from engine.core.runtime import Runtime, num_cores
from engine.data.shards.index import ClipIndex
from engine.data.views import Views
from engine.evaluate.paper.cells import Store, weights_of
from engine.evaluate.paper.rows import Network
from engine.evaluate.paper.scale import Scale, drawn
from engine.model.network_file import card_of, save_network
from engine.train.checkpoint import load_last, save_last
from engine.train.member import Member
from engine.train.memory import CohortMemory
from engine.train.trainer import MemberFailed, Trainer

Seeded = tuple[Network, int]
"""A network and its seed."""


@dataclass
class Training:
    """Trains the networks of one run."""

    scale: Scale
    store: Store
    runtime: Runtime
    display: Display
    index: ClipIndex
    """All unlabelled clips."""
    checkpoints: Path

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
                at_work[-1].begin()
            done += self._step(at_work)
            for cohort in [c for c in at_work if c.ended]:
                cohort.finish()
                at_work.remove(cohort)
            note = "  ".join(c.name for c in at_work)
            self.display.update("training", min(done, total), total, note=note)

    def _step(self, at_work: Sequence[_Cohort]) -> int:
        """Step every member of every cohort; returns how many there were."""
        began = time.perf_counter()
        going = [(c, *batch) for c in at_work if (batch := c.next_batch()) is not None]
        keys = [(c, key) for c, members, _ in going for key in members]
        steps = [(c.trainer, m, views) for c, members, views in going for m in members.values()]
        apart = self.runtime.map if all(c.trainer.mode == "off" for c, *_ in going) else map
        outcomes = list(apart(lambda step: step[0].attempt(*step[1:]), steps))
        for (cohort, key), outcome in zip(keys, outcomes, strict=True):
            cohort.stepped(key, outcome)
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
                name = f"{name}-{first}" if first else name
                yield _Cohort(self, name, trainer, same[first : first + fits])

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

    work: Training
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

    def begin(self) -> None:
        """Make the members, from their last checkpoint if there is one; untrained networks are done with that."""
        seed = self.networks[0][1]
        for key in self.networks:
            if key[0].loss is None:
                self._save(key, self.trainer.initial_loss(seed).rgb.state_dict())
                continue
            try:
                self.members[key] = self.trainer.member(weights_of(*key), seed=seed)
            except ValueError as error:
                self.work.store.fail(*key, str(error))
        digest, say = recipe_hash(self.trainer.recipe), self.work.display.say
        resumed = [
            load_last(self._folder(key), member, recipe_hash=digest, warn=say)
            for key, member in self.members.items()
        ]
        if any(resumed):
            say(f"{self.name}: going on from step {min(m.step for m in self.members.values())}")
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

    def stepped(self, key: Seeded, outcome: float | MemberFailed) -> None:
        """Save a member's state after a step, where it is time for it; leave one out that failed."""
        work, recipe, member = self.work, self.trainer.recipe, self.members[key]
        if isinstance(outcome, MemberFailed):
            work.store.fail(*key, str(outcome))
            work.display.say(f"{key[0].name}, seed {key[1]}: {outcome}")
            del self.members[key]
            return
        every = work.scale.checkpoint_every
        if every and member.step % every == 0 and member.step < recipe.optim.steps:
            facts = {"recipe_hash": recipe_hash(recipe), "seed": recipe.seed}
            save_last(self._folder(key), member, facts=facts)

    def _folder(self, key: Seeded) -> Path:
        return self.work.checkpoints / self.name / key[0].name

    def finish(self) -> None:
        """Keep the trained networks."""
        for key, member in self.members.items():
            self._save(key, member.loss.rgb.state_dict())
        shutil.rmtree(self.work.checkpoints / self.name, ignore_errors=True)

    def _save(self, key: Seeded, state: dict[str, Tensor]) -> None:
        network, seed = key
        trained: dict[str, Any] = {"num_clips": 0}
        if network.loss is not None:
            trained = {
                "loss": weights_of(network, seed),
                "labels_used": labels_chose(network.loss),
                "num_clips": len(self.trainer.index),
            }
        facts = provenance(self.work.runtime)
        card = card_of(
            self.trainer.recipe,
            recipe_hash=recipe_hash(self.trainer.recipe),
            seed=seed,
            git_sha=facts["git_sha"],
            versions=facts["versions"],
            **trained,
        )
        seconds = 0.0 if network.loss is None else self.seconds / self.trained
        path = self.work.store.network_path(network, seed)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_network(path, state, card, seconds=seconds)


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
