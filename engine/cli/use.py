"""``engine embed`` and ``engine export``: what a trained network is used for."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from engine.cli import common

if TYPE_CHECKING:
    from engine.core.recipe import Readout

CHECKPOINT = common.path(
    "--checkpoint", help="The network: RUN, RUN/rgb.safetensors, or published weights."
)


READOUT = click.option(
    "--readout",
    type=click.Choice(["raw", "unit", "zscore"]),
    default="raw",
    help="Scale vectors by their mean and deviation over training clips: unit length, or z-scores.",
)


@click.command()
@click.argument("videos", nargs=-1, type=common.PATH)
@CHECKPOINT
@common.path("--out", help="The file of features, such as features.parquet.")
@click.option("--per", type=click.Choice(["clip", "video"]), default="clip")
@common.count(
    "--views", default=1, help="Views in time, spread over each clip, whose features are averaged."
)
@common.seconds(
    "--clip-seconds", help="Length of a raw video's clips [default: what the network sees at once]."
)
@common.seconds(
    "--every",
    metavar="SECONDS",
    help="From one clip's start to the next one's [default: --clip-seconds, end to end].",
)
@click.option("--fps", type=click.FloatRange(min=1), default=25.0)
@common.count("--batch-size", default=32)
@common.options(READOUT, common.WORKERS, common.DEVICE)
@click.option(
    "--amp",
    type=click.Choice(["auto", "off", "bf16"]),
    default="auto",
    help="Number format of the network; auto: bf16 on a GPU, float32 on a CPU.",
)
@common.errors_explained
def embed(
    videos: tuple[Path, ...],
    checkpoint: Path | None,
    out: Path | None,
    workers: int | None,
    device: str,
    amp: str,
    **settings: Any,
) -> None:
    """Write the features of VIDEOS to a Parquet file, a row a clip or a video.

    VIDEOS are files, folders, lists (as for `engine ingest`) and shards. A raw video is cut into clips from its
    beginning to its end; a clip of shards is a row as it is. Columns: path, start and end in seconds, label where
    it is known, vector. The file's metadata holds the network's card and the protocol.

    After a kill the same command goes on, and the file is what an uninterrupted run gives. What gave no row is in
    OUT.rejects.jsonl, with the reason.
    """
    from engine.core.display import Display
    from engine.core.runtime import check_kernels_package, choose_runtime
    from engine.data.ingest.sources import Reject
    from engine.features.embed import embed as run
    from engine.features.segments import EmbedSettings
    from engine.model.network_file import load_network

    if not videos:
        raise ValueError("no videos given: name files, folders, lists or shards")
    checkpoint, out = _required(checkpoint, out, "the file of features, such as features.parquet")
    check_kernels_package()
    runtime = choose_runtime(device, amp=amp)
    network, card = load_network(checkpoint, device=runtime.device, say=click.echo)
    with Display() as display:
        report = run(
            network,
            card,
            videos=videos,
            out=out,
            settings=EmbedSettings(**settings),
            runtime=runtime,
            workers=workers,
            report=display.prepare,
            warn=display.say,
        )
        rejects = [Reject(**facts) for facts in report.rejects]
        common.say_rejects(display, rejects, file=f"{out}.rejects.jsonl")
        display.say(report.protocol)
        display.say(f"{report.rows} rows, {len(rejects)} rejected -> {out}")


def _required(checkpoint: Path | None, out: Path | None, what: str) -> tuple[Path, Path]:
    if checkpoint is None:
        raise ValueError("--checkpoint is missing: a run's folder, or a network's file")
    if out is None:
        raise ValueError(f"--out is missing: {what}")
    return checkpoint, out


@click.command()
@CHECKPOINT
@common.path("--out", help="The file, such as network.onnx or network.pt2.")
@click.option(
    "--format", "format_", metavar="torch|onnx", help="[default: by --out: .pt2 or .onnx]"
)
@READOUT
@common.errors_explained
def export(
    checkpoint: Path | None, out: Path | None, format_: str | None, readout: Readout
) -> None:
    """Write the RGB network, with its preprocessing, as a torch.export program or an ONNX file.

    It takes uint8 (clips, frames, height, width, 3) and gives features float32 (clips, D), equal to the engine's
    within 1e-4. The card is in the file and beside it (OUT.json).
    """
    from engine.features.export import export as run
    from engine.features.export import format_of
    from engine.model.network_file import load_network

    checkpoint, out = _required(checkpoint, out, "the file, such as network.onnx or network.pt2")
    format_of(out, format_)
    network, card = load_network(checkpoint, say=click.echo)
    report = run(network, card, out=out, format=format_, readout=readout)
    if report.difference is None:
        checked = "not run here, where onnxruntime is not installed"
    else:
        checked = f"differs by at most {report.difference:.1g} from the engine's features"
    click.echo(f"{report.format}, {report.bytes / 1e6:.1f} MB, {checked} -> {out}")
