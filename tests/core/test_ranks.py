"""Several processes as one: two with half the batch each beside one with all of it, and what they exchange.

All comparisons of two processes are made by one pair of them, since starting a pair takes seconds.
"""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from engine.core.launch import OWN_STORE, Ended, launch, may_miss_each_other, ranks_of_environment
from engine.core.ranks import (
    ALONE,
    PeerLost,
    Ranks,
    RanksDiffer,
    SyncedBatchNorm,
    gathered,
    joined,
    sync_batch_norm,
    without_others,
)
from engine.core.recipe import load_recipe, override
from engine.core.runtime import choose_runtime, make_deterministic
from engine.data.shards.index import ClipIndex
from engine.objective.lossfile import load_loss
from engine.train.trainer import Trainer

TINY = Path(__file__).parents[1] / "tiny.toml"
FROZEN = ["optim.batch_norm=frozen"]
CASES: dict[str, tuple[str, int, list[str]]] = {
    "all terms, sgd": ("equal", 6, [*FROZEN, "optim.name=sgd", "optim.lr=1e-3"]),
    "all terms, adamw": ("equal", 4, [*FROZEN, "optim.lr=1e-4"]),
    "without sound, synced batch norm": (
        "sec4",
        2,
        ["optim.batch_norm=sync", "optim.name=sgd", "optim.lr=1e-3"],
    ),
    "all terms, local batch norm": ("equal", 2, ["objective.units=raw"]),
}
"""Loss, steps and changes to the tiny recipe."""


def losses(case: str, shards: Path, ranks: Ranks) -> dict[str, Any]:
    """Each step's loss and, of the first step, every term."""
    loss, steps, changes = CASES[case]
    recipe = override(load_recipe(TINY), [f"optim.steps={steps}", "optim.batch_size=8", *changes])
    runtime = choose_runtime("cpu")
    make_deterministic(runtime)
    trainer = Trainer(recipe, ClipIndex([shards / "unlabelled"]), runtime, ranks=ranks)
    member = trainer.member(load_loss(loss), seed=0, alone=True)
    found, terms = [], {}
    for _, views in trainer.rounds([member], seed=0):
        found.append(trainer.step(member, views))
        terms = terms or member.term_values()
    state = torch.cat([t.flatten().double() for t in member.loss.state_dict().values()])
    return {"losses": found, "terms": terms, "state": state.sum().item()}


def small_checks(ranks: Ranks) -> dict[str, Any]:
    """What ranks exchange, on tensors small enough to know the answer."""
    mine = torch.tensor([1.0 + ranks.rank, 10.0], requires_grad=True)
    everyone = gathered(mine, ranks)
    (everyone.prod(1).sum() * (1 + ranks.rank)).backward()
    own = mine.grad
    mine.grad = None
    everyone = gathered(mine, ranks, summed=True)
    (everyone.prod(1).sum() * (1 + ranks.rank)).backward()
    with without_others():
        alone = gathered(mine.detach(), ranks)
    assert own is not None and mine.grad is not None
    said = []
    for attempt in (
        lambda: ranks.agree({"data": "a"}),
        lambda: ranks.agree({"data": f"of {ranks.rank}"}),
        lambda: ranks.shared(lambda: int("x")),
    ):
        try:
            attempt()
            said.append("")
        except ValueError as error:
            said.append(f"{type(error).__name__}: {error}")
    return {
        "gathered": everyone.tolist(),
        "own": own.tolist(),
        "summed": mine.grad.tolist(),
        "alone": alone.tolist(),
        "said": said,
        "shared": ranks.shared(lambda: f"from {ranks.rank}"),
        "norm": batch_norm_of_part(ranks),
    }


def batch_norm_of_part(ranks: Ranks) -> dict[str, Any]:
    norm = nn.Sequential(nn.BatchNorm3d(3))
    sync_batch_norm(norm, ranks)
    assert isinstance(norm[0], SyncedBatchNorm)
    x = norm_input()[ranks.rank :: 2].clone().requires_grad_()
    y = norm(x)
    (y * weights_like(norm_input())[ranks.rank :: 2]).sum().backward()
    parameters = [norm[0].weight.grad, norm[0].bias.grad]
    ranks.sum_(parameters)  # type: ignore[arg-type]
    assert x.grad is not None and norm[0].running_var is not None
    stats = [norm[0].running_mean, norm[0].running_var]
    return {
        "y": y.tolist(),
        "x": x.grad.tolist(),
        "rest": [t.tolist() for t in [*parameters, *stats]],  # type: ignore[union-attr]
    }


def norm_input() -> torch.Tensor:
    return torch.randn(4, 3, 2, 3, 3, generator=torch.Generator().manual_seed(1)) * 2 + 5


def weights_like(x: torch.Tensor) -> torch.Tensor:
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(2))


def work_of_two(shards: Path, out: Path, notes: Path) -> None:
    torch.set_num_threads(1)
    ranks = ranks_of_environment()
    assert ranks is not None
    with joined(ranks, torch.device("cpu")):
        told = {case: losses(case, shards, ranks) for case in CASES}
        told["small"] = small_checks(ranks)
    (out / f"rank-{ranks.rank}.json").write_text(json.dumps(told))


