"""The list of runs: states as processes and logs have them, broken folders, and the command."""

from __future__ import annotations

import fcntl
import json
import os
import time
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from engine.cli.main import main
from engine.core.recipe import load_recipe
from engine.core.run import RunError, RunFolder, RunLog
from engine.report.runs import list_runs
from engine.search.study import read_trials
from tests.made_run import make_run, store

TINY = Path(__file__).parents[1] / "tiny.toml"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Runs in every state, and things that are no runs."""
    root = tmp_path / "runs"
    make_run(root / "finished", members=9, population=4)
    make_run(root / "going", members=7, population=4, failed={2: "boom"}, summary=False)
    make_run(root / "killed", members=5, population=4, summary=False)
    make_run(root / "stopped", members=5, population=4, summary=False)
    make_run(root / "failed", members=2, population=2, summary=False)
    make_run(root / "torn", members=3, population=2)
    (root / "torn" / "recipe.toml").write_text("name = [")
    (root / "notes").mkdir()
    (root / "file.txt").write_text("no run")
    for name, words in (
        ("stopped", "ended: interrupted"),
        ("failed", "ended: failed: all 2 members failed; the first: boom"),
        ("killed", "evolving losses: 3/12"),
    ):
        RunLog(root / name).write(words)
    return root


def rows(folder: Path) -> dict[str, dict[str, object]]:
    done = CliRunner().invoke(main, ["runs", str(folder), "--json"])
    assert done.exit_code == 0, done.output
    found = [json.loads(line) for line in done.stdout.splitlines()]
    return {Path(row["path"]).name: row for row in found}


def test_states(folder: Path) -> None:
    with (folder / "going" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        found = rows(folder)
    assert {name: row["state"] for name, row in found.items()} == {
        "finished": "finished",
        "going": "running",
        "killed": "interrupted",
        "stopped": "interrupted",
        "failed": "failed",
        "torn": "broken",
    }
    assert rows(folder)["going"]["state"] == "interrupted"  # its process has gone
    assert found["failed"]["note"] == "all 2 members failed; the first: boom"
    assert "recipe.toml" in str(found["torn"]["note"])
    going = found["going"]
    members = read_trials(folder / "going" / "study.jsonl", name="evolve")
    assert going["best"] == max(m.fitness for m in members if m.fitness is not None)
    assert (going["done"], going["total"], going["failed"]) == (7, 7, 1)
    summary = json.loads((folder / "finished" / "summary.json").read_text())
    assert found["finished"]["confirmed"] == pytest.approx(summary["best"]["mean"])
    assert going["confirmed"] is None


def test_a_search_that_went_on_after_its_summary(folder: Path) -> None:
    """Its rounds were raised, and it was killed."""
    last = read_trials(folder / "finished" / "study.jsonl", name="evolve")[-1]
    store(folder / "finished", replace(last, number=9))
    assert rows(folder)["finished"]["state"] == "interrupted"


def test_members_of_total_and_age(folder: Path) -> None:
    recipe = (folder / "killed" / "recipe.toml").read_text().replace("rounds = 1", "rounds = 20")
    (folder / "killed" / "recipe.toml").write_text(recipe)
    provenance = {"started": "2026-01-01T00:00:00+00:00"}
    (folder / "killed" / "provenance.json").write_text(json.dumps(provenance))
    for path in (folder / "killed").iterdir():
        os.utime(path, (1767225600 + 600, 1767225600 + 600))
    (row,) = list_runs(folder / "killed", now=1767225600 + 3600.0)
    assert (row.done, row.total) == (5, 24)
    assert (row.age_s, row.idle_s) == (3600.0, 3000.0)


def test_table_without_a_terminal_is_plain(folder: Path) -> None:
    done = CliRunner().invoke(main, ["runs", str(folder)])
    lines = done.stdout.splitlines()
    assert done.exit_code == 0 and len(lines) == 7
    assert lines[0].split()[:3] == ["run", "state", "recipe"]
    assert all(character.isprintable() for line in lines for character in line)
    state = lines[0].index("state")
    assert {line[state:].split()[0] for line in lines[1:]} == {
        "finished",
        "interrupted",
        "failed",
        "broken",
    }


def test_nothing_there(tmp_path: Path) -> None:
    done = CliRunner().invoke(main, ["runs", str(tmp_path)])
    assert done.exit_code == 0 and done.stdout == f"{tmp_path}: no runs\n"
    done = CliRunner().invoke(main, ["runs", str(tmp_path / "absent")])
    assert done.exit_code == 2 and "no such folder" in done.stderr
    assert CliRunner().invoke(main, ["runs", str(tmp_path), "--json"]).stdout == ""


def test_before_the_first_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(main, ["runs"])
    assert done.exit_code == 0 and done.stdout == "runs: no runs; engine evolve makes one\n"


def test_a_run_that_others_look_at_can_still_be_taken(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run", load_recipe(TINY))
    run.begin()
    with pytest.raises(RunError, match="another process"):
        RunFolder.reopen(tmp_path / "run", None)
    run.close()
    with (tmp_path / "run" / ".lock").open("rb") as looker:
        fcntl.flock(looker, fcntl.LOCK_SH)
        began = time.monotonic()
        with pytest.raises(RunError):  # one that never lets go
            RunFolder.reopen(tmp_path / "run", None)
        assert 0.1 < time.monotonic() - began < 2
    RunFolder.reopen(tmp_path / "run", None)[0].close()


def test_report_command(folder: Path, tmp_path: Path) -> None:
    def told(*arguments: object) -> tuple[int, str]:
        done = CliRunner().invoke(main, ["report", *map(str, arguments)])
        return done.exit_code, done.stdout + done.stderr

    both = (folder / "finished", folder / "going")
    out = tmp_path / "side.html"
    assert told("--compare", *both, "--out", out) == (0, f"report: {out}\n")
    assert out.exists()
    for arguments, words in (
        (both, "add --compare"),
        ((both[0], "--out", out), "--out goes with --compare"),
        (("--compare", both[0]), "two or more"),
        ((tmp_path,), "no run there"),
    ):
        code, text = told(*arguments)
        assert code == 2 and words in text and len(text.splitlines()) == 1
