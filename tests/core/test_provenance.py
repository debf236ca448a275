"""What is written down of a run, and that it goes on with the videos that it began with."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from engine.core.provenance import provenance, without_password, write_provenance
from engine.core.recipe import load_recipe
from engine.core.runfolder import RunError, RunFolder
from engine.core.runtime import choose_runtime
from engine.data.shards.index import data_digest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    "text",
    [
        "engine evolve --storage postgresql+psycopg://me:secret@host:5432/losses --gpus 8",
        "engine evolve --storage postgresql://host/losses?sslmode=on&password=secret --gpus 8",
        "a://me:secret@one b://you:secret@two",
    ],
)
def test_no_password_is_written_down(text: str) -> None:
    clean = without_password(text)
    assert "secret" not in clean and clean.split()[0] == text.split()[0].replace("me:secret@", "")
    assert ("--gpus 8" in clean) == ("--gpus 8" in text)
    assert without_password(clean) == clean


def test_the_code_is_named_as_git_names_it() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a checkout")
    named = ["git", "-C", str(ROOT), "describe", "--always", "--dirty=+", "--abbrev=12"]
    facts = provenance(choose_runtime("cpu"))
    sha = subprocess.run([*named, "--exclude=*"], capture_output=True, text=True, check=True).stdout
    assert facts["git_sha"] == sha.strip()
    assert facts["versions"]["torch"] and facts["device"] and facts["started"]


def test_a_run_goes_on_with_its_videos_alone(tmp_path: Path) -> None:
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
        (folder / "dataset.json").write_text(f"shards of {folder.name}")
    run = RunFolder.create(tmp_path / "run", load_recipe("demo"))
    run.begin()
    began = write_provenance(run, {"started": "once", "seed": 3, "data": data_digest(folders)})
    assert "resumed" not in began
    again = write_provenance(run, {"started": "twice", "seed": 4, "data": data_digest(folders)})
    assert again == {**began, "resumed": ["twice"]}
    assert json.loads((run.path / "provenance.json").read_text()) == again
    with pytest.raises(RunError, match="run: the videos are not those that this run began with"):
        write_provenance(run, {"started": "late", "data": data_digest(folders[:1])})
    run.close()
