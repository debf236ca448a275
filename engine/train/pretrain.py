"""Pretraining: one member trained with a given loss, in one process or many, that resumes exactly.

Its folder holds checkpoints, TensorBoard's curves, the best network and, at the end, the RGB network.
"""

from __future__ import annotations

import math
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from engine.core.display import Display, duration
from engine.core.files import write_text_atomic
from engine.core.provenance import provenance, write_provenance
from engine.core.ranks import ALONE, Ranks
from engine.core.recipe import Recipe, recipe_hash
from engine.core.run import RunError, RunFolder
from engine.core.runtime import Runtime, choose_runtime, make_deterministic
from engine.core.tensors import CheckpointError, load_tensors
from engine.data.library import Library, default_shard_cache, open_library
from engine.data.shards.index import data_digest
from engine.data.views import Views
from engine.features.extract import LabelledClips, with_statistics
from engine.model.network_file import Card, card_of, card_text, save_network
from engine.objective.loss import active_terms
from engine.objective.lossfile import (
    found_otherwise,
    load_loss,
    loss_used_labels,
    save_loss,
)
from engine.objective.terms import LossWeights, reaching
from engine.train.checkpoint import load_last, save_last
from engine.train.flops import peak_flops, step_flops
from engine.train.member import Member, tensors_of
from engine.train.optim import RunningAverage, learning_rate, start_moments
from engine.train.trainer import Trainer

LOG_EVERY = 10
"""Steps between points in TensorBoard."""


@dataclass(frozen=True)
class PretrainOptions:
    """Options of a pretraining, the same for all of its processes."""

    recipe: Recipe
    run: Path
    videos: tuple[Path, ...]
    labelled: tuple[Path, ...] = ()
    """Clips whose k-means fitness chooses ``best.safetensors``, and nothing else."""
    noted: dict[str, list[str]] = field(default_factory=dict)
    """``videos`` and ``labelled`` as the user named them, for provenance: those here may be shards made of them."""
    weights: LossWeights | None = None
    """None: those that the run began with."""
    labels_used: bool = False
    """Whether labels had a part in choosing the loss."""
    objective: dict[str, str] = field(default_factory=dict)
    """The settings under which the loss was found, as its file says."""
    device: str = "auto"
    resume: bool = False
    save_every: int = 500
    """Steps between checkpoints."""
    keep_every: int | None = None
    """Steps between checkpoints that stay, beside the last one and the one before it."""
    judge_every: int | None = None
    """Steps between k-means fitnesses of the labelled clips; None: at every checkpoint."""


def pretrain(
    options: PretrainOptions,
    display: Display,
    *,
    run: RunFolder | None,
    device: str,
    ranks: Ranks = ALONE,
    opened: Callable[[Library], object] = lambda library: None,
) -> tuple[Path | None, Library]:
    """Train in this process, which is one of ``ranks``; returns the RGB network's file, and the videos.

    A run that is continued equals one that was never interrupted, bit for bit on a CPU with as many processes.
    ``run`` is rank 0's, which alone writes; others have None, and get None. ``opened`` is called with the videos, and
    with the labelled clips. Raises CheckpointError where no checkpoint is whole, or one does not fit, RunError where
    the run has another loss, RanksDiffer where processes are not at one, and NonFiniteLoss where training diverges.
    """
    recipe, labelled = options.recipe, None
    runtime = choose_runtime(device, amp=recipe.optim.amp)
    make_deterministic(runtime)
    library = _open(options.videos, display, opened)
    if options.labelled and ranks.leads:
        judging = _open(options.labelled, display, opened).index
        labelled = LabelledClips(judging, recipe, runtime=runtime)
    trainer = Trainer(recipe, library.index, runtime, warn=display.say, ranks=ranks)
    weights = ranks.shared(lambda: _begin(run, options, library, runtime))
    member = trainer.member(weights, seed=recipe.seed, alone=True)
    if not reaching(active_terms(weights, sound=trainer.sound)):
        silent = "" if trainer.sound else " on these videos, which are silent"
        display.say(
            f"no term of this loss can change the RGB network{silent}: it stays as it is initialised"
        )
    if unlike := found_otherwise(options.objective, recipe.objective):
        display.say(unlike)
    average = RunningAverage(member.loss.rgb, recipe.optim.ema) if recipe.optim.ema else None
    ranks.agree(_identity(recipe, library, member))
    _resume(run, member, average, digest=recipe_hash(recipe), ranks=ranks, display=display)
    log = None
    if run is not None:
        log = _Log(trainer, member, average, run, display, options, weights, labelled)
    for step, views in trainer.rounds([member], seed=recipe.seed):
        loss = trainer.step(member, views)
        if average is not None:
            average.update(member.loss.rgb, step=step)
        if log is not None:
            log.after(step, loss, views)
    return None if log is None else log.finish(), library


