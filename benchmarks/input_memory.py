"""Whether memory stays flat while batches are loaded: resident size over thousands of small batches.

python benchmarks/input_memory.py SHARDS --batches 5000
"""

from __future__ import annotations

import json
from pathlib import Path

import click
import torch

from engine.core.provenance import provenance
from engine.core.recipe import Audio, Clip
from engine.core.runtime import choose_runtime
from engine.data.pipeline import InputPipeline
from engine.data.plan import plan_batch
from engine.data.shards.index import ClipIndex


def resident() -> float:
    """MiB that this process holds in memory."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024


@click.command()
@click.argument("shards", nargs=-1, type=click.Path(path_type=Path, exists=True), required=True)
@click.option("--batches", "count", type=click.IntRange(min=10), default=5000, show_default=True)
@click.option("--device", default="auto", show_default=True)
@click.option("--json", "out", type=click.Path(path_type=Path), help="Append the result.")
def main(shards: tuple[Path, ...], count: int, device: str, out: Path | None) -> None:
    """Print the resident size after a tenth of the batches and at the end, and the growth between."""
    torch.set_num_threads(1)
    runtime = choose_runtime(device)
    index = ClipIndex(shards)
    clip, audio = Clip(num_frames=4, num_future_frames=2, size=32), Audio()
    pipeline = InputPipeline(
        index, clip, audio=audio, device=runtime.device, batch_size=2, num_frames=6, threads=2
    )
    plans = (plan_batch(index, clip, audio, seed=0, step=k, batch_size=2) for k in range(count))
    sizes = []
    for done, _ in enumerate(pipeline.batches(plans), 1):
        if done % (count // 10) == 0:
            sizes.append(resident())
            click.echo(f"{done:6d} batches: {sizes[-1]:.1f} MiB")
    growth = 100 * (sizes[-1] / sizes[0] - 1)
    click.echo(f"growth from {count // 10} to {count} batches: {growth:.2f} %")
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        facts = {**provenance(runtime), "seed": 0, "recipe_hash": None}
        facts.pop("command")  # it holds paths of this machine
        row = {"benchmark": "input_memory", "batches": count, "growth_percent": growth}
        row |= {"mib": [round(s, 1) for s in sizes]}
        with out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row | facts) + "\n")


if __name__ == "__main__":
    main()
