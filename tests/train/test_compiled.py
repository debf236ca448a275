"""Compiled steps: members taking turns in the same buffers are the members that they would be alone."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

from engine.core.files import take_lock
from engine.core.recipe import Optim, load_recipe, override
from engine.core.runtime import choose_runtime, cpu_has_bf16, make_deterministic
from engine.data.shards.index import ClipIndex
from engine.features.extract import LabelledClips
from engine.objective.loss import branches
from engine.objective.lossfile import random_weights
from engine.objective.terms import TERM_NAMES, LossWeights, check_weights
from engine.search.cohort import evaluate_cohort
from engine.search.members import Proposal
from engine.train.checkpoint import load_member, save_member
from engine.train.compiled import GRAPHS, compile_mode
from engine.train.member import FlatState, Member
from engine.train.trainer import NonFiniteLoss, Trainer

TINY = Path(__file__).parents[1] / "tiny.toml"
SMALL = check_weights({"rgb/reconstruct": 1.0, "rgb/predict": 0.3})
SMALLER = check_weights({"rgb/reconstruct": 0.2})
"""Of the same branches as SMALL."""


needs_bf16 = pytest.mark.skipif(not cpu_has_bf16(), reason="this CPU's bf16 can't be trusted")


def make_trainer(shards: Path, *changes: str) -> Trainer:
    recipe = override(load_recipe(TINY), ["model.depths=[1, 1, 1, 1]", *changes])
    runtime = choose_runtime("cpu", amp=recipe.optim.amp)
    make_deterministic(runtime)
    warnings: list[str] = []
    trainer = Trainer(recipe, ClipIndex([shards / "unlabelled"]), runtime, warn=warnings.append)
    trainer.warnings = warnings  # type: ignore[attr-defined]
    return trainer


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trace and differentiate graphs as always, but run them as they are: no time for code generation."""
    real = torch.compile

    def compile_(function, *, mode, fullgraph, dynamic):
        assert fullgraph and not dynamic and mode in ("default", "reduce-overhead")
        return real(function, backend="aot_eager", fullgraph=True, dynamic=False)

    monkeypatch.setattr(torch, "compile", compile_)


def train(trainer: Trainer, losses: Sequence[LossWeights], *, alone: bool = False) -> list[Member]:
    members = [trainer.member(loss, seed=0, alone=alone) for loss in losses]
    for _, views in trainer.rounds(members, seed=0):
        for outcome in trainer.step_all(members, views):
            assert isinstance(outcome, float), outcome
    return members


def same(one: Member, other: Member) -> bool:
    """In what is kept of a member; heads of terms that weigh nothing do not count."""
    mine, others = one.loss.rgb.state_dict(), other.loss.rgb.state_dict()
    return all(torch.equal(mine[name], others[name]) for name in mine)


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


def test_members_share_a_graph_and_equal_runs_of_one(tiny_shards: Path, traced: None) -> None:
    """All 39 terms: bit-equal, and nothing is compiled again for a member, a batch or a step."""
    losses = [random_weights(i) for i in range(3)]
    losses[2] |= {"flow/predict": 0.0, "rgb/shuffle": 0.0}
    trainer, before = make_trainer(tiny_shards, "optim.compile=default"), graphs()
    cohort = train(trainer, losses)
    assert trainer.buffers is not None and trainer.buffers.graphs == 1
    (alone,) = train(trainer, losses[1:2])
    assert graphs() - before == 1
    assert same(cohort[1], alone) and not same(cohort[0], cohort[1])
    assert cohort[1].term_values() == alone.term_values()
    assert set(cohort[2].term_values()) == set(TERM_NAMES) - {"flow/predict", "rgb/shuffle"}
    assert trainer.warnings == []
    train(trainer, [SMALL])
    assert graphs() - before == trainer.buffers.graphs == 2, "other branches are another graph"

    eager = train(make_trainer(tiny_shards), losses[:1])[0].loss.rgb.state_dict()
    for name, tensor in cohort[0].loss.rgb.state_dict().items():
        torch.testing.assert_close(tensor, eager[name], rtol=1e-3, atol=1e-3, msg=name)


