"""One training step and one loop, whatever is trained: a search's members or a long pretraining."""

from __future__ import annotations

import copy
import math
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from engine.data.clip_bank import ClipBank
from engine.data.pipeline import ClipBatch, InputPipeline
from engine.data.plan import plan_batch
from engine.data.shards import ClipIndex
from engine.data.views import ViewMaker, Views
from engine.distributed import ALONE, Ranks, sync_batch_norm, without_others
from engine.objective.loss import (
    EvolvedLoss,
    active_terms,
    branches,
    evaluation_order,
    weights_in_order,
)
from engine.objective.terms import TERM_NAMES, LossWeights
from engine.recipe import Optim, Recipe
from engine.runtime import (
    Clock,
    Runtime,
    is_device_error,
    is_out_of_memory,
    release_memory,
    set_seed,
)
from engine.train_check import CanNotCompile, check_step
from engine.train_compiled import Seat
from engine.train_shares import differentiate, split
from engine.train_state import FlatState, Member

CHECK_EVERY_ON_GPU = 10
"""Steps between looks at whether the loss is finite: each look makes the host wait for the GPU."""


class MemberFailed(RuntimeError):
    """A member can't go on; the message says why. Others are not concerned."""


class NonFiniteLoss(MemberFailed):
    """A member's loss became NaN or infinite; the message names the step and the terms."""


class DeviceFailed(RuntimeError):
    """The GPU can't be used any more in this process; members that were not done have to be trained in another."""


def device_failed(error: BaseException) -> DeviceFailed:
    """What to raise for an error of the GPU itself; the message says how to go on."""
    reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
    return DeviceFailed(f"the GPU is in an error state ({reason}); continue with --resume")


