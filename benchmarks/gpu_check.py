"""Every GPU check and bench in one go: what works, how fast it is, and which goals that meets.

    python benchmarks/gpu_check.py [--parts a,b] [--shards DIR] [--out FILE.jsonl]

Each part runs in a process of its own under a time limit, and writes its rows as it goes. A part that has run to
its end with this code on this GPU is skipped, so that an interrupted check goes on where it was. Time that parts
leave of their budgets goes to those after them. ``--table FILE`` prints a file's tables again; ``--cpu`` tries
everything at tiny sizes where there is no GPU, which says nothing about speed.
"""

from __future__ import annotations

import argparse
import faulthandler
import importlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from gpu_checks import goals, record  # noqa: E402

HOST = "GPU_CHECK_HOST"


@dataclass(frozen=True)
class Part:
    """A part: where it is, its share of the time, and what it is for."""

    function: str
    seconds: int
    about: str


PARTS = {
    "machine": Part("machine.machine", 12, "GPU, libraries, doctor, measured limits"),
    "data": Part("machine.data", 18, "the built-in videos, or those of --shards"),
    "first": Part(
        "training.first", 20, "does it run at all: members trained and judged, uncompiled"
    ),
    "streams": Part(
        "machine.streams", 20, "batches while training is behind, memory between streams"
    ),
    "kernels": Part("exact.kernel_numbers", 15, "Triton kernels against float64"),
    "terms": Part("exact.terms", 22, "39 terms, and a member's first losses, against the CPU"),
    "decode": Part("inputs.decode", 15, "JPEG and films by the GPU"),
    "flow": Part("inputs.flow", 12, "the flow engine against a known shift and the CPU"),
    "views": Part("inputs.views", 8, "views and log-mel against the CPU"),
    "supervised": Part("steps.supervised", 22, "R3D-18's step on a resident batch"),
    "graphs": Part(
        "steps.graphs", 70, "a search's step eager, compiled, with CUDA graphs, in parallel"
    ),
    "cohort": Part("training.cohort", 45, "members an hour, of cohorts and one process a member"),
    "evolve": Part("training.evolve", 35, "a small search from start to report"),
    "tests": Part("machine.tests", 25, "the other tests marked gpu"),
    "bench": Part("throughput.bench", 28, "loss, views and input beside limits and peers"),
    "kmeans": Part("clusters.clusters", 15, "k-means against scikit-learn and cuML"),
    "use": Part("commands.use", 25, "evaluate, finetune, embed and export"),
    "workers": Part("commands.workers", 20, "a search by a Ray worker on the GPU"),
    "ranks": Part("commands.ranks", 20, "pretraining: NCCL with one process, two on one GPU"),
    "step": Part("steps.step", 30, "the four-network step of full size, eager and compiled"),
}
"""In this order: what others need and whether it runs at all, in two minutes; then what a goal hangs on; what takes
long to compile at full size last, in the time that others leave."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run parts and show what came of them; 0 where all is well, 1 where something is not, 2 for a mistake."""
    args = parsed(arguments)
    if args.table:
        goals.show(record.read(args.table))
        return 0
    try:
        parts = chosen(args.parts)
    except ValueError as error:
        print(f"gpu_check: {error}", file=sys.stderr)
        return 2
    if args.dry_run:
        print_budget(parts)
        return 0
    if args.child:
        return child(args)
    import torch

    if not args.cpu and not torch.cuda.is_available():
        print(
            "gpu_check: no CUDA GPU is visible; --cpu tries the script without one", file=sys.stderr
        )
        return 2
    return run_all(args, parts)


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--parts", default="all", help=f"comma-separated, of {', '.join(PARTS)} [all]")
    add("--out", type=Path, help="rows [benchmarks/results/GPU-DATE-SHA.jsonl]")
    add("--shards", type=Path, action="append", default=[], help="shards to train on; or with"
        " folders unlabelled/ and labelled/ in it [the built-in videos]")  # fmt: skip
    add(
        "--work", type=Path, default=ROOT / "runs" / "gpu_check", help="caches, logs, the small run"
    )
    add("--minutes", type=float, default=8.0, help="for all parts together [8]")
    add("--again", action="store_true", help="run parts that are done, too")
    add("--sha", help="commit of the sources, where they came without .git")
    add("--cpu", action="store_true", help="try every part at tiny sizes on the CPU")
    add("--dry-run", action="store_true", help="print the time budget and stop")
    add("--table", type=Path, metavar="FILE", help="print the tables of a file of rows and stop")
    add("--child", help=argparse.SUPPRESS)
    add("--about", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def chosen(names: str) -> list[str]:
    """Parts by name, in their own order; raises ValueError for unknown ones."""
    wanted = list(PARTS) if names == "all" else [name.strip() for name in names.split(",")]
    unknown = [name for name in wanted if name not in PARTS]
    if unknown:
        raise ValueError(f"no part {', '.join(unknown)}; parts: {', '.join(PARTS)}")
    return [name for name in PARTS if name in wanted]


def print_budget(parts: Sequence[str]) -> None:
    """Seconds of each part."""
    for name in parts:
        print(f"{name:<11} {PARTS[name].seconds:>4} s  {PARTS[name].about}")
    print(f"{'together':<11} {sum(PARTS[name].seconds for name in parts):>4} s")


def run_all(args: argparse.Namespace, parts: Sequence[str]) -> int:
    """All parts, one after the other, then the tables."""
    about = record.about_machine(cpu=args.cpu, sha=args.sha)
    out = args.out or default_out(about)
    done = set() if args.again else record.finished(out, about)
    print(f"gpu_check: {about['gpu']}, code {about['code']}, rows in {out}", flush=True)
    deadline = time.monotonic() + 60 * args.minutes
    left = [name for name in parts if name not in done]
    for name in parts:
        if name in done:
            print(f"[{name}] done before; --again repeats it", flush=True)
            continue
        left.remove(name)
        later = sum(PARTS[other].seconds for other in left)
        limit = max(deadline - time.monotonic() - later, PARTS[name].seconds)
        limit = min(limit, deadline - time.monotonic())
        run_part(args, name, out=out, about=about, limit=limit)
    rows = [row for row in record.read(out) if row["gpu"] == about["gpu"]]
    goals.show(rows)
    bad = [
        row for row in goals.latest(rows).values() if row["ok"] is False and row["part"] in parts
    ]
    return 1 if bad else 0


def default_out(about: dict[str, Any]) -> Path:
    """benchmarks/results/GPU-DATE-SHA.jsonl."""
    gpu = re.sub(r"\W+", "-", about["gpu"]).strip("-").lower()
    sha = about["code"].replace("+", "-")
    return ROOT / "benchmarks" / "results" / f"{gpu}-{time.strftime('%Y%m%d')}-{sha}.jsonl"


def run_part(
    args: argparse.Namespace, name: str, *, out: Path, about: dict[str, Any], limit: float
) -> None:
    """One part in its own process; its last row says how it ended."""
    rec = record.Recorder(out, name, about)
    if limit < 5:
        rec.row(record.PART_ROW, ok=False, detail="no time left")
        return
    work = args.work.absolute()
    log = work / "logs" / f"{name}.err"
    log.parent.mkdir(parents=True, exist_ok=True)
    env = {**os.environ, "GPU_CHECK_LIMIT": f"{limit:.0f}", "PYTHONUNBUFFERED": "1"}
    env |= {"TORCHINDUCTOR_CACHE_DIR": str(work / "inductor"), "MPLBACKEND": "Agg"}
    env |= {"TRITON_CACHE_DIR": str(work / "triton"), "XDG_CACHE_HOME": str(work / "cache")}
    folders = [ROOT, ROOT / "benchmarks", ROOT / "benchmarks" / "gpu_checks" / "site"]
    env["PYTHONPATH"] = os.pathsep.join([*map(str, folders), env.get("PYTHONPATH", "")])
    env[HOST] = ",".join(stand_ins(record.read(out), about))
    command = [sys.executable, str(Path(__file__).resolve()), "--child", name, "--parts", name]
    command += ["--out", str(out.absolute()), "--work", str(work), "--about", json.dumps(about)]
    command += ["--cpu"] if args.cpu else []
    command += [word for path in args.shards for word in ("--shards", str(path.absolute()))]
    print(f"[{name}] begins, {limit:.0f} s at most", flush=True)
    began = time.monotonic()
    with log.open("w") as errors:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=env,
            stderr=errors,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            code = process.wait(timeout=limit)
            ended = "" if code == 0 else how_it_ended(code, log)
        except subprocess.TimeoutExpired:
            ended = f"over its limit of {limit:.0f} s; {where_it_was(log)}"
        finally:
            end(process)
    seconds = time.monotonic() - began
    rec.row(record.PART_ROW, seconds, unit="s", ok=not ended, detail=ended)


def end(process: subprocess.Popen[bytes]) -> None:
    """End a part's process and all that it started, which are its own process group."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, sign)
        except (ProcessLookupError, PermissionError):
            break
        try:
            process.wait(timeout=3)
        except subprocess.TimeoutExpired:
            continue
        time.sleep(0.2)
    process.wait()


def how_it_ended(code: int, log: Path) -> str:
    """The last line of the error."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [
        line for line in lines if re.match(r"(Fatal|[\w.]*(Error|Exception|Interrupt)\b)", line)
    ]
    what = (errors or lines or ["nothing said"])[-1]
    how = f"exit code {code}" if code > 0 else f"ended by {signal.Signals(-code).name}"
    return f"{how}: {what}"[:600]


