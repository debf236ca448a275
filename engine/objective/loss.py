"""Eq. 1: the networks of all modalities, the tasks that train them, and their weighted sum."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

import kernels
from engine.core.recipe import Clip, Model, Objective
from engine.data.views import Views, backward, shuffled
from engine.model.decoder import Decoder, LinearDecoder
from engine.model.resnet3d import ResNet, ResNet3D, audio_network, video_network
from engine.objective.align import AlignAudioTask, EmbedTask
from engine.objective.distill import DistillTask
from engine.objective.order import OrderTask
from engine.objective.predict import DecodeTask
from engine.objective.task import Activations, Pair, Task, TermValue
from engine.objective.terms import MODALITIES, TERM_NAMES, TERMS, VISUAL, reaching

CHANNELS = {"rgb": 3, "grey": 1, "flow": 2}
LEAST_CHANCE = 1e-4
"""Least that a term is divided by, in its own unit: what needs no learning (a still clip's flow) has no scale."""


@dataclass(frozen=True)
class LossOutput:
    """One evaluation of Eq. 1."""

    total: Tensor
    """Scalar float32, to be differentiated."""
    names: tuple[str, ...]
    """The terms computed."""
    values: Tensor
    """float32 (terms,), unweighted, detached, in the recipe's ``objective.units``; in the order of ``names``."""
    ranks: Tensor
    """float32 (networks,): how many directions each network's features spread in, in MODALITIES' order."""


class EvolvedLoss(nn.Module):
    """All networks and heads of a member, and the loss L = sum of weight x term over them (Eq. 1).

    ``active`` are the terms of ``active_terms``: others are not computed, nor are the networks and copies
    that only they need. The weights themselves come as a tensor over TERM_NAMES, so that one graph serves
    every loss with the same active terms.
    """

    def __init__(
        self, model: Model, clip: Clip, *, objective: Objective, audio_size: tuple[int, int, int]
    ) -> None:
        """``audio_size``: log-mel frames of the clip, of its future, and mels."""
        super().__init__()
        self.order_share, self.teacher_grad = objective.order_share, not objective.stop_gradient
        self.units = objective.units
        self.networks = nn.ModuleDict(
            {m: video_network(model, CHANNELS[m], pictures=m != "flow") for m in VISUAL}
        )
        self.networks["audio"] = audio_network(model)
        feature_dim = self.rgb.channels[4]
        embed = {"embed_dim": objective.embed_dim, "margin": objective.margin}
        tasks: list[Task] = []
        for m in VISUAL:
            tasks.append(OrderTask(m, feature_dim))
            tasks.append(AlignAudioTask(m, feature_dim, **embed))  # type: ignore[arg-type]
        tasks += self._decode_tasks(feature_dim, clip, objective, audio_size)
        for m in ("grey", "flow", "audio"):
            tasks.append(EmbedTask(m, feature_dim, **embed))  # type: ignore[arg-type]
            tasks.append(
                DistillTask(
                    m,
                    self.rgb.channels,
                    stop_gradient=objective.stop_gradient,
                    way=objective.distill,
                )
            )
        self.tasks = nn.ModuleList(tasks)
        assert sorted(name for task in tasks for name in task.terms) == sorted(TERM_NAMES)

    def _network(self, modality: str) -> ResNet:
        network = self.networks[modality]
        assert isinstance(network, ResNet)
        return network

    @property
    def rgb(self) -> ResNet3D:
        """The network whose representation is wanted."""
        network = self.networks["rgb"]
        assert isinstance(network, ResNet3D)
        return network

    def _decode_tasks(
        self, feature_dim: int, clip: Clip, objective: Objective, audio_size: tuple[int, int, int]
    ) -> list[Task]:
        heard, to_come, mels = audio_size
        side = max(clip.size // objective.decoder_downscale, 4)
        frames = (clip.num_frames, clip.size, clip.size)
        grids = {m: self._network(m).last_grid((CHANNELS[m], *frames)) for m in VISUAL}
        grids["audio"] = self._network("audio").last_grid((1, heard, mels))
        tasks: list[Task] = []
        for term in TERMS:
            if term.target is None:
                continue
            m, target, future = term.modality, term.target, term.task == "predict"
            if target == "audio":
                size: tuple[int, ...] = (to_come if future else heard, max(mels // 2, 1))
                channels = 1
            else:
                maps = clip.num_future_frames - (target == "flow")
                size = (maps if future else clip.num_frames, side, side)
                channels = CHANNELS[target]
            decoder: Decoder | LinearDecoder
            if objective.decoder == "linear":
                decoder = LinearDecoder(feature_dim, channels, size, grid=grids[m], future=future)
            else:
                decoder = Decoder(feature_dim, channels, size, hidden=objective.decoder_width)
            tasks.append(DecodeTask(term.name, m, target=target, future=future, decoder=decoder))
        return tasks

    def forward(self, views: Views, weights: Tensor, active: Collection[str]) -> LossOutput:
        """Evaluate Eq. 1 on a batch; ``weights`` float32 (39,) in TERM_NAMES' order."""
        names = evaluation_order(active)
        total, values = self.evaluate(views, weights_in_order(weights, names), active)
        return LossOutput(total, names, values[: len(names)], values[len(names) :])

    def evaluate(
        self, views: Views, weights: Tensor, active: Collection[str]
    ) -> tuple[Tensor, Tensor]:
        """The total and, one behind the other, the values and ranks of ``LossOutput``: what is compiled.

        ``weights`` (terms,) are those of ``evaluation_order(active)``.
        """
        activations = self.activate(views, active)
        values: dict[str, TermValue] = {}
        for task in self.tasks:
            assert isinstance(task, Task)
            if any(name in active for name in task.terms):
                for value in task.forward(views, activations, active):
                    values[value.name] = value
        pairs, scalars = [], []
        for name in evaluation_order(active):
            value = values[name]
            if isinstance(value, Pair):
                pairs.append(value)
            else:
                scalars.append(value)
        total, of_terms = kernels.weighted_loss(
            [p.student for p in pairs],
            [p.teacher for p in pairs],
            _masks(pairs, views),
            weights,
            self._divisors([*pairs, *scalars], weights),
            torch.stack([s.value.float() for s in scalars]) if scalars else weights.new_zeros(0),
            teacher_grad=self.teacher_grad,
        )
        ranks = [spread(layers[-1]) for layers in activations.clip.values()]
        return total, torch.cat([of_terms, torch.stack(ranks)])

    def _divisors(self, terms: Sequence[TermValue], weights: Tensor) -> Tensor:
        """float32 (terms,): what each is at chance or, for raw units, 1."""
        if self.units == "raw":
            return torch.ones_like(weights)
        chances = [
            t.chance.float() if isinstance(t, Pair) else weights.new_full((), t.chance)
            for t in terms
        ]
        return torch.stack(chances).clamp(min=LEAST_CHANCE)

    def activate(self, views: Views, active: Collection[str]) -> Activations:
        """Run each network that is needed once, on its clips and their changed copies stacked."""
        result, alive = Activations(clip={}), branches(active)
        for m in alive.networks:
            clip, n = views.clip[m], len(views)
            if m == "audio":
                misaligned = alive.misaligned
                heard = with_sound(views.has_audio)
                stack = clip[heard]
                if misaligned:
                    assert views.shifted_audio is not None
                    stack = torch.cat([stack, views.shifted_audio[heard]])
                *layers, pooled = self._network(m).forward_features(stack)
                result.clip[m] = [*(layer[:n] for layer in layers), pooled[:n]]
                result.shifted_audio = pooled[n:] if misaligned else None
                continue
            copies = max(round(n * self.order_share), 1) if m in alive.ordered else 0
            parts = [clip]
            if copies:
                parts.append(shuffled(clip[:copies], views.order[:copies]))
                parts.append(backward(clip[-copies:], m))
            stack = torch.cat(parts).contiguous(memory_format=torch.channels_last_3d)
            *layers, pooled = self._network(m).forward_features(stack)
            result.clip[m] = [*(layer[:n] for layer in layers), pooled[:n]]
            if copies:
                result.shuffled[m], result.reversed[m] = torch.split(pooled[n:], copies)
        return result


@torch.no_grad()
def spread(features: Tensor) -> Tensor:
    """Participation ratio () of features (N, D): (sum of l)^2 / sum of l^2, l the eigenvalues of their covariance.

    Between 1, all clips along one line, and N - 1; 0 where all are the same. An estimate of the effective rank that
    needs no decomposition.
    """
    with torch.autocast(features.device.type, enabled=False):
        away = features.float() - features.float().mean(0)
        gram = away @ away.T
    return gram.trace().square() / gram.square().sum().clamp(min=1e-30)


def with_sound(has_audio: Tensor) -> Tensor:
    """int64 (N,): each clip's own index or, for one without sound, that of a clip with sound, in turn.

    Batch norm would otherwise take silence, where there is no sound, into every clip's features.
    """
    own = torch.arange(len(has_audio), device=has_audio.device)
    first = has_audio.to(torch.int8).argsort(descending=True, stable=True)
    return torch.where(has_audio, own, first[own % has_audio.sum().clamp(min=1)])


def active_terms(weights: Mapping[str, float], *, sound: bool) -> tuple[str, ...]:
    """Terms with a weight above 0 that can change the RGB network or, where none can, all of them.

    Without any sound in the data, those that need it are left out.
    """
    chosen = tuple(
        t.name for t in TERMS if weights[t.name] > 0.0 and (sound or "audio" not in t.networks)
    )
    return reaching(chosen) or chosen


def weights_in_order(weights: Tensor, names: Sequence[str]) -> Tensor:
    """Pick ``names`` out of weights (39,) in TERM_NAMES' order."""
    return weights[torch.tensor([TERM_NAMES.index(name) for name in names], device=weights.device)]


def evaluation_order(active: Collection[str]) -> tuple[str, ...]:
    """The active terms in the order in which Eq. 1 is evaluated: L2 terms, then those that are numbers."""
    chosen = [term for term in TERMS if term.name in active]
    return tuple(term.name for term in sorted(chosen, key=lambda term: not term.is_l2))


@dataclass(frozen=True)
class Branches:
    """Parts of the networks that run: all that decides the shape of a step's graph.

    Losses with the same branches can share a compiled graph, in which the weights alone tell them apart;
    all losses whose weights are all above 0 do.
    """

    networks: tuple[str, ...]
    """Networks that some term reads, in MODALITIES' order."""
    modalities: tuple[str, ...]
    """Modalities whose clips are the networks' inputs or the decoders' targets, likewise."""
    ordered: tuple[str, ...]
    """Networks that also see shuffled and reversed copies: both, as soon as one term needs either."""
    misaligned: bool
    """Whether the audio network also hears the misaligned sound."""

    @property
    def size(self) -> int:
        """Batches that networks see in a step: clips, and changed copies of them."""
        return len(self.networks) + len(self.ordered) + self.misaligned

    def terms(self, *, sound: bool) -> tuple[str, ...]:
        """All terms that these parts suffice for; without any sound in the data, none that needs it."""
        copies = {"shuffle": self.ordered, "backward": self.ordered}
        return tuple(
            t.name
            for t in TERMS
            if set(t.networks) <= set(self.networks)
            and set(t.modalities) <= set(self.modalities)
            and t.modality in copies.get(t.task, MODALITIES)
            and (t.task != "align_audio" or self.misaligned)
            and (sound or "audio" not in t.networks)
        )

    def views(self, views: Views) -> Views:
        """The views without those that these parts do not read."""
        return replace(
            views,
            clip={m: views.clip[m] for m in self.modalities},
            future={m: views.future[m] for m in self.modalities},
            shifted_audio=views.shifted_audio if self.misaligned else None,
        )


def branches(active: Collection[str]) -> Branches:
    """The parts of the networks that the active terms need."""
    terms = [term for term in TERMS if term.name in active]
    networks = {m for term in terms for m in term.networks}
    modalities = {m for term in terms for m in term.modalities}
    ordered = {term.modality for term in terms if term.task in ("shuffle", "backward")}
    return Branches(
        tuple(m for m in MODALITIES if m in networks),
        tuple(m for m in MODALITIES if m in modalities),
        tuple(m for m in VISUAL if m in ordered),
        any(term.task == "align_audio" for term in terms),
    )


def _masks(pairs: list[Pair], views: Views) -> Tensor:
    """float32 (pairs, N): which clips count in which L2 term."""
    every = torch.ones(len(views), device=views.has_audio.device)
    if not pairs:
        return every.new_zeros(0, len(views))
    return torch.stack([every if p.mask is None else p.mask.float() for p in pairs])