@dataclass
class Trainer:
    """What members of one run share: recipe, data, device, and the networks' initial weights."""

    recipe: Recipe
    index: ClipIndex
    runtime: Runtime
    clock: Clock = field(default_factory=Clock)
    members_at_once: int | None = None
    """Most members of a cohort; None: as many as memory is found to hold (see ``engine.cohort``)."""
    warn: Callable[[str], object] = warnings.warn
    """Told once, at the first step, where compiled code or bf16 does not compute what float32 does."""
    bank: ClipBank | None = None
    """Clips to train on that are decoded already; None: all, decoded for each batch."""
    ranks: Ranks = ALONE
    """The processes that train together; each takes its part of every batch."""

    def __post_init__(self) -> None:
        self.mode = self.recipe.optim.compile
        if self.mode == "auto":
            self.mode = "off" if self.runtime.device.type == "cpu" else "default"
        optim = self.recipe.optim
        self.part = self.ranks.share_of(optim.batch_size, pieces=optim.accumulate)
        if self.mode == "reduce-overhead" and self.ranks.world * optim.accumulate > 1:
            self.mode = "default"
            self.warn(
                "CUDA graphs are for one process and one piece a step: compiling without them"
            )
        self.seat: Seat | None = None
        self._checked = self.mode == "off" and not self.runtime.amp
        self._checking = threading.Lock()
        if self.recipe.optim.amp == "bf16" and not self.runtime.amp:
            self.warn(
                "float32 instead of bf16: this CPU has no AMX, and without it bf16 goes wrong"
            )
        self.sound = bool(self.index.has_audio.any())
        self.views = ViewMaker(self.recipe.clip, self.recipe.audio).to(self.runtime.device)
        self._initial: tuple[int, EvolvedLoss] | None = None

    def initial_loss(self, seed: int) -> EvolvedLoss:
        """Networks and heads with the initial weights of ``seed``: equal for every member of that seed."""
        if self._initial is None or self._initial[0] != seed:
            set_seed(seed)
            self._initial = seed, self._build()
        return copy.deepcopy(self._initial[1])

    def open_bank(self, size: int | str) -> ClipBank:
        """Decode the clips that ``search.clip_bank`` asks for, drawn with the recipe's seed; see ``ClipBank``."""
        r = self.recipe
        with self.clock("input"):
            return ClipBank(
                self.index,
                r.clip,
                audio=r.audio,
                size=size,
                seed=r.seed,
                device=self.runtime.device,
                threads=self.runtime.threads,
                sound=self.sound,
            )

    def _build(self) -> EvolvedLoss:
        r = self.recipe
        heard, to_come = self.views.audio_frames(self._samples(), r.audio.hop)
        loss = EvolvedLoss(
            r.model, r.clip, objective=r.objective, audio_size=(heard, to_come, r.audio.num_mels)
        )
        for m, network in loss.networks.items():
            channels_last = torch.channels_last if m == "audio" else torch.channels_last_3d
            network.to(memory_format=channels_last)  # type: ignore[call-overload]
        if r.optim.batch_norm == "sync" and self.ranks.world > 1:
            sync_batch_norm(loss, self.ranks)
        if r.optim.batch_norm == "frozen":
            for module in loss.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        return loss.to(self.runtime.device)

    def _samples(self) -> int:
        clip = self.recipe.clip
        frames = clip.num_frames + clip.num_future_frames
        return round(frames * clip.frame_stride / self.index.fps * self.recipe.audio.sample_rate)

    def member(self, weights: LossWeights, *, seed: int, alone: bool = False) -> Member:
        """A new member; raises ValueError where no term of its loss can be computed.

        ``alone``: no other member will be trained, so compiled steps can work on this one's own networks.
        """
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
        optimizer = make_optimizer(loss, self.recipe.optim)
        alive, state = branches(active), None
        computed = evaluation_order(active)
        if self.mode != "off":
            computed = evaluation_order(alive.terms(sound=self.sound))
            state = FlatState(loss, optimizer)
            if alone:
                self.seat = Seat(loss, optimizer, state, mode=self.mode)
            elif self.seat is None:
                self.seat = self._new_seat(seed)
        vector = torch.tensor([weights[name] for name in TERM_NAMES], device=self.runtime.device)
        ordered = weights_in_order(vector, computed)
        return Member(loss, optimizer, vector, active, computed, ordered, alive, state)

    def _new_seat(self, seed: int) -> Seat:
        loss = self.initial_loss(seed)
        optimizer = make_optimizer(loss, self.recipe.optim)
        return Seat(loss, optimizer, FlatState(loss, optimizer), mode=self.mode)

    def free_memory(self) -> None:
        """Give back what no member at work needs: caches, and gradients of a step that came to nothing."""
        if self.seat is not None:
            self.seat.optimizer.zero_grad(set_to_none=True)
        release_memory(self.runtime.device)

    def batches(self, *, seed: int, first: int, modalities: Sequence[str]) -> Iterator[ClipBatch]:
        """This rank's part of the run's batches from step ``first`` on, decoded ahead in a thread of their own."""
        r = self.recipe
        plans = (
            plan_batch(
                self.bank or self.index,
                r.clip,
                r.audio,
                seed=seed,
                step=step,
                batch_size=self.part,
                rank=self.ranks.rank,
                world=self.ranks.world,
            )
            for step in range(first, r.optim.steps)
        )
        flow, sound = "flow" in modalities, "audio" in modalities
        if self.bank is not None:
            return self.bank.batches(plans, flow=flow, sound=sound)
        pipeline = InputPipeline(
            self.index,
            r.clip,
            audio=r.audio,
            device=self.runtime.device,
            batch_size=self.part,
            num_frames=r.clip.num_frames + r.clip.num_future_frames,
            threads=self.runtime.threads,
            flow=flow,
            sound=sound,
        )
        return pipeline.batches(plans)

    def rounds(self, members: Sequence[Member], *, seed: int) -> Iterator[tuple[int, Views]]:
        """Steps and their views, made once for all ``members``, from where they stand to the end."""
        modalities = tuple({m: None for member in members for m in member.alive.modalities})
        first = min(member.step for member in members)
        batches = self.batches(seed=seed, first=first, modalities=modalities)
        for step in range(first, self.recipe.optim.steps):
            with self.clock("input"):
                batch = next(batches)
            with self.clock("views"):
                views = self.views(batch, modalities)
            yield step, views

    def step_all(self, members: Sequence[Member], views: Views) -> list[float | MemberFailed]:
        """Step members on one batch; each gets its loss, or what ended it.

        On a CPU members run side by side, a core each, which also makes a member's numbers independent of
        its company; on a GPU, and compiled, they follow one another. Running out of memory is raised, and so is
        DeviceFailed for an error of the GPU itself, after which no member could go on.
        """

        def attempt(member: Member) -> float | MemberFailed:
            try:
                return self.step(member, views)
            except MemberFailed as error:
                return error
            except RuntimeError as error:
                if is_out_of_memory(error):
                    raise
                if is_device_error(error):
                    raise device_failed(error) from error
                return MemberFailed(f"step {member.step}: {str(error).splitlines()[0]}")

        with self.clock("train"):
            if self.seat is not None:
                return [attempt(member) for member in members]
            return list(self.runtime.map(attempt, members))

    def step(self, member: Member, views: Views) -> float:
        """Train a member on one batch: Eq. 1, backward, clipped gradient, optimizer; returns the loss.

        Raises NonFiniteLoss; on a GPU that is looked at every CHECK_EVERY_ON_GPU steps, and nan is returned
        for the loss in between.
        """
        if not self._checked:
            with self._checking:  # members may run side by side: one of them checks
                if not self._checked:
                    self._check(member, views)
        loss, optimizer = member.loss, member.optimizer
        if self.seat is not None and member.state is not None:
            self.seat.take(member.state)
            loss, optimizer = self.seat.loss, self.seat.optimizer
        optim = self.recipe.optim
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(optim, member.step, first=member.first)
        optimizer.zero_grad(
            set_to_none=True
        )  # before, so that gradients and activations never add up
        total, values = differentiate(
            member,
            views,
            loss=loss,
            seat=self.seat,
            runtime=self.runtime,
            settings=optim,
            ranks=self.ranks,
        )
        nn.utils.clip_grad_norm_(loss.parameters(), optim.grad_clip)
        seen = self._looked_at(member, total, values)
        optimizer.step()
        if self.seat is not None and member.state is not None:
            self.seat.give_back(member.state)
        member.note(values)
        return seen

    def _check(self, member: Member, views: Views) -> None:
        """Before the first step: see ``check_step``. Compiles, or goes on without where the recipe lets it."""
        pieces = self.recipe.optim.accumulate
        (first, *_), *_ = split(views, member.computed, pieces=pieces, ranks=self.ranks)
        try:
            with without_others():
                check_step(member, first, seat=self.seat, runtime=self.runtime, warn=self.warn)
        except CanNotCompile as error:
            if self.recipe.optim.compile != "auto":
                raise RuntimeError(f"{error}; go on without by --set optim.compile=off") from error
            self.warn(f"{error}: it runs uncompiled, slower")
            self.seat, self.mode = None, "off"
        self._checked = (
            True  # not before: running out of memory here, it is done again with fewer members
        )

    def _looked_at(self, member: Member, total: Tensor, values: Tensor) -> float:
        """The loss, where it is time to wait for it, else nan; raises NonFiniteLoss."""
        on_gpu, last = self.runtime.device.type != "cpu", self.recipe.optim.steps - 1
        if on_gpu and member.step % CHECK_EVERY_ON_GPU and member.step != last:
            return float("nan")
        found = total.item()
        if math.isfinite(found):
            return found
        pairs = zip(member.computed, values.tolist(), strict=False)
        bad = [name for name, value in pairs if not math.isfinite(value)]
        raise NonFiniteLoss(
            f"loss is {found} at step {member.step}; terms: {', '.join(bad) or 'their weighted sum'}"
        )


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


def learning_rate(settings: Optim, step: int, *, first: int = 0) -> float:
    """Linear warm-up over ``warmup_steps``, then a cosine to zero at ``steps``; joined at ``first``, warmed up to."""
    if first and step - first < settings.warmup_steps:
        return learning_rate(settings, step) * (step - first + 1) / settings.warmup_steps
    if step < settings.warmup_steps:
        return settings.lr * (step + 1) / settings.warmup_steps
    done = (step - settings.warmup_steps) / (settings.steps - settings.warmup_steps)
    return settings.lr * 0.5 * (1.0 + math.cos(math.pi * done))
