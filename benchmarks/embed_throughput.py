"""``engine embed`` beside its parts: input alone, the network alone, and both, in turn, in clips a second.

    python benchmarks/embed_throughput.py --videos SHARDS --json benchmarks/results/embed-cpu.jsonl

Where input and network have cores (or a GPU) of their own, both together reach the lower of the two rates. On a CPU
where they share the cores, 1 / (1 / input + 1 / network) is all there is. Both shares are printed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

from engine.core.provenance import provenance
from engine.core.runtime import Runtime, choose_runtime
from engine.data.shards.index import ClipIndex
from engine.features.embed import Embedder, embed
from engine.features.segments import EmbedSettings, Workers, shard_pieces
from engine.model.network_file import Card, ClipInput
from engine.model.resnet3d import ResNet3D

NETWORKS = {
    "r3d_18, 16x112x112": Card(arch="r3d_18", input=ClipInput(16, 2, 112)),
    "r3d_18 of width 0.25 with pool, 8x64x64": Card(
        arch="r3d_18", width=0.25, pool=True, input=ClipInput(8, 2, 64)
    ),
}


def rates(
    shards: Path, card: Card, runtime: Runtime, *, rounds: int, seconds: float
) -> dict[str, list[float]]:
    """Clips a second of input alone, network alone and both, one value a round, taken in turn."""
    torch.manual_seed(0)
    network = ResNet3D(card.arch, 3, width=card.width, pool=card.pool)
    network.to(runtime.device, memory_format=torch.channels_last_3d)
    index, workers = ClipIndex([shards]), Workers(1)
    clip = card.input
    batch = torch.randint(
        0, 256, (8, clip.num_frames, clip.size, clip.size, 3), dtype=torch.uint8
    ).to(runtime.device)
    views = 1

    def embedder() -> Embedder:
        settings = EmbedSettings(batch_size=8, views=views)
        return Embedder(network, card, settings, runtime, workers.stopping, warnings.warn)

    def synchronised() -> None:
        if runtime.device.type == "cuda":
            torch.cuda.synchronize()

    def input_alone() -> int:
        opened = (piece.open() for piece in shard_pieces(index))
        return sum(len(f) for _, f in embedder().decoded(opened) if f is not None)

    def network_alone() -> int:
        work = embedder()
        for _ in range(max(1, len(index) * views // 8)):
            work.embed_clips(batch)
        synchronised()
        return max(1, len(index) * views // 8) * 8

    def both() -> int:
        with tempfile.TemporaryDirectory() as folder:
            settings = EmbedSettings(batch_size=8, views=views)
            out = Path(folder) / "f.parquet"
            report = embed(
                network, card, videos=[shards], out=out, settings=settings, runtime=runtime
            )
        return report.rows * views

    def rate(run: Callable[[], int]) -> float:
        began = time.perf_counter()
        count = run()
        return count / (time.perf_counter() - began)

    views = max(1, round(rate(both) * seconds / len(index)))
    parts = {"input": input_alone, "network": network_alone, "both": both}
    found: dict[str, list[float]] = {name: [] for name in parts}
    for _ in range(rounds):
        for name, run in parts.items():
            found[name].append(rate(run))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--videos", type=Path, required=True, help="shards")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--seconds", type=float, default=10.0, help="of a round of each part, about"
    )
    parser.add_argument("--json", type=Path, help="append a row a network to this file")
    args = parser.parse_args()
    runtime = choose_runtime(args.device)
    for name, card in NETWORKS.items():
        found = rates(args.videos, card, runtime, rounds=args.rounds, seconds=args.seconds)
        each = list(zip(*found.values(), strict=True))
        row = {part: round(statistics.median(values), 2) for part, values in found.items()}
        lower = statistics.median(b / min(i, n) for i, n, b in each)
        shared = statistics.median(b * (1 / i + 1 / n) for i, n, b in each)
        row |= {"of_the_lower": round(lower, 3), "of_shared_cores": round(shared, 3)}
        print(f"{name}: {row}", flush=True)
        if args.json:
            told = {"benchmark": "embed_throughput", "network": name, **row}
            told |= {"rounds": args.rounds, "videos": args.videos.name, "seed": 0}
            facts = {k: v for k, v in provenance(runtime).items() if k != "command"}
            with args.json.open("a") as file:
                file.write(json.dumps({**told, "recipe_hash": None, **facts}) + "\n")


if __name__ == "__main__":
    main()
