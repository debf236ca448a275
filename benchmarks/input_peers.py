"""Decoding from shards beside torchcodec, decord, PyAV and OpenCV on files of the same clips.

    pip install torchcodec==0.13.0 decord2      # what is absent is left out, and said so
    python benchmarks/input_peers.py --videos VIDEOS --json benchmarks/results/input_peers.jsonl

Every video is cut into clips of ten seconds, 128 pixels on the short side. The same frames become our jpeg and vp9
shards, and four kinds of files: H.264 and VP9 as their encoders make them, H.264 with a key frame every 16 frames,
and the very packets of the vp9 shards. A batch is 32 clips: 16 frames each at a random place, two frames apart, as
RGB in memory. All have two threads: ours DALI's, the peers' two files at a time with one thread each, as torchcodec's
and decord's guides advise for many files, or, where that is faster, one file at a time with two. The peers' threads
go on with the next batch before the last clip of one is done; ours wait while a batch's bytes are read. Rounds take
everyone in turn on the same batches: the median of the rounds counts, and beside it stands the best, which what else
the machine does disturbs least. Files lie in the page cache. Our frames lie in memory that DALI uses again for the
next batch; the peers hand out their own.
"""

from __future__ import annotations

import io
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from statistics import median
from typing import Any

import av
import click
import numpy as np
import torch
from input_decoders import Frames, Peer, find_peers, versions
from numpy.typing import NDArray

from engine.core.provenance import provenance
from engine.core.runtime import choose_runtime
from engine.data.ingest.sources import find_videos
from engine.data.media.codecs import JPEG, Pictures
from engine.data.media.decode import (
    SAMPLE_RATE,
    MediaError,
    Window,
    decode_window,
    full_range,
    probe,
)
from engine.data.media.encode import encode_jpeg
from engine.data.media.film import encode_vp9
from engine.data.shards.index import ClipIndex
from engine.data.shards.writer import NewClip, ShardWriter

THREADS, FPS, SHORT, SECONDS = 2, 25.0, 128, 10.0
FRAMES, STRIDE, BATCHES = 16, 2, 4
SEED = 0
SPAN = 0.6
"""Seconds at least that a decoder works in a round: batches come again until they are over."""
AGREE = 30.0
"""dB between a peer's frames and ours, below which it decodes something else and is left out."""


@dataclass(frozen=True)
class Ask:
    """Frames wanted of a clip."""

    clip: int
    frames: NDArray[np.int64]


Step = Callable[[Sequence[Sequence[Ask]]], Iterator[Sequence[Any]]]
"""Batches of asks -> of each its frames or clips in order, uint8 (H, W, 3) or (F, H, W, 3)."""


def make_clips(videos: Path, count: int) -> list[Window]:
    clips: list[Window] = []
    for source in find_videos([videos]):
        try:
            facts = probe(source.path)
            window = decode_window(
                source.path, facts, start=0.0, seconds=SECONDS, fps=FPS, short_side=SHORT
            )
        except MediaError:
            continue
        if len(window.frames) > (FRAMES - 1) * STRIDE:
            clips.append(window)
        if len(clips) == count:
            break
    if not clips:
        raise click.UsageError(f"{videos} holds no video that is long enough")
    return clips


def write_file(path: Path, frames: Frames, codec: str, options: dict[str, str], gop: int) -> None:
    with av.open(str(path), "w") as out:
        stream: Any = out.add_stream(codec, rate=int(FPS))
        stream.width, stream.height = frames.shape[2], frames.shape[1] * 2 // 3
        stream.pix_fmt = "yuv420p"
        stream.codec_context.options, stream.codec_context.gop_size = options, gop
        stream.codec_context.bit_rate = 0
        for i, planes in enumerate(frames):
            frame = full_range(planes).reformat(format="yuv420p", dst_color_range=1)
            frame.pts, frame.time_base = i, Fraction(1, int(FPS))
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))


def remux(film: Pictures, path: Path, *, width: int, height: int) -> None:
    """A shard's very packets in a file that peers can seek in."""
    packed, _ = film.packed(width=width, height=height, fps=FPS)
    with av.open(io.BytesIO(packed)) as source, av.open(str(path), "w") as out:
        stream = out.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.size:
                packet.stream = stream
                out.mux(packet)


