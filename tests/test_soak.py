"""A few of the soak's kills; ``make soak`` runs two hundred."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_few_kills_change_no_search(tmp_path: Path) -> None:
    command = [sys.executable, str(Path(__file__).with_name("soak.py")), "--kills", "3"]
    done = subprocess.run(
        [*command, "--seed", "1"],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},  # Ray needs short paths for its sockets
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    last = done.stdout.strip().splitlines()[-1]
    count = re.search(r"(\d+) kills \(", last)
    assert count is not None and int(count[1]) >= 3 and "driver" in last, last
