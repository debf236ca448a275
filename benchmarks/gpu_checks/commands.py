"""The commands on the GPU from start to end: what a network is used for, Ray's workers, several processes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.distributed as dist

from engine.core.launch import launch, ranks_of_environment
from engine.core.recipe import override
from engine.core.runtime import choose_runtime
from engine.data.shards.index import ClipIndex
from engine.objective.lossfile import load_loss
from engine.train.trainer import Trainer
from gpu_checks.job import Job
from gpu_checks.record import ROOT, Absent, Recorder

BOOT = "from gpu_checks.job import use_host; use_host(); from engine.cli.main import main; main()"
TINY_RUN = (
    "clip.num_frames=4 clip.num_future_frames=2 clip.size=32 model.width=0.0625 optim.batch_size=4 "
    "optim.amp=off fitness.views_per_clip=1 fitness.kmeans_init=2 fitness.kmeans_seeds=1"
).split()
"""What every run is on a CPU."""
STEPS = 4
"""Of the pretrainings that are compared."""


def settings(job: Job, *changes: str) -> list[str]:
    """``--set`` options of a run."""
    return [word for change in (*job.size([], TINY_RUN), *changes) for word in ("--set", change)]


def options(name: str, folders: Sequence[Path]) -> list[str]:
    """An option once a folder."""
    return [word for folder in folders for word in (name, str(folder))]


def engine(job: Job, rec: Recorder, name: str, *arguments: str) -> str:
    """Run a command of the engine; its row says how it ended. Raises RuntimeError where it ended badly."""
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", BOOT, *arguments], cwd=ROOT, env=dict(os.environ), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    seconds = time.perf_counter() - began
    logs = job.work / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    (logs / f"{name.replace(' ', '-')}.txt").write_text(done.stdout)
    last = (done.stdout.strip().splitlines() or ["no output"])[-1][:300]
    rec.row(f"{name} ends well", done.returncode, goal=0, sense="==", detail=last)
    if done.returncode:
        raise RuntimeError(f"{name}: {last}")
    rec.row(f"{name}, start to end", seconds, unit="s", detail=job.on_host())
    return done.stdout


def fresh(job: Job, name: str) -> Path:
    """A run's folder that is not there yet."""
    run = job.work / name
    shutil.rmtree(run, ignore_errors=True)
    return run


def network(job: Job, rec: Recorder) -> Path:
    """A trained network's file: the small search's best, or else one that is pretrained here for a few steps."""
    best = job.work / "evolve" / "checkpoints" / "best.safetensors"
    if best.is_file():
        return best
    run, (videos, _) = fresh(job, "pretrained"), job.folders
    steps = settings(job, f"optim.steps={STEPS}", "optim.warmup_steps=1", "optim.compile=off")
    engine(
        job, rec, "engine pretrain", "pretrain", "--recipe", "demo", "--loss", "sec4",
        *options("--videos", videos), "--run", str(run), "--device", job.device.type, *steps,
    )  # fmt: skip
    return run / "rgb.safetensors"


def use(job: Job, rec: Recorder) -> None:
    """Evaluate, finetune, embed and export with a trained network; the exported file gives the network's features."""
    where = network(job, rec)
    checkpoint, device = ["--checkpoint", str(where)], ["--device", job.device.type]
    labelled = job.folders[1][0]
    dataset = ["--dataset", "folders", "--root", str(labelled), "--folds", "group"]
    dataset += ["--group-pattern", r"\d(?=\.)"]  # a built-in video's last digit: ten folds
    with rec.check("engine evaluate"):
        engine(
            job, rec, "engine evaluate", "evaluate", *checkpoint, *dataset, *device, "--protocol",
            "frozen", *settings(job),
        )  # fmt: skip
    with rec.check("engine embed"):
        out = job.work / "features.parquet"
        out.unlink(missing_ok=True)
        engine(
            job,
            rec,
            "engine embed",
            "embed",
            str(labelled),
            *checkpoint,
            *device,
            "--out",
            str(out),
        )
        rec.row("features.parquet", out.stat().st_size, unit="bytes", goal=1)
    with rec.check("engine export"):
        out = job.work / "network.pt2"
        engine(job, rec, "engine export", "export", *checkpoint, "--out", str(out))
        _exported(job, rec, where, out)
    with rec.check("engine finetune"):
        run = fresh(job, "finetuned")
        few = settings(job, "optim.steps=5", "optim.warmup_steps=1", "optim.compile=off")
        engine(
            job, rec, "engine finetune", "finetune", *checkpoint, *dataset, *device, "--recipe",
            "demo", "--run", str(run), *few,
        )  # fmt: skip


