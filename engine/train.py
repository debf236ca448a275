"""One training step and one loop, whatever is trained: a search's members or a long pretraining."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from engine.data.pipeline import ClipBatch, InputPipeline
from engine.data.plan import plan_batch
from engine.data.shards import ClipIndex
from engine.data.views import ViewMaker, Views
from engine.objective.loss import EvolvedLoss, active_terms, needed_modalities
from engine.objective.terms import TERM_NAMES, LossWeights
from engine.recipe import Optim, Recipe
from engine.runtime import Clock, Runtime, set_seed

CHECK_EVERY_ON_GPU = 10
"""Steps between looks at whether the loss is finite: each look makes the host wait for the GPU."""


class MemberFailed(RuntimeError):
    """A member can't go on; the message says why. Others are not concerned."""


class NonFiniteLoss(MemberFailed):
    """A member's loss became NaN or infinite; the message names the step and the terms."""


@dataclass
class Member:
    """One loss being trained: its networks, optimizer, weights and place in the schedule."""

    loss: EvolvedLoss
    optimizer: torch.optim.Optimizer
    weights: Tensor
    """float32 (39,) in TERM_NAMES' order."""
    active: tuple[str, ...]
    step: int = 0
    values: Tensor | None = None
    """Running mean of the active terms' values, float32 (terms,)."""
    names: tuple[str, ...] = ()

    def term_values(self) -> dict[str, float]:
        """Each computed term's running mean, unweighted."""
        return (
            {} if self.values is None else dict(zip(self.names, self.values.tolist(), strict=True))
        )


