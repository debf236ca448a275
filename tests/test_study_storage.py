"""Studies in a database: what Optuna's tools see, outages, answers that were lost, a second process, speed."""

from __future__ import annotations

import json
import os
import random
import signal
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any
from wsgiref.util import setup_testing_defaults

import optuna
import optuna_dashboard
import psycopg
import pytest
from engine.study_storage_outage import Patience
from sqlalchemy import event
from sqlalchemy.engine import Engine
from sqlalchemy.exc import OperationalError

from engine import study_storage
from engine.objective.terms import TERM_NAMES
from engine.recipe import Search
from engine.search import SearchStudy

SMALL = Search(population=6, rounds=9, tournament=3, generation=4)


def open_study(storage, *, settings=SMALL, name="search", **more):
    return SearchStudy(settings, storage=storage, name=name, seed=0, recipe_hash="abc", **more)


def finish(study, member):
    """What becomes of a member depends on its number and weights alone."""
    score = 0.3 + 0.1 * member.weights["rgb/predict"]
    if member.number % 5 == 3:
        study.fail(
            member.number, reason="loss is nan", attributes={"terms": {"rgb/shuffle": float("nan")}}
        )
    elif member.number % 7 == 4:
        study.prune(
            member.number, rungs=[(25, score), (50, score + 0.01)], attributes={"seconds": 2}
        )
    else:
        study.tell(member.number, fitness=score, attributes={"seconds": 1.5, "seeds": [0, 1]})


def run(study, *, between=lambda trial: None):
    while not study.finished:
        for member in study.ask():
            between(member.number)
            finish(study, member)
    return study.members()


def as_text(members):
    """NaN differs from itself."""
    return [json.dumps(asdict(member), sort_keys=True) for member in members]


@pytest.fixture(scope="module")
def expected():
    return as_text(run(open_study(None)))


@pytest.fixture(params=["sqlite", "postgres"])
def place(request, tmp_path):
    if request.param == "sqlite":
        return tmp_path / "study.db"
    return request.getfixturevalue("postgres").url


def optunas(storage, name):
    url = storage if isinstance(storage, str) else f"sqlite:///{storage}"
    return optuna.load_study(study_name=name, storage=url)


def test_a_study_reads_as_it_was_written_and_optuna_sees_all_of_it(place, expected):
    name = "read"
    assert as_text(run(open_study(place, name=name))) == expected
    again = open_study(place, name=name)
    assert as_text(again.members()) == expected
    study = optunas(place, name)
    assert study.direction.name == "MAXIMIZE"
    assert study.user_attrs == {"recipe_hash": "abc"}
    assert study.best_trial.number == again.best().number
    states = {"complete": "COMPLETE", "failed": "FAIL", "pruned": "PRUNED"}
    for trial, member in zip(study.trials, again.members(), strict=True):
        assert trial.params == member.weights
        assert set(trial.distributions.values()) == {optuna.distributions.FloatDistribution(0, 1)}
        assert trial.state.name == states[member.state]
        assert trial.intermediate_values == dict(member.rungs)
        if member.state == "complete":
            assert trial.value == member.fitness
        for key in ("parent", "mutated", "round"):
            assert trial.user_attrs[key] == getattr(member, key)
        assert trial.datetime_start <= trial.datetime_complete
    assert study.trials[0].user_attrs["seconds"] == 1.5
    assert study.trials[3].user_attrs["reason"] == "loss is nan"
    assert {m.state for m in again.members()} == set(states)
    pruned = again.members()[4]
    assert (pruned.state, pruned.fitness, pruned.partial) == ("pruned", None, pruned.rungs[1][1])


def test_optunas_dashboard_opens_the_study(tmp_path):
    members = run(open_study(tmp_path / "study.db"))
    app = optuna_dashboard.wsgi(f"sqlite:///{tmp_path / 'study.db'}")

    def get(path):
        environ: dict[str, object] = {}
        setup_testing_defaults(environ)
        where, _, query = path.partition("?")
        environ.update(PATH_INFO=where, QUERY_STRING=query)
        told = []
        body = b"".join(app(environ, lambda status, *more: told.append(status)))
        assert told[0].startswith("200"), (told, body)
        return json.loads(body)

    study = get("/api/studies")["study_summaries"][0]
    assert study["study_name"] == "search"
    trials = get(f"/api/studies/{study['study_id']}?after=0")["trials"]
    assert len(trials) == len(members)
    child = next(m for m in members if m.parent is not None and m.state == "complete")
    shown = trials[child.number]
    assert shown["state"] == "Complete"
    assert float(shown["values"][0]) == child.fitness
    weights = {p["name"]: float(p["param_external_value"]) for p in shown["params"]}
    assert weights == pytest.approx(child.weights) and len(weights) == len(TERM_NAMES)
    attributes = {a["key"]: a["value"] for a in shown["user_attrs"]}
    assert attributes["parent"] == str(child.parent)
    assert attributes["mutated"] == child.mutated
    pruned = trials[4]
    assert pruned["state"] == "Pruned"
    assert [v["step"] for v in pruned["intermediate_values"]] == [25, 50]


