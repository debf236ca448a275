"""What the machine has and can do, its videos, and the tests that need a GPU."""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import torch

from engine.bench.base import Bench
from engine.cli.doctor import diagnose
from gpu_checks.job import Job
from gpu_checks.record import ROOT, Absent, Recorder

LIBRARIES = {
    "libcuda.so.1": "the driver",
    "libnvcuvid.so.1": "video decoding",
    "libnvidia-opticalflow.so.1": "the flow engine",
    "libnvidia-encode.so.1": "video encoding",
}
MIN_CUDNN = 91500
"""bf16 conv3d is slow, and at large shapes wrong, before 9.15."""
NVJPEG_HARDWARE = 3
"""nvjpegBackend_t: NVJPEG_BACKEND_HARDWARE."""


def machine(job: Job, rec: Recorder) -> None:
    """GPU, libraries, ``engine doctor``, and the limits that benches are held against."""
    if job.gpu:
        facts = torch.cuda.get_device_properties(job.device)
        capability = f"{facts.major}.{facts.minor}"
        detail = (
            f"{facts.total_memory / 2**30:.0f} GiB, {facts.multi_processor_count} SMs, {capability}"
        )
        rec.row("GPU", facts.name, detail=f"{detail}, driver {rec.about['driver']}")
        version = torch.backends.cudnn.version() or 0
        rec.row("cuDNN", version, goal=MIN_CUDNN, detail=f"CUDA {torch.version.cuda}")
    else:
        rec.absent("GPU", "tried on a CPU")
    for what, found, path in diagnose():
        rec.row(f"doctor: {what}", found, detail=path)
    asked = os.environ.get("NVIDIA_DRIVER_CAPABILITIES", "unset")
    for name, purpose in LIBRARIES.items():
        with rec.check(name):
            _load(name, f"{purpose}; NVIDIA_DRIVER_CAPABILITIES is {asked}")
            rec.row(name, "found", detail=purpose)
    with rec.check("nvJPEG's hardware backend"):
        rec.row("nvJPEG's hardware backend", "found", detail=_hardware_jpeg(job))
    limits = Bench(job.small(), job.runtime(), None, job.said.append, quick=True)
    with rec.check("measured copy bandwidth"):
        copy = limits.copy_bandwidth()
        rec.row("measured copy bandwidth", copy.value, unit=copy.unit)
    for dtype in (torch.bfloat16, torch.float32):
        name = f"measured matrix product, {str(dtype)[6:]}"
        with rec.check(name):
            peak = limits.matrix_peak(dtype)
            rec.row(name, peak.value, unit=peak.unit, detail=peak.name)


def _load(name: str, purpose: str) -> None:
    try:
        ctypes.CDLL(name)
    except OSError as error:
        raise Absent(f"{purpose}: {error}") from None


def _hardware_jpeg(job: Job) -> str:
    job.need_gpu()
    found = [
        path
        for folder in sys.path
        for path in Path(folder or ".").glob("nvidia/*/lib/libnvjpeg.so*")
        if path.is_file()
    ]
    names = [str(path) for path in found] + ["libnvjpeg.so.13", "libnvjpeg.so.12", "libnvjpeg.so"]
    for name in names:
        try:
            library = ctypes.CDLL(name)
            break
        except OSError:
            continue
    else:
        raise Absent("no libnvjpeg")
    torch.cuda.current_stream(job.device).synchronize()  # the library wants a context
    torch.ones(1, device=job.device)
    handle = ctypes.c_void_p()
    status = library.nvjpegCreateEx(NVJPEG_HARDWARE, None, None, 0, ctypes.byref(handle))
    if status:
        raise Absent(f"{name}: nvjpegCreateEx(hardware) gives status {status}")
    library.nvjpegDestroy(handle)
    return name


def data(job: Job, rec: Recorder) -> None:
    """The videos that all other parts use."""
    began = time.monotonic()
    videos, labelled = job.folders
    named = f"{len(job.index)} clips, {job.index.has_audio.sum()} with sound"
    rec.row("videos", len(job.index), unit="clips", goal=4, detail=f"{named}: {_names(videos)}")
    rec.row("labelled", _names(labelled), detail=f"{time.monotonic() - began:.0f} s")


def _names(folders: list[Path]) -> str:
    return ", ".join(str(folder) for folder in folders)


def streams(job: Job, rec: Recorder) -> None:
    """Batches that cross from input's stream to training's, and memory that is given back between them."""
    files = ("core/test_streams.py", "data/test_pipeline.py")
    _pytest(job, rec, [str(ROOT / "tests" / name) for name in files])


def tests(job: Job, rec: Recorder) -> None:
    """The other tests marked ``gpu``, which take in the kernels' on the device; on a CPU a few others."""
    folder = ROOT / "tests"
    chosen = [str(folder / "kernels" / "test_clip_views.py")]
    if job.gpu:
        # kernels first: should time run out, they have been seen
        kernels = [
            str(folder / "kernels" / f"test_{op}.py") for op in ("weighted_loss", "clip_views")
        ]
        chosen = [*kernels, *_marked(folder)]
    _pytest(job, rec, chosen)


def _pytest(job: Job, rec: Recorder, chosen: list[str]) -> None:
    """Tests of some files, on a GPU those that are marked ``gpu``."""
    if not (ROOT / "tests").is_dir():
        rec.absent("pytest -m gpu", "no tests/ beside engine/")
        return
    if job.gpu:
        chosen = ["-m", "gpu", *chosen]
    # the project's own options name plug-ins that such a machine may lack
    options = ["-o", "addopts=--import-mode=importlib", "-p", "no:cacheprovider", "-v", "--tb=line"]
    command = [sys.executable, "-m", "pytest", *options, "--no-header", *chosen]
    log = job.work / "logs" / f"pytest-{rec.part}.txt"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as file:
        process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)
        limit = float(os.environ.get("GPU_CHECK_LIMIT", "60")) - (time.monotonic() - rec.since) - 5
        try:
            process.wait(timeout=max(limit, 5))
            ended = f"exit code {process.returncode}"
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            ended = "out of time"
    text = log.read_text(errors="replace")
    outcomes = re.findall(r"^(\S+::.*?) (PASSED|FAILED|ERROR|SKIPPED)", text, re.MULTILINE)
    counts = Counter(outcome for _, outcome in outcomes)
    bad = [name for name, outcome in outcomes if outcome in ("FAILED", "ERROR")]
    last = (text.strip().splitlines() or [""])[-1]
    rec.row("tests passed", counts["PASSED"], goal=1, detail=f"{ended}; {last}"[:300])
    rec.row("tests failed", len(bad), goal=0, sense="==", figures={"failed": bad})
    reasons = re.findall(r"^(/.*?:\d+: .*|E  .*)$", text, re.MULTILINE)
    for name, why in zip(bad[:20], [*reasons, *[""] * 20], strict=False):
        rec.row(name.split("/")[-1][:100], ok=False, detail=why[:300])


def _marked(folder: Path) -> list[str]:
    """Other test files that mention the mark: collecting all of them takes long."""
    mentions = [p for p in sorted(folder.rglob("test_*.py")) if "mark.gpu" in p.read_text()]
    elsewhere = ("test_streams.py", "test_pipeline.py")
    return [str(p) for p in mentions if p.parent.name != "kernels" and p.name not in elsewhere]