def _open(
    videos: tuple[Path, ...], display: Display, opened: Callable[[Library], object]
) -> Library:
    library = open_library(videos, cache=default_shard_cache(), report=display.prepare)
    opened(library)
    return library


def _begin(
    run: RunFolder | None, options: PretrainOptions, library: Library, runtime: Runtime
) -> LossWeights:
    """The loss that a run trains with, written to loss.toml as it begins; it never changes after that.

    Writes provenance.json beside it. Raises RunError where a run is continued with another loss or on other videos.
    """
    assert run is not None
    path, weights = run.path / "loss.toml", options.weights
    begun_before = (run.path / "recipe.toml").exists()
    own = load_loss(path) if begun_before and path.exists() else None
    if own is not None and weights not in (None, own):
        raise RunError(
            f"{run.path}: this run trains with another loss (loss.toml); resume without --loss, or "
            "give another --run"
        )
    begun = own or weights
    if begun is None:
        raise RunError(f"{run.path}: ended before it wrote its loss (loss.toml): give --loss again")
    about = "the loss that this run trains with"

    def note() -> None:
        if own is None:
            save_loss(
                begun,
                path,
                name="loss",
                about=about,
                labels_used=options.labels_used,
                objective=options.objective,
            )
        facts = {
            **provenance(runtime),
            "seed": options.recipe.seed,
            "recipe_hash": recipe_hash(options.recipe),
            **options.noted,
            "labels_used": loss_used_labels(path),
            "num_clips": len(library.index),
            "data": data_digest(library.shards),
        }
        write_provenance(run, facts)

    run.begin(note)
    return begun


def _identity(recipe: Recipe, library: Library, member: Member) -> dict[str, Any]:
    """Facts that must be the same in all processes."""
    checksum = 0
    for parameter in member.loss.parameters():
        checksum = zlib.crc32(parameter.detach().cpu().numpy().tobytes(), checksum)
    return {
        "recipe": recipe_hash(recipe),
        "data set": data_digest(library.shards),
        "network at the start": f"{checksum:08x}",
    }


def _resume(
    run: RunFolder | None,
    member: Member,
    average: RunningAverage | None,
    *,
    digest: str,
    ranks: Ranks,
    display: Display,
) -> None:
    """Bring the member, on every rank, to the newest state in rank 0's folder."""
    extra = {} if average is None else average.tensors
    parameters = [p for group in member.optimizer.param_groups for p in group["params"]]

    def load() -> tuple[int, list[int]]:
        assert run is not None
        if load_last(run.checkpoints, member, recipe_hash=digest, extra=extra, warn=display.say):
            display.say(f"going on from step {member.step}")
        return member.step, [i for i, p in enumerate(parameters) if member.optimizer.state.get(p)]

    member.step, moved = ranks.shared(load)
    if ranks.world == 1 or member.step == 0:
        return
    start_moments(member.optimizer)
    for i in sorted(set(range(len(parameters))) - set(moved)):
        del member.optimizer.state[parameters[i]]
    empty = member.ordered.new_zeros(len(member.computed) + len(member.alive.networks))
    member.values = empty.clone() if member.values is None else member.values
    member.start = empty if member.start is None else member.start
    own = [*tensors_of(member.loss, member.optimizer), member.values, member.start]
    ranks.broadcast_([*own, *extra.values()])


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
        """Leave out time in which no step was taken."""
        self._began += seconds

    @property
    def clips_per_second(self) -> float:
        """Since the second step; of the first where there is no other."""
        if self._steps < 2:
            return self._steps * self.batch_size / (self._first_seconds or 1.0)
        passed = max(time.perf_counter() - self._began, 1e-9)
        return (self._steps - 1) * self.batch_size / passed

    @property
    def mfu(self) -> float | None:
        """Model FLOPs utilisation; None on a CPU, in float32, and on a GPU whose peak is not known."""
        if self._peak is None:
            return None
        return self._flops * self.clips_per_second / self.batch_size / self._peak

    def __str__(self) -> str:
        rate, share = self.clips_per_second, self.mfu
        speed = f"{rate:.0f} clips/s" if rate >= 10 else f"{rate:.2g} clips/s"
        return speed if share is None else f"{speed}, MFU {100 * share:.0f} %"


