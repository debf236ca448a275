"""What every number is written with: the code, the machine and the videos that it came of."""

from __future__ import annotations

import platform
import re
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import engine
from engine.core.runfolder import RunError, RunFolder
from engine.core.runtime import Runtime, num_cores

LIBRARIES = (
    "torch triton nvidia-dali-cuda130 nvidia-dali-cuda120 torchaudio numpy cupy-cuda13x cupy-cuda12x cuml-cu13 "
    "cuml-cu12 optuna cmaes av opencv-python-headless scikit-learn safetensors"
).split()


def without_password(text: str) -> str:
    """The text with no user or password in the addresses that it holds."""
    return re.sub(r"([?&]password=)[^&\s]*", r"\1", re.sub(r"://[^/\s]*@", "://", text))


def provenance(runtime: Runtime) -> dict[str, Any]:
    """What every number is written with: code, device and library versions, start time."""
    gpu = torch.cuda.get_device_name(runtime.device) if runtime.device.type == "cuda" else None
    return {
        "command": without_password(" ".join([Path(sys.argv[0]).name, *sys.argv[1:]])),
        "engine_version": engine.__version__,
        "git_sha": _git_sha(),
        "device": gpu or _cpu_name(),
        "cpu_count": num_cores(),
        "amp": runtime.amp,
        "platform": platform.platform(),
        "versions": {"python": platform.python_version(), **_versions()},
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def _versions() -> dict[str, str]:
    found = {}
    for library in LIBRARIES:
        try:
            found[library] = metadata.version(library)
        except metadata.PackageNotFoundError:
            continue
    return found


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _git_sha() -> str | None:
    """The commit of the source tree, with ``+`` where files differ from it; None outside a checkout."""
    root = Path(__file__).resolve().parent.parent

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

    ``facts`` are those of ``provenance``, and ``data``, the videos' digest. Raises RunError for other videos.
    """
    old = run.read_json("provenance.json")
    if old is not None:
        check_same_videos(run.path, before=old["data"], now=facts["data"])
        facts = {**old, "resumed": [*old.get("resumed", []), facts["started"]]}
    run.write_json("provenance.json", facts)
    return facts
