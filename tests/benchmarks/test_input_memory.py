"""The benchmark of memory: what it counts, and what it prints and writes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from engine.data.shards.index import ClipIndex

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "input_memory.py"


def test_growth_is_that_of_the_sizes_printed(tiny_shards: Path, tmp_path: Path) -> None:
    assert len(ClipIndex([tiny_shards / "unlabelled"])) > 0
    out = tmp_path / "rows.jsonl"
    done = subprocess.run(
        [
            sys.executable,
            str(SCRIPT),
            str(tiny_shards / "unlabelled"),
            "--batches",
            "20",
            "--device",
            "cpu",
        ]
        + ["--json", str(out)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    (row,) = map(json.loads, out.read_text().splitlines())
    assert len(row["mib"]) == 10 and min(row["mib"]) > 50
    growth = 100 * (row["mib"][-1] / row["mib"][0] - 1)  # sizes are written rounded to 0.1 MiB
    assert abs(row["growth_percent"] - growth) < 0.2
    assert "growth from 2 to 20 batches" in done.stdout
