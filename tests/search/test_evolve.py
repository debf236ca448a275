"""The main job, end to end: what a run leaves, and that an interrupted one ends as if it had not been."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.core.recipe import load_recipe, recipe_hash
from engine.core.run import RunFolder
from engine.core.tensors import load_tensors
from engine.objective.lossfile import load_loss
from engine.objective.terms import TERM_NAMES
from engine.search import worker as cohort_worker
from engine.search.study import SearchStudy
from engine.train.member import Member
from engine.train.trainer import Trainer
from tests.runs import (
    RECIPE,
    TINY,
    begin,
    command,
    ended_as,
    history,
    members,
    one_line,
    outcome,
    read,
    resume,
)


@pytest.fixture(autouse=True, scope="module")
def as_before() -> Iterator[None]:
    """A run on a CPU sets the process's threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def reference(tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupted."""
    run = tmp_path_factory.mktemp("runs") / "reference"
    code, out, err = begin(tiny_shards, run)
    assert (code, err) == (0, "")
    assert f"report: {run / 'report.html'}" in out and "Best loss" in out
    return run


@pytest.fixture(autouse=True, scope="module")
def other_runs_undrawn(reference: Path, undrawn: None) -> None:
    """Only the reference's figures are drawn."""


def test_a_run_leaves_its_whole_folder(reference: Path) -> None:
    files = "recipe.toml provenance.json study.jsonl best.toml summary.json report.html timing.json"
    for name in files.split():
        assert (reference / name).stat().st_size > 0
    assert (reference / "checkpoints" / "best.safetensors").is_file()
    assert list((reference / "figures").iterdir())
    assert [p for p in (reference / "tensorboard").iterdir() if "tfevents" in p.name]
    assert (reference / "log.txt").read_text().splitlines()[-1].endswith("ended: finished")
    assert load_recipe(reference / "recipe.toml") == RECIPE