def outage(server, seconds):
    server.stop()
    time.sleep(seconds)
    server.start()


@pytest.mark.parametrize("seconds", [1.5, pytest.param(30.0, marks=pytest.mark.slow)])
def test_a_search_lives_through_a_server_that_is_gone(postgres, expected, seconds):
    waits, threads = [], []
    name = f"gone-{seconds}"

    def between(trial):
        if trial == 7:  # the connection is cut while members are out
            thread = threading.Thread(target=outage, args=(postgres, seconds))
            thread.start()
            threads.append(thread)
            time.sleep(0.3)

    study = open_study(postgres.url, name=name, on_wait=waits.append)
    try:
        began = time.monotonic()
        members = run(study, between=between)
        took = time.monotonic() - began
    finally:
        for thread in threads:
            thread.join()
    assert as_text(members) == expected
    assert as_text(open_study(postgres.url, name=name).members()) == expected
    assert [t.number for t in optunas(postgres.url, name).trials] == list(range(15))
    assert took > seconds * len(threads) - 0.5
    assert len(waits) == len(threads)
    assert all(f"127.0.0.1:{postgres.port}" in w and "secret" not in w for w in waits)


def test_a_server_that_is_cut_off_at_any_moment_loses_and_doubles_nothing(postgres, expected):
    """Connections are cut again and again while the search writes; some answers are lost."""
    stop, cuts, rng = threading.Event(), [], random.Random(0)

    def cut():
        with psycopg.connect(postgres.url.replace("+psycopg", ""), autocommit=True) as connection:
            while len(cuts) < 15 and not stop.wait(rng.uniform(0.02, 0.15)):
                query = (
                    "select pg_terminate_backend(pid) from pg_stat_activity"
                    " where pid <> pg_backend_pid() and backend_type = 'client backend'"
                )
                cuts.extend(connection.execute(query).fetchall())

    study = open_study(postgres.url, name="cut")
    thread = threading.Thread(target=cut)
    thread.start()
    try:
        members = run(study, between=lambda trial: time.sleep(0.1))
    finally:
        stop.set()
        thread.join()
    assert len(cuts) > 5
    assert as_text(members) == expected
    assert as_text(open_study(postgres.url, name="cut").members()) == expected
    assert len(optunas(postgres.url, "cut").trials) == 15


def test_patience_ends_with_one_line(postgres):
    study = open_study(postgres.url, name="patience", patience=1.0)
    study.ask()
    postgres.stop()
    try:
        with pytest.raises(OSError, match="the study can't be read or written") as error:
            study.tell(0, fitness=0.5, attributes={})
        with pytest.raises(OSError, match=r"check that its server runs"):
            open_study(postgres.url, patience=0.2)
    finally:
        postgres.start()
    assert "\n" not in str(error.value) and "secret" not in str(error.value)
    assert study.members() == []
    study.tell(0, fitness=0.5, attributes={})  # it may be told again
    assert [m.number for m in open_study(postgres.url, name="patience").members()] == [0]


def test_a_mistake_is_not_waited_for(postgres, tmp_path):
    began = time.monotonic()
    with pytest.raises(OSError, match='database "absent" does not exist'):
        open_study(postgres.url.replace("/postgres", "/absent"))
    with pytest.raises(OSError, match='role "nobody" does not exist'):
        open_study(postgres.url.replace("engine:", "nobody:"))
    with pytest.raises(OSError, match="unable to open database file"):
        open_study(tmp_path / "absent" / "study.db")
    with pytest.raises(ValueError, match="not the address of a database"):
        open_study("study.db")
    with pytest.raises(ValueError, match="driver is not installed"):
        open_study("mysql+mysqldb://engine:secret@127.0.0.1/none")
    assert time.monotonic() - began < 5


