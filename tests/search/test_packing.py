"""Which members make a job: shares of a generation, whole generations, and the end states that children start from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from engine.core.recipe import load_recipe, override
from engine.core.runtime import Clock
from engine.search.packing import Planner, job_sizes, split
from engine.search.study import SearchStudy
from engine.search.worker import Cohort
from tests.runs import TINY


def plan(
    folder: Path,
    *settings: str,
    workers: int,
    at_once: int | None = None,
    storage: str | None = None,
) -> tuple[Planner, SearchStudy]:
    base = ["search.population=4", "search.rounds=8", "search.generation=4"]
    recipe = override(load_recipe(TINY), [*base, *settings])
    study = SearchStudy(
        recipe.search, storage=storage, name="plan", seed=0, recipe_hash="same in all"
    )
    folder.mkdir(exist_ok=True)
    options: dict[str, Any] = {"workers": workers, "members_at_once": at_once}
    return Planner(recipe, study, checkpoints=folder, clock=Clock(), **options), study


def tell(study: SearchStudy, *trials: int) -> None:
    for trial in trials:
        study.tell(trial, fitness=0.1 + trial / 100, attributes={})


def trials(cohorts: list[Cohort]) -> list[tuple[int, ...]]:
    return [cohort.numbers for cohort in cohorts]


def test_a_generation_is_shared_out_among_the_workers(tmp_path: Path) -> None:
    planner, study = plan(tmp_path, workers=2)
    first = planner.cohorts(2)
    assert sorted(sum(trials(first), ())) == [0, 1, 2, 3] and [len(c.numbers) for c in first] == [
        2,
        2,
    ]
    assert planner.cohorts(1) == []  # the next generation waits
    tell(study, 0, 1, 2, 3)
    second = planner.cohorts(1)  # only one of the workers is idle yet
    assert trials(second) == [(4, 5)] and trials(planner.cohorts(1)) == [(6, 7)]
    assert second[0].keep_from == pytest.approx(0.13) and first[0].keep_from == float("-inf")


def test_one_worker_gets_a_whole_generation_and_a_limit_holds(tmp_path: Path) -> None:
    assert trials(plan(tmp_path, workers=1)[0].cohorts(1)) == [(0, 1, 2, 3)]
    planner, _ = plan(tmp_path, workers=1, at_once=3)
    assert [len(c.numbers) for c in planner.cohorts(1) + planner.cohorts(1)] == [3, 1]


@pytest.mark.parametrize("method", ["evolution", "random"])
def test_generations_have_seeds_of_their_own(tmp_path: Path, method: str) -> None:
    """No cohort mixes two, whatever the workers, and no seed is another search's or a confirmation's."""
    options = (f"search.method={method}", "search.seeds=generation", "search.repeats=2")
    seeds: dict[tuple[int, ...], tuple[int, ...]] = {}
    for at_once in (1, 3, 8):
        planner, study = plan(tmp_path, *options, workers=3, at_once=at_once)
        done: set[int] = set()
        while not study.finished:
            cohorts = planner.cohorts(2)
            assert len(cohorts) <= 2
            for cohort in cohorts:
                start = {study.generation(number).start for number in cohort.numbers}
                assert seeds.setdefault(tuple(start), cohort.seeds) == cohort.seeds
                tell(study, *cohort.numbers)
                done.update(cohort.numbers)
        assert done == set(range(12))
    assert sorted(seeds) == [(0,), (4,), (8,)] and seeds[0,] == (0, 1)
    every = [seed for each in seeds.values() for seed in each]
    assert len(set(every)) == 6 and all(2**30 <= seed < 2**31 for seed in every[2:])
    same, _ = plan(tmp_path, "search.method=random", workers=3)
    assert {cohort.seeds for cohort in same.cohorts(3)} == {(0,)}


def test_what_a_kill_left_of_a_generation_is_no_cohort_with_the_next(tmp_path: Path) -> None:
    options = ("search.method=random", "search.seeds=generation")
    storage = f"sqlite:///{tmp_path / 'study.db'}"
    planner, study = plan(tmp_path, *options, workers=2, storage=storage)
    assert trials(planner.cohorts(2)) == [(0, 1), (2, 3)]
    tell(study, 2, 3)
    # the driver is killed, and one worker goes on
    again, _ = plan(tmp_path, *options, workers=1, storage=storage)
    assert trials(again.cohorts(3)) == [(0, 1), (4, 5, 6, 7), (8, 9, 10, 11)]


def test_children_of_parents_with_other_seeds_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"search\.seeds = same"):
        plan(tmp_path, "search.warm_start=true", "search.seeds=generation", workers=1)


def test_members_that_need_no_other_are_handed_out_ahead(tmp_path: Path) -> None:
    planner, _ = plan(tmp_path, "search.method=random", workers=3, at_once=2)
    assert [len(c.numbers) for c in planner.cohorts(3) + planner.cohorts(3)] == [2] * 6
    assert planner.cohorts(3) == []


def test_with_halving_a_generation_told_in_part_is_trained_again_as_a_whole(tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path / 'study.db'}"
    planner, study = plan(tmp_path, "search.halving=true", workers=3, storage=storage)
    (whole,) = planner.cohorts(3)
    assert whole.numbers == (0, 1, 2, 3)
    tell(study, 1, 3)
    # the driver is killed
    again, reopened = plan(tmp_path, "search.halving=true", workers=3, storage=storage)
    (same,) = again.cohorts(3)
    assert same.numbers == (0, 1, 2, 3) and same.members == whole.members
    assert [reopened.is_done(n) for n in same.numbers] == [False, True, False, True]
    tell(reopened, 0, 2)
    assert trials(again.cohorts(3)) == [(4, 5, 6, 7)]


def test_with_halving_generations_are_never_mixed(tmp_path: Path) -> None:
    settings = ("search.halving=true", "search.method=random", "search.population=6")
    planner, _ = plan(tmp_path, *settings, workers=2)
    cohorts = [*planner.cohorts(1), *planner.cohorts(2), *planner.cohorts(2)]
    assert trials(cohorts) == [(0, 1, 2, 3), (4, 5), (6, 7, 8, 9), (10, 11, 12, 13)]


def test_children_start_from_their_parents_states_which_are_kept_as_long(tmp_path: Path) -> None:
    planner, study = plan(tmp_path, "search.warm_start=true", workers=1)
    done: list[int] = []
    while cohorts := planner.cohorts(1):
        for cohort in cohorts:
            for member in cohort.members:
                parent = member.parent
                assert member.start == (None if parent is None else planner.state(parent))
                assert member.start is None or member.start.exists(), "a parent's state was deleted"
                assert member.keep == planner.state(member.number)
                member.keep.touch()
            for trial in cohort.numbers:
                tell(study, trial)
                done.append(trial)
                planner.drop_states()
    kept = {int(path.stem[-5:]) for path in tmp_path.glob("member-*")}
    assert len(done) == 12 and kept == {8, 9, 10, 11}, "the population is the last four"


def test_without_warm_start_no_state_is_kept(tmp_path: Path) -> None:
    (cohort,) = plan(tmp_path, workers=1)[0].cohorts(1)
    assert all(member.start is None and member.keep is None for member in cohort.members)


def test_a_lost_cohorts_members_are_tried_alone(tmp_path: Path) -> None:
    (cohort,) = plan(tmp_path, workers=1)[0].cohorts(1)
    parts = split(cohort)
    assert trials(parts) == [(0,), (1,), (2,), (3,)]
    assert [part.members[0] for part in parts] == list(cohort.members)
    assert {part.seeds for part in parts} == {cohort.seeds}


@pytest.mark.parametrize(
    ("generation", "workers", "at_once", "sizes"),
    [(16, 4, None, [4] * 4), (5, 2, None, [3, 2]), (2, 8, None, [1, 1]), (8, 2, 3, [3, 3, 2])],
)
def test_sizes_of_jobs(
    generation: int, workers: int, at_once: int | None, sizes: list[int]
) -> None:
    search = load_recipe(TINY).search
    assert job_sizes(search, generation, workers=workers, members_at_once=at_once) == sizes
