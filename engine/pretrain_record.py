"""What a pretraining leaves behind and shows: progress, TensorBoard, checkpoints, the best network, the last one."""

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

from engine.checkpoint import CheckpointError, keep_member, load_tensors
from engine.data.library import Library
from engine.data.views import Views
from engine.display import Display, duration
from engine.features import LabelledClips
from engine.fitness import kmeans_fitness
from engine.lossfile import loss_used_labels
from engine.network_file import Card, card_of, save_network
from engine.objective.terms import LossWeights
from engine.presets import write_text_atomic
from engine.recipe import Recipe, recipe_hash
from engine.runfolder import RunFolder
from engine.runtime import Runtime
from engine.train import Trainer, learning_rate
from engine.train_average import RunningAverage
from engine.train_flops import peak_flops, step_flops
from engine.train_state import Member

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


SAVING = Saving()


class Judge:
    """K-means fitness of a network's features of labelled clips, as in a search."""

    def __init__(self, labelled: Library, recipe: Recipe, runtime: Runtime) -> None:
        self.recipe, self.runtime = recipe, runtime
        self.clips = LabelledClips(labelled.index, recipe, runtime=runtime)

    def __call__(self, trainer: Trainer, state: dict[str, Tensor]) -> float:
        """Fitness of the RGB network with weights ``state``."""
        network = trainer.initial_loss(self.recipe.seed).rgb
        network.load_state_dict(state)
        (features,) = self.clips.features([network])
        found = kmeans_fitness(
            features,
            self.clips.labels,
            settings=self.recipe.fitness,
            num_classes=self.clips.num_classes,
            seed=self.recipe.seed,
            device=self.runtime.device.type,
        )
        return found.value


class Speed:
    """Clips per second over all processes, and the share of the GPUs' peak that they use."""

    def __init__(self, trainer: Trainer) -> None:
        self.batch_size, self.world = trainer.recipe.optim.batch_size, trainer.ranks.world
        self._peak, self._flops = peak_flops(trainer.runtime), 0
        self._began, self._steps = time.perf_counter(), 0
        self._paused = 0.0

    def after(self, member: Member, views: Views) -> None:
        """Count a step; the first one, which compiles and chooses kernels, is left out once there are others."""
        self._steps += 1
        if self._steps == 1 and self._peak is not None:
            self._flops = step_flops(member, views)
        if self._steps == 1:
            self._first, self._began = time.perf_counter() - self._began, time.perf_counter()

    def leave_out(self, seconds: float) -> None:
        """Time in which no step was taken."""
        self._began += seconds

    @property
    def clips_per_second(self) -> float:
        """Since the second step; of the first where there is no other."""
        if self._steps == 0:
            return 0.0
        if self._steps == 1:
            return self.batch_size / self._first
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
        told = f"{rate:.0f} clips/s" if rate >= 10 else f"{rate:.2g} clips/s"
        share = self.mfu
        return told if share is None else f"{told}, MFU {100 * share:.0f} %"


class Record:
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
    ) -> None:
        self.trainer, self.member, self.average = trainer, member, average
        self.run, self.display, self.saving = run, display, saving
        self.recipe = trainer.recipe
        self.weights: LossWeights = {}
        self.facts: dict[str, Any] = {}
        """What provenance.json holds."""
        self.judge: Judge | None = None
        self._loss = math.nan
        self._best = -math.inf

    def start(self) -> None:
        """Begin where the member stands."""
        steps, done = self.recipe.optim.steps, self.member.step
        self._board = SummaryWriter(str(self.run.tensorboard), purge_step=done)
        self._best = self._best_so_far()
        self._speed, self._started = Speed(self.trainer), time.perf_counter()
        self._saved = done
        self.display.start("training", steps, done=done)

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
        if self.judge is not None and (done % (saving.judge_every or saving.every) == 0 or at_end):
            self._judged(self.judge)
        keep = saving.keep_every is not None and done % saving.keep_every == 0
        if done % saving.every == 0 or keep or at_end:
            facts = {"recipe_hash": recipe_hash(self.recipe), "seed": self.recipe.seed}
            extra = {} if self.average is None else self.average.tensors
            keep_member(self.run.checkpoints, member, facts=facts, extra=extra, keep=keep)
        self._speed.leave_out(time.perf_counter() - paused)

    def finish(self) -> Path:
        """Write the RGB network with its card, and how the run went; returns the network's file."""
        self._board.close()
        out = self.run.path / "rgb.safetensors"
        used = loss_used_labels(self.run.path / "loss.toml")
        card = self._card(labels_used=used)
        told = {"steps": self.member.step, "processes": self.trainer.ranks.world}
        save_network(out, self._network(), card, **told)
        self.run.write_json("terms.json", self.member.learnt())
        text = json.dumps({**msgspec.to_builtins(card), **told}, indent=1)
        write_text_atomic(out.with_suffix(".json"), text + "\n")
        if self.member.step > self._saved:
            self._tell_speed()
        return out

    def _network(self) -> dict[str, Tensor]:
        """The weights that are wanted: the running average, where there is one."""
        return self.member.loss.rgb.state_dict() if self.average is None else self.average.tensors

    def _card(self, *, labels_used: bool) -> Card:
        keys = ("recipe_hash", "seed", "num_clips", "git_sha", "versions")
        told = {key: self.facts[key] for key in keys}
        ema = self.recipe.optim.ema
        return card_of(self.recipe, loss=self.weights, labels_used=labels_used, ema=ema, **told)

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

    def _judged(self, judge: Judge) -> None:
        state = self._network()
        fitness = judge(self.trainer, state)
        self._board.add_scalar("judge/fitness", fitness, self.member.step - 1)
        told = "" if fitness <= self._best else ", the best so far"
        self.display.say(f"step {self.member.step}: k-means fitness {fitness:.3f}{told}")
        if told:
            self._best = fitness
            facts = {"step": self.member.step, "fitness": fitness}
            path = self.run.checkpoints / "best.safetensors"
            save_network(path, state, self._card(labels_used=True), **facts)

    def _tell_speed(self) -> None:
        steps, world = self.member.step - self._saved, self.trainer.ranks.world
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
