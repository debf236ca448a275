"""Cheaper members: who is dropped, against Optuna's pruner and members trained alone; and where children start."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from optuna.pruners._successive_halving import _is_trial_promotable_to_next_rung
from optuna.study import StudyDirection

from engine.core.recipe import Search, load_recipe, override
from engine.core.runtime import choose_runtime, make_deterministic
from engine.data.shards.index import ClipIndex
from engine.data.views import Views
from engine.features.extract import LabelledClips
from engine.objective.terms import check_weights
from engine.search.cohort import MemberResult, evaluate_cohort, first_step, promoted, rungs
from engine.search.members import Proposal
from engine.train.member import Member
from engine.train.memory import CohortMemory
from engine.train.trainer import Trainer

TINY = Path(__file__).parents[1] / "tiny.toml"
JOBS = [
    Proposal(0, weights)
    for weights in (
        check_weights({"rgb/to_flow": 1.0, "rgb/predict": 0.3}),
        check_weights({"rgb/reconstruct": 1.0}),
        check_weights({"grey/colorize": 0.7, "distill/grey@2": 1.0}),
        check_weights({"rgb/backward": 0.2, "rgb/predict": 0.9}),
        check_weights({"rgb/shuffle": 1.0}),
    )
]
SEED = 3
Cohort = tuple[Trainer, LabelledClips]


def cohort_of(tiny_shards: Path, *changes: str) -> Cohort:
    runtime = choose_runtime("cpu")
    make_deterministic(runtime)
    recipe = override(load_recipe(TINY), ["optim.steps=4", *changes])
    trainer = Trainer(recipe, ClipIndex([tiny_shards / "unlabelled"]), runtime)
    labelled = LabelledClips(ClipIndex([tiny_shards / "labelled"]), recipe, runtime=runtime)
    return trainer, labelled


@pytest.fixture(scope="module")
def full(tiny_shards: Path) -> list[MemberResult]:
    """Every job without halving."""
    return evaluate_cohort(*cohort_of(tiny_shards), members=JOBS, seeds=[SEED])


@pytest.fixture(scope="module")
def halved(tiny_shards: Path) -> list[MemberResult]:
    trainer, labelled = cohort_of(tiny_shards, "search.halving=true")
    return evaluate_cohort(trainer, labelled, members=JOBS, seeds=[SEED])


def same(one: MemberResult, other: MemberResult) -> bool:
    names = ("state", "fitness", "reason", "results", "seeds", "learnt", "rungs", "steps")
    if not all(getattr(one, name) == getattr(other, name) for name in names):
        return False
    if one.rgb is None or other.rgb is None:
        return one.rgb is other.rgb
    return all(torch.equal(one.rgb[name], other.rgb[name]) for name in one.rgb)


@pytest.mark.parametrize(
    "fitnesses",
    [[0.3], [0.1, 0.2], [0.2, 0.1, 0.3], [0.4, 0.4, 0.4], [0.1, 0.3, 0.3, 0.2, 0.3, 0.0], []],
)
def test_who_is_promoted_is_optunas_rule(fitnesses: list[float]) -> None:
    expected = [
        _is_trial_promotable_to_next_rung(
            value, list(fitnesses), reduction_factor=2, study_direction=StudyDirection.MAXIMIZE
        )
        for value in fitnesses
    ]
    assert promoted(fitnesses) == expected


def test_where_members_are_looked_at() -> None:
    halving, collapse = Search(halving=True), Search(collapse_rank=2.0)
    assert rungs(halving, first=0, steps=60) == (15, 30)
    assert rungs(collapse, first=0, steps=60) == (15,)
    assert rungs(Search(), first=0, steps=60) == ()
    assert rungs(halving, first=30, steps=60) == (38, 45)
    assert rungs(halving, first=0, steps=2) == (1,)
    assert rungs(halving, first=0, steps=1) == ()
    assert first_step(Search(warm_start_steps=0.25), 60) == 45
    assert first_step(Search(warm_start_steps=1.0), 60) == 0
    assert first_step(Search(warm_start_steps=0.001), 60) == 59


def test_the_worse_half_is_dropped_at_each_rung(
    tiny_shards: Path, full: list[MemberResult], halved: list[MemberResult]
) -> None:
    trainer, labelled = cohort_of(tiny_shards, "search.halving=true")
    alone = [evaluate_cohort(trainer, labelled, members=[job], seeds=[SEED])[0] for job in JOBS]
    for one, other in zip(alone, full, strict=True):  # nobody to lose against
        assert [at for at, _ in one.rungs] == [1, 2] and one.steps == 4
        assert one.results == other.results and one.fitness == other.fitness
    going = list(range(len(JOBS)))
    for rung in (0, 1):
        seen = [alone[i].rungs[rung][1] for i in going]
        kept = [i for i, stays in zip(going, promoted(seen), strict=True) if stays]
        for i in set(going) - set(kept):
            at = alone[i].rungs[rung]
            assert halved[i].state == "pruned" and halved[i].fitness is None
            assert halved[i].rungs == alone[i].rungs[: rung + 1] and halved[i].steps == at[0]
            assert halved[i].reason == (
                f"fitness {at[1]:.4f} at step {at[0]} is in the worse half of {len(going)} members"
            )
            assert halved[i].rgb is None and halved[i].learnt["terms"] and halved[i].seconds > 0
        going = kept
    assert 0 < len(going) < len(JOBS)
    for i in going:
        assert halved[i].state == "complete" and same(halved[i], alone[i])


def test_halving_compares_the_cohort_whatever_memory_holds(
    tiny_shards: Path, halved: list[MemberResult]
) -> None:
    trainer, labelled = cohort_of(tiny_shards, "search.halving=true")
    memory = CohortMemory(members_at_once=2)
    split = evaluate_cohort(trainer, labelled, members=JOBS, seeds=[SEED], memory=memory)
    assert all(same(one, other) for one, other in zip(split, halved, strict=True))
    pickle.loads(pickle.dumps((JOBS, split)))


@pytest.mark.parametrize("most", [2, 0])
def test_a_halved_cohort_out_of_memory_begins_again_with_fewer_at_once(
    most: int, tiny_shards: Path, halved: list[MemberResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, labelled = cohort_of(tiny_shards, "search.halving=true")
    warnings: list[str] = []
    trainer.warn = warnings.append
    original = Trainer.step_all

    def step_all(self: Trainer, members: Sequence[Member], views: Views) -> object:
        if len(members) > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return original(self, members, views)

    monkeypatch.setattr(Trainer, "step_all", step_all)
    results = evaluate_cohort(trainer, labelled, members=JOBS, seeds=[SEED])
    assert warnings[:2] == [
        "out of memory with 5 members at once: going on with 3",
        "out of memory with 3 members at once: going on with 2",
    ]
    if most:
        assert all(same(one, other) for one, other in zip(results, halved, strict=True))
    else:
        assert {r.state for r in results} == {"failed"}
        assert all(str(r.reason).startswith("out of memory: CUDA") for r in results)


def test_halving_compares_means_over_repeats(tiny_shards: Path) -> None:
    trainer, labelled = cohort_of(tiny_shards, "search.halving=true")
    alone = [
        [evaluate_cohort(trainer, labelled, members=[job], seeds=[seed])[0] for seed in (3, 4)]
        for job in JOBS[:3]
    ]
    both = evaluate_cohort(trainer, labelled, members=JOBS[:3], seeds=[3, 4])
    means = [(one.rungs[0][1] + other.rungs[0][1]) / 2 for one, other in alone]
    for mean, result in zip(means, both, strict=True):
        assert result.rungs[0] == (1, pytest.approx(mean)) and result.seeds == (3, 4)
    assert [len(r.rungs) > 1 or r.state == "complete" for r in both] == promoted(means)
    (best,) = (i for i, r in enumerate(both) if r.state == "complete")
    one, other = alone[best]
    assert both[best].results == one.results + other.results and both[best].steps == 8


def test_confirmations_use_a_bank_of_all_clips_alone(
    tiny_shards: Path, full: list[MemberResult]
) -> None:
    """A confirmation sees all clips: a bank of some of them is not used, and one of all saves decoding them again."""

    def results(size: int | str, *, confirm: bool) -> MemberResult:
        pair = cohort_of(tiny_shards, f"search.clip_bank={size}")
        return evaluate_cohort(*pair, members=JOBS[:1], seeds=[SEED], full=confirm)[0]

    assert same(results(4, confirm=True), full[0]) and not same(results(4, confirm=False), full[0])
    of_all = results('"1GiB"', confirm=True)
    assert same(of_all, results('"1GiB"', confirm=False)) and not same(of_all, full[0])


def test_a_failed_member_is_not_counted(tiny_shards: Path, halved: list[MemberResult]) -> None:
    trainer, labelled = cohort_of(tiny_shards, "search.halving=true")
    nothing = Proposal(0, check_weights({}))
    results = evaluate_cohort(trainer, labelled, members=[nothing, *JOBS], seeds=[SEED])
    assert results[0].state == "failed" and results[0].rungs == () and results[0].steps == 0
    assert all(same(one, other) for one, other in zip(results[1:], halved, strict=True))


def test_collapsed_members_are_stopped(tiny_shards: Path, full: list[MemberResult]) -> None:
    free = cohort_of(tiny_shards, "search.collapse_rank=0.5")
    assert all(
        same(one, other)
        for one, other in zip(evaluate_cohort(*free, members=JOBS, seeds=[SEED]), full, strict=True)
    )
    trainer, labelled = cohort_of(tiny_shards, "search.halving=true")
    member = trainer.member(JOBS[0].weights, seed=SEED)
    for step, views in trainer.rounds([member], seed=SEED):
        trainer.step(member, views)
        if step == 0:
            break
    (features,) = labelled.features([member.loss.rgb])
    values = torch.linalg.svdvals(features.double())
    share = values / values.sum()
    rank = float(torch.exp(-(share * share.log()).sum()))
    bound = cohort_of(tiny_shards, f"search.collapse_rank={rank + 1e-6}")
    stopped = evaluate_cohort(*bound, members=JOBS[:1], seeds=[SEED])
    assert stopped[0].state == "pruned" and stopped[0].steps == 1 and stopped[0].fitness is None
    assert stopped[0].reason == f"collapsed: effective rank {rank:.2f} at step 1"
    bound = cohort_of(tiny_shards, f"search.collapse_rank={rank - 1e-6}")
    assert evaluate_cohort(*bound, members=JOBS[:1], seeds=[SEED])[0].state == "complete"


def test_all_collapsed(tiny_shards: Path) -> None:
    for more in ("search.halving=false", "search.halving=true"):
        held = cohort_of(tiny_shards, "search.collapse_rank=1000.0", more)
        results = evaluate_cohort(*held, members=JOBS[:3], seeds=[SEED])
        assert {r.state for r in results} == {"pruned"}
        assert all(str(r.reason).startswith("collapsed") for r in results)


def test_a_child_starts_from_its_parents_end(tiny_shards: Path, tmp_path: Path) -> None:
    trainer, labelled = cohort_of(tiny_shards, "search.warm_start_steps=0.5")
    kept = tmp_path / "states" / "0.safetensors"
    parent = Proposal(0, JOBS[0].weights, keep=kept)
    child = Proposal(0, JOBS[2].weights, start=kept)
    (first,) = evaluate_cohort(trainer, labelled, members=[parent], seeds=[SEED, 4])
    by_hand = trainer.member(parent.weights, seed=SEED)
    for _, views in trainer.rounds([by_hand], seed=SEED):
        trainer.step(by_hand, views)
    member = trainer.member(child.weights, seed=SEED)
    member.loss.load_state_dict(by_hand.loss.state_dict())
    member.step = member.first = 2
    seen = []
    for step, views in trainer.rounds([member], seed=SEED):
        trainer.step(member, views)
        seen.append(step)
    assert seen == [2, 3]  # the batches of the schedule's second half
    # beside one that starts from the beginning
    warm, cold = evaluate_cohort(trainer, labelled, members=[child, JOBS[1]], seeds=[SEED])
    assert warm.state == "complete" and warm.steps == 2 and warm.rgb is not None
    assert all(torch.equal(warm.rgb[n], t) for n, t in member.loss.rgb.state_dict().items())
    (other,) = evaluate_cohort(trainer, labelled, members=[JOBS[1]], seeds=[SEED])
    assert same(cold, other) and cold.steps == 4
    (later,) = evaluate_cohort(trainer, labelled, members=[child], seeds=[SEED, 4])
    assert later.results[0] == warm.results[0] and later.results[1] != first.results[1]


def test_halving_compares_those_that_train_as_long(
    tiny_shards: Path, tmp_path: Path, halved: list[MemberResult]
) -> None:
    trainer, labelled = cohort_of(tiny_shards, "search.halving=true")
    kept = tmp_path / "0.safetensors"
    evaluate_cohort(
        trainer, labelled, members=[Proposal(0, JOBS[0].weights, keep=kept)], seeds=[SEED]
    )
    warm = [Proposal(0, job.weights, start=kept) for job in JOBS[1:3]]
    mixed = evaluate_cohort(trainer, labelled, members=[*warm, *JOBS], seeds=[SEED])
    own = evaluate_cohort(trainer, labelled, members=warm, seeds=[SEED])
    assert all(same(one, other) for one, other in zip(mixed, [*own, *halved], strict=True))
    assert all(at in (1, 2) for result in own for at, _ in result.rungs)


def test_a_pruned_member_keeps_no_end(tiny_shards: Path, tmp_path: Path) -> None:
    held = cohort_of(tiny_shards, "search.collapse_rank=1000.0")
    job = Proposal(0, JOBS[0].weights, keep=tmp_path / "0.safetensors")
    evaluate_cohort(*held, members=[job], seeds=[SEED])
    assert list(tmp_path.iterdir()) == []


def test_starts_that_do_not_fit_fail_their_member_alone(tiny_shards: Path, tmp_path: Path) -> None:
    trainer, labelled = cohort_of(tiny_shards)
    kept, broken = tmp_path / "0.safetensors", tmp_path / "1.safetensors"
    evaluate_cohort(
        trainer, labelled, members=[Proposal(0, JOBS[0].weights, keep=kept)], seeds=[SEED]
    )
    broken.write_bytes(kept.read_bytes()[:-100])
    starts = [kept, broken, tmp_path / "2.safetensors"]
    jobs = [Proposal(0, JOBS[1].weights, start=start) for start in starts]
    results = evaluate_cohort(trainer, labelled, members=jobs, seeds=[SEED])
    assert [r.state for r in results] == ["complete", "failed", "failed"]
    assert "1.safetensors: not a readable safetensors file" in str(results[1].reason)
    assert "2.safetensors: no such checkpoint" in str(results[2].reason)
    (other,) = evaluate_cohort(trainer, labelled, members=jobs[:1], seeds=[4])
    assert other.reason == f"{kept}: ends of seed {SEED}, not of seed 4"
    wider, judged = cohort_of(tiny_shards, "objective.embed_dim=9")
    (misfit,) = evaluate_cohort(wider, judged, members=jobs[:1], seeds=[SEED])
    assert misfit.state == "failed" and "has shape" in str(misfit.reason)
