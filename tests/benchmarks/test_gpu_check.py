"""The GPU check without a GPU: its budget, its mistakes told in one line, its rows, and going on after a stop."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks" / "gpu_check.py"
MINUTES = 8


def gpu_check(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=280)


def test_all_parts_together_stay_under_eight_minutes() -> None:
    lines = gpu_check("--dry-run").stdout.splitlines()
    name, seconds, _ = lines[-1].split()
    assert name == "together"
    assert sum(int(line.split()[1]) for line in lines[:-1]) == int(seconds) <= 60 * MINUTES


def test_an_unknown_part_is_one_line() -> None:
    done = gpu_check("--parts", "kernels,warp_drive")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "warp_drive" in line and "kernels" in line


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is present")
def test_without_a_gpu_it_says_so() -> None:
    done = gpu_check("--parts", "kernels")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "no CUDA GPU" in line and "--cpu" in line


def test_a_part_that_failed_is_run_again_and_one_that_is_done_is_not(tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    arguments = ["--cpu", "--parts", "data", "--out", str(out), "--work", str(tmp_path / "work")]
    failed = gpu_check(*arguments, "--minutes", "0.01", "--shards", str(tmp_path / "nowhere"))
    assert failed.returncode == 1
    (row,) = [json.loads(line) for line in out.read_text().splitlines()]
    assert row["ok"] is False and row["detail"] == "no time left"
    first = gpu_check(*arguments)
    assert first.returncode == 0, first.stdout + first.stderr
    rows = [json.loads(line) for line in out.read_text().splitlines()[1:]]
    assert rows[-1]["name"] == "the whole part" and rows[-1]["ok"] is True
    for row in rows:
        assert row["device"] == "cpu" and row["code"] and row["versions"]["torch"]
    size = out.stat().st_size
    again = gpu_check(*arguments)
    assert again.returncode == 0
    assert "done before" in again.stdout and out.stat().st_size == size


def test_tables_of_rows_show_goals_beside_what_was_seen(tmp_path: Path) -> None:
    row = {
        "part": "supervised",
        "ok": True,
        "goal": 171.0,
        "sense": ">=",
        "unit": "clips/s",
        "detail": "",
    }
    row |= {
        "name": "supervised step, compiled",
        "seen": 1234.0,
        "gpu": "H100",
        "code": "abc",
        "device": "cuda",
    }
    out = tmp_path / "rows.jsonl"
    out.write_text(json.dumps(row) + "\n" + '{"cut off')
    shown = gpu_check("--table", str(out)).stdout
    (line,) = [line for line in shown.splitlines() if "171 a GPU" in line]
    assert "1,234 clips/s" in line and "yes" in line
    assert "1 ok, 0 not ok" in shown
