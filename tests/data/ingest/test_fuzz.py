"""Damaged files: cut off and with bytes changed, in every container; each ends as clips or with a reason."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.data.films import beep_at, texture, write_film

ROOT = Path(__file__).resolve().parents[3]
KINDS = ("mp4", "mkv", "webm", "avi", "mov", "ts", "ogv", "flv")
DECLARED = ("mp4", "mkv", "webm", "avi")
"""Containers whose head says how long the whole is."""
CUTS = int(os.environ.get("FUZZ_CUTS", "10"))
FLIPS = int(os.environ.get("FUZZ_FLIPS", "60"))
SEED = int(os.environ.get("FUZZ_SEED", "0"))
SECONDS_A_FILE = 10.0
MEMORY = 400.0
"""MiB."""


class Worker:
    """``fuzz_worker`` in a process of its own, started again after each that died."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[str] | None = None

    def cut(self, path: Path) -> dict[str, Any] | str:
        """What became of the file, or how the process ended."""
        if self.process is None:
            self.process = subprocess.Popen(
                [sys.executable, str(ROOT / "tests/data/ingest/fuzz_worker.py")],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            )
            first = 20.0  # importing
        else:
            first = 0.0
        process = self.process
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(f"{path}\n")
        process.stdin.flush()
        ready, _, _ = select.select([process.stdout], [], [], SECONDS_A_FILE + first)
        line = process.stdout.readline() if ready else ""
        if line:
            found: dict[str, Any] = json.loads(line)
            return found
        self.close()
        return "hangs" if not ready else f"dies with {process.returncode}"

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
            self.process = None


@pytest.fixture(scope="module")
def worker() -> Any:
    worker = Worker()
    yield worker
    worker.close()


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    root = tmp_path_factory.mktemp("films")
    found = {}
    for kind in KINDS:
        path = write_film(
            root / f"film.{kind}",
            (texture(i) for i in range(60)),
            sound=beep_at(0.5),
            sound_to=2.4,
            container_options={"movflags": "faststart"} if kind == "mp4" else None,
        )
        found[kind] = path.read_bytes()
    return found


def cuts(data: bytes, random: np.random.Generator) -> list[bytes]:
    return [data[:n] for n in np.sort(random.integers(0, len(data), CUTS))]


def flips(data: bytes, random: np.random.Generator) -> list[bytes]:
    """One to thirty bytes replaced: half the time anywhere, half the time in the head, which rules the rest."""
    found = []
    for i in range(FLIPS):
        changed = np.frombuffer(data, np.uint8).copy()
        reach = len(data) if i % 2 else min(4096, len(data))
        where = random.integers(0, reach, random.integers(1, 31))
        changed[where] = random.integers(0, 256, len(where))
        found.append(changed.tobytes())
    return found


def check(found: dict[str, Any] | str) -> str | None:
    """What is wrong with the way in which a file ended."""
    if isinstance(found, str):
        return found
    if not found["clips"] and not found["rejects"]:
        return "vanishes without a word"
    if any("unexpected" in reason or not reason for reason in found["rejects"]):
        return f"is rejected with {found['rejects']}"
    if found["seconds"] > SECONDS_A_FILE:
        return f"takes {found['seconds']:.1f} s"
    if found["peak"] > MEMORY:
        return f"takes {found['peak']:.0f} MiB"
    return None


def run(worker: Worker, folder: Path, kind: str, variants: list[bytes]) -> list[dict[str, Any]]:
    """Cut each variant; fails with the list of those that ended badly."""
    ended, bad = [], []
    for i, data in enumerate(variants):
        path = folder / f"{i}.{kind}"
        path.write_bytes(data)
        found = worker.cut(path)
        wrong = check(found)
        if wrong:
            bad.append(f"{kind} variant {i} of seed {SEED} {wrong}")
        elif isinstance(found, dict):
            ended.append(found)
        path.unlink()
    assert not bad, "\n".join(bad)
    return ended


@pytest.mark.parametrize("kind", KINDS)
def test_whole_films_give_whole_clips(worker, films, kind: str, tmp_path: Path) -> None:
    (found,) = run(worker, tmp_path, kind, [films[kind]])
    assert found["clips"] == [[25, None, True]] * 2
    assert found["rejects"] == []


@pytest.mark.parametrize("kind", KINDS)
def test_truncated_films(worker, films, kind: str, tmp_path: Path) -> None:
    random = np.random.default_rng([SEED, KINDS.index(kind), 0])
    for found in run(worker, tmp_path, kind, cuts(films[kind], random)):
        short = [clip for clip in found["clips"] if clip[0] < 12]
        if kind in DECLARED:  # the loss must be told
            assert all(note for _, note, _ in short)
            assert len(found["clips"]) == 2 or found["rejects"] or any(c[1] for c in found["clips"])


@pytest.mark.parametrize("kind", KINDS)
def test_changed_bytes(worker, films, kind: str, tmp_path: Path) -> None:
    random = np.random.default_rng([SEED, KINDS.index(kind), 1])
    ended = run(worker, tmp_path, kind, flips(films[kind], random))
    if kind != "ogv":  # whose pages carry checksums
        assert sum(bool(found["clips"]) for found in ended) > FLIPS / 4