def test_inductor_gives_the_numbers_of_eager_steps(tiny_shards: Path) -> None:
    eager = make_trainer(tiny_shards, "optim.steps=2")
    compiled = make_trainer(tiny_shards, "optim.steps=2", "optim.compile=default")
    before = graphs()
    for mine, other in zip(
        train(eager, [SMALL, SMALLER]), train(compiled, [SMALL, SMALLER]), strict=True
    ):
        assert mine.term_values() == pytest.approx(other.term_values(), rel=1e-3)
    assert graphs() - before == 1 and compiled.warnings == []


def test_the_only_member_of_a_run_lends_its_own_networks(tiny_shards: Path, traced: None) -> None:
    trainer = make_trainer(tiny_shards, "optim.compile=default")
    (alone,) = train(trainer, [SMALL], alone=True)
    assert trainer.buffers is not None and trainer.buffers.loss is alone.loss
    (guest,) = train(make_trainer(tiny_shards, "optim.compile=default"), [SMALL])
    assert same(alone, guest)


def test_a_compiled_run_goes_on_as_if_it_had_not_stopped(
    tiny_shards: Path, tmp_path: Path, traced: None
) -> None:
    def trainer() -> Trainer:
        return make_trainer(tiny_shards, "optim.compile=default")

    (whole,) = train(trainer(), [SMALL], alone=True)
    first = trainer()
    member = first.member(SMALL, seed=0, alone=True)
    _, views = next(first.rounds([member], seed=0))
    first.step(member, views)
    save_member(tmp_path / "one.safetensors", member, facts={"recipe_hash": "x"})

    then = trainer()
    member = then.member(SMALL, seed=0, alone=True)
    load_member(tmp_path / "one.safetensors", member, recipe_hash="x")
    assert member.step == 1
    for _, views in then.rounds([member], seed=0):
        then.step(member, views)
    assert same(member, whole) and member.term_values() == whole.term_values()


def test_a_member_that_diverges_leaves_the_buffers_clean(tiny_shards: Path, traced: None) -> None:
    trainer = make_trainer(tiny_shards, "optim.compile=default")
    ill, healthy = (trainer.member(SMALL, seed=0) for _ in range(2))
    with torch.no_grad():
        (task,) = (t for t in ill.loss.tasks if "rgb/predict" in getattr(t, "terms", ()))
        next(task.parameters()).fill_(float("nan"))
    trainer._checked = True  # the check would tell of the nan too
    for _, views in trainer.rounds([healthy], seed=0):
        first, second = trainer.step_all([ill, healthy], views)
        assert isinstance(first, NonFiniteLoss) and "rgb/predict" in str(first)
        assert isinstance(second, float)
    (alone,) = train(make_trainer(tiny_shards, "optim.compile=default"), [SMALL])
    assert same(healthy, alone)


def test_a_cohort_is_judged_by_its_own_networks(tiny_shards: Path, traced: None) -> None:
    trainer = make_trainer(tiny_shards, "optim.compile=default")
    index = ClipIndex([tiny_shards / "labelled"])
    labelled = LabelledClips(index, trainer.recipe, runtime=trainer.runtime)
    both = evaluate_cohort(
        trainer, labelled, members=[Proposal(0, SMALL), Proposal(0, SMALLER)], seeds=[0]
    )
    (one,) = evaluate_cohort(trainer, labelled, members=[Proposal(0, SMALLER)], seeds=[0])
    assert both[1].fitness == one.fitness and both[1].learnt["terms"] == one.learnt["terms"]
    assert both[0].rgb is not None and both[1].rgb is not None and one.rgb is not None
    assert all(torch.equal(both[1].rgb[name], one.rgb[name]) for name in one.rgb)
    assert not all(torch.equal(both[0].rgb[name], one.rgb[name]) for name in one.rgb)


