"""Members do not depend on who asks when: splits of asks, kills, releases, failures, rounds raised; in any method."""

from __future__ import annotations

import hashlib
from collections import Counter

import msgspec
import numpy as np
import pytest

from engine.core.recipe import Search
from engine.search.study import SearchStudy

METHODS = ("evolution", "cmaes", "random", "grid")
SMALL = Search(population=6, rounds=25, tournament=3, generation=4, cmaes_population=5)


def settings_of(method, **more):
    return msgspec.structs.replace(SMALL, method=method, **more)


def open_study(settings, *, storage=None):
    return SearchStudy(settings, storage=storage, name="search", seed=0, recipe_hash="abc")


def finish(study, member):
    """What becomes of a member depends on its number and weights alone."""
    fate = hashlib.sha256(f"fate {member.number}".encode()).digest()[0] / 256
    score = 0.3 + 0.1 * member.weights["rgb/predict"] - 0.05 * member.weights["flow/to_rgb"]
    if fate < 0.15:
        study.fail(member.number, reason="loss is nan")
    elif fate < 0.3:
        study.prune(member.number, rungs=[(25, score)], attributes={})
    else:
        study.tell(member.number, fitness=score, attributes={"seconds": 1.5})


def run(study):
    while not study.finished:
        asked = study.ask()
        assert asked
        for member in asked:
            finish(study, member)
    return study.members()


@pytest.mark.parametrize("method", METHODS)
def test_a_search_is_the_same_however_it_is_split_killed_and_resumed(method, tmp_path):
    """Several lives, each of which asks for some, loses some to dead workers, and ends at a random moment."""
    settings = settings_of(method)
    expected = run(open_study(settings))
    assert {m.state for m in expected} == {"complete", "failed", "pruned"}
    for seed in range(2):
        rng = np.random.default_rng(seed)
        path, told = tmp_path / f"{seed}.jsonl", Counter()
        done = 0
        while done < settings.population + settings.rounds:
            study = open_study(settings, storage=path)
            assert len(study.members()) == done == sum(told.values())
            out = {}
            for _ in range(rng.integers(1, 60)):  # then it is killed
                if rng.random() < 0.5:
                    limit = int(rng.integers(0, 7))
                    asked = study.ask(limit if rng.random() < 0.8 else None)
                    assert not out.keys() & {p.number for p in asked}, "handed out twice"
                    assert out or asked or limit == 0 or study.finished, "nobody could go on"
                    out |= {p.number: p for p in asked}
                elif out:
                    number = int(rng.choice(list(out)))
                    member = out.pop(number)
                    if rng.random() < 0.2:
                        study.release(number)
                    else:
                        finish(study, member)
                        told[number] += 1
            done = len(study.members())
        assert max(told.values()) == 1, "counted twice"
        assert study.members() == expected
        assert open_study(settings, storage=path).members() == expected


def test_without_waiting_nobody_waits_and_nothing_is_lost(tmp_path):
    settings = settings_of("evolution", synchronous=False)
    rng = np.random.default_rng(1)
    path, told, children = tmp_path / "study.jsonl", Counter(), set()
    study = open_study(settings, storage=path)
    while not study.finished:
        out = {}
        for _ in range(40):  # then it is killed
            free = 8 - len(out)
            complete = {m.number for m in study.members() if m.fitness is not None}
            new = study.ask(free)
            left = study.total - len(study.members()) - len(out)
            assert len(new) == min(free, left), "a worker had to wait"
            for proposal in new:
                assert proposal.number not in told, "proposed though it was done"
                if proposal.parent is not None:
                    assert proposal.parent in complete
                    children.add(proposal.number)
            out |= {p.number: p for p in new}
            if not out:
                break
            number = int(rng.choice(list(out)))
            finish(study, out.pop(number))
            told[number] += 1
        study = open_study(settings, storage=path)
    assert set(told.values()) == {1} and len(told) == 31
    assert len(children) > 15


@pytest.mark.parametrize("method", METHODS)
def test_rounds_may_be_raised_later(method, tmp_path):
    expected = run(open_study(settings_of(method)))
    for rounds in (3, 11, 25):
        study = open_study(settings_of(method, rounds=rounds), storage=tmp_path / "study.jsonl")
        run(study)
        assert study.finished and study.ask() == [] and study.ask(5) == []
    assert study.members() == expected


def test_asks_hand_out_at_most_the_limit_and_never_wait_without_need():
    study = open_study(settings_of("evolution"))
    assert study.ask(0) == []
    assert [p.number for p in study.ask(3)] == [0, 1, 2]
    assert [p.number for p in study.ask(3)] == [3]  # the generation's last
    assert study.ask() == [] and not study.finished
    study = open_study(settings_of("random"))
    assert [p.number for p in study.ask()] == [0, 1, 2, 3]
    assert [p.number for p in study.ask(7)] == list(range(4, 11))
    assert [p.number for p in study.ask(100)] == list(range(11, 31))
    assert study.ask(1) == [] and not study.finished


def test_a_member_lost_with_its_worker_is_offered_again():
    study = open_study(settings_of("evolution"))
    first = study.ask(2)
    study.release(0)
    with pytest.raises(ValueError, match="trial 0 is not out"):
        study.release(0)
    assert study.ask(1) == [first[0]]
    assert [p.number for p in study.ask()] == [2, 3]
    study.release(2)
    finish(study, first[0])
    with pytest.raises(ValueError, match="trial 0 is not out"):
        study.release(0)
    study.tell(2, fitness=0.3, attributes={})  # its worker was alive after all
    assert study.ask() == []


def test_prune_refuses_what_is_no_fitness():
    study = open_study(settings_of("evolution"))
    study.ask()
    for rungs in ([], [(25, float("nan"))]):
        with pytest.raises(ValueError, match="trial 0 is pruned with rungs"):
            study.prune(0, rungs=rungs, attributes={})
    with pytest.raises(ValueError, match=r"attributes \['parent'\] are the study's own"):
        study.tell(0, fitness=0.3, attributes={"parent": 3})
    study.prune(0, rungs=[(50, 0.4), (25, 0.3)], attributes={"seconds": 2.0})
    member = study.members()[0]
    assert (member.state, member.fitness, member.partial) == ("pruned", None, 0.4)
    assert member.rungs == ((25, 0.3), (50, 0.4))
    with pytest.raises(ValueError, match="no member of this study completed"):
        study.best()
