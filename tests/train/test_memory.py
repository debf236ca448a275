"""How many members memory holds, and cohorts that find out that it does not."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from engine.core import runtime
from engine.core.recipe import load_recipe, override
from engine.core.runtime import choose_runtime, is_out_of_memory, make_deterministic
from engine.data.shards.index import ClipIndex
from engine.data.views import Views
from engine.features.extract import LabelledClips
from engine.objective.lossfile import random_weights
from engine.objective.terms import check_weights
from engine.search.cohort import MemberResult, evaluate_cohort
from engine.search.members import Proposal
from engine.search.worker import Cohort, CohortEvaluator, CohortFactory
from engine.train import memory as train_memory
from engine.train.member import Member
from engine.train.memory import CohortMemory
from engine.train.trainer import DeviceFailed, NonFiniteLoss, Trainer

TINY = Path(__file__).parents[1] / "tiny.toml"
RECIPE = override(load_recipe(TINY), ["optim.steps=2"])
LOSSES = [check_weights({"rgb/reconstruct": 1.0, "rgb/predict": i / 10}) for i in range(5)]
JOBS = [Proposal(0, loss) for loss in LOSSES]


@pytest.fixture
def warnings() -> list[str]:
    return []


def new_trainer(shards: Path, warnings: list[str]) -> Trainer:
    chosen = choose_runtime("cpu")
    make_deterministic(chosen)
    return Trainer(RECIPE, ClipIndex([shards / "unlabelled"]), chosen, warn=warnings.append)


@pytest.fixture
def trainer(tiny_shards: Path, warnings: list[str]) -> Trainer:
    return new_trainer(tiny_shards, warnings)


@pytest.fixture(scope="module")
def labelled(tiny_shards: Path) -> LabelledClips:
    index = ClipIndex([tiny_shards / "labelled"])
    return LabelledClips(index, RECIPE, runtime=choose_runtime("cpu"))


@pytest.fixture(scope="module")
def all_at_once(tiny_shards: Path, labelled: LabelledClips) -> list[MemberResult]:
    """What memory for all members comes to."""
    return evaluate_cohort(new_trainer(tiny_shards, []), labelled, members=JOBS, seeds=[0])


def limit_members(monkeypatch: pytest.MonkeyPatch, most: int, error: Exception) -> list[int]:
    """Let a step run out of memory where more than ``most`` members are trained; notes how many were."""
    sizes: list[int] = []
    original = Trainer.step_all

    def step_all(self: Trainer, members: Sequence[Member], views: Views) -> object:
        sizes.append(len(members))
        if len(members) > most:
            raise error
        return original(self, members, views)

    monkeypatch.setattr(Trainer, "step_all", step_all)
    return sizes


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried ..."),
        MemoryError(),
    ],
    ids=["gpu", "cpu", "python"],
)
def test_a_cohort_out_of_memory_halves_itself(
    error: Exception,
    trainer: Trainer,
    labelled: LabelledClips,
    all_at_once: list[MemberResult],
    warnings: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sizes, memory = limit_members(monkeypatch, 2, error), CohortMemory()
    got = evaluate_cohort(trainer, labelled, members=JOBS, seeds=[0], memory=memory)
    steps = trainer.recipe.optim.steps
    assert sizes == [5, 3] + [2] * steps + [2] * steps + [1] * steps
    assert warnings == [
        "out of memory with 5 members at once: going on with 3",
        "out of memory with 3 members at once: going on with 2",
    ]
    for one, other in zip(all_at_once, got, strict=True):
        assert (
            one.fitness == other.fitness
            and one.learnt["terms"] == other.learnt["terms"]
            and one.fitness is not None
        )
    sizes.clear()
    evaluate_cohort(trainer, labelled, members=JOBS[:3], seeds=[0], memory=memory)
    assert sizes == [2] * steps + [1] * steps, "the size that fits is kept"


def test_a_member_too_large_for_memory_fails_alone_and_says_what_to_do(
    trainer: Trainer, labelled: LabelledClips, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit_members(monkeypatch, 0, torch.OutOfMemoryError("CUDA out of memory.\nmore"))
    results = evaluate_cohort(trainer, labelled, members=JOBS[:2], seeds=[0])
    for result in results:
        assert result.fitness is None
        assert result.reason == (
            "out of memory: CUDA out of memory.; try a smaller --set optim.batch_size or clip.size"
        )


def test_a_worker_out_of_memory_shrinks_its_own_cohorts_alone(
    tiny_shards: Path, tmp_path: Path
) -> None:
    """Two workers, one of which holds two members at once: the other trains all, and the numbers are the same."""
    shards = [(tiny_shards / "unlabelled",), (tiny_shards / "labelled",)]
    factory = CohortFactory(
        RECIPE,
        *shards,
        data="",
        checkpoints=tmp_path,
        device="cpu",
        members_at_once=None,
    )

    def worker() -> CohortEvaluator:
        return CohortEvaluator(factory, *map(ClipIndex, shards), choose_runtime("cpu"))

    large, small = worker(), worker()
    sizes: dict[str, list[int]] = {"large": [], "small": []}
    for name, most in (("large", 99), ("small", 2)):
        trainer = {"large": large, "small": small}[name].trainer

        def step_all(members, views, most=most, seen=sizes[name], real=trainer.step_all):
            seen.append(len(members))
            if len(members) > most:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return real(members, views)

        trainer.step_all = step_all  # type: ignore[method-assign]
    cohort = Cohort(tuple(Proposal(i, loss) for i, loss in enumerate(LOSSES[:3])), (0,))
    told: list[object] = []
    results = [evaluator(cohort, told.append) for evaluator in (small, large, small)]
    assert max(sizes["large"]) == min(sizes["large"]) == 3
    assert sizes["small"].count(3) == 1, "found out once, and kept"
    assert [len(result.warnings) for result in results] == [1, 0, 0]
    first, *others = ([one.fitness for one in result.results] for result in results)
    assert all(other == first for other in others) and None not in first


def test_other_errors_are_not_taken_for_a_lack_of_memory(
    trainer: Trainer, labelled: LabelledClips, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit_members(monkeypatch, 0, RuntimeError("a bug"))
    with pytest.raises(RuntimeError, match="a bug"):
        evaluate_cohort(trainer, labelled, members=JOBS[:2], seeds=[0])


def test_an_allocation_that_really_fails_is_known_as_one() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
    assert not is_out_of_memory(RuntimeError("shape mismatch"))
    assert not is_out_of_memory(ValueError("can't allocate memory"))


def test_members_at_once_follow_free_memory(
    trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    parameters = sum(p.nbytes for p in trainer.initial_loss(0).parameters())
    step = 4 * 4 * parameters * trainer.runtime.threads
    for members, want in ((3.5, 3), (1.2, 1), (0.0, 1), (99.0, 5)):
        free = (step + members * 4 * parameters) / train_memory.SHARE
        monkeypatch.setattr(train_memory, "free_memory", lambda _, free=free: int(free))
        memory = CohortMemory()
        assert memory.members_that_fit(trainer, LOSSES, seed=0) == want
        assert memory.members_at_once == (None if want == 5 else want)


@pytest.mark.parametrize(
    ("error", "want"),
    [
        (NonFiniteLoss("loss is nan at step 0"), 5),
        (ValueError("the loss has no weight above 0"), 5),
        (RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED"), 5),
        (torch.OutOfMemoryError("CUDA out of memory."), 1),
        (MemoryError(), 1),
        (torch.AcceleratorError("CUDA error: device-side assert triggered", 710), None),
    ],
    ids=["nan", "no term", "library", "memory", "host memory", "device"],
)
def test_a_measurement_that_fails_ends_nothing(
    error: Exception, want: int | None, trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object, **__: object) -> tuple[int, int]:
        raise error

    monkeypatch.setattr(train_memory, "memory_needed", fails)
    memory = CohortMemory()
    if want is None:
        with pytest.raises(DeviceFailed, match="--resume"):
            memory.members_that_fit(trainer, LOSSES, seed=0)
    else:
        assert memory.members_that_fit(trainer, LOSSES, seed=0) == want
        assert memory.members_at_once is None


class Allocator:
    """Stands for a GPU's: so much is allocated, has been at most, and is reserved."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, idle: int) -> None:
        self.allocated = self.peak = 0
        self.idle = idle
        functions = {
            "memory_allocated": lambda _: self.allocated,
            "max_memory_allocated": lambda _: self.peak,
            "memory_reserved": lambda _: self.allocated + self.idle,
            "reset_peak_memory_stats": lambda _: setattr(self, "peak", self.allocated),
        }
        for name, function in functions.items():
            monkeypatch.setattr(torch.cuda, name, function)

    def take(self, size: int) -> None:
        self.allocated += size
        self.peak = max(self.peak, self.allocated)