def test_another_number_format_is_said_at_the_start_and_once(
    tiny_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.core.runtime.cpu_has_bf16", lambda: False)
    short = [f"search.{key}" for key in ("population=2", "rounds=1", "confirm_seeds=0")]
    options = [arg for each in (*short, "optim.amp=bf16") for arg in ("--set", each)]
    code, out, err = begin(tiny_shards, tmp_path / "run", *options)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    (place,) = [i for i, line in enumerate(lines) if line.startswith("float32 instead of bf16")]
    assert place < lines.index(f"run folder {tmp_path / 'run'}")


def test_the_study_has_all_that_is_known_of_a_member(reference: Path) -> None:
    done = members(reference)
    assert [m.number for m in done] == [0, 1, 2, 3, 4]
    assert [m.round for m in done] == [0, 0, 0, 1, 2]
    for member in done:
        facts = member.attributes
        assert facts["recipe_hash"] == recipe_hash(RECIPE) and facts["seeds"] == [0]
        assert facts["labels_used"] is True and set(member.terms) <= set(TERM_NAMES)
        assert [each["fitness"] for each in facts["repeats"]] == [member.fitness]
        assert member.metrics.items() <= facts["repeats"][0].items()
        assert facts["terms_at_start"].keys() == member.terms.keys() and facts["feature_ranks"]
    for child in done[3:]:
        assert child.parent in (0, 1, 2) and child.mutated is not None
        parent = done[child.parent].weights
        assert {n for n in parent if parent[n] != child.weights[n]} == {child.mutated}


def test_the_best_loss_and_its_network_are_kept(reference: Path) -> None:
    best = max(members(reference), key=lambda m: (m.fitness, -m.number))
    assert load_loss(reference / "best.toml") == best.weights
    summary = read(reference / "summary.json")
    assert summary["best_trial"] == best.number and summary["weights"] == best.weights
    assert summary["best_search_fitness"] == best.fitness
    tensors, facts = load_tensors(reference / "checkpoints" / "best.safetensors")
    assert len(facts["feature_mean"]) == len(facts["feature_scale"]) > 0
    assert facts["trial"] == best.number and facts["fitness"] == best.fitness
    assert "stem.0.weight" in tensors


def test_the_summary_is_made_of_the_records(reference: Path) -> None:
    summary = read(reference / "summary.json")
    confirmed = read(reference / "confirmations.json")["10000"]
    for kind in ("untrained", "best"):
        assert summary[kind]["values"] == [confirmed[kind]["fitness"]]
    assert summary["random"]["values"] == [one["fitness"] for one in confirmed["random"]]
    initial = [m.fitness for m in members(reference)[:3]]
    assert summary["initial_population"]["values"] == initial
    assert summary["initial_population"]["mean"] == pytest.approx(sum(initial) / 3)
    assert confirmed["best"]["seeds"] == [10000] and [
        one["seeds"] for one in confirmed["random"]
    ] == [[10000]]
    facts = read(reference / "provenance.json")
    assert (facts["num_clips"], facts["num_labelled"], facts["num_classes"]) == (8, 24, 8)
    assert facts["recipe_hash"] == summary["recipe_hash"] == recipe_hash(RECIPE)
    assert facts["versions"]["torch"] == version("torch")


def test_pretrain_takes_the_best_loss(reference: Path, tiny_shards: Path, tmp_path: Path) -> None:
    done = command(
        *("pretrain", "--loss", reference / "best.toml", "--videos", tiny_shards / "unlabelled"),
        *("--recipe", TINY, "--run", tmp_path / "run", "--device", "cpu"),
    )
    assert done[0] == 0, done
    assert load_loss(tmp_path / "run" / "loss.toml") == load_loss(reference / "best.toml")
    best, _ = load_tensors(reference / "checkpoints" / "best.safetensors")
    tensors, _ = load_tensors(tmp_path / "run" / "rgb.safetensors")
    assert tensors.keys() == best.keys()


def interrupt_at(
    patched: pytest.MonkeyPatch, owner: Any, name: str, *, call: int, after: bool = False
) -> None:
    """Press Ctrl-C as a function begins (or has ended) its ``call``-th call, from 1."""
    original: Callable[..., Any] = getattr(owner, name)
    calls = 0

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        result = original(*args, **kwargs) if after or calls != call else None
        if calls == call:
            raise KeyboardInterrupt
        return result

    patched.setattr(owner, name, counted)


@pytest.mark.parametrize(
    ("owner", "name", "call", "after", "kept"),
    [
        # In the second generation, of the first one's children.
        (Trainer, "step_all", 8, False, 3),
        # The study knows of the best member, and nothing was derived of it.
        (SearchStudy, "tell", 2, True, 2),
    ],
    ids=["training", "told"],
)
def test_an_interrupted_run_ends_as_one_that_was_not(
    reference: Path,
    tiny_shards: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    owner: Any,
    name: str,
    call: int,
    after: bool,
    kept: int,
) -> None:
    """Before a member is told, and as one is confirmed: see ``test_evolve_faults``."""
    run = tmp_path / "run"
    with monkeypatch.context() as patched:
        interrupt_at(patched, owner, name, call=call, after=after)
        line = one_line(begin(tiny_shards, run), code=130)
    assert "interrupted" in line and "--resume" in line
    assert history(run) == history(reference)[:kept]
    assert not (run / "summary.json").exists()
    code, _, err = resume(run)
    assert (code, err) == (0, "")
    ended_as(run, reference)
    assert len(read(run / "provenance.json")["resumed"]) == 1


def test_a_killed_run_ends_as_one_that_was_not(
    reference: Path, tiny_shards: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    arguments = [
        *("evolve", "--videos", tiny_shards / "unlabelled", "--labelled"),
        *(tiny_shards / "labelled", "--recipe", TINY, "--run", run, "--device", "cpu"),
    ]
    program = [sys.executable, "-c", "from engine.cli.main import main; main()"]
    with subprocess.Popen(
        [*program, *map(str, arguments)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    ) as process:
        deadline = time.monotonic() + 240
        journal = run / "study.jsonl"
        while (
            not (journal.exists() and b'"number"' in journal.read_bytes())
            and process.poll() is None
        ):
            assert time.monotonic() < deadline, "no member was done in time"
            time.sleep(0.002)
        os.kill(process.pid, signal.SIGKILL)
        assert process.stderr is not None
        said = process.stderr.read().decode()
    assert process.returncode == -signal.SIGKILL, said
    assert len(members(run)) < 5
    code, _, err = resume(run)
    assert (code, err) == (0, "")
    ended_as(run, reference)


def test_resuming_a_finished_run_changes_no_number(
    reference: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = history(reference), outcome(reference)
    files = {p: p.read_bytes() for p in (reference / "study.jsonl", reference / "best.toml")}
    with monkeypatch.context() as patched:
        patched.setattr(cohort_worker, "evaluate_cohort", None)  # training anything would fail
        code, _, err = resume(reference)
    assert (code, err) == (0, "")
    assert (history(reference), outcome(reference)) == before
    assert {p: p.read_bytes() for p in files} == files


@pytest.mark.parametrize("more", [("--set", "optim.lr=0.1"), ("--seed", "1"), ("--recipe", "demo")])
def test_a_run_is_not_resumed_with_another_recipe(reference: Path, more: tuple[str, ...]) -> None:
    line = one_line(resume(reference, *more), code=2)
    assert recipe_hash(RECIPE) in line and "give another --run" in line


def test_a_run_may_be_resumed_with_its_own_recipe_named(reference: Path) -> None:
    run, recipe = RunFolder.reopen(reference, RECIPE)
    run.close()
    assert recipe == RECIPE


def test_a_run_is_not_resumed_on_other_videos(reference: Path, tiny_shards: Path) -> None:
    other = tiny_shards / "labelled"
    line = one_line(resume(reference, "--videos", other, "--labelled", other), code=2)
    assert "not those that this run began with" in line


def test_a_run_notes_where_its_videos_are(
    reference: Path, tiny_shards: Path, tmp_path: Path
) -> None:
    facts = read(reference / "provenance.json")
    assert facts["videos"] == [str(tiny_shards / "unlabelled")]
    run, gone = tmp_path / "run", str(tmp_path / "gone")
    shutil.copytree(reference, run)
    (run / "provenance.json").write_text(json.dumps({**facts, "videos": [gone]}))
    line = one_line(resume(run), code=2)
    assert f"the run began with {gone}, which is not there" in line and line.endswith("--videos")
    assert resume(run, "--videos", tiny_shards / "unlabelled")[0] == 0
    assert read(run / "provenance.json")["videos"] == facts["videos"]


def test_two_processes_do_not_share_a_run(reference: Path, tiny_shards: Path) -> None:
    run, _ = RunFolder.reopen(reference, None)
    assert "another process is at work" in one_line(resume(reference), code=2)
    run.close()


def test_a_run_is_not_begun_twice(reference: Path, tiny_shards: Path) -> None:
    before = {p: p.read_bytes() for p in reference.glob("*.toml")}
    line = one_line(begin(tiny_shards, reference), code=2)
    assert "holds a run already; continue it with --resume" in line
    assert {p: p.read_bytes() for p in reference.glob("*.toml")} == before


def test_there_must_be_a_run_to_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "no run to resume there" in one_line(resume(tmp_path / "none"), code=2)
    monkeypatch.chdir(tmp_path)
    assert "no evolve run to resume" in one_line(command("evolve", "--resume"), code=2)


def poison_losses(patched: pytest.MonkeyPatch, *, which: Callable[[int], bool]) -> None:
    """Make the networks of the chosen members, counted in the order of their making, NaN."""
    original = Trainer.member
    count = 0

    def member(self: Trainer, *args: Any, **kwargs: Any) -> Member:
        nonlocal count
        new = original(self, *args, **kwargs)
        if which(count):
            for parameter in new.loss.parameters():
                parameter.data.fill_(float("nan"))
        count += 1
        return new

    patched.setattr(Trainer, "member", member)


def test_a_member_that_fails_does_not_end_the_run(
    reference: Path, tiny_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    poison_losses(monkeypatch, which=lambda number: number == 0)
    code, out, err = begin(tiny_shards, run)
    assert (code, err) == (0, "")
    assert "member 0 failed: loss is nan at step 0" in out and "1 of 5 members failed" in out
    rows = history(run)
    assert rows[0]["state"] == "failed" and rows[0]["fitness"] is None
    assert "loss is nan at step 0" in rows[0]["reason"]
    assert rows[1:3] == history(reference)[1:3]
    assert all(row["parent"] != 0 for row in rows)
    assert read(run / "summary.json")["failures"] == 1


def test_a_run_whose_members_all_fail_says_why(
    tiny_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison_losses(monkeypatch, which=lambda _: True)
    line = one_line(begin(tiny_shards, tmp_path / "run"), code=1)
    assert "all 5 members failed; the first: loss is nan at step 0; terms:" in line
