"""What a report takes from a run's folder."""

from __future__ import annotations

import json
from pathlib import Path

from engine.objective.terms import TERM_NAMES
from engine.report.run import read_run
from engine.search.members import Trial
from engine.search.storage import StudyStorage
from tests.made_run import store

MEMBER = Trial(3, dict.fromkeys(TERM_NAMES, 0.5), state="complete", fitness=0.5)


def test_confirmations_are_no_members(tmp_path: Path) -> None:
    store(tmp_path, MEMBER)
    confirmation = {"10000": {"trial": 3, "best": {"fitness": 0.4}}}
    (tmp_path / "confirmations.json").write_text(json.dumps(confirmation))
    run = read_run(tmp_path)
    assert run.trials == (MEMBER,) and run.failed == ()


def test_a_study_elsewhere_is_found(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'studies.db'}"
    StudyStorage(url, name="run-1").add(MEMBER)
    (tmp_path / "run").mkdir()
    noted = {"url": url, "study": "run-1"}
    (tmp_path / "run" / "storage.json").write_text(json.dumps(noted))
    assert read_run(tmp_path / "run").trials == (MEMBER,)


def test_a_study_that_cant_be_read_is_noted(tmp_path: Path) -> None:
    store(tmp_path, MEMBER)
    with (tmp_path / "study.jsonl").open("a") as file:
        file.write("{half\n{}\n")
    run = read_run(tmp_path)
    assert run.trials == () and "study.jsonl is damaged" in run.unread[0]