@pytest.mark.parametrize("idle", [0, 5000])
def test_what_a_gpu_holds_for_its_graphs_is_not_free(
    idle: int, trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CUDA graphs replay in memory of their own, which no peak shows; and a step begins with an empty cache."""
    gpu = Allocator(monkeypatch, idle=idle)
    new, steps = Trainer.member, []

    def member(self: Trainer, *args: object, **kwargs: object) -> Member:
        gpu.take(100)
        return new(self, *args, **kwargs)  # type: ignore[arg-type]

    def step(member: Member, views: Views) -> float:
        steps.append((gpu.allocated, member.active))
        gpu.take(700)  # 300 of it are gradients, which stay
        gpu.allocated -= 400
        return 0.0

    def free() -> None:
        if steps:
            gpu.allocated -= 300 * (gpu.allocated > 300)

    monkeypatch.setattr(Trainer, "member", member)
    monkeypatch.setattr(trainer, "step", step)
    monkeypatch.setattr(trainer, "free_memory", free)
    losses = [*LOSSES[:2], check_weights({"rgb/to_flow": 0.1}), random_weights(0)]
    largest = train_memory._largest(trainer, losses)
    assert largest == losses[-1]
    per_member, per_step = train_memory._measured(trainer, largest, seed=0)
    assert [held for held, _ in steps] == [100, 100], "what a step leaves is not there at the next"
    assert per_member == 400 and per_step == max(700, idle)


def test_free_memory_is_that_of_this_machine() -> None:
    free = runtime.free_memory(torch.device("cpu"))
    assert 2**28 < free < 2**50
    block = bytearray(2**30)
    block[::4096] = b"x" * len(block[::4096])
    assert runtime.free_memory(torch.device("cpu")) < free - 2**29


@pytest.mark.gpu
def test_a_gpu_measures_its_members(tiny_shards: Path) -> None:
    chosen = choose_runtime("cuda")
    trainer = Trainer(load_recipe(TINY), ClipIndex([tiny_shards / "unlabelled"]), chosen)
    assert CohortMemory().members_that_fit(trainer, LOSSES, seed=0) == 5
    member, step = train_memory._measured(trainer, LOSSES[1], seed=0)
    parameters = sum(p.nbytes for p in trainer.initial_loss(0).parameters())
    assert 3 * parameters <= member <= 6 * parameters and step > parameters
