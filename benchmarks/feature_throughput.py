"""Feature extraction beside its two halves: decoding alone, the network alone on decoded clips, and both as evaluated.

python benchmarks/feature_throughput.py SHARDS --arch r3d_18 --frames 16 --size 112
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import click
import numpy as np
import torch
from rows import DEVICE, JSON, ROUNDS, SHARDS, append

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
@SHARDS
@click.option("--arch", type=click.Choice(list(DEPTHS)), default="r3d_18", show_default=True)
@click.option("--width", type=float, default=1.0, show_default=True)
@click.option("--frames", type=click.IntRange(min=2), default=16, show_default=True)
@click.option("--size", type=click.IntRange(min=16), default=112, show_default=True)
@click.option("--clips", type=click.IntRange(min=2), default=32, show_default=True)
@click.option("--views", type=click.IntRange(min=1), default=3, show_default=True)
@click.option("--batch-size", type=click.IntRange(min=2), default=16, show_default=True)
@ROUNDS
@DEVICE
@JSON
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
    sizes = {"arch": arch, "width": width, "frames": frames, "size": size, "views": total}
    row = {"benchmark": "feature_throughput", **sizes, "batch_size": batch_size}
    row |= {"views_per_second": {name: round(value, 3) for name, value in rates.items()}}
    append(out, [row | {"share": round(share, 3)}], runtime, seed=0)


if __name__ == "__main__":
    main()
