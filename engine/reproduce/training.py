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

from engine.checkpoint import load_member, save_member
from engine.data.shards import ClipIndex
from engine.data.views import Views
from engine.display import Display
from engine.lossfile import load_loss
from engine.network_file import card_of
from engine.presets import RecipeError, preset_names
from engine.provenance import provenance
from engine.recipe import Recipe, load_recipe, recipe_hash
from engine.reproduce.cells import Store, weights_of
from engine.reproduce.rows import Network
from engine.reproduce.scale import Scale, drawn
from engine.runtime import Runtime, num_cores
from engine.train import MemberFailed, Trainer
from engine.train_memory import members_that_fit
from engine.train_state import Member

Job = tuple[Network, int]
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

    def train(self, jobs: Sequence[Job]) -> None:
        """Train and keep each network, or keep why it could not be."""
        waiting = deque(self._cohorts(jobs))
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
        """A step of every member of every cohort; gives how many there were."""
        began = time.perf_counter()
        pairs = [(c, c.next_views()) for c in at_work]
        going = [(c, views) for c, views in pairs if views is not None]
        jobs = [(c, job, views) for c, views in going for job in list(c.members)]
        if len(going) == 1:
            ((cohort, views),) = going
            outcomes = cohort.trainer.step_all(list(cohort.members.values()), views)
        else:
            outcomes = self.runtime.map(_attempt, jobs)
        for (cohort, job, _), outcome in zip(jobs, outcomes, strict=True):
            if isinstance(outcome, MemberFailed):
                cohort.fail(self, job, str(outcome))
        for cohort, _ in going:
            cohort.keep(self)
            cohort.seconds += (time.perf_counter() - began) / len(going)
        return len(jobs)

    def _cohorts(self, jobs: Sequence[Job]) -> Iterator[_Cohort]:
        """Jobs of one seed, share and schedule together, as many as memory holds."""
        alike: dict[tuple[int, float, bool], list[Job]] = {}
        for network, seed in jobs:
            alike.setdefault((seed, network.share, network.epochs), []).append((network, seed))
        for (seed, share, epochs), same in alike.items():
            trainer = self._trainer(seed, share, epochs)
            losses = [weights_of(*job) for job in same if job[0].loss is not None]
            fits = members_that_fit(trainer, losses, seed=seed) if losses else 1
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
    jobs: list[Job]
    members: dict[Job, Member] = field(default_factory=dict)
    ended: bool = False
    seconds: float = 0.0
    rounds: Iterator[tuple[int, Views]] = field(default_factory=lambda: iter(()))

    @property
    def trained(self) -> int:
        """Networks that are trained; others stay as they begin."""
        return sum(network.loss is not None for network, _ in self.jobs)

    def begin(self, of: Training) -> None:
        """Make the members, from their last checkpoint if there is one; untrained networks are done with that."""
        seed = self.jobs[0][1]
        for job in self.jobs:
            if job[0].loss is None:
                self._save(of, job, self.trainer.initial_loss(seed).rgb.state_dict())
                continue
            try:
                self.members[job] = self.trainer.member(weights_of(*job), seed=seed)
            except ValueError as error:
                of.store.fail(*job, str(error))
        last = self._last(of)
        if last is not None:
            for job, member in self.members.items():
                load_member(_file(last, job), member, recipe_hash=recipe_hash(self.trainer.recipe))
            of.display.say(f"{self.name}: going on from step {last.name}")
        if self.members:
            self.rounds = self.trainer.rounds(list(self.members.values()), seed=seed)

    def next_views(self) -> Views | None:
        """The next batch; None at the end of training."""
        found = next(self.rounds, None) if self.members else None
        self.ended = found is None
        return None if found is None else found[1]

    def fail(self, of: Training, job: Job, reason: str) -> None:
        """Leave a member out from here on."""
        of.store.fail(*job, reason)
        of.display.say(f"{job[0].name}, seed {job[1]}: {reason}")
        del self.members[job]

    def keep(self, of: Training) -> None:
        """After a step: a checkpoint where it is due."""
        every, recipe = of.scale.checkpoint_every, self.trainer.recipe
        step = next((m.step for m in self.members.values()), 0)
        if not every or not step or step % every or step == recipe.optim.steps:
            return
        folder = of.checkpoints / self.name
        part = folder / f"{step}.part"
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        facts = {"recipe_hash": recipe_hash(recipe), "seed": recipe.seed}
        for job, member in self.members.items():
            save_member(_file(part, job), member, facts=facts)
        part.rename(folder / str(step))
        for old in folder.iterdir():
            if old.name != str(step):
                shutil.rmtree(old)

    def _last(self, of: Training) -> Path | None:
        """The newest checkpoint that holds all members."""
        folder = of.checkpoints / self.name
        found = [p for p in folder.glob("*") if p.name.isdecimal()]
        whole = [p for p in found if all(_file(p, job).exists() for job in self.members)]
        return max(whole, key=lambda p: int(p.name), default=None)

    def finish(self, of: Training) -> None:
        """Keep the trained networks."""
        for job, member in self.members.items():
            self._save(of, job, member.loss.rgb.state_dict())
        shutil.rmtree(of.checkpoints / self.name, ignore_errors=True)

    def _save(self, of: Training, job: Job, state: dict[str, Tensor]) -> None:
        network, seed = job
        told = provenance(of.runtime)
        card = card_of(
            self.trainer.recipe,
            loss=None if network.loss is None else weights_of(network, seed),
            labels_used=network.loss is not None and labels_chose(network.loss),
            recipe_hash=recipe_hash(self.trainer.recipe),
            seed=seed,
            num_clips=0 if network.loss is None else len(self.trainer.index),
            git_sha=told["git_sha"],
            versions=told["versions"],
        )
        seconds = 0.0 if network.loss is None else self.seconds / self.trained
        of.store.save(network, seed, state, card, seconds=seconds)


def _attempt(job: tuple[_Cohort, Job, Views]) -> float | MemberFailed:
    cohort, key, views = job
    member = cohort.members[key]
    try:
        return cohort.trainer.step(member, views)
    except MemberFailed as error:
        return error


def _file(folder: Path, job: Job) -> Path:
    return folder / f"{job[0].name}.safetensors"


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
