"""The training step, and the batches it is fed: the same for a search's members and for a long pretraining."""

from __future__ import annotations

import copy
import math
import threading
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import closing, nullcontext

import torch
from torch import Tensor, nn

from engine.core.prefetch import prefetch
from engine.core.ranks import ALONE, Ranks, sync_batch_norm, without_others
from engine.core.recipe import Recipe
from engine.core.runtime import (
    Clock,
    Runtime,
    format_note,
    is_device_error,
    is_out_of_memory,
    release_memory,
    set_seed,
)
from engine.core.streams import HostLead, SideStream, cross
from engine.data.clip_bank import ClipBank
from engine.data.pipeline import ClipBatch, InputPipeline
from engine.data.plan import ClipPlan, plan_batch
from engine.data.shards.index import ClipIndex
from engine.data.views import ViewMaker, Views
from engine.objective.loss import (
    EvolvedLoss,
    active_terms,
    branches,
    evaluation_order,
    weights_in_order,
)
from engine.objective.terms import MODALITIES, TERM_NAMES, LossWeights
from engine.train import units
from engine.train.compiled import GRAPHS, StepBuffers, compile_mode, compiling
from engine.train.member import FlatState, Member
from engine.train.microbatch import differentiate, split
from engine.train.optim import descend, make_optimizer
from engine.train.precision_check import CanNotCompile, check_step

CHECK_EVERY_ON_GPU = 10
"""Steps between checks that the loss is finite: each makes the host wait for the GPU."""


class MemberFailed(RuntimeError):
    """A member can't go on; the message says why. Others are not concerned."""


class NonFiniteLoss(MemberFailed):
    """A member's loss became NaN or infinite; the message names the step and the terms."""


class DeviceFailed(RuntimeError):
    """The GPU can't be used any more in this process; members that were not done have to be trained in another."""


def device_failed(error: BaseException) -> DeviceFailed:
    """The exception for an error of the GPU itself; its message says how to go on."""
    reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
    return DeviceFailed(f"the GPU is in an error state ({reason}); continue with --resume")


