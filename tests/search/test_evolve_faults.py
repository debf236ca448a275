"""A search whose disk or storage fails, whose rounds change, or whose study lies elsewhere; all in one process."""

from __future__ import annotations

import errno
import json
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from optuna.storages.journal import JournalFileBackend

from engine.core.recipe import recipe_hash
from engine.core.run import Events, RunFolder
from engine.objective import loss
from engine.objective.lossfile import load_loss
from engine.search import estimate, evolve
from engine.train.trainer import Trainer
from tests.runs import RECIPE, begin, ended_as, history, one_line, outcome, read, resume

pytestmark = pytest.mark.usefixtures("undrawn")


@pytest.fixture(autouse=True, scope="module")
def as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def reference(tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory, undrawn: None) -> Path:
    run = tmp_path_factory.mktemp("runs") / "reference"
    assert begin(tiny_shards, run)[0] == 0
    return run


def events(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]


def test_a_full_disk_loses_nothing(
    reference: Path, tiny_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, write = tmp_path / "run", JournalFileBackend.append_logs

    def full(self: JournalFileBackend, logs: list[dict[str, Any]]) -> None:
        if any(log.get("user_attrs", {}).get("number") == 2 for log in logs):
            with (run / "study.jsonl").open("a") as file:
                file.write(json.dumps(logs[0])[:100])  # as far as there was room
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, logs)

    with monkeypatch.context() as patched:
        patched.setattr(JournalFileBackend, "append_logs", full)
        line = one_line(begin(tiny_shards, run), code=1)
    assert "No space left" in line
    assert "make room; what was finished is kept, and --resume goes on from there" in line
    assert history(run) == history(reference)[:2]
    assert resume(run)[0] == 0
    ended_as(run, reference)


