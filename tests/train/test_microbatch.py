"""Steps in pieces: shares of every term, and the gradient of the pieces beside the whole batch's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from engine.core.ranks import ALONE, Ranks
from engine.core.recipe import load_recipe, override
from engine.core.runtime import choose_runtime, make_deterministic
from engine.data.shards.index import ClipIndex
from engine.data.views import Views
from engine.objective.lossfile import load_loss
from engine.objective.terms import BY_NAME, TERM_NAMES, LossWeights, Term
from engine.train.member import Member
from engine.train.microbatch import split
from engine.train.trainer import Trainer

TINY = Path(__file__).parents[1] / "tiny.toml"
HEARD = torch.tensor([1, 1, 0, 1, 0, 0, 1, 1], dtype=torch.bool)
SHIFTS = torch.tensor([1, 0, 0, 1, 0, 0, 0, 1], dtype=torch.bool)


class Rank(Ranks):
    """One of two ranks, whose exchange is known."""

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        whole = torch.stack([HEARD, SHIFTS]).to(x.dtype)
        return torch.stack([whole[:, rank::2] for rank in (0, 1)])


def views_of(heard: torch.Tensor, shifts: torch.Tensor) -> Views:
    number = torch.arange(len(heard), dtype=torch.float32)
    clip = {"rgb": number[:, None, None, None, None].expand(-1, 3, 2, 2, 2)}
    order = torch.zeros(len(heard), 2, dtype=torch.int64)
    return Views(clip, clip, None, heard, shifts, order)


@pytest.mark.parametrize("pieces", [1, 2])
def test_shares_are_counts_over_the_whole_batch(pieces: int) -> None:
    names = ("rgb/predict", "audio/predict", "rgb+flow/embed", "rgb+audio/embed", "rgb/align_audio")
    gradient, value = [], []
    for rank in (0, 1):
        own = views_of(HEARD[rank::2], SHIFTS[rank::2])
        parts, *shares = split(own, names, count=pieces, ranks=Rank(rank, 2))
        assert sum(map(len, parts)) == 4
        gradient.append(shares[0])
        value.append(shares[1])
        for number, part in enumerate(parts):
            assert part.whole is not None
            # the clips of this piece, of both ranks, in the order in which one process has them
            mine = [i for i in range(8) if i // 2 % pieces == number]
            assert part.whole.has_audio.tolist() == HEARD[mine].tolist()
            assert part.whole.has_shift.tolist() == SHIFTS[mine].tolist()
            count = HEARD[mine][rank::2].sum() / HEARD.sum()
            assert gradient[-1][number, 1] == pytest.approx(count.item())
    total = torch.stack(value).sum((0, 1))
    torch.testing.assert_close(total, torch.ones(5))  # every value counts once
    per_rank = gradient[0].sum(0)
    torch.testing.assert_close(per_rank[[0, 2, 3, 4]], torch.tensor([0.5, 1.0, 1.0, 1.0]))
    if pieces == 2:
        heard = [HEARD[[0, 1, 4, 5]].sum().item(), HEARD[[2, 3, 6, 7]].sum().item()]
        pairs = [n * (n - 1) for n in heard]
        torch.testing.assert_close(gradient[0][:, 3], torch.tensor([p / sum(pairs) for p in pairs]))


def test_a_piece_is_every_so_manyth_clip() -> None:
    part = views_of(HEARD, SHIFTS).microbatch(1, 4)
    assert part.clip["rgb"][:, 0, 0, 0, 0].tolist() == [1.0, 5.0]
    assert part.has_audio.tolist() == [True, False] and len(part) == 2
    assert part.clip["rgb"].is_contiguous(memory_format=torch.channels_last_3d)


def of_a_piece(term: Term) -> bool:
    """Whether a term compares clips of a batch with each other, or what is decoded with the batch's mean picture."""
    aims_at_pictures = not term.name.endswith("flow") and term.name != "flow/reconstruct"
    pictured = term.task in ("reconstruct", "colorize", "cross") and aims_at_pictures
    return term.task in ("embed", "align_audio") or pictured


def run(
    shards: Path, weights: LossWeights, changes: list[str], *, one_batch: bool = False
) -> tuple[list[float], Member]:
    recipe = override(
        load_recipe(TINY), ["optim.steps=6", "optim.batch_size=8", "optim.name=sgd", *changes]
    )
    runtime = choose_runtime("cpu")
    make_deterministic(runtime)
    trainer = Trainer(recipe, ClipIndex([shards / "unlabelled"]), runtime, ranks=ALONE)
    member = trainer.member(weights, seed=0, alone=True)
    seen = [views for _, views in trainer.rounds([member], seed=0)]
    if one_batch:
        seen = seen[:1] * len(seen)
    return [trainer.step(member, views) for views in seen], member


def test_pieces_equal_the_whole_batch(tiny_shards: Path) -> None:
    """Without what comes from a piece alone: batch norm's statistics, negatives, mean pictures, chance."""
    weights = {n: 0.0 if of_a_piece(BY_NAME[n]) else w for n, w in load_loss("equal").items()}
    changes = ["optim.batch_norm=frozen", "objective.units=raw"]
    whole, member = run(tiny_shards, weights, changes)
    pieces, split_up = run(tiny_shards, weights, [*changes, "optim.accumulate=2"])
    assert pieces == pytest.approx(whole, rel=1e-5)
    assert split_up.term_values() == pytest.approx(member.term_values(), rel=1e-4)
    state = member.loss.state_dict()
    for name, tensor in split_up.loss.state_dict().items():
        torch.testing.assert_close(tensor, state[name], rtol=1e-3, atol=1e-5)


def test_all_terms_train_in_pieces(tiny_shards: Path) -> None:
    changes = ["optim.accumulate=4", "optim.name=adamw", "optim.steps=10", "optim.lr=3e-3"]
    losses, member = run(tiny_shards, load_loss("equal"), changes, one_batch=True)
    assert set(member.term_values()) == set(TERM_NAMES)
    assert losses[-1] < 0.8 * losses[0]