class Trainer:
    """Trains members of one run, which share recipe, data, device, initial networks and the compiled step."""

    def __init__(
        self,
        recipe: Recipe,
        index: ClipIndex,
        runtime: Runtime,
        *,
        clock: Clock | None = None,
        warn: Callable[[str], object] = warnings.warn,
        ranks: Ranks = ALONE,
    ) -> None:
        """``ranks``: the processes that train together, each on its share of every batch.

        ``warn`` gets a message, once, where the step is not the one that the recipe asks for, or differs from
        float32's. Raises ValueError where the ranks can't share a batch.
        """
        self.recipe, self.index, self.runtime = recipe, index, runtime
        self.clock, self.warn, self.ranks = clock or Clock(), warn, ranks
        optim = recipe.optim
        self.local_batch_size = ranks.share_of(optim.batch_size, pieces=optim.accumulate)
        whole = ranks.world * optim.accumulate == 1
        self.mode = compile_mode(optim, runtime.device, whole=whole)
        """Mode in which steps are compiled; "off": not at all."""
        if self.mode == GRAPHS and not whole:
            self.mode = "default"
            warn(
                "CUDA graphs are for one process and one microbatch a step: compiling without them"
            )
        if (note := format_note(optim.amp, runtime)) is not None:
            warn(note)
        self.sound = bool(index.has_audio.any())
        self.views = ViewMaker(recipe.clip, recipe.audio).to(runtime.device)
        self._side, self._said = SideStream(runtime.device), set[str]()
        self.buffers: StepBuffers | None = None
        """Networks of the compiled steps, from the first member on."""
        self._checked = self.mode == "off" and not runtime.amp
        self._checking = threading.Lock()
        self._initial: tuple[int, EvolvedLoss] | None = None
        self._sizes: Tensor | None = None

    def initial_loss(self, seed: int) -> EvolvedLoss:
        """Networks and heads with the initial weights of ``seed``: equal for every member of that seed."""
        return copy.deepcopy(self._initial_networks(seed))

    def _initial_networks(self, seed: int) -> EvolvedLoss:
        if self._initial is None or self._initial[0] != seed:
            set_seed(seed)
            self._initial = seed, self._build()
        return self._initial[1]

    def weight_bytes(self, seed: int) -> int:
        """Bytes of a member's networks and heads."""
        return sum(p.nbytes for p in self._initial_networks(seed).parameters())

    def open_bank(self, size: int | str) -> ClipBank:
        """Decode the clips that ``search.clip_bank`` asks for, drawn with the recipe's seed."""
        r = self.recipe
        with self.clock("input"):
            bank = ClipBank(
                self.index,
                r.clip,
                audio=r.audio,
                size=size,
                seed=r.seed,
                device=self.runtime.device,
                threads=self.runtime.threads,
                sound=self.sound,
            )
        if isinstance(size, str) and len(bank) < len(self.index):
            self.warn(
                f"search.clip_bank: members train on {len(bank)} of {len(self.index)} clips, as many as {size} of"
                " memory hold; a larger bank holds more, and --set search.clip_bank=0 trains on all"
            )
        if self.sound and not self.sounds(bank):
            self.warn(
                f"search.clip_bank: none of its {len(bank)} clips has sound, though the videos have: terms that need"
                " sound are left out; a larger bank holds some"
            )
        return bank

    def sounds(self, bank: ClipBank | None) -> bool:
        """Whether some clip of the bank, or of all the videos where there is none, has sound."""
        return self.sound if bank is None else bool(bank.has_audio.any())

    def _build(self) -> EvolvedLoss:
        r = self.recipe
        frames = r.clip.num_frames + r.clip.num_future_frames
        samples = round(frames * r.clip.frame_stride / self.index.fps * r.audio.sample_rate)
        heard, to_come = self.views.audio_frames(samples, r.audio.hop)
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

    def member(
        self,
        weights: LossWeights,
        *,
        seed: int,
        first: int = 0,
        alone: bool = False,
        bank: ClipBank | None = None,
    ) -> Member:
        """A new member, trained from step ``first`` on; raises ValueError where no term of its loss can be computed.

        ``bank``: the clips that it is trained on, all where it is None. ``alone``: no other member will be trained, so
        compiled steps can work on this one's own networks.
        """
        sound = self.sounds(bank)
        active = active_terms(weights, sound=sound)
        if not active:
            silent = " on a term that does without sound, and the videos have none"
            raise ValueError(f"the loss has no weight above 0{'' if sound else silent}")
        alive, computed, state = branches(active), evaluation_order(active), None
        loss, optimizer = self._networks(seed)
        if self.mode != "off":
            computed = evaluation_order(alive.terms(sound=sound))
            state = FlatState(loss, optimizer)
            if alone:
                self.buffers = StepBuffers(loss, optimizer, state, mode=self.mode)
            elif self.buffers is None:
                own = self._networks(seed)
                self.buffers = StepBuffers(*own, FlatState(*own), mode=self.mode)
        vector = torch.tensor([weights[name] for name in TERM_NAMES], device=self.runtime.device)
        ordered = weights_in_order(vector / self.gradient_sizes(), computed)
        return Member(
            loss, optimizer, vector, active, computed, ordered, alive, state, first, first
        )

    def gradient_sizes(self) -> Tensor:
        """float32 (39,): what weights are divided by, measured on the run's first clips; 1 but for gradient units."""
        if self._sizes is None:
            sizes = torch.ones(len(TERM_NAMES), device=self.runtime.device)
            if self.recipe.objective.units == "gradient":
                batches = list(self.first_views(units.BATCHES))
                loss = self._initial_networks(self.recipe.seed)
                # where one of several ranks fails, none of its threads may go on after the block
                apart = self.runtime.map if self.ranks.world == 1 else map
                with without_others():
                    sizes = units.gradient_sizes(loss, batches, sound=self.sound, apart=apart)
            self._sizes = sizes
        return self._sizes

    def first_views(self, count: int) -> Iterator[Views]:
        """Batches that depend on the recipe and the clips alone, not on processes, members or their seeds."""
        r, size = self.recipe, min(units.CLIPS, self.recipe.optim.batch_size)
        modalities = tuple(m for m in MODALITIES if m != "audio" or self.sound)
        pipeline = self.pipeline(modalities, batch_size=size)
        plans = (
            plan_batch(self.index, r.clip, r.audio, seed=r.seed, step=step, batch_size=size)
            for step in range(count)
        )
        for batch in pipeline.batches(plans):
            yield self.views(batch, modalities)

    def _networks(self, seed: int) -> tuple[EvolvedLoss, torch.optim.Optimizer]:
        loss = self.initial_loss(seed)
        return loss, make_optimizer([(loss, 1.0)], self.recipe.optim)

    def free_memory(self) -> None:
        """Release memory that no member needs: caches, and the gradients of a step that failed."""
        if self.buffers is not None:
            self.buffers.optimizer.zero_grad(set_to_none=True)
        release_memory(self.runtime.device)

    def batches(
        self, *, seed: int, first: int, modalities: Sequence[str], bank: ClipBank | None = None
    ) -> Iterator[ClipBatch]:
        """This rank's share of the run's batches from step ``first`` on, decoded in advance by another thread.

        With a ``bank`` they are drawn from its clips, which are decoded already.
        """
        plans = (
            self.plan(step, seed=seed, bank=bank) for step in range(first, self.recipe.optim.steps)
        )
        if bank is not None:
            return bank.batches(plans, flow="flow" in modalities, sound="audio" in modalities)
        return self.pipeline(modalities).batches(plans)

    def plan(self, step: int, *, seed: int, bank: ClipBank | None = None) -> ClipPlan:
        """The clips of this rank's share of a step's batch, and where they are cut."""
        return plan_batch(
            bank or self.index,
            self.recipe.clip,
            self.recipe.audio,
            seed=seed,
            step=step,
            batch_size=self.local_batch_size,
            rank=self.ranks.rank,
            world=self.ranks.world,
        )

    def pipeline(
        self, modalities: Collection[str], *, batch_size: int | None = None
    ) -> InputPipeline:
        """The pipeline that decodes this rank's batches."""
        r = self.recipe
        return InputPipeline(
            self.index,
            r.clip,
            audio=r.audio,
            device=self.runtime.device,
            batch_size=batch_size or self.local_batch_size,
            num_frames=r.clip.num_frames + r.clip.num_future_frames,
            threads=self.runtime.threads,
            flow="flow" in modalities,
            sound="audio" in modalities,
            warn=self._say_once,
        )

    def _say_once(self, message: str) -> None:
        """Warn of what each of a run's pipelines would say again."""
        if message not in self._said:
            self._said.add(message)
            self.warn(message)

    def rounds(
        self, members: Sequence[Member], *, seed: int, bank: ClipBank | None = None
    ) -> Iterator[tuple[int, Views]]:
        """Steps and their views, computed once for all ``members``, from where these stand to the end.

        On a CPU another thread makes them in advance: a core is idle as soon as members' steps differ.
        """
        modalities = tuple({m: None for member in members for m in member.alive.modalities})
        misaligned = any(member.alive.misaligned for member in members)
        first = min(member.step for member in members)
        batches = self.batches(seed=seed, first=first, modalities=modalities, bank=bank)
        steps = range(first, self.recipe.optim.steps)
        if self.runtime.device.type == "cpu":
            made = self._views_of(batches, modalities, misaligned=misaligned)
            made = prefetch(made, depth=1, name="views")
            with closing(made):
                for step in steps:
                    with self.clock("input"):
                        views = next(made)
                    yield step, views
            return
        lead = HostLead(self.runtime.device)
        self._side.follow()
        for step in steps:
            with self._side.work():
                with self.clock("input"):
                    batch = next(batches)
                with self.clock("views"):
                    views = self.views(batch, modalities, misaligned=misaligned)
                ready = self._side.mark()
            yield step, cross(views, ready)
            lead.after_step()

    def _views_of(
        self, batches: Iterator[ClipBatch], modalities: Collection[str], *, misaligned: bool
    ) -> Iterator[Views]:
        torch.set_num_threads(1)  # of the thread that asks; members have the other cores
        for batch in batches:
            yield self.views(batch, modalities, misaligned=misaligned)

    def step_all(self, members: Sequence[Member], views: Views) -> list[float | MemberFailed]:
        """Step members on one batch; returns the loss of each, or the failure that ended it. Raises as ``attempt``.

        On a CPU members run side by side, a core each, which also makes a member's numbers independent of
        its company; on a GPU, and compiled, they follow one another.
        """
        with self.clock("train"):
            if self.buffers is not None:
                return [self.attempt(member, views) for member in members]
            # the longest first: all wait for the last
            order = sorted(range(len(members)), key=lambda i: -members[i].alive.size)
            done = self.runtime.map(lambda i: self.attempt(members[i], views), order)
            outcomes = dict(zip(order, done, strict=True))
            return [outcomes[i] for i in range(len(members))]

    def attempt(self, member: Member, views: Views) -> float | MemberFailed:
        """Step a member; returns its loss, or the failure that ended it alone.

        Raises the error where memory runs out, and DeviceFailed for an error of the GPU itself, after which no member
        can go on.
        """
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

    def step(self, member: Member, views: Views) -> float:
        """Train a member on one batch: Eq. 1, backward, clipped gradient, optimizer; returns the loss.

        Raises NonFiniteLoss. On a GPU the loss is checked every CHECK_EVERY_ON_GPU steps, and is nan in between.
        """
        with self._checking:  # members may run side by side: one of them checks
            if not self._checked:
                self._check(member, views)
        loss, optimizer, optim = member.loss, member.optimizer, self.recipe.optim
        if self.buffers is not None and member.state is not None:
            self.buffers.state.copy_from(member.state)
            loss, optimizer = self.buffers.loss, self.buffers.optimizer

        def backward() -> tuple[float, Tensor]:
            total, values = differentiate(
                member,
                views,
                loss=loss,
                buffers=self.buffers,
                runtime=self.runtime,
                settings=optim,
                ranks=self.ranks,
            )
            return self._checked_loss(member, total, values), values

        value, values = descend(
            optimizer, optim, step=member.step, first=member.first, backward=backward
        )
        if self.buffers is not None and member.state is not None:
            member.state.copy_from(self.buffers.state)
        member.note(values)
        return value

    def _check(self, member: Member, views: Views) -> None:
        """Compile the step, or go on with less where the recipe allows it, and compare it with float32's."""
        count = self.recipe.optim.accumulate
        (first, *_), *_ = split(views, member.computed, count=count, ranks=self.ranks)
        while not self._checked:
            try:
                with without_others(), compiling() if self.buffers else nullcontext():
                    check_step(
                        member, first, buffers=self.buffers, runtime=self.runtime, warn=self.warn
                    )
                # not before: where memory runs out here, it is done again with fewer members
                self._checked = True
            except CanNotCompile as error:
                if self.recipe.optim.compile != "auto":
                    advice = "go on without by --set optim.compile=off"
                    raise RuntimeError(f"{error}; {advice}") from error
                self._compile_less(error)

    def _compile_less(self, error: CanNotCompile) -> None:
        """Go on without CUDA graphs, or, where it did already, uncompiled."""
        if self.mode == GRAPHS and self.buffers is not None:
            self.warn(
                f"{error} with CUDA graphs: it is compiled without them, and launches cost more"
            )
            self.mode = "default"
            self.buffers.without_graphs()
        else:
            self.warn(f"{error}: it runs uncompiled, slower")
            self.buffers, self.mode = None, "off"

    def _checked_loss(self, member: Member, total: Tensor, values: Tensor) -> float:
        """The loss at steps where it is checked, else nan; raises NonFiniteLoss."""
        on_gpu, last = self.runtime.device.type != "cpu", self.recipe.optim.steps - 1
        if on_gpu and member.step % CHECK_EVERY_ON_GPU and member.step != last:
            return float("nan")
        value = total.item()
        if math.isfinite(value):
            return value
        pairs = zip(member.computed, values.tolist(), strict=False)
        bad = [name for name, term in pairs if not math.isfinite(term)]
        raise NonFiniteLoss(
            f"loss is {value} at step {member.step}; terms: {', '.join(bad) or 'their weighted sum'}"
        )
