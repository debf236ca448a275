"""What a report takes from a run's folder."""

import json
from pathlib import Path

from engine.objective.terms import TERM_NAMES
from engine.report.run import read_run


def test_confirmations_beside_the_members_are_no_members(tmp_path: Path) -> None:
    """They name the trial that they confirm, and must not take its place."""
    (tmp_path / "members").mkdir()
    member = {
        "trial": 3,
        "state": "complete",
        "fitness": 0.5,
        "weights": dict.fromkeys(TERM_NAMES, 0.5),
    }
    (tmp_path / "members" / "00003.json").write_text(json.dumps(member))
    confirmation = {"seed": 10000, "trial": 3, "best": {"fitness": 0.4}}
    (tmp_path / "members" / "confirm-10000.json").write_text(json.dumps(confirmation))
    run = read_run(tmp_path)
    assert [(trial.number, trial.fitness) for trial in run.trials] == [(3, 0.5)]
    assert run.failed == ()
