"""Digests of what one seed gives: a change that should alter no number is held against the commit before it.

    python tests/digests.py > before.json      # then change the code
    python tests/digests.py > after.json && diff before.json after.json

Shards, a batch, a member's first losses, proposals of each method, three searches, and features of a film. The values
belong to one machine and one set of library versions. ``--real FOLDER`` adds shards of real films.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)  # not tests, which has a folder kernels
TINY = ROOT / "tests" / "tiny.toml"
STEPS = 20
"""Of a member."""


def sha(*blobs: bytes) -> str:
    digest = hashlib.sha256()
    for blob in blobs:
        digest.update(blob)
    return digest.hexdigest()[:16]


def engine(*arguments: object) -> None:
    """Run a command; raises SystemExit with its errors."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "engine", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command[1:])}: {done.stderr}")


def shards(raw: Path, out: Path) -> list[str]:
    """Of their bytes alone: a shard's name holds where its films lie."""
    engine("ingest", raw, "--out", out)
    return sorted(sha(path.read_bytes()) for path in out.rglob("*.tar"))


def batch(videos: Path) -> dict[str, str]:
    from engine.api import load_recipe, open_videos
    from engine.data.pipeline import InputPipeline
    from engine.data.plan import plan_batch

    recipe, index = load_recipe(TINY), open_videos([videos]).index
    frames = recipe.clip.num_frames + recipe.clip.num_future_frames
    pipeline = InputPipeline(
        index,
        recipe.clip,
        audio=recipe.audio,
        device=torch.device("cpu"),
        batch_size=4,
        num_frames=frames,
        threads=1,
    )
    plan = plan_batch(index, recipe.clip, recipe.audio, seed=1, step=2, batch_size=4)
    clips = pipeline.load(plan)
    fields = ("rgb", "flow", "wave", "wave_shifted", "order")
    return {name: sha(getattr(clips, name).contiguous().numpy().tobytes()) for name in fields}


def losses(videos: Path, loss: str) -> list[str]:
    from engine.api import load_loss, load_recipe, open_videos, override, train

    recipe = override(load_recipe("demo"), [f"optim.steps={STEPS}"])
    totals: list[str] = []
    library = open_videos([videos])
    train(
        recipe,
        library,
        loss=load_loss(loss),
        device="cpu",
        progress=lambda step, total: totals.append(total.hex()),
    )
    return totals


def proposals(method: str) -> str:
    """Of 30 members whose fitness is a made-up function of their weights."""
    from engine.api import SearchStudy, load_recipe, recipe_hash

    recipe = load_recipe(TINY)
    size = {"population": 8, "rounds": 22, "cmaes_population": 6, "generation": 4}
    settings = msgspec.structs.replace(recipe.search, method=method, **size)
    study = SearchStudy(
        settings, storage=None, name="digest", seed=3, recipe_hash=recipe_hash(recipe)
    )
    rows = []
    while not study.finished:
        for p in study.ask():
            rows.append(json.dumps([p.number, p.weights, p.parent, p.mutated, p.round]))
            values = list(p.weights.values())
            study.tell(p.number, fitness=sum(values[:5]) - sum(values[5:9]), attributes={})
    return sha("\n".join(rows).encode())


def search(run: Path, videos: Path, labelled: Path, *settings: str) -> dict[str, Any]:
    from safetensors.numpy import load_file

    sets = [word for setting in settings for word in ("--set", setting)]
    data = ("--videos", videos, "--labelled", labelled, "--recipe", TINY, "--run", run)
    engine("evolve", *data, "--device", "cpu", "--members-per-gpu", "8", *sets)
    summary = json.loads((run / "summary.json").read_text())
    del summary["seconds"]
    network = load_file(run / "checkpoints" / "best.safetensors")
    return {
        "summary": summary,
        "best": sha((run / "best.toml").read_bytes()),
        "network": sha(*(name.encode() + network[name].tobytes() for name in sorted(network))),
    }


def features(run: Path, film: Path) -> str:
    from engine.api import embed_video, load_network

    network, card = load_network(run)
    return sha(np.ascontiguousarray(embed_video(network, card, video=film).vector).tobytes())


def main() -> None:
    parser = argparse.ArgumentParser(description="Print digests of what one seed gives, as JSON.")
    parser.add_argument("--real", type=Path, help="a folder of real films to ingest as well")
    real = parser.parse_args().real
    from engine.data.demo.demo import make_demo

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        demo = make_demo(folder / "demo", clips_per_class=3, unlabelled_clips=12)
        videos, labelled = folder / "videos", folder / "labelled"
        rows: dict[str, Any] = {"shards": shards(demo.unlabelled, videos)}
        rows["shards"] += shards(demo.labelled, labelled)
        if real is not None:
            rows["shards"] += shards(real, folder / "real")
        rows["batch"] = batch(videos)
        rows["losses"] = {loss: losses(videos, loss) for loss in ("sec4", "equal")}
        methods = ("evolution", "cmaes", "random", "grid")
        rows["proposals"] = {method: proposals(method) for method in methods}
        halving = ("search.halving=true", "search.population=4", "search.generation=4")
        rows["searches"] = {
            "evolution": search(folder / "evolution", videos, labelled),
            "cmaes": search(
                folder / "cmaes", videos, labelled, "search.method=cmaes", "search.rounds=5"
            ),
            "halving": search(folder / "halving", videos, labelled, "optim.steps=4", *halving),
        }
        rows["features"] = features(folder / "evolution", demo.unlabelled / "000.mp4")
    print(json.dumps(rows, indent=1, sort_keys=True))


if __name__ == "__main__":
    main()
