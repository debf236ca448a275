"""The log of a pretraining: progress, TensorBoard, checkpoints, the best network, the last one."""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from engine.core.display import Display, duration
from engine.core.files import write_text_atomic
from engine.core.recipe import recipe_hash
from engine.core.runfolder import RunFolder
from engine.core.tensors import CheckpointError, load_tensors
from engine.data.views import Views
from engine.features.extract import LabelledClips
from engine.features.fitness import kmeans_fitness
from engine.model.network_file import Card, card_of, save_network
from engine.objective.lossfile import loss_used_labels
from engine.objective.terms import LossWeights
from engine.train.checkpoint import save_last
from engine.train.ema import RunningAverage
from engine.train.flops import peak_flops, step_flops
from engine.train.member import Member
from engine.train.optim import learning_rate
from engine.train.trainer import Trainer

LOG_EVERY = 10
"""Steps between points in TensorBoard."""


@dataclass(frozen=True)
class Saving:
    """When a run is saved and judged, in steps."""

    every: int = 500
    keep_every: int | None = None
    """Between checkpoints that stay, beside the last one and the one before it."""
    judge_every: int | None = None
    """Between k-means fitnesses of the labelled clips; None: at every checkpoint."""


class Speed:
    """Clips per second over all processes, and the share of the GPUs' peak that they use."""

    def __init__(self, trainer: Trainer) -> None:
        self.batch_size = trainer.recipe.optim.batch_size
        self._peak, self._flops = peak_flops(trainer.runtime), 0
        self._began, self._steps, self._first_seconds = time.perf_counter(), 0, 0.0

    def after(self, member: Member, views: Views) -> None:
        """Count a step; the first one, which compiles and chooses kernels, is left out once there are others."""
        self._steps += 1
        if self._steps > 1:
            return
        if self._peak is not None:
            self._flops = step_flops(member, views)
        now = time.perf_counter()
        self._first_seconds, self._began = now - self._began, now

    def leave_out(self, seconds: float) -> None:
        """Time in which no step was taken."""
        self._began += seconds

    @property
    def clips_per_second(self) -> float:
        """Since the second step; of the first where there is no other."""
        if self._steps == 0:
            return 0.0
        if self._steps == 1:
            return self.batch_size / self._first_seconds
        passed = max(time.perf_counter() - self._began, 1e-9)
        return (self._steps - 1) * self.batch_size / passed

    @property
    def mfu(self) -> float | None:
        """Model FLOPs utilisation; None on a CPU, in float32, and on a GPU whose peak is not known."""
        if self._peak is None:
            return None
        steps_per_second = self.clips_per_second / self.batch_size
        return self._flops * steps_per_second / self._peak

    def __str__(self) -> str:
        rate = self.clips_per_second
        speed = f"{rate:.0f} clips/s" if rate >= 10 else f"{rate:.2g} clips/s"
        share = self.mfu
        return speed if share is None else f"{speed}, MFU {100 * share:.0f} %"


