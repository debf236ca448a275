"""Eq. 1 as a whole against a second computation in float64, and what runs for which terms."""

import copy
import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import kernels
from engine.core.recipe import Clip, Model, Objective
from engine.data.views import Views
from engine.model.decoder import Decoder
from engine.objective.distill import DistillTask
from engine.objective.loss import (
    EvolvedLoss,
    active_terms,
    branches,
    spread,
)
from engine.objective.task import Scalar
from engine.objective.terms import TERM_NAMES

N, T, P, SIZE, HEARD, COMING, MELS, MARGIN = 4, 4, 3, 32, 20, 12, 16, 0.5
CHANNELS = {"rgb": 3, "grey": 1, "flow": 2}
VISUAL, EVERY = tuple(CHANNELS), (*CHANNELS, "audio")
SOME_SOUND = torch.tensor([True, True, False, True])
SOME_SHIFT = torch.tensor([True, False, False, True])
SOUND_TERMS = tuple(n for n in TERM_NAMES if "audio" in n)


def make_loss(
    *, size: int = SIZE, share: float = 1.0, stop: bool = True, units: str = "chance", seed: int = 0
):
    torch.manual_seed(seed)
    loss = EvolvedLoss(
        Model(width=0.125),
        Clip(num_frames=T, num_future_frames=P, size=size),
        objective=Objective(
            decoder_width=8,
            embed_dim=8,
            margin=MARGIN,
            order_share=share,
            stop_gradient=stop,
            units=units,
            distill="l2",
        ),
        audio_size=(HEARD, COMING, MELS),
    )
    with (
        torch.no_grad()
    ):  # statistics and last weights of decoders that differ from where they start
        for module in loss.modules():
            if isinstance(module, Decoder):
                module.output.weight.normal_(0, 0.1)
            if isinstance(module, (nn.BatchNorm2d, nn.BatchNorm3d)):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 1.5)
    return loss


def make_views(*, size: int = SIZE, sound=SOME_SOUND, shift=SOME_SHIFT, seed: int = 1) -> Views:
    rng = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng)

    frames = {"rgb": P, "grey": P, "flow": P - 1}
    clip = {m: draw(N, c, T, size, size) for m, c in CHANNELS.items()}
    future = {m: draw(N, c, frames[m], size, size) for m, c in CHANNELS.items()}
    clip["audio"], future["audio"] = draw(N, 1, HEARD, MELS), draw(N, 1, COMING, MELS)
    order = torch.stack([torch.randperm(T, generator=rng) for _ in range(N)])
    return Views(clip, future, draw(N, 1, HEARD, MELS), sound, shift, order)


def in_float64(views: Views) -> Views:
    return replace(
        views,
        clip={m: x.double() for m, x in views.clip.items()},
        future={m: x.double() for m, x in views.future.items()},
        shifted_audio=views.shifted_audio.double(),
    )


def draw_weights(seed: int = 2) -> Tensor:
    return torch.rand(len(TERM_NAMES), generator=torch.Generator().manual_seed(seed))


