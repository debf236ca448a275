"""A member's step as a GPU sees it: nothing that makes the host wait, and how many operations it launches.

On the device ``meta``, which computes nothing: numbers can't be read off it, as they can't off a GPU without waiting,
and what the host holds is seen to be elsewhere. With a GPU the same step runs under PyTorch's own watch.
"""

from __future__ import annotations

from collections import Counter
from contextlib import nullcontext
from dataclasses import fields, replace
from functools import partial
from math import isnan
from pathlib import Path
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor
from torch._inductor import compile_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from engine.core.recipe import Optim, load_recipe, override
from engine.core.runtime import Runtime, choose_runtime
from engine.data.shards.index import ClipIndex
from engine.data.views import Views
from engine.model.resnet3d import audio_network, video_network
from engine.objective import loss as objective
from engine.objective.lossfile import random_weights
from engine.objective.terms import check_weights
from engine.train.member import Member
from engine.train.muon import convolutions
from engine.train.optim import make_optimizer, start_moments
from engine.train.trainer import CHECK_EVERY_ON_GPU, Trainer

TINY = Path(__file__).parents[1] / "tiny.toml"
META = torch.device("meta")
WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique")
"""Operations whose result the host reads, or whose output's size it must know."""
VIEWS = (
    "view expand permute transpose t unsqueeze squeeze slice select split split_with_sizes detach alias as_strided "
    "unbind diagonal promote_types _unsafe_view _reshape_alias empty empty_like empty_strided new_empty"
    " lift_fresh unfold"
).split()
"""Operations that launch nothing."""


class Watch(TorchDispatchMode):
    """Counts operations that launch something on ``device``; refuses what makes the host wait for it."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device, self.launched = device, Counter[str]()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = function.overloadpacket.__name__
        inputs = [x for x in tree_leaves((args, kwargs or {})) if isinstance(x, Tensor)]
        assert name not in WAITS, f"{name}: the host waits for its result"
        for place in tree_leaves(args[1]) if name in ("index", "index_put", "index_put_") else ():
            is_mask = isinstance(place, Tensor) and place.dtype in (torch.bool, torch.uint8)
            assert not is_mask, f"{name} by a mask: the host waits for its size"
        for x in inputs:
            assert x.device.type == self.device.type, f"{name} takes a tensor of the host"
        out = function(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            elsewhere = isinstance(x, Tensor) and x.device.type != self.device.type
            assert not elsewhere, f"{name} makes a tensor on the host"
        if name not in VIEWS:
            self.launched[name] += 1
        return out


@pytest.fixture(scope="module")
def index(tiny_shards: Path) -> ClipIndex:
    return ClipIndex([tiny_shards / "unlabelled"])


@pytest.fixture(scope="module")
def views(index: ClipIndex) -> Views:
    """A batch's views, from the CPU."""
    trainer = Trainer(load_recipe(TINY), index, choose_runtime("cpu"))
    member = trainer.member(random_weights(0), seed=0)
    return next(trainer.rounds([member], seed=0))[1]


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let ``meta`` take all weights at once where a GPU does."""
    from torch.nn.utils import clip_grad
    from torch.optim import adam

    monkeypatch.setattr(adam, "_device_dtype_check_for_fused", lambda *_, **__: None)
    monkeypatch.setattr(clip_grad, "_has_foreach_support", lambda *_: True)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())


def moved(views: Views, device: torch.device) -> Views:
    def there(value: Any) -> Any:
        return (
            {m: x.to(device) for m, x in value.items()}
            if isinstance(value, dict)
            else value.to(device)
        )

    held = {f.name: getattr(views, f.name) for f in fields(views)}
    return replace(
        views, **{name: there(value) for name, value in held.items() if value is not None}
    )


def on_meta(index: ClipIndex) -> tuple[Trainer, Member]:
    """A trainer on ``meta``, and a member at a step whose loss is not looked at."""
    recipe = override(load_recipe(TINY), ["optim.steps=40", "optim.compile=off"])
    trainer = Trainer(recipe, index, Runtime(META, amp=False))
    member = trainer.member(random_weights(0), seed=0)
    member.step = 1
    return trainer, member


def test_a_step_makes_the_host_wait_for_nothing(index: ClipIndex, views: Views) -> None:
    """All terms; views and weights are on the device, and so must be all that the step makes."""
    trainer, member = on_meta(index)
    there = moved(views, META)
    start_moments(member.optimizer)
    with Watch(META) as watch:
        assert isnan(trainer.step(member, there))
    launched = watch.launched
    assert launched["convolution"] == launched["convolution_backward"]
    assert launched["weighted_loss"] == 1, "all L2 terms at once"
    assert launched["_fused_adamw_"] == 2, "all weights at once, those that decay and the others"
    # 2,444 with PyTorch 2.13; a host launches one in about 5 us
    assert sum(launched.values()) < 2600, launched.most_common(30)


def test_muon_launches_little() -> None:
    """Two products for each convolution of four 18-layer networks, and all else for many at once."""
    model = load_recipe("small/evolve").model
    with META:
        films = [video_network(model, channels) for channels in (3, 1, 2)]
        networks = torch.nn.ModuleList([*films, audio_network(model)])
    optimizer = make_optimizer([(networks, 1.0)], Optim(name="muon"))
    for parameter in networks.parameters():
        parameter.grad = torch.zeros_like(parameter)
    start_moments(optimizer)
    with Watch(META) as watch:
        optimizer.step()
    launched, count = watch.launched, len(convolutions(networks))
    assert launched["mm"] == 2 * count == 160
    # 299 with PyTorch 2.13, AdamW's two among them
    assert sum(launched.values()) < 320, launched.most_common(30)


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (lambda x: x * float(x.sum()), "the host waits"),
        (lambda x: x * x[x > 0].sum(), "the host waits"),
        (lambda x: x * torch.tensor(0.5), "a tensor on the host|of the host"),
        (lambda x: x * torch.ones(3, device="cpu").sum(), "a tensor on the host|of the host"),
        (lambda x: x.nonzero().sum() * x, "the host waits"),
    ],
)
def test_what_creeps_into_a_step_is_found(
    index: ClipIndex, views: Views, fault: Any, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = objective.spread
    monkeypatch.setattr(objective, "spread", lambda features: fault(real(features).expand(1))[0])
    trainer, member = on_meta(index)
    member.computed, member.ordered = ("rgb/reconstruct",), member.ordered[:1]
    there = moved(views, META)
    with pytest.raises(AssertionError, match=said), Watch(META):
        trainer.step(member, there)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["off", "default", "reduce-overhead"])
def test_pytorch_sees_no_wait_in_a_step(index: ClipIndex, mode: str) -> None:
    """PyTorch's own watch on a GPU, which raises where an operation waits for it, in each mode of compiling."""
    recipe = override(load_recipe(TINY), ["optim.steps=40", f"optim.compile={mode}"])
    trainer = Trainer(recipe, index, choose_runtime("cuda"))
    member = trainer.member(random_weights(0), seed=0)
    rounds = trainer.rounds([member], seed=0)
    for step, views in rounds:
        watched = step > 3 and step % CHECK_EVERY_ON_GPU
        torch.cuda.set_sync_debug_mode("error" if watched else "default")
        try:
            trainer.step(member, views)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        if step == 25:
            break