def test_a_locked_file_is_waited_for(tmp_path, monkeypatch, expected):
    monkeypatch.setattr(study_storage, "BUSY_SECONDS", 0.05)
    waits = []
    path = tmp_path / "study.db"

    def hold(trial):
        if trial in (1, 7):
            holder = sqlite3.connect(path, check_same_thread=False)
            holder.execute("BEGIN EXCLUSIVE")
            threading.Timer(0.7, holder.close).start()

    assert as_text(run(open_study(path, on_wait=waits.append), between=hold)) == expected
    assert as_text(open_study(path).members()) == expected
    assert len(waits) == 2 and all("database is locked" in w and str(path) in w for w in waits)


@pytest.mark.parametrize("done_before", [False, True])
def test_a_write_whose_answer_was_lost_is_done_once(place, expected, done_before):
    """Every write fails once, before it is done or after it was."""
    lost = sqlite3.OperationalError("the answer was lost")
    lost.sqlite_errorcode = sqlite3.SQLITE_BUSY
    name, losses = f"lost-{done_before}", []
    study = open_study(place, name=name)

    class Losing(Patience):
        def __call__(self, action):
            fails = [True]

            def attempt():
                if fails.pop() if fails else False:
                    losses.append(action() if done_before else None)
                    raise OperationalError("statement", {}, lost)
                return action()

            return super().__call__(attempt)

    study._storage._patiently = Losing("here", file=None, seconds=10, on_wait=None)
    assert as_text(run(study)) == expected
    assert len(losses) == 5 + 15  # generations, and members
    assert as_text(open_study(place, name=name).members()) == expected
    assert len(optunas(place, name).trials) == 15


def test_a_second_process_is_noticed_and_changes_nothing(place):
    first, second = (open_study(place, name="two") for _ in range(2))
    first.ask()
    with pytest.raises(RuntimeError, match="another process proposes members in this study"):
        second.ask()
    third = open_study(place, name="two")
    assert [p.number for p in third.ask()] == [0, 1, 2, 3]
    first.tell(1, fitness=0.5, attributes={})
    for fitness in (0.5, 0.6):
        with pytest.raises(ValueError, match="trial 1 is done already"):
            third.tell(1, fitness=fitness, attributes={})
    with pytest.raises(ValueError, match="trial 1 is done already"):
        third.fail(1, reason="late")
    assert [t.value for t in optunas(place, "two").trials] == [None, 0.5, None, None]


def test_a_trial_costs_few_statements_and_late_as_many_as_early(tmp_path):
    settings = Search(population=20, rounds=100, generation=4)
    study = open_study(tmp_path / "s.db", settings=settings)
    statements = []
    engine = study._storage._storage.engine
    event.listen(engine, "before_cursor_execute", lambda *args: statements.append(args[2]))
    costs = []
    while not study.finished:
        generation = study.ask()
        for proposal in generation:
            finish(study, proposal)
        costs.append(len(statements) / len(generation))
        statements.clear()
    assert max(costs) < 12  # Optuna's own ask and tell take more than 120 for 39 weights
    assert max(costs[20:]) <= max(costs[:5])


def _die_at_last(left: Iterator[int], *_: Any) -> None:
    if next(left, None) is None:
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_kill_while_a_file_is_made_leaves_none(tmp_path: Path) -> None:
    """At any statement: Optuna makes tables first and their indices later, and never looks for these again."""
    made = 0
    for moment in range(0, 60, 7):
        run = tmp_path / str(moment)
        run.mkdir()
        child = os.fork()
        if child == 0:
            left = iter(range(moment))
            event.listen(Engine, "before_cursor_execute", partial(_die_at_last, left))
            SearchStudy(Search(), storage=run / "study.db", name="a", seed=0, recipe_hash="x")
            os._exit(0)
        os.waitpid(child, 0)
        made += (run / "study.db").exists()
        for _ in range(2):
            study = SearchStudy(
                Search(), storage=run / "study.db", name="a", seed=0, recipe_hash="x"
            )
        assert len(study.ask()) > 0
        with closing(sqlite3.connect(run / "study.db")) as database:
            assert database.execute("SELECT count(*) FROM studies").fetchone() == (1,)
        assert [p.name for p in run.glob(".*")] == []
    assert made < 9, "no kill came before the file was there"