def where_it_was(log: Path) -> str:
    """The innermost of our own places in the stacks that faulthandler wrote, or the last line."""
    lines = log.read_text(errors="replace").splitlines()
    stacks = [line.strip() for line in lines if line.lstrip().startswith('File "')]
    ours = [line for line in stacks if str(ROOT) in line and ".venv" not in line]
    last = [line.strip() for line in lines if line.strip()][-1:] or ["nothing said"]
    return (f"at {(ours or stacks)[0]}" if stacks else last[0])[:400]


def stand_ins(rows: Sequence[dict[str, Any]], about: dict[str, Any]) -> list[str]:
    """Stages of input whose part ended without a row, or gave wrong pictures: later parts leave them to the CPU."""
    if about["device"] == "cpu":
        return []
    mine = goals.latest([row for row in rows if row["gpu"] == about["gpu"]])
    checks = {"decode": "frames on the GPU are the CPU's", "flow": "flow engine"}
    found = []
    for part, name in checks.items():
        whole, row = mine.get((part, record.PART_ROW)), mine.get((part, name))
        crashed = whole is not None and row is None and whole["ok"] is False
        if crashed or (row is not None and row["ok"] is not True and row["seen"] is None):
            found.append(part)
    return found


def child(args: argparse.Namespace) -> int:
    """Run one part in this process."""
    # where it was, should it hang: shortly before it is ended
    faulthandler.enable()
    faulthandler.dump_traceback_later(max(float(os.environ["GPU_CHECK_LIMIT"]) - 2, 1))
    import torch
    from gpu_checks.job import Job, use_host

    name, about = args.child, json.loads(args.about)
    if args.cpu:
        torch.set_num_threads(1)
    folders = [path / "unlabelled" for path in args.shards if (path / "unlabelled").is_dir()]
    labelled = [path / "labelled" for path in args.shards if (path / "labelled").is_dir()]
    plain = [path for path in args.shards if (path / "dataset.json").is_file()]
    device = torch.device("cpu" if args.cpu else "cuda:0")
    job = Job(device, args.work, tuple(folders + labelled + plain), tuple(labelled))
    rec = record.Recorder(args.out, name, about)
    if name not in ("decode", "flow"):  # there they are tried all the same
        use_host()
    module, function = PARTS[name].function.split(".")
    getattr(importlib.import_module(f"gpu_checks.{module}"), function)(job, rec)
    return 0


if __name__ == "__main__":
    sys.exit(main())
elif __name__ == "__mp_main__" and os.environ.get(HOST):
    # a process that a part started
    from gpu_checks.job import use_host

    use_host()