def test_a_compiled_step_writes_to_fixed_places_alone(
    index: ClipIndex, views: Views, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A CUDA graph is recorded for a step that changes nothing but its networks, which stay where they are.

    What PyTorch's compiler is given: the networks' weights and statistics as fixed inputs, and no other input that is
    written to. Otherwise it would leave the graph out, with no more than a line in its log.
    """
    seen: list[tuple[set[int], set[int], int]] = []

    def inner(graph: Any, inputs: Any, **options: Any) -> Any:
        places = {n: i for i, n in enumerate(n for n in graph.graph.nodes if n.op == "placeholder")}
        written = {
            places[n.args[0]]
            for n in graph.graph.nodes
            if n.target is torch.ops.aten.copy_.default and n.args[0] in places
        }
        seen.append((set(options["static_input_idxs"]), written, len(places)))
        return make_boxed_func(graph.forward)

    real = torch.compile

    def traced(function: Any, **options: Any) -> Any:
        backend = partial(compile_fx.compile_fx, inner_compile=inner)
        return real(function, backend=backend, fullgraph=True, dynamic=False)

    monkeypatch.setattr(torch, "compile", traced)
    changes = ["optim.compile=reduce-overhead", "optim.steps=2"]
    trainer = Trainer(override(load_recipe(TINY), changes), index, choose_runtime("cpu"))
    member = trainer.member(check_weights({"rgb/reconstruct": 1.0}), seed=0)
    trainer.step(member, views)
    assert trainer.buffers is not None
    (fixed, written, inputs), *_ = seen
    statistics = [b for b in trainer.buffers.loss.rgb.buffers() if b.dim()]
    assert len(written) >= len(statistics) and written <= fixed
    assert inputs - len(fixed) <= 5, "views and the terms' weights, which are copied in"