def test_a_storage_that_is_away_for_a_while_is_told(
    reference: Path, tiny_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, write = tmp_path / "run", JournalFileBackend.append_logs
    failures = [errno.ESTALE, errno.EIO]

    def away(self: JournalFileBackend, logs: list[dict[str, Any]]) -> None:
        if logs[0].get("user_attrs", {}).get("number") == 1 and failures:
            raise OSError(failures.pop(), "the file server is away")
        write(self, logs)

    monkeypatch.setattr(JournalFileBackend, "append_logs", away)
    code, out, err = begin(tiny_shards, run)
    assert not failures and (code, err) == (0, "")
    assert "storage is away, waiting for it" in out and "study's storage was away" in out
    assert [event["kind"] for event in events(run)] == ["storage"]
    ended_as(run, reference)


def test_more_rounds_are_what_they_would_have_been(
    reference: Path, tiny_shards: Path, tmp_path: Path
) -> None:
    short = tmp_path / "short"
    assert begin(tiny_shards, short, "--rounds", 1)[0] == 0
    assert len(history(short)) == 4
    assert resume(short, "--rounds", 2)[0] == 0
    assert history(short) == history(reference) and len(history(short)) == 5
    assert outcome(short) == outcome(reference)
    assert read(short / "provenance.json")["recipe_hash"] == recipe_hash(RECIPE)
    line = one_line(resume(short, "--rounds", 1), code=2)
    assert "5 members are done already, so --rounds must be 2 or more" in line
    assert resume(short)[0] == 0  # the refusal changed nothing
    assert outcome(short) == outcome(reference)


def test_a_search_whose_members_all_collapse_says_so(tiny_shards: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    line = one_line(begin(tiny_shards, run, "--set", "search.collapse_rank=1000"), code=1)
    assert "all 5 members failed or were pruned; the first: collapsed: effective rank" in line
    assert {row["state"] for row in history(run)} == {"pruned"}


def test_another_method_is_another_recipe(reference: Path) -> None:
    assert "was made with recipe" in one_line(resume(reference, "--method", "random"), code=2)


def test_a_study_elsewhere_is_found_again(
    reference: Path, tiny_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, place = tmp_path / "run", tmp_path / "studies.db"
    with monkeypatch.context() as patched:
        patched.setattr(evolve, "_confirmation", interrupted)
        one_line(begin(tiny_shards, run, "--storage", f"sqlite:///{place}"), code=130)
    noted = run / "storage.json"
    assert noted.stat().st_mode & 0o777 == 0o600
    name = read(noted)["study"]
    assert name.startswith("run-") and not (run / "study.jsonl").exists()
    assert resume(run)[0] == 0
    assert outcome(run) == outcome(reference)
    with sqlite3.connect(place) as database:
        assert database.execute("SELECT study_name FROM studies").fetchall() == [(name,)]
    database.close()


def interrupted(*args: Any) -> Any:
    raise KeyboardInterrupt


def test_a_password_is_kept_where_only_its_owner_reads(tmp_path: Path) -> None:
    url = "postgresql+psycopg://me:secret@host/losses"
    run = RunFolder.create(tmp_path / "run", RECIPE)
    run.use_storage(url)
    run.begin()
    run.close()
    assert [p.name for p in run.path.rglob("*") if p.is_file() and "secret" in p.read_text()] == [
        "storage.json"
    ]
    again, _ = RunFolder.reopen(run.path, None)
    again.use_storage(None)
    assert again.storage == url and again.study_name == run.study_name
    moved = "postgresql+psycopg://me:secret@other/losses"
    again.use_storage(moved)
    again.close()
    assert read(run.path / "storage.json") == {"url": moved, "study": run.study_name}
    assert (run.path / "storage.json").stat().st_mode & 0o777 == 0o600


def test_a_run_with_its_study_inside_is_not_moved(reference: Path) -> None:
    line = one_line(resume(reference, "--storage", "sqlite:///other.db"), code=2)
    assert "keeps its study in study.jsonl" in line


def test_events_survive_half_a_line(tmp_path: Path) -> None:
    Events(tmp_path).add("storage", "gone\nfor a while", trials=[3], worker="worker 1")
    with (tmp_path / "events.jsonl").open("a") as file:
        file.write('{"kind": "wor')  # killed in the middle of it
    again = Events(tmp_path)
    assert again.counts == {"storage": 1}
    again.add("resumed", "2 workers")
    whole = []
    for line in (tmp_path / "events.jsonl").read_text().splitlines():
        try:
            whole.append(json.loads(line))
        except ValueError:
            assert line == '{"kind": "wor'
    assert [row["kind"] for row in whole] == ["storage", "resumed"]
    assert whole[0]["detail"] == "gone for a while" and whole[0]["trials"] == [3]


def test_a_dry_run_writes_nothing(tiny_shards: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    code, out, err = begin(tiny_shards, run, "--dry-run", "--workers", 4)
    assert (code, err) == (0, "") and not run.exists()
    assert "terms: 39, of which 39 can be computed" in out
    assert "members: 5 by evolution (3 and 2 rounds)" in out and "expected; measured here" in out
    assert "MiB a member" in out and "in 2 jobs of 1" in out
    assert "2 of 4 workers would have nothing to do: set search.generation to 4 or more" in out
    assert "say how many GPUs" in one_line(
        begin(tiny_shards, run, "--dry-run", "--address", "auto", "--device", "auto"), code=2
    )


def test_a_dry_run_measures_the_losses_that_can_be_computed(
    tiny_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on silent videos, where some sparse losses have nothing left."""
    original, refused, measured = Trainer.member, list[Any](), list[Any]()

    def active_terms(weights: Any, *, sound: bool) -> tuple[str, ...]:
        if len(refused) < least and 0.0 in weights.values():
            refused.append(weights)
            return ()
        return loss.active_terms(weights, sound=sound)

    def member(self: Trainer, weights: Any, **options: Any) -> Any:
        assert weights not in refused
        measured.append(weights)
        return original(self, weights, **options)

    monkeypatch.setattr(estimate, "active_terms", active_terms)
    monkeypatch.setattr(Trainer, "member", member)
    sparse = ("--set", "search.sparsity=0.9", "--dry-run")
    for least in (1, 100):
        code, out, err = begin(tiny_shards, tmp_path / "run", *sparse)
        assert (code, err) == (0, "") and "expected; measured here" in out
        assert (load_loss("equal") in measured) == (least == 100)
        refused.clear()
        measured.clear()


def test_a_dry_run_with_a_signal_says_how_well_fitness_ranks(
    tiny_shards: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    code, out, err = begin(tiny_shards, run, "--signal", 2)
    assert (code, err) == (0, "") and not run.exists()
    assert (
        "MiB a member" in out and "how well fitness ranks 2 losses that a search begins with" in out
    )


def test_a_cluster_that_is_not_there_is_told(tiny_shards: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    more = ("--address", "127.0.0.1:1", "--workers", 1)
    line = one_line(begin(tiny_shards, tmp_path / "run", *more), code=2)
    assert "there is no Ray cluster at 127.0.0.1:1" in line


def test_a_kill_before_the_recipe_is_there_leaves_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a run is continued with is on the disk before the folder counts as a run's."""
    run = RunFolder.create(tmp_path / "run", RECIPE)
    monkeypatch.setattr(RunFolder, "save_recipe", _killed)
    with pytest.raises(KeyboardInterrupt):
        run.begin(lambda: run.write_json("provenance.json", {"data": "of another start"}))
    run.close()
    monkeypatch.undo()
    assert not (tmp_path / "run" / "recipe.toml").exists()
    again = RunFolder.create(tmp_path / "run", RECIPE)
    seen: list[object] = []
    again.begin(lambda: seen.append(again.read_json("provenance.json")))
    assert seen == [None] and (tmp_path / "run" / "recipe.toml").exists()
    again.close()


def _killed(*_: object) -> None:
    raise KeyboardInterrupt
