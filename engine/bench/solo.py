"""Training as the cohort bench times it, and a process that does so for one member after another, alone."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch

from engine.bench.timing import timed
from engine.data.pipeline import InputPipeline
from engine.data.plan import plan_batch
from engine.data.shards import ClipIndex
from engine.lossfile import random_weights
from engine.objective.terms import LossWeights
from engine.recipe import Recipe, override
from engine.runtime import Runtime, make_deterministic
from engine.train import MemberFailed, Trainer

WARM_STEPS, SPARE_STEPS = 3, 3
"""Steps before the clock starts, and batches that are planned but not taken: at both ends of the time taken,
as many are decoded ahead."""


@dataclass(frozen=True)
class Job:
    """What a process works on."""

    recipe: Recipe
    index: ClipIndex
    runtime: Runtime
    core: int | None
    """The one core that it may use; None for all, beside a GPU."""


def trainer_for(recipe: Recipe, index: ClipIndex, runtime: Runtime, *, steps: int) -> Trainer:
    """A trainer whose rounds last ``steps`` and what is not timed."""
    total = WARM_STEPS + steps + SPARE_STEPS
    short = override(recipe, [f"optim.steps={total}", "optim.warmup_steps=0"])
    return Trainer(short, index, runtime)


def seconds_a_step(trainer: Trainer, losses: Sequence[LossWeights]) -> float:
    """Seconds of one step of all members, input included, once under way.

    Raises MemberFailed where a member can't go on.
    """
    seed = trainer.recipe.seed
    steps = trainer.recipe.optim.steps - WARM_STEPS - SPARE_STEPS
    members = [trainer.member(weights, seed=seed) for weights in losses]
    began = 0.0
    rounds = trainer.rounds(members, seed=seed)
    for done, (_, views) in enumerate(rounds, start=1):
        for outcome in trainer.step_all(members, views):
            if isinstance(outcome, MemberFailed):
                raise outcome
        if done in (WARM_STEPS, WARM_STEPS + steps):
            _wait(trainer.runtime)
            now = time.perf_counter()
            if done > WARM_STEPS:
                return (now - began) / steps
            began = now
    raise AssertionError("more steps than batches")


def costs(trainer: Trainer, weights: LossWeights, *, repeats: int) -> list[tuple[float, float]]:
    """Milliseconds (D, C) of input with views and of a member's step, one after the other, nothing ahead."""
    r = trainer.recipe
    member = trainer.member(weights, seed=r.seed)
    wanted = member.alive.modalities
    pipeline = InputPipeline(
        trainer.index,
        r.clip,
        audio=r.audio,
        device=trainer.runtime.device,
        batch_size=r.optim.batch_size,
        num_frames=r.clip.num_frames + r.clip.num_future_frames,
        threads=trainer.runtime.threads,
        flow="flow" in wanted,
        sound="audio" in wanted,
    )
    found = []
    for step in range(repeats + 2):
        plan = plan_batch(
            trainer.index, r.clip, r.audio, seed=r.seed, step=step, batch_size=r.optim.batch_size
        )
        kept: list[Any] = []

        def load(plan: Any = plan, kept: list[Any] = kept) -> None:
            kept.append(trainer.views(pipeline.load(plan), wanted))

        def train(kept: list[Any] = kept) -> None:
            (outcome,) = trainer.step_all([member], kept[0])
            if isinstance(outcome, MemberFailed):
                raise outcome

        found.append((timed(load, trainer.runtime.device), timed(train, trainer.runtime.device)))
    return found[2:]


def _wait(runtime: Runtime) -> None:
    if runtime.device.type == "cuda":
        torch.cuda.synchronize(runtime.device)


class Soloist:
    """A process of its own that trains one member at a time; a context, which ends it."""

    def __init__(self, job: Job, *, steps: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, job, steps), daemon=True)
        self._process.start()
        theirs.close()

    def __enter__(self) -> Soloist:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._pipe.send(None)
            self._process.join(timeout=10)
        except OSError:  # it is gone already
            pass
        if self._process.is_alive():
            self._process.terminate()
            self._process.join()

    def ask(self, what: str, number: int) -> None:
        """Have it begin: ``train`` member ``number``, or take ``costs`` as many times."""
        self._pipe.send((what, number))

    def answer(self) -> Any:
        """What it found; raises RuntimeError with its reason where it could not."""
        try:
            found = self._pipe.recv()
        except (EOFError, ConnectionError):
            raise RuntimeError("cohort: a member's process ended without a word") from None
        if isinstance(found, str):
            raise RuntimeError(f"cohort: a member's process failed: {found}")
        return found


def _serve(pipe: Connection, job: Job, steps: int) -> None:
    if job.core is not None and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {job.core})
    if job.runtime.device.type == "cpu":
        torch.set_num_threads(1)
    elif job.runtime.device.index is not None:
        torch.cuda.set_device(job.runtime.device)
    make_deterministic(job.runtime)
    trainer = trainer_for(job.recipe, job.index, job.runtime, steps=steps)
    while True:
        try:
            order = pipe.recv()
        except EOFError:  # whoever asked is gone
            return
        if order is None:
            return
        what, number = order
        try:
            if what == "train":
                pipe.send(seconds_a_step(trainer, [random_weights(number)]))
            else:
                pipe.send(costs(trainer, random_weights(0), repeats=number))
        except Exception as error:
            pipe.send((str(error).splitlines() or [type(error).__name__])[0])