@dataclass
class _Log:
    """The run's folder, display and TensorBoard as training goes on, from where the member stands; rank 0's."""

    trainer: Trainer
    member: Member
    average: RunningAverage | None
    run: RunFolder
    display: Display
    options: PretrainOptions
    weights: LossWeights
    labelled: LabelledClips | None
    """Clips that choose the best network."""
    loss: float = field(default=math.nan, init=False)
    """The last one that was looked at."""

    def __post_init__(self) -> None:
        self.recipe, self._first = self.trainer.recipe, self.member.step
        begun = self.run.read_json("provenance.json") or {}
        self.facts = {**begun, "processes": self.trainer.ranks.world}
        self._board = SummaryWriter(str(self.run.tensorboard), purge_step=self._first)
        self._best = self._best_so_far()
        self._speed, self._started = Speed(self.trainer), time.perf_counter()
        self.display.start("training", self.recipe.optim.steps, done=self._first)

    def after(self, step: int, loss: float, views: Views) -> None:
        """Show, log, judge and save after a step, where it is time for it."""
        options, done, steps = self.options, self.member.step, self.recipe.optim.steps
        at_end = done == steps
        self._speed.after(self.member, views)
        self.loss = self.loss if math.isnan(loss) else loss
        self.display.update("training", done, steps, note=f"loss {self.loss:.3f}  {self._speed}")
        if step % LOG_EVERY == 0 or at_end:
            self._log(step)
        paused = time.perf_counter()
        judge_every = options.judge_every or options.save_every
        if self.labelled is not None and (done % judge_every == 0 or at_end):
            self._judge(self.labelled)
        keep = options.keep_every is not None and done % options.keep_every == 0
        if done % options.save_every == 0 or keep or at_end:
            facts = {"recipe_hash": recipe_hash(self.recipe), "seed": self.recipe.seed}
            extra = {} if self.average is None else self.average.tensors
            save_last(self.run.checkpoints, self.member, facts=facts, extra=extra, keep=keep)
        self._speed.leave_out(time.perf_counter() - paused)

    def finish(self) -> Path:
        """Write the RGB network with its card, and how the run went; returns the network's file."""
        self._board.close()
        out = self.run.path / "rgb.safetensors"
        card = self._described(labels_used=loss_used_labels(self.run.path / "loss.toml"))
        how = {"steps": self.member.step, "processes": self.trainer.ranks.world}
        save_network(out, self._network(), card, **how)
        self.run.write_json("terms.json", self.member.learnt())
        text = card_text({**msgspec.to_builtins(card), **how})
        write_text_atomic(out.with_suffix(".json"), text)
        if self.member.step > self._first:
            self._keep_speed()
        return out

    def _network(self) -> dict[str, Tensor]:
        """The RGB network's weights, or their running average, where there is one."""
        return self.member.loss.rgb.state_dict() if self.average is None else self.average.tensors

    def _described(self, *, labels_used: bool) -> Card:
        """The network's card, with the mean and scale of its features over training clips."""
        card, trainer = self._card(labels_used=labels_used), self.trainer
        return with_statistics(card, self._network(), trainer.index, runtime=trainer.runtime)

    def _card(self, *, labels_used: bool) -> Card:
        keys = ("recipe_hash", "seed", "num_clips", "git_sha", "versions")
        facts = {key: self.facts[key] for key in keys}
        ema = self.recipe.optim.ema
        return card_of(self.recipe, loss=self.weights, labels_used=labels_used, ema=ema, **facts)

    def _log(self, step: int) -> None:
        scalars = {
            "train/loss": self.loss,
            "train/lr": learning_rate(self.recipe.optim, step),
            "train/clips_per_second": self._speed.clips_per_second,
            **({} if self._speed.mfu is None else {"train/mfu": self._speed.mfu}),
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
        state, step = self._network(), self.member.step
        network = self.trainer.initial_loss(self.recipe.seed).rgb
        network.load_state_dict(state)
        (result,) = labelled.fitness([network], seed=self.recipe.seed)
        if isinstance(result, str):
            raise ValueError(result)
        best = result.value > self._best
        self._board.add_scalar("judge/fitness", result.value, step - 1)
        note = ", the best so far" if best else ""
        self.display.say(f"step {step}: k-means fitness {result.value:.3f}{note}")
        if best:
            self._best = result.value
            path = self.run.checkpoints / "best.safetensors"
            card = self._described(labels_used=True)
            save_network(path, state, card, step=step, fitness=result.value)

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
