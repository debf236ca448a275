"""The check before the first step: what it tells of, what it lets pass, and what it needs itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from engine.core.recipe import load_recipe, override
from engine.core.runtime import choose_runtime, cpu_has_bf16, make_deterministic
from engine.data.shards.index import ClipIndex
from engine.objective.terms import TERM_NAMES, check_weights
from engine.train import precision_check as train_check
from engine.train.member import FlatState, Member
from engine.train.precision_check import GRADIENT, CanNotCompile, check_step, twin, verdict
from engine.train.trainer import Trainer

TINY = Path(__file__).parents[1] / "tiny.toml"
SMALL = check_weights({"rgb/reconstruct": 1.0, "rgb/predict": 0.3})
OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


needs_bf16 = pytest.mark.skipif(not cpu_has_bf16(), reason="this CPU's bf16 can't be trusted")


def make_trainer(shards: Path, *changes: str) -> tuple[Trainer, list[str]]:
    recipe = override(load_recipe(TINY), ["optim.steps=2", *changes])
    runtime = choose_runtime("cpu", amp=recipe.optim.amp)
    make_deterministic(runtime)
    told: list[str] = []
    return Trainer(recipe, ClipIndex([shards / "unlabelled"]), runtime, warn=told.append), told


def trained(trainer: Trainer) -> Member:
    member = trainer.member(SMALL, seed=0)
    for _, views in trainer.rounds([member], seed=0):
        trainer.step(member, views)
    return member


def failing(error: Exception, *, times: int = 1000) -> Callable[..., dict[str, float]]:
    left = times

    def function(*_: object, **__: object) -> dict[str, float]:
        nonlocal left
        left -= 1
        if left < 0:
            return {}
        raise error

    return function


@needs_bf16
def test_no_memory_for_float32_is_told_and_ends_nothing(
    tiny_shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    want = trained(make_trainer(tiny_shards, "optim.amp=bf16")[0])
    trainer, told = make_trainer(tiny_shards, "optim.amp=bf16")
    monkeypatch.setattr(train_check, "_in_float32", failing(OUT_OF_MEMORY))
    got = trained(trainer)
    assert len(told) == 1 and "no memory for a first step in float32" in told[0]
    assert "bf16 goes unchecked" in told[0]
    assert got.term_values() == want.term_values()


@needs_bf16
def test_a_check_that_ran_out_of_memory_is_made_again(
    tiny_shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step itself does not fit: fewer members will, and are checked then."""
    trainer, told = make_trainer(tiny_shards, "optim.amp=bf16")
    real = train_check._as_configured
    monkeypatch.setattr(train_check, "_as_configured", failing(OUT_OF_MEMORY))
    with pytest.raises(torch.OutOfMemoryError):
        trained(trainer)
    asked: list[Member] = []

    def noted(member: Member, *args: object, **kwargs: object) -> dict[str, float]:
        asked.append(member)
        return real(member, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(train_check, "_as_configured", noted)
    trained(trainer)
    trained(trainer)
    assert len(asked) == 1 and told == []


@needs_bf16
def test_other_errors_of_float32_are_not_hidden(
    tiny_shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, _ = make_trainer(tiny_shards, "optim.amp=bf16")
    monkeypatch.setattr(train_check, "_in_float32", failing(KeyError("a bug")))
    with pytest.raises(KeyError, match="a bug"):
        trained(trainer)


def test_a_copy_for_the_check_takes_a_members_own_size(tiny_shards: Path) -> None:
    trainer, _ = make_trainer(tiny_shards)
    member = trainer.member(SMALL, seed=0)
    member.state = FlatState(member.loss, member.optimizer)
    copied = twin(member.loss)
    tensors = [*copied.parameters(), *copied.buffers()]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    assert sum(storages.values()) <= 1.01 * sum(t.nbytes for t in tensors)
    assert sum(storages.values()) < 0.4 * member.state.nbytes, "moments are not copied"
    for name, tensor in member.loss.state_dict().items():
        other = copied.state_dict()[name]
        assert torch.equal(other, tensor) and other.stride() == tensor.stride()
        assert other.data_ptr() != tensor.data_ptr() or tensor.numel() == 0


@pytest.mark.parametrize("kind", [RuntimeError, NotImplementedError, SyntaxError, OSError])
def test_a_compiler_may_fail_with_any_error(kind: type[Exception], tiny_shards: Path) -> None:
    """Triton's CompilationError, for one, is no RuntimeError."""
    trainer, _ = make_trainer(tiny_shards, "optim.compile=default")
    member = trainer.member(SMALL, seed=0)
    buffers = trainer.buffers
    assert buffers is not None
    buffers.evaluate = failing(kind("no way\nmore"))  # type: ignore[method-assign,assignment]
    _, views = next(trainer.rounds([member], seed=0))
    with pytest.raises(CanNotCompile, match=r"can't be compiled \(no way\)$"):
        check_step(member, views, buffers=buffers, runtime=trainer.runtime, warn=pytest.fail)
    buffers.evaluate = failing(kind("CUDA out of memory"))  # type: ignore[method-assign,assignment]
    expected = kind if issubclass(kind, RuntimeError) else CanNotCompile
    with pytest.raises(expected):
        check_step(member, views, buffers=buffers, runtime=trainer.runtime, warn=pytest.fail)


EXACT = dict.fromkeys(TERM_NAMES, 1.0) | {GRADIENT: 2.0}


def apart(**changes: float) -> dict[str, float]:
    """All terms 2 % off, and some by more."""
    found = {name: value * 1.02 for name, value in EXACT.items()}
    return found | {name.replace("__", "/"): value for name, value in changes.items()}


def test_a_few_terms_that_round_badly_are_no_alarm() -> None:
    assert verdict(apart(rgb__predict=1.4, grey__predict=0.7), EXACT, kind="bf16") is None
    assert verdict(apart() | {GRADIENT: 2.9}, EXACT, kind="bf16") is None
    assert verdict(EXACT | {"rgb/predict": 1.004}, EXACT, kind="float32") is None


def test_what_is_wrong_is_told_in_one_line() -> None:
    line = verdict(apart(rgb__predict=1.6), EXACT, kind="bf16")
    assert line is not None and "most in rgb/predict, which is 1.6, in float32 1" in line
    every = {name: value * 1.2 for name, value in EXACT.items()}
    line = verdict(every, EXACT, kind="bf16")
    assert line is not None and "by 0.2 in the median" in line
    assert verdict(apart(), EXACT, kind="float32") is not None
    nan = float("nan")
    assert verdict(apart(rgb__predict=nan), EXACT, kind="bf16") == "rgb/predict not finite"
    four = dict.fromkeys(TERM_NAMES[:4], nan)
    line = verdict(EXACT | four, EXACT, kind="bf16")
    assert line == f"{', '.join(TERM_NAMES[:3])}, ... not finite"
    assert verdict(EXACT | four, EXACT | four, kind="bf16") is None, "the member's own fault"