class PretrainLog:
    """A run's folder, display and TensorBoard as training goes on; one process has it."""

    def __init__(
        self,
        trainer: Trainer,
        member: Member,
        average: RunningAverage | None,
        *,
        run: RunFolder,
        display: Display,
        saving: Saving,
        weights: LossWeights,
        provenance: dict[str, Any],
        labelled: LabelledClips | None,
    ) -> None:
        """Begins where the member stands; ``labelled`` choose the best network."""
        self.trainer, self.member, self.average = trainer, member, average
        self.run, self.display, self.saving = run, display, saving
        self.recipe, self.weights, self.labelled = trainer.recipe, weights, labelled
        self.facts = {**provenance, "processes": trainer.ranks.world}
        self._first = member.step
        self._loss = math.nan
        self._board = SummaryWriter(str(run.tensorboard), purge_step=member.step)
        self._best = self._best_so_far()
        self._speed, self._started = Speed(trainer), time.perf_counter()
        display.start("training", self.recipe.optim.steps, done=member.step)

    def after(self, step: int, total: float, views: Views) -> None:
        """Show, log, judge and save after a step, where it is time for it."""
        member, steps = self.member, self.recipe.optim.steps
        done, at_end = member.step, member.step == steps
        self._speed.after(member, views)
        self._loss = self._loss if math.isnan(total) else total
        self.display.update("training", done, steps, note=f"loss {self._loss:.3f}  {self._speed}")
        if step % LOG_EVERY == 0 or at_end:
            self._log(step)
        paused = time.perf_counter()
        saving = self.saving
        if self.labelled is not None and (
            done % (saving.judge_every or saving.every) == 0 or at_end
        ):
            self._judge(self.labelled)
        keep = saving.keep_every is not None and done % saving.keep_every == 0
        if done % saving.every == 0 or keep or at_end:
            facts = {"recipe_hash": recipe_hash(self.recipe), "seed": self.recipe.seed}
            extra = {} if self.average is None else self.average.tensors
            save_last(self.run.checkpoints, member, facts=facts, extra=extra, keep=keep)
        self._speed.leave_out(time.perf_counter() - paused)

    def finish(self) -> Path:
        """Write the RGB network with its card, and how the run went; returns the network's file."""
        self._board.close()
        out = self.run.path / "rgb.safetensors"
        used = loss_used_labels(self.run.path / "loss.toml")
        card = self._card(labels_used=used)
        how = {"steps": self.member.step, "processes": self.trainer.ranks.world}
        save_network(out, self._network(), card, **how)
        self.run.write_json("terms.json", self.member.learnt())
        text = json.dumps({**msgspec.to_builtins(card), **how}, indent=1)
        write_text_atomic(out.with_suffix(".json"), text + "\n")
        if self.member.step > self._first:
            self._keep_speed()
        return out

    def _network(self) -> dict[str, Tensor]:
        """The weights that are wanted: the running average, where there is one."""
        return self.member.loss.rgb.state_dict() if self.average is None else self.average.tensors

    def _card(self, *, labels_used: bool) -> Card:
        keys = ("recipe_hash", "seed", "num_clips", "git_sha", "versions")
        facts = {key: self.facts[key] for key in keys}
        ema = self.recipe.optim.ema
        return card_of(self.recipe, loss=self.weights, labels_used=labels_used, ema=ema, **facts)

    def _log(self, step: int) -> None:
        speed = self._speed
        scalars = {
            "train/loss": self._loss,
            "train/lr": learning_rate(self.recipe.optim, step),
            "train/clips_per_second": speed.clips_per_second,
            **({} if speed.mfu is None else {"train/mfu": speed.mfu}),
            **{f"terms/{name}": value for name, value in self.member.term_values().items()},
            **{f"ranks/{name}": value for name, value in self.member.ranks().items()},
        }
        for name, value in scalars.items():
            self._board.add_scalar(name, value, step)

    def _best_so_far(self) -> float:
        path = self.run.checkpoints / "best.safetensors"
        try:
            return float(load_tensors(path)[1]["fitness"]) if path.exists() else -math.inf
        except CheckpointError as error:
            self.display.say(f"{error}: the next one that is judged takes its place")
            return -math.inf

    def _judge(self, labelled: LabelledClips) -> None:
        """Measure the k-means fitness, as a search does, and keep the network where it is the best so far."""
        state, recipe = self._network(), self.recipe
        network = self.trainer.initial_loss(recipe.seed).rgb
        network.load_state_dict(state)
        (features,) = labelled.features([network])
        fitness = kmeans_fitness(
            features,
            labelled.labels,
            settings=recipe.fitness,
            num_classes=labelled.num_classes,
            seed=recipe.seed,
            device=self.trainer.runtime.device.type,
        ).value
        best = fitness > self._best
        self._board.add_scalar("judge/fitness", fitness, self.member.step - 1)
        note = ", the best so far" if best else ""
        self.display.say(f"step {self.member.step}: k-means fitness {fitness:.3f}{note}")
        if best:
            self._best = fitness
            facts = {"step": self.member.step, "fitness": fitness}
            path = self.run.checkpoints / "best.safetensors"
            save_network(path, state, self._card(labels_used=True), **facts)

    def _keep_speed(self) -> None:
        steps, world = self.member.step - self._first, self.trainer.ranks.world
        seconds = time.perf_counter() - self._started
        self.facts["training"] = {
            "steps": steps,
            "seconds": round(seconds, 2),
            "processes": world,
            "clips_per_second": round(self._speed.clips_per_second, 2),
            "mfu": None if self._speed.mfu is None else round(self._speed.mfu, 4),
        }
        self.run.write_json("provenance.json", self.facts)
        how = "1 process" if world == 1 else f"{world} processes"
        self.display.say(f"{steps} steps in {duration(seconds)}: {self._speed}, {how}")