@dataclass
class Trainer:
    """What members of one run share: recipe, data, device, and the networks' initial weights."""

    recipe: Recipe
    index: ClipIndex
    runtime: Runtime
    clock: Clock = field(default_factory=Clock)

    def __post_init__(self) -> None:
        self.sound = bool(self.index.has_audio.any())
        self.views = ViewMaker(self.recipe.clip, self.recipe.audio).to(self.runtime.device)
        self._initial: tuple[int, EvolvedLoss] | None = None

    def initial_loss(self, seed: int) -> EvolvedLoss:
        """Networks and heads with the initial weights of ``seed``: equal for every member of that seed."""
        if self._initial is None or self._initial[0] != seed:
            set_seed(seed)
            self._initial = seed, self._build()
        return copy.deepcopy(self._initial[1])

    def _build(self) -> EvolvedLoss:
        r = self.recipe
        heard, to_come = self.views.audio_frames(self._samples(), r.audio.hop)
        loss = EvolvedLoss(
            r.model, r.clip, objective=r.objective, audio_size=(heard, to_come, r.audio.num_mels)
        )
        for m, network in loss.networks.items():
            channels_last = torch.channels_last if m == "audio" else torch.channels_last_3d
            network.to(memory_format=channels_last)  # type: ignore[call-overload]
        return loss.to(self.runtime.device)

    def _samples(self) -> int:
        clip = self.recipe.clip
        frames = clip.num_frames + clip.num_future_frames
        return round(frames * clip.frame_stride / self.index.fps * self.recipe.audio.sample_rate)

    def member(self, weights: LossWeights, *, seed: int) -> Member:
        """A new member; raises ValueError where no term of its loss can be computed."""
        active = active_terms(weights, sound=self.sound)
        if not active:
            raise ValueError(
                "the loss has no weight above 0"
                + (
                    ""
                    if self.sound
                    else " on a term that does without sound, and the videos have none"
                )
            )
        loss = self.initial_loss(seed)
        vector = torch.tensor([weights[name] for name in TERM_NAMES], device=self.runtime.device)
        return Member(loss, make_optimizer(loss, self.recipe.optim), vector, active)

    def batches(
        self, *, seed: int, first: int, modalities: Sequence[str], rank: int = 0, world: int = 1
    ) -> Iterator[ClipBatch]:
        """The run's batches from step ``first`` on, decoded ahead in a thread of their own."""
        r = self.recipe
        pipeline = InputPipeline(
            self.index,
            r.clip,
            audio=r.audio,
            device=self.runtime.device,
            batch_size=r.optim.batch_size,
            num_frames=r.clip.num_frames + r.clip.num_future_frames,
            threads=self.runtime.threads,
            flow="flow" in modalities,
            sound="audio" in modalities,
        )
        plans = (
            plan_batch(
                self.index,
                r.clip,
                r.audio,
                seed=seed,
                step=step,
                batch_size=r.optim.batch_size,
                rank=rank,
                world=world,
            )
            for step in range(first, r.optim.steps)
        )
        return pipeline.batches(plans)

    def rounds(self, members: Sequence[Member], *, seed: int) -> Iterator[tuple[int, Views]]:
        """Steps and their views, made once for all ``members``, from where they stand to the end."""
        modalities = tuple(
            {m: None for member in members for m in needed_modalities(member.active)}
        )
        batches = self.batches(seed=seed, first=members[0].step, modalities=modalities)
        for step in range(members[0].step, self.recipe.optim.steps):
            with self.clock("input"):
                batch = next(batches)
            with self.clock("views"):
                views = self.views(batch, modalities)
            yield step, views

    def step_all(self, members: Sequence[Member], views: Views) -> list[float | MemberFailed]:
        """Step members on one batch; each gets its loss, or what ended it.

        On a CPU members run side by side, a core each, which also makes a member's numbers independent of
        its company; on a GPU they follow one another.
        """

        def attempt(member: Member) -> float | MemberFailed:
            try:
                return self.step(member, views)
            except MemberFailed as error:
                return error
            except RuntimeError as error:  # such as out of memory
                return MemberFailed(f"step {member.step}: {str(error).splitlines()[0]}")

        with self.clock("train"):
            return list(self.runtime.map(attempt, members))

    def step(self, member: Member, views: Views) -> float:
        """Train a member on one batch: Eq. 1, backward, clipped gradient, optimizer; returns the loss.

        Raises NonFiniteLoss; on a GPU that is looked at every CHECK_EVERY_ON_GPU steps, and nan is returned
        for the loss in between.
        """
        optim = self.recipe.optim
        for group in member.optimizer.param_groups:
            group["lr"] = learning_rate(optim, member.step)
        device = self.runtime.device.type
        with torch.autocast(device, dtype=torch.bfloat16, enabled=self.runtime.amp):
            output = member.loss(views, member.weights, member.active)
        member.optimizer.zero_grad(set_to_none=True)
        output.total.backward()
        nn.utils.clip_grad_norm_(member.loss.parameters(), optim.grad_clip)
        total = float("nan")
        if (
            device == "cpu"
            or member.step % CHECK_EVERY_ON_GPU == 0
            or member.step == optim.steps - 1
        ):
            total = output.total.item()
            if not math.isfinite(total):
                bad = [
                    n
                    for n, v in zip(output.names, output.values.tolist(), strict=True)
                    if not math.isfinite(v)
                ]
                raise NonFiniteLoss(
                    f"loss is {total} at step {member.step}; terms: {', '.join(bad) or 'their weighted sum'}"
                )
        member.optimizer.step()
        keep = 0.0 if member.values is None else 0.9
        member.values = (
            output.values
            if member.values is None
            else keep * member.values + (1 - keep) * output.values
        )
        member.names = output.names
        member.step += 1
        return total


def make_optimizer(loss: nn.Module, settings: Optim) -> torch.optim.Optimizer:
    """AdamW or SGD; norms and biases are not decayed."""
    decayed = [p for p in loss.parameters() if p.dim() > 1]
    others = [p for p in loss.parameters() if p.dim() <= 1]
    groups = [
        {"params": decayed, "weight_decay": settings.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    if settings.name == "adamw":
        return torch.optim.AdamW(groups, lr=settings.lr, fused=True)
    return torch.optim.SGD(groups, lr=settings.lr, momentum=settings.momentum, fused=True)


def learning_rate(settings: Optim, step: int) -> float:
    """Linear warm-up over ``warmup_steps``, then a cosine to zero at ``steps``."""
    if step < settings.warmup_steps:
        return settings.lr * (step + 1) / settings.warmup_steps
    done = (step - settings.warmup_steps) / (settings.steps - settings.warmup_steps)
    return settings.lr * 0.5 * (1.0 + math.cos(math.pi * done))