class ByHand:
    """All 39 terms in units of chance, in float64 and one after another; differentiable.

    Networks, decoders and linear heads are copies of the loss's own; everything around them is written anew.
    """

    def __init__(self, loss: EvolvedLoss, views: Views, *, copies: int, stop: bool) -> None:
        self.loss = copy.deepcopy(loss).double()
        self.heads = {name: task for task in self.loss.tasks for name in task.terms}
        self.views, self.copies, self.stop = views, copies, stop
        self.clip = {m: x.double() for m, x in views.clip.items()}
        self.acts, self.shuffled, self.reversed = {}, {}, {}
        for m in VISUAL:
            x, k = self.clip[m], copies
            mixed = [x[i][:, views.order[i]] for i in range(k)]
            turned = [x[i][:, range(T - 1, -1, -1)] for i in range(N - k, N)]
            if m == "flow":
                turned = [-clip for clip in turned]
            # in another order than the engine's: batch norm sees a set
            *layers, pooled = self.loss.networks[m].forward_features(
                torch.cat([torch.stack(turned), x, torch.stack(mixed)])
            )
            self.acts[m] = [*(a[k : k + N] for a in layers), pooled[k : k + N]]
            self.reversed[m], self.shuffled[m] = pooled[:k], pooled[k + N :]
        *layers, pooled = self.loss.networks["audio"].forward_features(
            torch.cat([views.shifted_audio.double(), self.clip["audio"]])
        )
        self.acts["audio"] = [*(a[N:] for a in layers), pooled[N:]]
        self.shifted = pooled[:N]
        self.with_sound = [i for i in range(N) if views.has_audio[i]]

    def values(self) -> dict[str, Tensor]:
        found = {}
        for name in TERM_NAMES:
            if name.startswith("distill/"):
                found[name] = self.distill(*name.removeprefix("distill/").split("@"))
            elif name.endswith("/embed"):
                found[name] = self.embed(name, name.removeprefix("rgb+").removesuffix("/embed"))
            else:
                m, task = name.split("/")
                found[name] = {
                    "shuffle": self.order,
                    "backward": self.order,
                    "align_audio": self.align,
                }.get(task, self.decode)(name, m, task)
        return found

    def order(self, name: str, m: str, task: str) -> Tensor:
        pooled, k = self.acts[m][5], self.copies
        real, changed = (
            (pooled[:k], self.shuffled[m])
            if task == "shuffle"
            else (pooled[N - k :], self.reversed[m])
        )
        owner = self.heads[name]
        head = owner.shuffle if task == "shuffle" else owner.backward_time
        return (
            -head(real).log_softmax(1)[:, 0].sum() - head(changed).log_softmax(1)[:, 1].sum()
        ) / (2 * k * math.log(2))

    def align(self, name: str, m: str, task: str) -> Tensor:
        head, hinges = self.heads[name], []

        def cosine(i: int, sound: Tensor) -> Tensor:
            return functional.cosine_similarity(
                head.video(self.acts[m][5][i]), head.audio(sound), dim=0
            )

        for i in range(N):
            own, before = cosine(i, self.acts["audio"][5][i]), (i - 1) % N
            if self.views.has_shift[i]:
                hinges.append(MARGIN - own + cosine(i, self.shifted[i]))
            if i in self.with_sound and before in self.with_sound:
                hinges.append(MARGIN - own + cosine(i, self.acts["audio"][5][before]))
        return self.mean_hinge(hinges)

    def embed(self, name: str, other: str) -> Tensor:
        head, hinges = self.heads[name], []
        count = self.with_sound if other == "audio" else range(N)
        rgb = [head.rgb(x) for x in self.acts["rgb"][5]]
        second = [head.with_rgb(x) for x in self.acts[other][5]]
        s = functional.cosine_similarity
        for i in count:
            own = s(rgb[i], second[i], dim=0)
            for j in count:
                if i != j:
                    hinges.append(MARGIN - own + s(rgb[i], second[j], dim=0))
                    hinges.append(MARGIN - own + s(rgb[j], second[i], dim=0))
        return self.mean_hinge(hinges)

    @staticmethod
    def mean_hinge(hinges: list[Tensor]) -> Tensor:
        if not hinges:
            return torch.zeros((), dtype=torch.float64)
        return torch.stack(hinges).clamp(min=0).mean() / MARGIN

    def decode(self, name: str, m: str, task: str) -> Tensor:
        target = {"colorize": "rgb", "to_flow": "flow", "to_rgb": "rgb"}.get(task, m)
        x = (self.views.future if task == "predict" else self.views.clip)[target].double()
        if target == "audio":
            x, last = self.small(x), self.small(self.clip["audio"]).mean(2, keepdim=True)
        else:
            x, last = self.small(x), self.small(self.clip[target][:, :, -1:])
        kept = self.with_sound if target == "audio" else range(N)
        if target == "flow":
            trivial = torch.zeros_like(x)
        elif task == "predict":
            trivial = last.expand_as(x)
        else:
            some = x[list(kept)] if len(kept) else x[:1]
            trivial = some.mean((0, 2), keepdim=True).expand_as(x)
        decoded = trivial + self.heads[name].decoder(self.acts[m][4])
        return self.squares(decoded, x, kept) / self.squares(trivial, x, kept).clamp(min=1e-4)

    @staticmethod
    def small(x: Tensor) -> Tensor:
        if x.dim() == 4:
            return x.unflatten(3, (MELS // 2, 2)).mean(4)
        blocks = (x.shape[3] // 4, 4)
        return x.unflatten(4, blocks).unflatten(3, blocks).mean((4, 6))

    def distill(self, other: str, layer: str) -> Tensor:
        student, teacher = self.acts["rgb"][int(layer)], self.acts[other][int(layer)]
        if self.stop:
            teacher = teacher.detach()
        if other == "audio":
            student, teacher = student.mean((2, 3, 4)), teacher.mean((2, 3))
        kept = self.with_sound if other == "audio" else range(N)
        if not len(kept):
            return student.new_zeros(())
        mean = teacher[list(kept)].transpose(0, 1).flatten(1).mean(1)
        constant = mean.view(1, -1, *[1] * (teacher.dim() - 2)).expand_as(teacher)
        chance = self.squares(constant, teacher, kept).detach().clamp(min=1e-4)
        return self.squares(student, teacher, kept) / chance

    @staticmethod
    def squares(one: Tensor, two: Tensor, clips) -> Tensor:
        assert one.shape == two.shape
        if not len(clips):
            return torch.zeros((), dtype=torch.float64)
        return torch.stack([(one[i] - two[i]).square().mean() for i in clips]).mean()


@pytest.mark.parametrize(
    ("share", "copies", "stop", "training", "size"),
    [(1.0, N, True, True, 32), (0.5, 2, False, True, 16), (0.25, 1, True, False, 16)],
)
def test_values_total_and_gradients_against_float64(share, copies, stop, training, size) -> None:
    """Networks and views in float64, so that no ReLU falls on another side; the sum is in float32.

    In training every clip has sound: what batch norm sees of the others is not part of Eq. 1.
    """
    sound = torch.ones(N, dtype=torch.bool) if training else SOME_SOUND
    loss = make_loss(size=size, share=share, stop=stop)
    views = in_float64(make_views(size=size, sound=sound))
    loss, weights = loss.double().train(training), draw_weights()
    by_hand = ByHand(loss, views, copies=copies, stop=stop)
    want = by_hand.values()
    output = loss(views, weights, TERM_NAMES)
    got = dict(zip(output.names, output.values.tolist(), strict=True))
    for name in TERM_NAMES:
        assert got[name] == pytest.approx(want[name].item(), rel=2e-6, abs=1e-7), name
    total = sum(w * want[n] for n, w in zip(TERM_NAMES, weights.double(), strict=True))
    assert output.total.item() == pytest.approx(total.item(), rel=2e-6)
    output.total.backward()
    total.backward()
    pairs = zip(loss.named_parameters(), by_hand.loss.parameters(), strict=True)
    for (name, p), q in pairs:
        # relative, but for a gradient that is 0 up to rounding
        assert (p.grad - q.grad).norm() <= 1e-4 * q.grad.norm() + 1e-6, name
        assert q.grad.norm() > 0, name


def test_values_in_float32() -> None:
    loss, views = make_loss(size=16).eval(), make_views(size=16)
    want = ByHand(loss, views, copies=N, stop=True).values()
    output = loss(views, draw_weights(), TERM_NAMES)
    for name, value in zip(output.names, output.values.tolist(), strict=True):
        assert value == pytest.approx(want[name].item(), rel=5e-4, abs=1e-5), name


def test_without_any_sound_values_match_too() -> None:
    nothing = torch.zeros(N, dtype=torch.bool)
    loss, views = make_loss(size=16), make_views(size=16, sound=nothing, shift=nothing)
    want = ByHand(loss, views, copies=N, stop=True).values()
    output = loss(views, draw_weights(), TERM_NAMES)
    for name, value in zip(output.names, output.values.tolist(), strict=True):
        assert value == pytest.approx(want[name].item(), rel=5e-4, abs=1e-5), name


@pytest.mark.parametrize("seed", range(3))
def test_the_total_is_the_weighted_sum_of_the_values(seed) -> None:
    """For all terms, and for a subset in which every weight must find its own term."""
    loss, views, weights = make_loss(size=16), make_views(size=16), draw_weights(seed)
    subset = tuple(n for i, n in enumerate(TERM_NAMES) if (i + seed) % 3 == 0)
    for active in (TERM_NAMES, subset):
        output = loss(views, weights, active)
        assert Counter(output.names) == Counter(active), "each name once"
        of = dict(zip(TERM_NAMES, weights.double().tolist(), strict=True))
        values = output.values.double().tolist()
        want = sum(of[n] * v for n, v in zip(output.names, values, strict=True))
        assert output.total.item() == pytest.approx(want, rel=1e-6)
        assert output.total.dtype == output.values.dtype == torch.float32
        assert output.total.shape == () and not output.values.requires_grad


def test_raw_terms_are_those_in_units_of_chance_times_chance() -> None:
    views, weights = make_views(size=16), draw_weights()
    raw, unit = make_loss(size=16, units="raw"), make_loss(size=16)
    acts = unit.activate(views, TERM_NAMES)
    chance = {v.name: float(v.chance) for task in unit.tasks for v in task(views, acts, TERM_NAMES)}
    found = [make_loss(size=16, units=u)(views, weights, TERM_NAMES) for u in ("raw", "chance")]
    assert raw.state_dict().keys() == unit.state_dict().keys()
    for name, one, other in zip(found[0].names, found[0].values, found[1].values, strict=True):
        assert one.item() == pytest.approx(other.item() * chance[name], rel=1e-4), name


def test_what_needs_no_learning_does_not_blow_up() -> None:
    """Clips that stand still: no flow, and the last frame says all of what comes."""
    views = make_views(size=16)
    still = {m: x[:, :, :1].expand_as(x) for m, x in views.clip.items() if m != "audio"}
    future = {m: still[m][:, :, :1].expand_as(views.future[m]) for m in ("rgb", "grey")}
    views = replace(
        views,
        clip={**views.clip, **still, "flow": torch.zeros_like(views.clip["flow"])},
        future={**views.future, **future, "flow": torch.zeros_like(views.future["flow"])},
    )
    output = make_loss(size=16)(views, draw_weights(), TERM_NAMES)
    output.total.backward()
    assert output.values.isfinite().all() and output.total.isfinite()


def test_ranks_say_how_far_features_spread() -> None:
    rng = torch.Generator().manual_seed(0)
    line = torch.randn(16, 1, generator=rng) * torch.randn(1, 8, generator=rng)
    assert spread(line).item() == pytest.approx(1.0, rel=1e-4)
    assert spread(torch.ones(16, 8)).item() == 0.0
    two = torch.cat([torch.eye(2), -torch.eye(2)]).repeat(4, 1)
    assert spread(two + 5.0).item() == pytest.approx(2.0, rel=1e-4)
    x = torch.randn(16, 8, generator=rng).double().numpy()
    values = np.linalg.eigvalsh(np.cov(x.T))
    want = values.sum() ** 2 / (values**2).sum()
    assert spread(torch.from_numpy(x)).item() == pytest.approx(want, rel=1e-5)
    loss, views = make_loss(size=16), make_views(size=16)
    output = loss(views, draw_weights(), TERM_NAMES)
    acts = loss.activate(views, TERM_NAMES)
    assert len(output.ranks) == len(EVERY)
    for rank, m in zip(output.ranks, EVERY, strict=True):
        assert rank.item() == pytest.approx(spread(acts.clip[m][-1]).item(), rel=1e-3)


def test_weights_do_not_change_the_values() -> None:
    loss, views = make_loss(size=16), make_views(size=16)
    first = loss(views, draw_weights(0), TERM_NAMES)
    second = loss(views, draw_weights(1), TERM_NAMES)
    assert first.names == second.names and torch.equal(first.values, second.values)
    assert first.total.item() != second.total.item()


def test_the_gradient_is_the_weighted_sum_of_the_terms_gradients(monkeypatch) -> None:
    """To every activation, from which on backward is the networks' own; each term computed alone."""
    loss, views, weights = make_loss(size=16, stop=False), make_views(size=16), draw_weights()
    with torch.no_grad():
        acts = loss.activate(views, TERM_NAMES)
    leaves = [x for m in EVERY for x in acts.clip[m]] + [acts.shifted_audio]
    leaves += [x for m in VISUAL for x in (acts.shuffled[m], acts.reversed[m])]
    for x in leaves:
        x.requires_grad_()
    monkeypatch.setattr(loss, "activate", lambda *_: acts)

    def flat_gradient(w: Tensor, active) -> Tensor:
        grads = torch.autograd.grad(loss(views, w, active).total, leaves, allow_unused=True)
        zipped = zip(grads, leaves, strict=True)
        return torch.cat(
            [(torch.zeros_like(x) if g is None else g).double().flatten() for g, x in zipped]
        )

    whole, summed = flat_gradient(weights, TERM_NAMES), 0.0
    for name, weight in zip(TERM_NAMES, weights.double(), strict=True):
        one = flat_gradient(torch.ones(len(TERM_NAMES)), [name])
        assert one.norm() > 0, name
        summed = summed + weight * one
    assert (whole - summed).norm() / whole.norm() < 1e-5


def expected_stack(name: str) -> dict[str, int]:
    """Which networks a term alone runs, and on how many clips: changed copies come on top."""
    if name.startswith("distill/"):
        return {"rgb": N, name[8:].split("@")[0]: N}
    m, task = name.split("/")
    if task == "embed":
        return {"rgb": N, m.removeprefix("rgb+"): N}
    if task == "align_audio":
        return {m: N, "audio": 2 * N}
    return {m: 3 * N if task in ("shuffle", "backward") else N}


@pytest.fixture(scope="module")
def watched():
    """A loss that notes its networks' inputs and the heads that run."""
    loss, stacks, heads = make_loss(size=16), [], []
    for m, network in loss.networks.items():
        network.stem.register_forward_pre_hook(lambda _, x, m=m: stacks.append((m, x[0])))
    for task in loss.tasks:
        for part, head in task.named_children():
            head.register_forward_hook(
                lambda *_, task=task, part=part: heads.append((task.terms, part))
            )
    return loss, stacks, heads


@pytest.mark.parametrize("name", TERM_NAMES)
def test_a_single_term_runs_only_what_it_needs(name, watched) -> None:
    loss, stacks, heads = watched
    stacks.clear()
    heads.clear()
    every, weights = make_views(size=16), torch.zeros(len(TERM_NAMES))
    weights[TERM_NAMES.index(name)] = 0.7
    has = branches([name]).modalities
    views = replace(
        every,
        clip={m: every.clip[m] for m in has},
        future={m: every.future[m] for m in has},
        shifted_audio=every.shifted_audio if "audio" in has else None,
    )
    active = active_terms(dict(zip(TERM_NAMES, weights.tolist(), strict=True)), sound=True)
    assert active == (name,)
    output = loss(views, weights, active)
    assert output.names == (name,)
    assert output.total.item() == pytest.approx(0.7 * output.values.item(), rel=1e-5)
    assert {m: len(x) for m, x in stacks} == expected_stack(name)
    assert len(stacks) == len(expected_stack(name)), "one forward a network"
    assert {part for terms, part in heads if name not in terms} == set()
    if name.endswith(("/shuffle", "/backward")):
        assert [p for _, p in heads] == ["shuffle" if "shuffle" in name else "backward_time"]
    loss.zero_grad()
    output.total.backward()
    touched = {m for m, n in loss.networks.items() for p in n.parameters() if p.grad is not None}
    trained = set(expected_stack(name)) - (
        {name[8:].split("@")[0]} if name.startswith("distill/") else set()
    )
    assert touched == trained == set(branches([name]).networks) & trained


def test_all_terms_take_one_channels_last_forward_a_network(watched) -> None:
    loss, stacks, _ = watched
    stacks.clear()
    loss(make_views(size=16), draw_weights(), TERM_NAMES)
    assert [m for m, _ in stacks] == list(EVERY)
    for m, x in stacks:
        assert len(x) == (2 if m == "audio" else 3) * N
        if m != "audio":
            assert x.is_contiguous(memory_format=torch.channels_last_3d)


def test_shares_of_the_batch_make_smaller_stacks() -> None:
    for share, copies in ((0.5, 2), (0.25, 1), (0.01, 1)):
        loss, views = make_loss(size=16, share=share), make_views(size=16)
        acts = loss.activate(views, TERM_NAMES)
        for m in VISUAL:
            assert len(acts.shuffled[m]) == len(acts.reversed[m]) == copies
            assert all(len(a) == N for a in acts.clip[m])


def test_terms_of_zero_weight_are_left_out() -> None:
    weights = dict.fromkeys(TERM_NAMES, 0.0)
    assert active_terms(weights, sound=True) == ()
    weights["rgb/to_flow"], weights["distill/audio@3"] = 1e-9, 1.0
    assert set(active_terms(weights, sound=True)) == {"rgb/to_flow", "distill/audio@3"}
    assert active_terms(weights, sound=False) == ("rgb/to_flow",)
    every = dict.fromkeys(TERM_NAMES, 1.0)
    assert active_terms(every, sound=True) == TERM_NAMES
    silent = active_terms(every, sound=False)
    assert set(TERM_NAMES) - set(silent) == set(SOUND_TERMS) and len(SOUND_TERMS) == 11
    assert "audio" not in branches(silent).networks + branches(silent).modalities


def trained_rgb(terms) -> list[Tensor]:
    """The RGB network's weights after three steps on a loss of these terms."""
    loss, views = make_loss(size=16, share=0.5), make_views(size=16)
    weights = torch.tensor([float(name in terms) for name in TERM_NAMES])
    optimizer = torch.optim.SGD(loss.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        loss(branches(terms).views(views), weights, terms).total.backward()
        optimizer.step()
    return [p.detach().clone() for p in loss.rgb.parameters()]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize(
    ("reach", "others"),
    [
        (("rgb/predict",), ("flow/shuffle", "grey/align_audio", "audio/predict")),
        (("flow/predict", "distill/flow@2"), ("grey/to_flow",)),
        (("grey/align_audio", "audio/predict", "rgb/align_audio"), ("flow/to_rgb",)),
        (("grey/colorize", "grey/align_audio", "distill/audio@0"), ()),
    ],
)
def test_terms_that_can_not_change_the_rgb_network_are_left_out(reach, others) -> None:
    """Trained with and without each term: those that change nothing are not computed, and no other is left out."""
    weights = {name: float(name in reach + others) for name in TERM_NAMES}
    assert set(active_terms(weights, sound=True)) == set(reach)
    expected = trained_rgb(reach)
    assert same(trained_rgb(reach + others), expected)
    for name in reach if len(reach) > 1 else ():
        left = tuple(each for each in reach if each != name)
        assert not same(trained_rgb(left), expected), name
    only = {name: float(name in others) for name in TERM_NAMES}
    assert set(active_terms(only, sound=True)) == set(others), "where none can, all are computed"


def test_networks_and_modalities_that_terms_need() -> None:
    for names, networks, modalities in (
        (["grey/colorize"], ("grey",), ("rgb", "grey")),
        (["rgb/to_flow"], ("rgb",), ("rgb", "flow")),
        (["grey/to_flow"], ("grey",), ("grey", "flow")),
        (["flow/to_rgb"], ("flow",), ("rgb", "flow")),
        (["flow/align_audio"], ("flow", "audio"), ("flow", "audio")),
        (["audio/predict", "grey/shuffle"], ("grey", "audio"), ("grey", "audio")),
        (["distill/flow@4"], ("rgb", "flow"), ("rgb", "flow")),
        (TERM_NAMES, EVERY, EVERY),
        ([], (), ()),
    ):
        assert branches(names).networks == networks
        assert branches(names).modalities == modalities


@pytest.mark.parametrize("stop", [True, False])
@pytest.mark.parametrize("other", ["grey", "flow", "audio"])
def test_the_teachers_network_moves_only_without_the_stop(other, stop) -> None:
    loss, views = make_loss(size=16, stop=stop), make_views(size=16)
    active = [n for n in TERM_NAMES if n.startswith(f"distill/{other}@")]
    loss(views, torch.ones(len(TERM_NAMES)), active).total.backward()
    assert any(t.stop_gradient == stop for t in loss.tasks if isinstance(t, DistillTask))
    student = [p.grad for p in loss.rgb.parameters()]
    teacher = [p.grad for p in loss.networks[other].parameters()]
    assert all(g is not None for g in student) and sum(g.abs().sum() for g in student) > 0
    if stop:
        assert all(g is None for g in teacher)
    else:
        assert all(g is not None for g in teacher) and sum(g.abs().sum() for g in teacher) > 0


def test_a_batch_without_sound_has_zero_sound_terms_and_finite_gradients() -> None:
    nothing = torch.zeros(N, dtype=torch.bool)
    loss, views = make_loss(size=16), make_views(size=16, sound=nothing, shift=nothing)
    output = loss(views, draw_weights(), TERM_NAMES)
    values = dict(zip(output.names, output.values.tolist(), strict=True))
    assert {n for n, v in values.items() if v == 0.0} >= set(SOUND_TERMS)
    assert all(values[n] > 0 for n in TERM_NAMES if n not in SOUND_TERMS and "embed" not in n)
    output.total.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in loss.parameters())
    assert all(p.grad is None or (p.grad == 0).all() for p in loss.networks["audio"].parameters())


def sound_values(*, training: bool) -> tuple[dict[str, float], dict[str, float]]:
    """The sound terms' values, as they are and with garbage for the clips without sound."""
    loss, views = make_loss(size=16).train(training), make_views(size=16)
    garbage = 30 * torch.randn(
        N, 1, HEARD + COMING, MELS, generator=torch.Generator().manual_seed(9)
    )
    silent = ~views.has_audio[:, None, None, None]
    spoilt = replace(
        views,
        clip={**views.clip, "audio": views.clip["audio"].where(~silent, garbage[:, :, :HEARD])},
        future={
            **views.future,
            "audio": views.future["audio"].where(~silent, garbage[:, :, HEARD:]),
        },
        shifted_audio=views.shifted_audio.where(~silent, garbage[:, :, :HEARD].flip(2)),
    )
    found = []
    for v in (views, spoilt):
        output = copy.deepcopy(loss)(v, draw_weights(), SOUND_TERMS)
        found.append(dict(zip(output.names, output.values.tolist(), strict=True)))
    return found[0], found[1]


def test_what_clips_without_sound_hold_changes_no_value_under_fixed_statistics() -> None:
    before, after = sound_values(training=False)
    assert before == pytest.approx(after, rel=1e-6)


def test_what_clips_without_sound_hold_changes_no_value_in_training() -> None:
    """Nor through the batch norm of the audio network."""
    before, after = sound_values(training=True)
    assert before == pytest.approx(after, rel=1e-4)


def test_no_gradient_comes_through_the_sound_of_clips_without_it() -> None:
    loss, views = make_loss(size=16, stop=False).eval(), make_views(size=16)
    sound = views.clip["audio"].requires_grad_()
    shifted = views.shifted_audio.requires_grad_()
    loss(views, draw_weights(), SOUND_TERMS).total.backward()
    for x, kept in ((sound, views.has_audio), (shifted, views.has_shift)):
        assert (x.grad[~kept] == 0).all()
        assert all((x.grad[i] != 0).any() for i in kept.nonzero().flatten())


def test_bf16_autocast_is_finite_and_near_float32() -> None:
    loss, views, weights = make_loss(units="raw").eval(), make_views(), draw_weights()
    exact = loss(views, weights, TERM_NAMES)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        acts = loss.activate(views, TERM_NAMES)
        made = [v for task in loss.tasks for v in task(views, acts, TERM_NAMES)]
        output = loss(views, weights, TERM_NAMES)
    assert acts.clip["rgb"][0].dtype == torch.bfloat16, "the test means nothing in float32"
    assert all(v.value.dtype == torch.float32 for v in made if isinstance(v, Scalar))
    assert Counter(v.name for v in made) == Counter(TERM_NAMES)
    assert output.total.dtype == output.values.dtype == torch.float32
    assert output.names == exact.names
    np.testing.assert_allclose(output.values, exact.values, rtol=0.05, atol=0.01)
    output.total.backward()
    for p in loss.parameters():
        assert p.grad is not None and p.grad.dtype == torch.float32 and p.grad.isfinite().all()


def test_equation_1_goes_through_the_op_once(monkeypatch) -> None:
    calls = []
    real = kernels.weighted_loss

    def noted(*args, **kwargs):
        calls.append(kwargs)
        return real(*args, **kwargs)

    monkeypatch.setattr(kernels, "weighted_loss", noted)
    for stop in (True, False):
        loss = make_loss(size=16, stop=stop)
        loss(make_views(size=16), draw_weights(), TERM_NAMES)
        assert calls == [{"teacher_grad": not stop}]
        calls.clear()


def test_equal_seeds_give_equal_values() -> None:
    one = make_loss(size=16)(make_views(size=16), draw_weights(), TERM_NAMES)
    two = make_loss(size=16)(make_views(size=16), draw_weights(), TERM_NAMES)
    assert one.names == two.names and torch.equal(one.values, two.values)
    assert one.total.item() == two.total.item()
