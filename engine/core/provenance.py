"""Provenance of numbers: the code, the machine and the videos that they came of."""

from __future__ import annotations

import platform
import re
import subprocess
import sys
import time
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import engine
from engine.core.run import RunError, RunFolder
from engine.core.runtime import Runtime, num_cores

LIBRARIES = (
    "torch triton nvidia-dali-cuda130 nvidia-dali-cuda120 torchaudio numpy cupy-cuda13x cupy-cuda12x cuml-cu13 "
    "cuml-cu12 optuna cmaes av opencv-python-headless scikit-learn safetensors"
).split()


def without_password(text: str) -> str:
    """The text with no user or password in the addresses that it holds."""
    return re.sub(r"([?&]password=)[^&\s]*", r"\1", re.sub(r"://[^/\s]*@", "://", text))


def provenance(runtime: Runtime) -> dict[str, Any]:
    """Code, device and library versions and start time, which every number is written with."""
    gpu = torch.cuda.get_device_name(runtime.device) if runtime.device.type == "cuda" else None
    versions = {name: version for name in LIBRARIES if (version := installed_version(name))}
    return {
        "command": without_password(" ".join([Path(sys.argv[0]).name, *sys.argv[1:]])),
        "engine_version": engine.__version__,
        "git_sha": _git_sha(),
        "device": gpu or _cpu_name(),
        "cpu_count": num_cores(),
        "amp": runtime.amp,
        "platform": platform.platform(),
        "versions": {"python": platform.python_version(), **versions},
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def installed_version(*packages: str) -> str | None:
    """The version of the first of ``packages`` that is installed; None where none is."""
    for package in packages:
        with suppress(metadata.PackageNotFoundError):
            return metadata.version(package)
    return None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _git_sha() -> str | None:
    """The commit of the source tree, with ``+`` where files differ from it; None outside a checkout."""
    root = Path(engine.__file__).resolve().parents[1]

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        if not (root / ".git").exists():
            return None
        dirty = git("status", "--porcelain", "-uno")
        return git("rev-parse", "--short=12", "HEAD") + ("+" if dirty else "")
    except (subprocess.CalledProcessError, OSError):
        return None


def check_same_videos(run: Path, *, before: str, now: str) -> None:
    """Raise RunError where a run is continued on other videos, by their digests."""
    if before != now:
        raise RunError(
            f"{run}: the videos are not those that this run began with; bring them back, or start a new run"
        )


def write_provenance(run: RunFolder, facts: dict[str, Any]) -> dict[str, Any]:
    """Write ``provenance.json``; of a run that is continued, what it began with and when it was resumed.

    ``facts`` are those of ``provenance``, and ``data``, the videos' digest; ``videos`` and ``labelled`` are where they
    are now. Raises RunError for other videos.
    """
    old = run.read_json("provenance.json")
    if old is not None:
        check_same_videos(run.path, before=old["data"], now=facts["data"])
        places = ("videos", "labelled")
        moved: dict[str, Any] = {key: facts[key] for key in places if key in facts}
        facts = {**old, **moved, "resumed": [*old.get("resumed", []), facts["started"]]}
    run.write_json("provenance.json", facts)
    return facts
