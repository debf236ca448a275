"""Feature extraction beside its two halves: decoding alone, the network alone on decoded clips, and both as evaluated.

python benchmarks/feature_throughput.py SHARDS --arch r3d_18 --frames 16 --size 112
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import click
import numpy as np
import torch

from engine.core.provenance import provenance
from engine.core.runtime import choose_runtime, set_seed
from engine.data.shards.index import ClipIndex
from engine.features.extract import Cuts, Extractor
from engine.model.network_file import Card, ClipInput
from engine.model.resnet3d import DEPTHS, ResNet3D


def rate(work: Callable[[], object], views: int, runtime_device: torch.device) -> float:
    """Views a second of one call."""
    began = time.perf_counter()
    work()
    if runtime_device.type == "cuda":
        torch.cuda.synchronize(runtime_device)
    return views / (time.perf_counter() - began)


@click.command()
@click.argument("shards", nargs=-1, type=click.Path(path_type=Path, exists=True), required=True)
@click.option("--arch", type=click.Choice(list(DEPTHS)), default="r3d_18", show_default=True)
@click.option("--width", type=float, default=1.0, show_default=True)
@click.option("--frames", type=click.IntRange(min=2), default=16, show_default=True)
@click.option("--size", type=click.IntRange(min=16), default=112, show_default=True)
@click.option("--clips", type=click.IntRange(min=2), default=32, show_default=True)
@click.option("--views", type=click.IntRange(min=1), default=3, show_default=True)
@click.option("--batch-size", type=click.IntRange(min=2), default=16, show_default=True)
@click.option("--rounds", type=click.IntRange(min=1), default=3, show_default=True)
@click.option("--device", default="auto", show_default=True)
@click.option("--json", "out", type=click.Path(path_type=Path), help="Append the result.")
def main(
    shards: tuple[Path, ...],
    arch: str,
    width: float,
    frames: int,
    size: int,
    clips: int,
    views: int,
    batch_size: int,
    rounds: int,
    device: str,
    out: Path | None,
) -> None:
    """Print views a second of each half alone and of both, in turn, and both's share of the slower half."""
    runtime = choose_runtime(device)
    index = ClipIndex(shards)
    set_seed(0)
    network = ResNet3D(arch, 3, width=width).eval()
    network.to(device=runtime.device, memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    card = Card(arch=arch, width=width, input=ClipInput(frames, 2, size))
    cuts = Cuts(card.input, views, 1, batch_size)
    which = np.arange(min(clips, len(index)))
    total = len(which) * views
    bank: dict[object, object] = {}
    both = Extractor(index, which, cuts=cuts, runtime=runtime)
    resident = Extractor(index, which, cuts=cuts, runtime=runtime, bank=bank)
    halves: dict[str, Callable[[], object]] = {
        "decoding alone": lambda: [None for _ in both._batches()],
        "network alone": lambda: resident.outputs([network], [card]),
        "both": lambda: both.outputs([network], [card]),
    }
    for work in halves.values():  # the bank is filled, kernels are chosen
        work()
    found: dict[str, list[float]] = {name: [] for name in halves}
    for _ in range(rounds):
        for name, work in halves.items():
            found[name].append(rate(work, total, runtime.device))
    rates = {name: median(values) for name, values in found.items()}
    for name, value in rates.items():
        click.echo(f"{name:15s} {value:9.2f} views/s")
    share = rates["both"] / min(rates["decoding alone"], rates["network alone"])
    click.echo(f"both reach {share:.2f} of the slower half")
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        facts = {**provenance(runtime), "seed": 0, "recipe_hash": None}
        facts.pop("command")  # it holds paths of this machine
        what = {"arch": arch, "width": width, "frames": frames, "size": size, "views": total}
        row = {"benchmark": "feature_throughput", **what, "batch_size": batch_size}
        row |= {
            "views_per_second": {n: round(v, 3) for n, v in rates.items()},
            "share": round(share, 3),
        }
        with out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row | facts) + "\n")


if __name__ == "__main__":
    main()
