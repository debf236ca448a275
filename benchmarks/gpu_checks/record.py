"""Rows of the GPU check: what one says, how it gets into the file, and which code and machine it belongs to."""

from __future__ import annotations

import gc
import hashlib
import json
import operator
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PART_ROW = "the whole part"
"""Name of the row that a part ends with: it says whether the part ran to its end, and for how long."""
SENSES = {">=": operator.ge, "<=": operator.le, "==": operator.eq}
SOURCES = ("engine", "kernels", "recipes", "benchmarks")


class Absent(Exception):
    """What a check needs is not on this machine; the message says what."""


@dataclass
class Recorder:
    """Writes a part's rows, each on disk before the next check begins."""

    path: Path
    part: str
    about: dict[str, Any]
    """GPU, driver, versions, code and device: what every row is written with."""
    since: float = field(default_factory=time.monotonic)

    def row(
        self,
        name: str,
        seen: Any = None,
        *,
        unit: str = "",
        goal: float | None = None,
        sense: str = ">=",
        ok: bool | str | None = None,
        detail: str = "",
        figures: dict[str, Any] | None = None,
    ) -> None:
        """One check; where ``ok`` is not given, ``seen`` is held against ``goal``, if there is one."""
        if ok is None:
            ok = True if goal is None else bool(SENSES[sense](seen, goal))
        now = time.monotonic()
        row: dict[str, Any] = {"part": self.part, "name": name, "ok": ok, "seen": plain(seen)}
        row |= {"goal": goal, "sense": sense if goal is not None else "", "unit": unit}
        row |= {"detail": detail, "figures": plain(figures or {}), "seconds": now - self.since}
        row |= {"date": time.strftime("%Y-%m-%dT%H:%M:%S%z"), **self.about}
        self.since = now
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())
        held = "" if goal is None else f" (goal {sense} {goal:g})"
        verdict = {True: "ok", False: "NOT OK"}.get(ok, ok) if isinstance(ok, bool) else ok
        shown = "" if seen is None else f": {number(row['seen'])} {unit}".rstrip()
        more = f" | {detail}" if detail else ""
        print(f"[{self.part}] {verdict}: {name}{shown}{held}{more}", flush=True)

    def absent(self, name: str, why: str) -> None:
        """A check for which this machine lacks something."""
        self.row(name, ok="absent", detail=why)

    @contextmanager
    def check(self, name: str) -> Iterator[None]:
        """Let what goes wrong inside become this check's row, and the next check run."""
        try:
            yield
        except (Absent, ModuleNotFoundError) as error:
            self.absent(name, str(error))
        except Exception as error:
            lines = [line for line in str(error).splitlines() if line.strip()] or ["no message"]
            where = _innermost(error)
            self.row(name, ok=False, detail=f"{type(error).__name__}: {lines[0]} ({where})"[:600])
            torch = sys.modules.get("torch")
            error.__traceback__ = None  # it holds the tensors
            gc.collect()
            if torch is not None and torch.cuda.is_available():
                torch.cuda.empty_cache()


def _innermost(error: BaseException) -> str:
    """The last place in our own files that an error passed."""
    place, trace = "?", error.__traceback__
    while trace is not None:
        path = Path(trace.tb_frame.f_code.co_filename)
        if path.is_relative_to(ROOT) and ".venv" not in path.parts:
            place = f"{path.relative_to(ROOT)}:{trace.tb_lineno}"
        trace = trace.tb_next
    return place


def plain(value: Any) -> Any:
    """A value as JSON can hold it: NumPy's and torch's numbers as Python's, floats that are none as text."""
    if isinstance(value, dict):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(each) for each in value]
    if hasattr(value, "item") and not isinstance(value, (str, bytes)):
        value = value.item()
    if isinstance(value, float) and value - value != 0:
        return str(value)
    return value


def number(value: Any) -> str:
    """Three or four digits of a number; anything else as it is."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if value == int(value) and abs(value) < 1e6:
        return f"{int(value):,}"
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e6 else f"{value:.3g}"


def read(path: Path) -> list[dict[str, Any]]:
    """Rows of a file; a last line that a kill cut off is left out."""
    rows = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def finished(path: Path, about: dict[str, Any]) -> set[str]:
    """Parts that ran to their end before, with this code on this kind of GPU."""
    key = [about["gpu"], about["code"]]
    ended = (r for r in read(path) if r["name"] == PART_ROW and [r["gpu"], r["code"]] == key)
    return {row["part"] for row in ended if row["ok"] is True}


def code_version(sha: str | None) -> str:
    """The commit, where files differ from it with a hash of the sources; the hash alone outside a checkout.

    ``sha`` names the commit where the sources were copied without their history.
    """
    digest = hashlib.sha256()
    for path in sorted(p for folder in SOURCES for p in (ROOT / folder).rglob("*")):
        if path.suffix in (".py", ".toml"):
            digest.update(path.read_bytes())
    tree = digest.hexdigest()[:8]
    if sha is not None:
        return f"{sha}+{tree}"
    git = ["git", "-C", str(ROOT)]
    try:
        found = subprocess.run(
            [*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True
        )
        dirty = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True)
    except OSError:
        return f"tree-{tree}"
    if found.returncode:
        return f"tree-{tree}"
    changed = any(line[3:].startswith(SOURCES) for line in dirty.stdout.splitlines())
    return found.stdout.strip() + (f"+{tree}" if changed else "")


def about_machine(*, cpu: bool, sha: str | None) -> dict[str, Any]:
    """What every row is written with."""
    import torch

    from engine.core.provenance import provenance
    from engine.core.runtime import choose_runtime

    facts = provenance(choose_runtime("cpu" if cpu else "cuda"))
    versions = dict(facts["versions"]) | {"cuda": torch.version.cuda or "none"}
    if not cpu:
        versions["cudnn"] = str(torch.backends.cudnn.version())
    return {
        "gpu": facts["device"],
        "device": "cpu" if cpu else "cuda",
        "driver": "none" if cpu else driver_version(),
        "code": code_version(sha),
        "versions": versions,
    }


def driver_version() -> str:
    """The NVIDIA driver's version, or why it is not known."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"unknown ({type(error).__name__})"
    return (done.stdout.strip().splitlines() or ["unknown"])[0]
