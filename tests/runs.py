"""Runs of the smallest search by way of the command line, and what they come to."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import torch
from click.testing import CliRunner

from engine.cli.main import main
from engine.core.recipe import load_recipe
from engine.core.tensors import load_tensors
from engine.objective.lossfile import load_loss
from engine.search.members import Trial
from engine.search.study import read_trials

TINY = Path(__file__).with_name("tiny.toml")
RECIPE = load_recipe(TINY)


def fitting(*more: object) -> tuple[object, ...]:
    """Options with one that spares a search in one process measuring how many members fit."""
    return more if {"--workers", "--gpus"} & set(more) else ("--members-per-gpu", 8, *more)


def command(*arguments: object) -> tuple[int, str, str]:
    """Run the command: exit code, stdout, stderr."""
    result = CliRunner().invoke(main, [str(a) for a in arguments])
    told = result.exit_code, result.stdout, result.stderr
    assert result.exception is None or isinstance(result.exception, SystemExit), told
    del result
    gc.collect()  # the traceback holds the run, and the run its lock
    return told


def begin(shards: Path, run: Path, *more: object) -> tuple[int, str, str]:
    data = ("--videos", shards / "unlabelled", "--labelled", shards / "labelled")
    where = ("--run", run, "--device", "cpu")
    return command("evolve", *data, "--recipe", TINY, *where, *fitting(*more))


def resume(run: Path, *more: object) -> tuple[int, str, str]:
    return command("evolve", "--resume", "--run", run, "--device", "cpu", *fitting(*more))


def one_line(told: tuple[int, str, str], *, code: int) -> str:
    assert told[0] == code, told
    lines = told[2].splitlines()
    assert len(lines) == 1 and lines[0].startswith("engine: "), told[2]
    return lines[0]


def read(path: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(path.read_text())
    return value


def members(run: Path) -> list[Trial]:
    return read_trials(run / "study.jsonl", name="evolve")


TIMES = ("seconds", "clips_per_second")


def history(run: Path) -> list[dict[str, Any]]:
    """All that the study knows, less what a clock measured."""
    rows = []
    for member in members(run):
        told = {k: v for k, v in member.attributes.items() if k not in TIMES}
        fields = ("number", "weights", "fitness", "parent", "mutated", "round", "state")
        rows.append({**{name: getattr(member, name) for name in fields}, **told})
    return rows


def outcome(run: Path) -> dict[str, Any]:
    summary = read(run / "summary.json")
    summary.pop("seconds")
    return summary


def equal_networks(one: Path, other: Path) -> bool:
    tensors, facts = load_tensors(one / "checkpoints" / "best.safetensors")
    others, other_facts = load_tensors(other / "checkpoints" / "best.safetensors")
    assert tensors.keys() == others.keys()
    return facts == other_facts and all(torch.equal(tensors[n], others[n]) for n in tensors)


def ended_as(run: Path, reference: Path) -> None:
    """A run is whole, and as the reference in all but the time it took."""
    assert history(run) == history(reference)
    assert outcome(run) == outcome(reference)
    assert load_loss(run / "best.toml") == load_loss(reference / "best.toml")
    assert equal_networks(run, reference)
    assert (run / "report.html").stat().st_size > 1000
    assert not list(run.rglob("*.tmp"))
