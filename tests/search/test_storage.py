"""Studies in a database: what Optuna's tools see, outages, answers that were lost, a second process, speed."""

from __future__ import annotations

import json
import os
import random
import signal
import sqlite3
import threading
import time
from dataclasses import asdict
from pathlib import Path
from wsgiref.util import setup_testing_defaults

import optuna
import optuna_dashboard
import psycopg
import pytest
import sqlalchemy
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from sqlalchemy.exc import OperationalError

from engine.core.recipe import Search
from engine.objective.terms import TERM_NAMES
from engine.search import storage as study_storage
from engine.search.storage import JournalLock, StudyStorage
from engine.search.study import SearchStudy, read_trials

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


@pytest.fixture(params=["journal", "sqlite", "postgres"])
def place(request, tmp_path):
    if request.param == "journal":
        return tmp_path / "study.jsonl"
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'study.db'}"
    return request.getfixturevalue("postgres").url


def optunas(storage, name):
    """The study as Optuna's own tools read it."""
    if isinstance(storage, Path):
        storage = JournalStorage(JournalFileBackend(str(storage)))
    return optuna.load_study(study_name=name, storage=storage)


def test_a_study_reads_as_it_was_written_and_optuna_sees_all_of_it(place, expected):
    name = "read"
    assert as_text(run(open_study(place, name=name))) == expected
    again = open_study(place, name=name)
    assert as_text(again.members()) == expected
    study = optunas(place, name)
    assert study.direction.name == "MAXIMIZE"
    assert study.user_attrs == {"recipe_hash": "abc"}
    assert study.best_trial.user_attrs["number"] == again.best().number
    states = {"complete": "COMPLETE", "failed": "FAIL", "pruned": "PRUNED"}
    for trial, member in zip(study.trials, again.members(), strict=True):
        assert trial.params == member.weights
        assert set(trial.distributions.values()) == {optuna.distributions.FloatDistribution(0, 1)}
        assert trial.state.name == states[member.state]
        assert trial.intermediate_values == dict(member.rungs)
        if member.state == "complete":
            assert trial.value == member.fitness
        for key in ("number", "parent", "mutated", "round"):
            assert trial.user_attrs[key] == getattr(member, key)
        assert trial.datetime_start <= trial.datetime_complete
    assert study.trials[0].user_attrs["seconds"] == 1.5
    assert study.trials[3].user_attrs["reason"] == "loss is nan"
    assert {m.state for m in again.members()} == set(states)
    pruned = again.members()[4]
    assert (pruned.state, pruned.fitness, pruned.partial) == ("pruned", None, pruned.rungs[1][1])


def test_optunas_dashboard_opens_the_study(tmp_path):
    members = run(open_study(tmp_path / "study.jsonl"))
    app = optuna_dashboard.wsgi(JournalStorage(JournalFileBackend(str(tmp_path / "study.jsonl"))))

    def get(path):
        environ: dict[str, object] = {}
        setup_testing_defaults(environ)
        where, _, query = path.partition("?")
        environ.update(PATH_INFO=where, QUERY_STRING=query)
        statuses = []
        body = b"".join(app(environ, lambda status, *more: statuses.append(status)))
        assert statuses[0].startswith("200"), (statuses, body)
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


def assert_stored(url, name):
    """Every member is in the database; Optuna itself may write one twice whose answer it lost, with equal content."""
    contents = {}
    for trial in optunas(url, name).trials:
        content = (trial.params, trial.state, trial.value)
        assert contents.setdefault(trial.user_attrs["number"], content) == content
    assert sorted(contents) == list(range(15))


def outage(server, seconds):
    server.stop()
    time.sleep(seconds)
    server.start()


def test_a_search_lives_through_a_server_that_is_gone(postgres, expected):
    waits, threads, seconds, name = [], [], 4.0, "gone"

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
    assert_stored(postgres.url, name)
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
    assert_stored(postgres.url, "cut")