def write_all(clips: list[Window], folder: Path) -> dict[str, int]:
    """Files and shards of the clips; gives bytes a frame by kind."""
    sizes = dict.fromkeys(("jpeg shards", "vp9 shards", *KINDS), 0)
    shared: dict[str, Any] = {"fps": FPS, "short_side": SHORT, "sample_rate": SAMPLE_RATE}
    with (
        ShardWriter(folder / "jpeg", **shared) as jpeg,
        ShardWriter(folder / "vp9", **shared) as vp9,
    ):
        for i, clip in enumerate(clips):
            pixels = clip.frames
            width, height = pixels.shape[2], pixels.shape[1] * 2 // 3
            facts: dict[str, Any] = {"width": width, "height": height, "source": "", "start": 0.0}
            pictures = Pictures(JPEG, tuple(encode_jpeg(pixels, quality=85)))
            jpeg.add(NewClip(pictures=pictures, **facts))
            film = encode_vp9(pixels, fps=FPS)
            vp9.add(NewClip(pictures=film, **facts))
            sizes["jpeg shards"] += sum(map(len, pictures.pieces))
            sizes["vp9 shards"] += sum(map(len, film.pieces))
            remux(film, folder / f"{i}.same.webm", width=width, height=height)
            x264, vpx = {"crf": "22"}, {"crf": "30", "cpu-used": "4", "deadline": "good"}
            write_file(folder / f"{i}.mp4", pixels, "libx264", x264, 250)
            write_file(folder / f"{i}.16.mp4", pixels, "libx264", x264, 16)
            write_file(folder / f"{i}.webm", pixels, "libvpx-vp9", vpx, 128)
            for kind, suffix in KINDS.items():
                sizes[kind] += (folder / f"{i}{suffix}").stat().st_size
    frames = sum(len(clip.frames) for clip in clips)
    return {name: round(size / frames) for name, size in sizes.items()}


KINDS = {
    "H.264": ".mp4",
    "H.264, key frame every 16": ".16.mp4",
    "VP9": ".webm",
    "VP9 of our shards": ".same.webm",
}


RIVALS = (("jpeg", tuple(KINDS)), ("vp9", ("VP9", "VP9 of our shards")), ("vp9", ("VP9",)))
"""What our shards are held against: the best peer on any of its files, and on VP9 files."""


def ours(folder: Path, batch: int) -> Step:
    """Reading and decoding from shards, without crop and resize, which the peers don't do either."""
    from nvidia.dali import fn, pipeline_def, types

    index = ClipIndex([folder])
    jpeg = index.codecs == {JPEG}

    @pipeline_def(
        batch_size=batch * (FRAMES if jpeg else 1), num_threads=THREADS, device_id=None,
        prefetch_queue_depth=1,
    )  # fmt: skip
    def graph() -> Any:
        data = fn.external_source(name="data", dtype=types.UINT8, ndim=1)
        if jpeg:
            return fn.decoders.image(data, device="cpu", output_type=types.RGB)
        places = fn.external_source(name="places", dtype=types.INT32, ndim=1)
        return fn.decoders.video(data, device="cpu", frames=places)

    built = graph()

    def decode(plans: Sequence[Sequence[Ask]]) -> Iterator[Any]:
        for asks in plans:
            clips = [index.read(ask.clip, ask.frames.tolist()) for ask in asks]
            if jpeg:
                built.feed_input("data", [picture for clip in clips for picture in clip.frames])
            else:
                built.feed_input("data", [clip.film for clip in clips])
                built.feed_input("places", [clip.places for clip in clips])
            yield from built.run()

    return decode


def parallel(peer: Peer, folder: Path, suffix: str, *, files: int) -> Step:
    """A peer on ``files`` files at a time, which share the threads."""
    threads = THREADS // files

    def one(ask: Ask) -> Sequence[Frames]:
        return peer(str(folder / f"{ask.clip}{suffix}"), ask.frames, threads)

    def decode(plans: Sequence[Sequence[Ask]]) -> Iterator[list[Frames]]:
        with ThreadPoolExecutor(files) as pool:
            at_work = [pool.submit(one, ask) for ask in plans[0]]
            for following in [*plans[1:], ()]:
                ahead = [pool.submit(one, ask) for ask in following]
                yield [frame for clip in at_work for frame in clip.result()]
                at_work = ahead

    return decode


def psnr(one: Any, other: Any) -> float:
    error = np.mean((np.stack(one).astype(np.float64) - np.stack(other)) ** 2)
    return float(10 * np.log10(255**2 / max(error, 1e-9)))


def agrees(step: Step, asks: Sequence[Ask], clips: list[Window]) -> float:
    """The lowest PSNR of a batch's clips, in dB, against the source's frames."""
    (batch,) = step([asks])
    got = [np.array(part) for part in batch]
    flat = [frame for part in got for frame in (part if part.ndim == 4 else [part])]
    assert len(flat) == len(asks) * FRAMES, f"{len(flat)} frames instead of those asked for"
    worst = 99.0
    for i, ask in enumerate(asks):
        planes = clips[ask.clip].frames[ask.frames]
        want = [full_range(p).to_ndarray(format="rgb24") for p in planes]
        worst = min(worst, psnr(flat[i * FRAMES : (i + 1) * FRAMES], want))
    return worst


def measure(
    steps: dict[str, Step], plans: list[list[Ask]], rounds: int
) -> dict[str, NDArray[np.float64]]:
    """Clips a second by step, one value a round; everyone in turn."""
    rates: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            began, clips = time.perf_counter(), 0
            while time.perf_counter() - began < SPAN:
                for _ in step(plans):
                    pass
                clips += sum(map(len, plans))
            rates[name].append(clips / (time.perf_counter() - began))
    return {name: np.array(found) for name, found in rates.items()}


