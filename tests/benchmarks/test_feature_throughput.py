"""The benchmark of feature extraction: what it prints and writes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "feature_throughput.py"


def test_both_are_held_against_the_slower_half(tiny_shards: Path, tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    sizes = "--width 0.125 --frames 2 --size 16 --clips 6 --views 1 --rounds 1 --batch-size 3"
    command = [sys.executable, str(SCRIPT), str(tiny_shards / "unlabelled"), *sizes.split()]
    done = subprocess.run(
        [*command, "--device", "cpu", "--json", str(out)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    (row,) = map(json.loads, out.read_text().splitlines())
    rates = row["views_per_second"]
    slower = min(rates["decoding alone"], rates["network alone"])
    assert abs(row["share"] - rates["both"] / slower) < 0.01 and row["views"] == 6
    assert f"both reach {row['share']:.2f} of the slower half" in done.stdout