def test_a_connection_lost_while_members_are_read_is_waited_for(postgres, expected):
    """Optuna asks again in the session that lost it, which SQLAlchemy refuses by an error of its own."""
    name, waits, cuts = "read-cut", [], []
    study = open_study(postgres.url, name=name, on_wait=waits.append)

    def cut():
        with psycopg.connect(postgres.url.replace("+psycopg", ""), autocommit=True) as connection:
            connection.execute(
                "select pg_terminate_backend(pid) from pg_stat_activity"
                " where pid <> pg_backend_pid() and backend_type = 'client backend'"
            )

    def once(connection, cursor, statement, parameters, context, executemany):
        if statement.startswith("SELECT trials") and len(cuts) < 3:
            cuts.append(statement)
            cut()

    sqlalchemy.event.listen(sqlalchemy.Engine, "before_cursor_execute", once)
    try:
        members = run(study)
    finally:
        sqlalchemy.event.remove(sqlalchemy.Engine, "before_cursor_execute", once)
    assert len(cuts) == 3
    assert waits and all("terminating connection" in wait or "closed" in wait for wait in waits)
    assert as_text(members) == expected
    assert_stored(postgres.url, name)


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
        if trial == 7:
            holder = sqlite3.connect(path, check_same_thread=False)
            holder.execute("BEGIN EXCLUSIVE")
            threading.Timer(9.0, holder.close).start()  # Optuna itself tries for up to 8 s

    assert as_text(run(open_study(path, on_wait=waits.append), between=hold)) == expected
    assert as_text(open_study(path).members()) == expected
    assert len(waits) == 1 and all("database is locked" in w and str(path) in w for w in waits)


def test_two_processes_write_a_journal_in_turns(tmp_path, expected):
    path = tmp_path / "study.jsonl"
    study = open_study(path)
    holders = []

    def hold(trial):
        if trial == 1:
            holders.append(JournalLock(path))
            holders[0].acquire()
            threading.Timer(0.5, holders[0].release).start()

    began = time.monotonic()
    assert as_text(run(study, between=hold)) == expected
    assert time.monotonic() - began > 0.5
    assert as_text(open_study(path).members()) == expected


@pytest.mark.parametrize("done_before", [False, True])
def test_a_write_whose_answer_was_lost_is_done_once(place, expected, monkeypatch, done_before):
    """Every member's first write fails, before it is done or after it was."""
    lost = sqlite3.OperationalError("the answer was lost")
    lost.sqlite_errorcode = sqlite3.SQLITE_BUSY
    name, losses, add = f"lost-{done_before}", [], StudyStorage._add
    study = open_study(place, name=name)

    def losing(self, trial):
        if trial.number not in losses:
            losses.append(trial.number)
            if done_before:
                add(self, trial)
            raise OperationalError("statement", {}, lost)
        add(self, trial)

    monkeypatch.setattr(StudyStorage, "_add", losing)
    assert as_text(run(study)) == expected
    assert len(losses) == 15
    assert as_text(open_study(place, name=name).members()) == expected
    assert len(optunas(place, name).trials) == 15


def test_members_that_are_there_twice_are_read_once(tmp_path, expected):
    path = tmp_path / "study.jsonl"
    run(open_study(path))
    lines = path.read_text().splitlines()
    with path.open("a") as file:
        file.write("\n".join(lines[-3:]) + "\n")
    assert as_text(open_study(path).members()) == expected
    assert len(optunas(path, "search").trials) == 18


def test_a_second_process_is_noticed_and_changes_nothing(place):
    first, second = (open_study(place, name="two") for _ in range(2))
    assert first.ask() == second.ask()
    first.tell(1, fitness=0.5, attributes={})
    for number in (1, 2):
        for fitness in (0.5, 0.6):
            with pytest.raises(RuntimeError, match="another process is at work on this study"):
                second.tell(number, fitness=fitness, attributes={})
    with pytest.raises(RuntimeError, match="another process is at work on this study"):
        second.fail(1, reason="late")
    third = open_study(place, name="two")
    assert [p.number for p in third.ask()] == [0, 2, 3]
    assert [t.value for t in optunas(place, "two").trials] == [0.5]


@pytest.mark.parametrize("damage", ["", "\0" * 40, '{"op_code": 4, "worker_id": "a{{"op_code"'])
def test_a_line_that_a_file_system_lost_is_named_and_can_be_deleted(tmp_path, expected, damage):
    place = tmp_path / "study.jsonl"
    run(open_study(place))
    lines = place.read_text().splitlines()
    number = len(lines) - 2
    lines[number - 1] = damage
    place.write_text("".join(f"{line}\n" for line in lines))
    with pytest.raises(
        OSError, match=rf"study.jsonl is damaged in line {number}: .*sed -i {number}d"
    ):
        open_study(place)
    del lines[number - 1]
    place.write_text("".join(f"{line}\n" for line in lines))
    found = {member.number: member for member in run(open_study(place))}
    assert as_text([found[number] for number in sorted(found)]) == expected