@pytest.fixture(scope="module")
def two(tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes found."""
    out = tmp_path_factory.mktemp("two")
    launch(work_of_two, tiny_shards, out, processes=2, restarts=0)
    return [json.loads((out / f"rank-{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_two_processes_equal_one(case: str, two: list[dict[str, Any]], tiny_shards: Path) -> None:
    """One of the eight clips has no sound, so that the ranks' counts differ."""
    one = losses(case, tiny_shards, ALONE)
    both = [each[case] for each in two]
    assert both[0] == both[1]  # to the bit, weights included
    apart = [abs(a - b) / abs(b) for a, b in zip(both[0]["losses"], one["losses"], strict=True)]
    print(f"{case}: losses differ by at most {max(apart):.1e}")
    if "local" in case:
        # each process normalises by its own half: another, noisier function of the same batch
        assert 1e-4 < max(apart) < 0.2
        return
    assert max(apart) < 1e-5
    assert both[0]["terms"] == pytest.approx(one["terms"], rel=2e-5, abs=1e-6)


@pytest.mark.slow
def test_what_ranks_exchange(two: list[dict[str, Any]]) -> None:
    for rank, told in enumerate(each["small"] for each in two):
        assert told["gathered"] == [[1.0, 10.0], [2.0, 10.0]]
        # d(prod)/d(first) = second = 10; each rank's loss is the sum times 1 + rank
        factor, own = 1 + rank, [10.0, 1.0 + rank]
        assert told["own"] == [factor * g for g in own]
        assert told["summed"] == [(1 + 2) * g for g in own]
        assert told["alone"] == [[1.0 + rank, 10.0]] * 2
        assert told["shared"] == "from 0"
        assert told["said"][0] == ""
        assert "rank 1 on" in told["said"][1] and "another data (of 1)" in told["said"][1]
        kind = "ValueError" if rank == 0 else "RanksDiffer"
        assert told["said"][2].startswith(kind) and "invalid literal" in told["said"][2]


@pytest.mark.slow
def test_synced_batch_norm_is_torchs_over_the_whole_batch(two: list[dict[str, Any]]) -> None:
    norm = nn.BatchNorm3d(3)
    x = norm_input().requires_grad_()
    y = norm(x)
    (y * weights_like(x)).sum().backward()
    assert norm.weight.grad is not None and norm.bias.grad is not None and x.grad is not None
    rest = [norm.weight.grad, norm.bias.grad, norm.running_mean, norm.running_var]
    for rank, told in enumerate(each["small"]["norm"] for each in two):
        torch.testing.assert_close(torch.tensor(told["y"]), y[rank::2])
        torch.testing.assert_close(torch.tensor(told["x"]), x.grad[rank::2])
        for found, expected in zip(told["rest"], rest, strict=True):
            assert expected is not None
            torch.testing.assert_close(torch.tensor(found), expected, rtol=1e-4, atol=1e-5)


def test_a_batch_is_shared_equally_or_not_at_all() -> None:
    assert Ranks(world=4).share_of(16) == 4
    assert Ranks(world=2).share_of(16, pieces=4) == 8
    with pytest.raises(ValueError, match="a multiple of 3"):
        Ranks(world=3).share_of(16)
    with pytest.raises(ValueError, match=r"in 4 pieces each .* a multiple of 8"):
        Ranks(world=2).share_of(12, pieces=4)


def test_alone_nothing_is_exchanged() -> None:
    x = torch.ones(2)
    ALONE.sum_([x])
    ALONE.agree({"x": 1})
    ALONE.broadcast_([x])
    assert ALONE.gather(x).shape == (1, 2) and ALONE.shared(lambda: 3) == 3 and ALONE.leads
    assert issubclass(RanksDiffer, ValueError)


def test_torchruns_restarts_need_their_own_store(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(OWN_STORE, raising=False)
    assert not may_miss_each_other()
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    assert may_miss_each_other()
    monkeypatch.setenv(OWN_STORE, "1")
    assert not may_miss_each_other()


def end(how: str, notes: Path) -> None:
    if how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if (notes / "final").exists():
        return
    (notes / "final").write_text("no restart helps here")
    raise SystemExit(1)


def test_processes_that_end_are_explained() -> None:
    with pytest.raises(Ended, match=r"process 0 ended: killed by SIGKILL; .* --resume"):
        launch(end, "killed", processes=1, restarts=0)
    with pytest.raises(ValueError, match="no restart helps here"):
        launch(end, "final", processes=1, restarts=1)


def lose_the_other(out: Path, notes: Path) -> None:
    """Rank 1 is killed amid an exchange; rank 0 writes what it is told, before the launcher ends it."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    ranks = ranks_of_environment()
    assert ranks is not None
    try:
        with joined(ranks, torch.device("cpu")):
            ranks.agree({"fact": 1})
            if ranks.rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            ranks.sum_([torch.ones(3)])
    except PeerLost as error:
        out.write_text(str(error))
        raise


def test_a_rank_whose_peer_is_gone_says_so(tmp_path: Path) -> None:
    with pytest.raises(Ended, match="killed by SIGKILL"):
        launch(lose_the_other, tmp_path / "said", processes=2, restarts=0)
    assert re.fullmatch(
        r"rank 0 on \S+: the connection to another process of this training was lost",
        (tmp_path / "said").read_text(),
    )