@pytest.mark.parametrize("name", ["adamw", "muon", "sgd"])
def test_a_state_in_one_piece_trains_like_one_in_many(name: str, tiny_shards: Path) -> None:
    changes = (f"optim.name={name}", "optim.lr=0.01")
    apart = train(make_trainer(tiny_shards, *changes), [SMALL])[0]
    trainer = make_trainer(tiny_shards, *changes)
    member = trainer.member(SMALL, seed=0)
    member.state = FlatState(member.loss, member.optimizer)
    for _, views in trainer.rounds([member], seed=0):
        trainer.step(member, views)
    assert same(apart, member)
    first, last = (
        p.data_ptr() for p in (*member.loss.parameters(),)[:: len([*member.loss.parameters()]) - 1]
    )
    block = member.state.blocks[torch.float32]
    assert block.data_ptr() <= first < last < block.data_ptr() + block.nbytes
    strides = {p.stride() for p in member.loss.rgb.parameters() if p.dim() == 5 and p.shape[2] > 1}
    assert all(stride[1] == 1 for stride in strides), "channels-last weights stay so"


def test_what_compiled_code_gets_wrong_is_told(
    tiny_shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compile_(function, **_):
        def wrong(views, weights):
            total, values = function(views, weights)
            return total, values * 1.5

        return wrong

    monkeypatch.setattr(torch, "compile", compile_)
    trainer = make_trainer(tiny_shards, "optim.compile=default", "optim.steps=2")
    before = trainer.member(SMALL, seed=0).loss.state_dict()
    before = {name: t.clone() for name, t in before.items()}
    (member,) = train(trainer, [SMALL])
    assert len(trainer.warnings) == 1 and "by 0.5 in the median" in trainer.warnings[0]
    assert "--set optim.compile=off" in trainer.warnings[0]
    monkeypatch.undo()
    assert same(member, train(make_trainer(tiny_shards, "optim.steps=2"), [SMALL])[0]), (
        "the check leaves no trace"
    )


@needs_bf16
def test_bf16_is_checked_without_compiling_too(
    tiny_shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(tiny_shards, "optim.amp=bf16", "optim.steps=2")
    train(trainer, [SMALL])
    assert trainer.warnings == []
    monkeypatch.setattr("engine.train.precision_check.TOLERANCE", {"bf16": (1e-7, 1e-7)})
    trainer = make_trainer(tiny_shards, "optim.amp=bf16", "optim.steps=2")
    train(trainer, [SMALL])
    assert trainer.warnings, "bf16 is never exact: the comparison sees it"


def test_a_step_that_can_not_be_compiled(
    tiny_shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is an error where it was asked for; else it runs uncompiled, with a warning."""

    def compile_(function, **_):
        def broken(*_):
            raise RuntimeError("no C++ compiler")

        return broken

    monkeypatch.setattr(torch, "compile", compile_)
    trainer = make_trainer(tiny_shards, "optim.compile=default")
    member = trainer.member(SMALL, seed=0)
    _, views = next(trainer.rounds([member], seed=0))
    with pytest.raises(RuntimeError, match=r"no C\+\+ compiler.*--set optim.compile=off"):
        trainer.step(member, views)

    # heads that weigh nothing would be in the gradient's norm, as zeros that are summed in another order
    never_clipped = "optim.grad_clip=1000"
    trainer = make_trainer(tiny_shards, never_clipped)
    trainer.mode, trainer._checked = "default", False  # as auto chooses on a GPU
    members = train(trainer, [SMALL, SMALLER])
    assert len(trainer.warnings) == 1 and "it runs uncompiled" in trainer.warnings[0]
    for member, other in zip(
        members, train(make_trainer(tiny_shards, never_clipped), [SMALL, SMALLER]), strict=True
    ):
        assert same(member, other)


@pytest.mark.parametrize("without_too", [False, True])
def test_a_step_that_can_not_be_recorded_is_compiled_without_graphs(
    tiny_shards: Path, monkeypatch: pytest.MonkeyPatch, without_too: bool
) -> None:
    """As chosen on a GPU: CUDA graphs, else none, else nothing compiled; a capture's error comes at the second run."""
    modes: list[str] = []

    def compile_(function, *, mode, **_):
        runs = [0]

        def step(*inputs):
            modes.append(mode)
            runs[0] += 1
            if mode == GRAPHS and runs[0] == 2:
                raise RuntimeError("CUDA error: operation not permitted when stream is capturing")
            if mode == "default" and without_too:
                raise RuntimeError("no C++ compiler")
            return function(*inputs)

        return step

    monkeypatch.setattr(torch, "compile", compile_)
    eager = train(make_trainer(tiny_shards), [SMALL])[0]
    trainer = make_trainer(tiny_shards, "optim.compile=reduce-overhead")
    trainer.recipe = override(trainer.recipe, ["optim.compile=auto"])
    (member,) = train(trainer, [SMALL])
    assert trainer.mode == ("off" if without_too else "default")
    assert modes[:3] == [GRAPHS, GRAPHS, "default"]
    assert "with CUDA graphs" in trainer.warnings[0] and "capturing" in trainer.warnings[0]
    assert len(trainer.warnings) == 1 + without_too
    assert member.term_values() == eager.term_values()


def test_a_replayed_graph_is_what_is_checked(
    tiny_shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A third run that differs from the first two, as a graph's replay may, is told; the member stays as it was."""
    runs = [0]

    def compile_(function, **_):
        def step(views, weights):
            runs[0] += 1
            total, values = function(views, weights)
            return (total, values) if runs[0] < 3 else (total * 2, values * 2)

        return step

    monkeypatch.setattr(torch, "compile", compile_)
    trainer = make_trainer(tiny_shards, "optim.compile=reduce-overhead", "optim.steps=2")
    train(trainer, [SMALL])
    assert runs == [5] and "differs from float32's" in trainer.warnings[0]


def test_processes_compile_in_turn(
    tiny_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While another process compiles, this one waits, and then finds what it compiled."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    compiled = threading.Event()

    def compile_(function, **_):
        compiled.set()
        return function

    monkeypatch.setattr(torch, "compile", compile_)
    trainer = make_trainer(tiny_shards, "optim.compile=default", "optim.steps=2")
    with take_lock(tmp_path / "engine.lock"):
        work = threading.Thread(target=train, args=(trainer, [SMALL]))
        work.start()
        assert not compiled.wait(2.0)
    work.join()
    assert compiled.is_set()
    with take_lock(tmp_path / "engine.lock"):
        train(make_trainer(tiny_shards, "optim.steps=2"), [SMALL])


def test_graphs_are_chosen_where_a_step_is_whole() -> None:
    def mode(compile_: str, device: str, whole: bool) -> str:
        return compile_mode(Optim(compile=compile_), torch.device(device), whole=whole)

    assert mode("auto", "cuda", True) == GRAPHS
    assert mode("auto", "cuda", False) == mode("default", "cuda", True) == "default"
    assert mode("auto", "cpu", True) == mode("off", "cuda", True) == "off"


def test_branches_say_which_terms_share_a_graph() -> None:
    every = branches(TERM_NAMES)
    assert every.terms(sound=True) == TERM_NAMES
    assert {n for n in TERM_NAMES if n not in every.terms(sound=False)} == {
        n for n in TERM_NAMES if "audio" in n
    }
    assert branches([n for n in TERM_NAMES if n != "rgb/shuffle"]) == every
    assert branches(["rgb/predict"]).terms(sound=True) == ("rgb/predict", "rgb/reconstruct")
    shuffle = branches(["rgb/shuffle"])
    assert shuffle.ordered == ("rgb",) and "rgb/backward" in shuffle.terms(sound=True)
    heard = branches(["audio/predict"])
    assert not heard.misaligned and heard.terms(sound=True) == (
        "audio/predict",
        "audio/reconstruct",
    )
    seen = branches(["rgb/to_flow"])
    assert seen.networks == ("rgb",) and seen.modalities == ("rgb", "flow")
    assert "flow/to_rgb" not in seen.terms(sound=True)
    for name in TERM_NAMES:
        assert name in branches([name]).terms(sound=True), "what asks for them can be computed"