def test_tables_of_another_version_say_how_to_upgrade_them(tmp_path):
    place = tmp_path / "study.db"
    open_study(place)
    with sqlite3.connect(place) as database:
        database.execute("update alembic_version set version_num = 'v2.6.0.a'")
    with pytest.raises(ValueError, match=r"study.db: its tables are of another version.*upgrade"):
        open_study(place)


def test_a_trial_of_something_else_is_named(tmp_path):
    place = tmp_path / "study.jsonl"
    open_study(place)
    storage = JournalStorage(JournalFileBackend(str(place), lock_obj=JournalLock(place)))
    optuna.load_study(storage=storage, study_name="search").add_trial(
        optuna.trial.create_trial(value=1.0)
    )
    with pytest.raises(
        ValueError, match=r"study.jsonl: trial 0 has no weight for 39 terms \(audio"
    ):
        open_study(place)


def test_a_reader_writes_nothing(tmp_path):
    path = tmp_path / "study.jsonl"
    run(open_study(path))
    with path.open("a") as file:
        file.write('{"half')
    before = path.read_bytes()
    path.chmod(0o400)
    assert [trial.number for trial in read_trials(path, name="search")] == list(range(15))
    with pytest.raises(ValueError, match="holds no study 'other'"):
        read_trials(path, name="other")
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == [path.name]


def test_studies_of_earlier_versions_open(tmp_path):
    """They were SQLite files, and members were stored when they were proposed, without a number of their own."""
    study = open_study(None)
    url = f"sqlite:///{tmp_path / 'study.db'}"
    old = optuna.create_study(study_name="search", storage=url, direction="maximize")
    old.set_user_attr("recipe_hash", "abc")
    for member in study.ask()[:2]:
        trial = old.ask(study_storage.SPACE)
        trial.set_user_attr("seconds", 1.5)
        if member.number == 0:
            old.tell(trial, 0.25)
    assert [trial.number for trial in read_trials(tmp_path / "study.db", name="search")] == [0]
    again = open_study(tmp_path / "study.db")
    assert [(m.number, m.fitness, m.seconds) for m in again.members()] == [(0, 0.25, 1.5)]
    assert [p.number for p in again.ask()] == [1, 2, 3]


@pytest.mark.parametrize("suffix", ["jsonl", "db"])
def test_a_kill_at_any_moment_leaves_whole_members(tmp_path, suffix):
    """A writer is killed again and again; whatever it had been told was stored is there, and the file opens."""
    path, settings, rng = (
        tmp_path / f"study.{suffix}",
        Search(method="random", rounds=5000),
        random.Random(0),
    )
    stored = 0
    for _ in range(6):
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            study = open_study(path, settings=settings)
            for member in study.ask(400):
                study.tell(
                    member.number, fitness=0.5, attributes={"terms": dict.fromkeys(TERM_NAMES, 1.5)}
                )
                os.write(writing, b".")
            os._exit(0)
        os.close(writing)
        os.read(reading, 1)  # it has begun
        time.sleep(rng.uniform(0, 0.3))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        stored += 1
        with open(reading, "rb") as acknowledged:
            stored += len(acknowledged.read())
        members = read_trials(path, name="search")
        assert len(members) in (stored, stored + 1), "a member was lost"
        stored = len(members)
        assert [m.number for m in members] == list(range(stored))
        assert all(len(m.terms) == len(TERM_NAMES) for m in members)


def test_a_kill_while_a_journal_is_made_leaves_one_that_opens(tmp_path: Path) -> None:
    whole = tmp_path / "whole.jsonl"
    open_study(whole)
    for length in range(len(whole.read_bytes()) + 1):
        path = tmp_path / f"{length}.jsonl"
        path.write_bytes(whole.read_bytes()[:length])
        for _ in range(2):
            assert len(open_study(path).ask()) == 4
        study = open_study(path)
        study.tell(study.ask()[0].number, fitness=0.5, attributes={})
        assert len(open_study(path).members()) == 1