def all_steps(folder: Path, batch: int) -> dict[str, Step]:
    """Ours, for batches of up to ``batch`` clips, and the peers', by "decoder | files"."""
    steps = {f"ours | {kind} shards": ours(folder / kind, batch) for kind in ("jpeg", "vp9")}
    for name, peer in find_peers().items():
        for kind, suffix in KINDS.items():
            steps[f"{name} | {kind}"] = parallel(peer, folder, suffix, files=THREADS)
            steps[f"{name}, one file | {kind}"] = parallel(peer, folder, suffix, files=1)
    return steps


def check(
    steps: dict[str, Step], asks: Sequence[Ask], clips: list[Window]
) -> tuple[dict[str, Step], dict[str, float]]:
    """The steps that give the frames asked for, and how well, in dB; tells of the others."""
    kept, quality = {}, {}
    for name, step in steps.items():
        try:
            quality[name] = agrees(step, asks, clips)
            reason = "" if quality[name] >= AGREE else f"{quality[name]:.1f} dB: other frames"
        except Exception as error:  # a peer may fail on a kind of file in any way
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if reason:
            click.echo(f"{name} is left out: {reason}")
        else:
            kept[name] = step
    return kept, quality


def faster_ways(steps: dict[str, Step], plans: list[list[Ask]]) -> dict[str, Step]:
    """The steps without the slower of a peer's two ways of using threads, by the better of two batches each."""
    rates = {name: rate.max() for name, rate in measure(steps, plans, 2).items()}
    pairs = [(n, n.replace(", one file |", " |")) for n in steps if ", one file |" in n]
    slower = {min(p, key=lambda n: rates[n]) for p in pairs if all(n in rates for n in p)}
    return {name: step for name, step in steps.items() if name not in slower}


@click.command()
@click.option("--videos", type=click.Path(path_type=Path, exists=True), required=True)
@click.option("--clips", "count", type=click.IntRange(min=1), default=32, show_default=True)
@click.option("--batch", type=click.IntRange(min=1), default=32, show_default=True)
@click.option("--rounds", type=click.IntRange(min=1), default=7, show_default=True)
@click.option("--json", "out", type=click.Path(path_type=Path), help="Append a row a decoder.")
def main(videos: Path, count: int, batch: int, rounds: int, out: Path | None) -> None:
    """Print clips a second of every decoder on every kind of file, and ours beside the best."""
    torch.set_num_threads(1)
    clips = make_clips(videos, count)
    draw = np.random.default_rng(SEED)
    plans = [[ask(draw, clips) for _ in range(batch)] for _ in range(BATCHES)]
    with tempfile.TemporaryDirectory() as name:
        sizes = write_all(clips, Path(name))
        steps, quality = check(all_steps(Path(name), batch), plans[0], clips)
        steps = faster_ways(steps, plans[1:2])
        rates = measure(steps, plans, rounds)
    show_table(rates, quality, sizes)
    if out is not None:
        facts = {**provenance(choose_runtime("cpu")), "threads": THREADS, "clips": len(clips)}
        facts.pop("command", None)  # it holds paths of this machine
        facts |= {
            "videos": videos.name,
            "peers": versions(),
            "seed": SEED,
            "recipe_hash": None,
            "rounds": rounds,
            "batch": batch,
            "cores": len(os.sched_getaffinity(0)),
        }
        out.parent.mkdir(parents=True, exist_ok=True)
        with out.open("a", encoding="utf-8") as file:
            for step, rate in rates.items():
                decoder, kind = step.split(" | ")
                row = {"benchmark": "input_peers", "decoder": decoder, "files": kind}
                row |= {"clips_per_second": round(median(rate), 1)}
                row |= {"best_clips_per_second": round(rate.max(), 1)}
                row |= {"worst_psnr": round(quality[step], 2), "bytes_per_frame": sizes[kind]}
                file.write(json.dumps(row | facts) + "\n")


def ask(draw: np.random.Generator, clips: list[Window]) -> Ask:
    clip = int(draw.integers(len(clips)))
    first = draw.integers(len(clips[clip].frames) - (FRAMES - 1) * STRIDE)
    return Ask(clip, first + STRIDE * np.arange(FRAMES))


def show_table(
    rates: dict[str, NDArray[np.float64]], quality: dict[str, float], sizes: dict[str, int]
) -> None:
    click.echo(f"{'decoder':34s} {'files':26s} clips/s    best  worst dB  bytes a frame")
    for step, rate in sorted(rates.items(), key=lambda pair: -median(pair[1])):
        decoder, kind = step.split(" | ")
        told = f"{median(rate):7.1f} {rate.max():7.1f}  {quality[step]:8.1f}  {sizes[kind]:6d}"
        click.echo(f"{decoder:34s} {kind:26s} {told}")
    for kind, files in RIVALS:
        mine = rates[f"ours | {kind} shards"]
        rivals = {s: r for s, r in rates.items() if s.split(" | ")[1] in files}
        if rivals:
            best = max(rivals, key=lambda s: median(rivals[s]))
            told = f"{median(mine) / median(rivals[best]):.2f} times the best peer, {best}"
            top = max(rate.max() for rate in rivals.values())
            click.echo(f"{kind} shards: {told}; by best rounds {mine.max() / top:.2f} times")


if __name__ == "__main__":
    main()