def _exported(job: Job, rec: Recorder, checkpoint: Path, exported: Path) -> None:
    """The exported program's features beside the network's own on the device."""
    from engine.features.extract import normalised
    from engine.model.network_file import load_network

    own, card = load_network(checkpoint)
    own = own.to(job.device).eval()
    shape = card.input
    torch.manual_seed(0)
    frames = torch.randint(
        0, 256, (2, shape.num_frames, shape.size, shape.size, 3), dtype=torch.uint8
    )
    with torch.no_grad():
        want = own(normalised(frames, card, job.device)).float().cpu()
        got = torch.export.load(exported).module()(frames)
    error = float((got - want).norm() / want.norm())
    rec.row("exported features are the network's on the device", error, goal=0.01, sense="<=")


def workers(job: Job, rec: Recorder) -> None:
    """A small search by one of Ray's workers, which has the GPU."""
    if find_spec("ray") is None:
        raise Absent("Ray is not installed")
    run, (videos, labelled) = fresh(job, "workers"), job.folders
    small = ["optim.steps=6", "optim.warmup_steps=1", "search.population=3", "search.rounds=1"]
    small += ["search.generation=2", "search.tournament=2", "search.confirm_seeds=1"]
    engine(
        job, rec, "engine evolve with a worker", "evolve", "--recipe", "demo", "--run", str(run),
        *options("--videos", videos), *options("--labelled", labelled),
        *job.size(["--gpus", "1"], ["--workers", "1"]), *settings(job, *small),
    )  # fmt: skip
    summary = json.loads((run / "summary.json").read_text())
    rec.row("members that failed", summary["failures"], goal=0, sense="==")


def ranks(job: Job, rec: Recorder) -> None:
    """NCCL with one process; two processes on one GPU, by gloo where NCCL has no two, beside one process alone."""
    found: dict[str, list[float]] = {}
    backends = job.size(("nccl", "gloo"), ("gloo",))
    for count, backend in [(1, backends[0]), *((2, backend) for backend in backends)]:
        name = f"{count} process{'es' * (count > 1)} on one device by {backend}"
        with rec.check(name):
            out = job.work / f"ranks-{count}-{backend}.json"
            out.unlink(missing_ok=True)
            try:
                launch(
                    train_as_rank, job.folders[0], job.device.type, backend, job.gpu, out,
                    processes=count, restarts=0,
                )  # fmt: skip
            except RuntimeError as error:
                if backend == "nccl" and count > 1:  # it refuses two processes on one GPU
                    raise Absent(str(error)) from None
                raise
            found[name] = json.loads(out.read_text())
            rec.row(name, found[name][-1], detail=f"{STEPS} steps, the last one's loss")
    if len(found) > 1:
        first, *rest = found.values()
        apart = [
            max(abs(other[step] - first[step]) / abs(first[step]) for other in rest)
            for step in range(STEPS)
        ]
        detail = (
            f"relative difference of the first step's loss; of later ones up to {max(apart):.1e}"
        )
        rec.row("two processes are one", apart[0], goal=1e-4, sense="<=", detail=detail)


def train_as_rank(
    videos: Sequence[Path], device: str, backend: str, gpu: bool, out: Path, notes: Path
) -> None:
    """A few steps as one of the processes that share a device; rank 0 writes the losses."""
    from gpu_checks.job import TINY

    own = ranks_of_environment()
    assert own is not None
    dist.init_process_group(backend)
    try:
        import engine.train.trainer as trainer_module
        from engine.core.recipe import load_recipe

        trainer_module.CHECK_EVERY_ON_GPU = 1
        changes = [f"optim.steps={STEPS}", "optim.warmup_steps=1", "optim.compile=off"]
        changes += ["optim.amp=off", "optim.batch_size=8", "optim.name=sgd"]
        # else each process copies, and fills silence with, clips of its own
        changes += ["optim.batch_norm=frozen", "objective.order_share=1"]
        recipe = override(load_recipe("demo"), [*([] if gpu else TINY), *changes])
        torch.backends.cuda.matmul.fp32_precision = "ieee"
        torch.backends.cudnn.conv.fp32_precision = "ieee"  # type: ignore[attr-defined]
        runtime = choose_runtime(device, amp="off")
        trainer = Trainer(recipe, ClipIndex(list(videos)), runtime, ranks=own)
        member = trainer.member(load_loss("equal"), seed=0)
        losses = [trainer.step(member, views) for _, views in trainer.rounds([member], seed=0)]
        if own.leads:
            out.write_text(json.dumps(losses))
    finally:
        dist.destroy_process_group()
