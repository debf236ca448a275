"""Features of videos by a trained RGB network: of folders into a file that survives a kill, or of one video at once.

While one piece's videos are cut by processes, the one before is decoded in threads and the network works on the one
before that. Each piece's rows are a file of their own until all are there.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
import threading
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from torch import Tensor

import engine
from engine.core.files import take_lock
from engine.core.prefetch import ahead
from engine.core.runtime import Runtime, choose_runtime, num_cores
from engine.data.ingest.sources import Found, find_sources
from engine.data.plan import ClipPlan
from engine.data.shards.index import ClipIndex, is_shards
from engine.features.extract import clip_of, decoded, forward
from engine.features.parquet import (
    FeatureRows,
    count_rows,
    identity_of,
    is_part,
    joined,
    merge_parts,
    read_rejects,
    rejects_file,
    write_part,
    write_rejects,
)
from engine.features.segments import (
    EmbedSettings,
    Opened,
    Piece,
    Stretches,
    Workers,
    raw_pieces,
    shard_pieces,
)
from engine.model.network_file import Card
from engine.model.resnet3d import ResNet3D

Report = Callable[[str, int, int], None]
"""Called while features are made: what, done, total."""


@dataclass(frozen=True)
class EmbedReport:
    """What became of the videos."""

    rows: int
    rejects: list[dict[str, Any]]
    reused: int
    """Pieces whose rows an earlier run had made."""
    protocol: str


def protocol_of(card: Card, settings: EmbedSettings, *, amp: bool) -> str:
    """How features came about, in words: network, frames, views, averages, number format."""
    clip, s = card.input, Stretches.of(card.input, settings)
    fps = settings.fps
    return (
        f"{card.arch}{' with pool' if card.pool else ''} of width {card.width:g}, {clip.num_frames} frames"
        f" {clip.frame_stride} apart, central {clip.size}x{clip.size}; raw videos at {fps:g} frames/s in clips of"
        f" {s.length / fps:g} s every {s.every / fps:g} s, shards' clips whole; {settings.views} views a clip,"
        f" averaged; a row a {settings.per}; running batch norm; {'bfloat16' if amp else 'float32'}"
    )


def embed(
    network: ResNet3D,
    card: Card,
    *,
    videos: Sequence[Path],
    out: Path,
    settings: EmbedSettings | None = None,
    runtime: Runtime | None = None,
    workers: int | None = None,
    report: Report | None = None,
    warn: Callable[[str], object] = warnings.warn,
) -> EmbedReport:
    """Write the features of ``videos`` (files, folders, lists, shards) to the Parquet file ``out``.

    A file of the same features that is there already is left as it is; what an earlier run that was killed had
    made, in a hidden folder beside ``out``, is used. Where something gave no row, ``out`` with ``.rejects.jsonl``
    after it lists what and why. ``workers`` counts the processes that cut raw videos (None: one a core).
    Raises ValueError for videos that are not there or give no row, and an ``out`` that is something else;
    OSError where it can't be written.
    """
    settings, runtime = settings or EmbedSettings(), runtime or choose_runtime()
    protocol = protocol_of(card, settings, amp=runtime.amp)
    with _working_beside(out) as work, Workers(workers or num_cores()) as pool:
        pieces, listed = _pieces(videos, card, settings, folder=work, pool=pool)
        about = _about(network, card, protocol, [listed, *(piece.key for piece in pieces)])
        if out.exists():
            if identity_of(out) != about["identity"]:
                raise ValueError(
                    f"{out} is there already, and not with these features: give another --out, or delete it"
                )
            return EmbedReport(count_rows(out), read_rejects(out), len(pieces), protocol)
        job = Embedder(network, card, settings, runtime, pool.stopping, warn)
        parts, reused = _made(job, pieces, work, report)
        rows, rejects = merge_parts(
            parts, out, videos=settings.per == "video", about=about, listed=listed
        )
        write_rejects(out, rejects)
    if not rows:
        raise ValueError(
            f"no video gave a row: {len(rejects)} were rejected; the first, {rejects[0]['path']}: "
            f"{rejects[0]['reason']} (all reasons: {rejects_file(out)})"
        )
    return EmbedReport(rows, rejects, reused, protocol)


def _made(
    job: Embedder, pieces: Sequence[Piece], work: Path, report: Report | None
) -> tuple[list[Path], int]:
    """The files of all pieces' rows in ``work``, and how many of them were there before."""
    parts = {piece.key: work / f"{piece.key}.parquet" for piece in pieces}
    missing = [piece for piece in pieces if not is_part(parts[piece.key])]
    left, total = (sum(piece.units for piece in some) for some in (missing, pieces))
    with closing(job.features(missing)) as made:
        for piece, (opened, rows) in zip(missing, made, strict=True):
            write_part(parts[piece.key], rows)
            opened.close()
            left -= piece.units
            if report is not None:
                report("embedding", total - left, total)
    return list(parts.values()), len(pieces) - len(missing)


def embed_video(
    network: ResNet3D,
    card: Card,
    *,
    video: Path,
    settings: EmbedSettings | None = None,
    runtime: Runtime | None = None,
) -> FeatureRows:
    """The features of one video file, or of a folder of shards, a row a stretch, as ``embed`` makes them.

    Works in this process alone. Raises ValueError with the reason for a video that gives none.
    """
    settings, runtime = settings or EmbedSettings(), runtime or choose_runtime()
    with tempfile.TemporaryDirectory() as folder, Workers(1) as pool:
        pieces, _ = _pieces([video], card, settings, folder=Path(folder), pool=pool)
        job = Embedder(network, card, settings, runtime, pool.stopping, warnings.warn)
        rows = joined([rows for _, rows in job.features(pieces)])
    if not len(rows):
        raise ValueError(f"{video}: {rows.rejects[0]['reason']}")
    return rows


def _pieces(
    videos: Sequence[Path], card: Card, settings: EmbedSettings, *, folder: Path, pool: Workers
) -> tuple[list[Piece], list[dict[str, Any]]]:
    """What is to be embedded, and what can't be by the lists' and shards' own account."""
    given = list(dict.fromkeys(videos))
    shards = [path for path in given if is_shards(path)]
    raw = [path for path in given if path not in shards]
    found = find_sources(raw) if raw else Found()
    pieces = list(raw_pieces(found, card.input, settings, folder=folder, workers=pool))
    rejects = [reject.told() for reject in found.rejects]
    for path in shards:
        index = ClipIndex([path], warn=lambda text: None)
        pieces += shard_pieces(index)
        rejects += [{"path": str(path), "reason": str(damage)} for damage in index.damaged]
    if not pieces:
        why = f": {rejects[0]['path']}: {rejects[0]['reason']}" if rejects else ""
        raise ValueError(f"no videos found in {', '.join(map(str, given))}{why}")
    return pieces, rejects


class Embedder:
    """A network at work on pieces."""

    def __init__(
        self,
        network: ResNet3D,
        card: Card,
        settings: EmbedSettings,
        runtime: Runtime,
        stopping: threading.Event,
        warn: Callable[[str], object],
    ) -> None:
        self.network = network.eval().to(runtime.device)
        self.card, self.settings, self.runtime = card, settings, runtime
        self.stopping, self.warn = stopping, warn
        self.clip = clip_of(card.input)

    def features(
        self, pieces: Sequence[Piece]
    ) -> Generator[tuple[Opened, FeatureRows], None, None]:
        """Each piece's rows, in order; the pieces after it are cut and decoded meanwhile."""
        opened = ahead((piece.open() for piece in pieces), depth=1, name="embed-cut")
        batches = ahead(self.decoded(opened), depth=2, name="embed-decode")
        kept: list[Tensor] = []
        try:
            for piece, frames in batches:
                if frames is not None:
                    kept.append(self.embed_clips(frames))
                    continue
                yield piece, self._rows(piece, kept)
                kept = []
        finally:
            self.stopping.set()
            batches.close()  # type: ignore[attr-defined]

    def embed_clips(self, frames: Tensor) -> Tensor:
        """Features float32 (n, D) of uint8 (n, T, H, W, 3), on the device."""
        (features,) = forward(
            [self.network], [self.card], frames, runtime=self.runtime, all_cores=True
        )
        return features

    def decoded(self, opened: Iterator[Opened]) -> Iterator[tuple[Opened, Tensor | None]]:
        """The pieces' batches, uint8 (n, T, H, W, 3), and None after the last one of each."""
        try:
            for piece in opened:
                if piece.index is not None and len(piece.clip):
                    for frames in decoded(
                        piece.index,
                        self._plans(piece),
                        clip=self.clip,
                        batch_size=self.settings.batch_size,
                        runtime=self.runtime,
                        warn=self.warn,
                    ):
                        yield piece, frames
                yield piece, None
        finally:
            opened.close()  # type: ignore[attr-defined]

    def _plans(self, piece: Opened) -> Iterator[ClipPlan]:
        """Every view of every stretch, a stretch's views one after the other."""
        views, size = self.settings.views, self.settings.batch_size
        for first in range(0, len(piece.clip) * views, size):
            items = np.arange(first, min(first + size, len(piece.clip) * views))
            row, view = items // views, items % views
            yield piece.plan(row, self.clip, place=(view + 0.5) / views)

    def _rows(self, piece: Opened, kept: list[Tensor]) -> FeatureRows:
        """A piece's rows: means over views, without clips that are damaged or whose features are not finite."""
        n, views = len(piece.clip), self.settings.views
        fps = 1.0 if piece.index is None else piece.index.fps
        every = torch.cat(kept) if kept else torch.zeros(0, self.network.feature_dim)
        vectors = every.view(n, views, self.network.feature_dim).mean(1).cpu().numpy()
        end = piece.start + piece.size / fps
        rows = FeatureRows(
            piece.path, piece.start, end, piece.label, vectors, rejects=list(piece.rejects)
        )
        finite = np.isfinite(vectors).all(1)
        lost = {} if piece.index is None else piece.index.substituted
        intact = np.array([clip not in lost for clip in piece.clip.tolist()], np.bool_)
        for i in np.flatnonzero(~(finite & intact)):
            why = "its features are not finite" if intact[i] else "it is damaged in its shard"
            told = {"path": rows.path[i], "reason": why, "where": f"{rows.start[i]:.3f} s"}
            rows.rejects.append({**told, "partial": True})
        return rows.take(finite & intact)


@contextmanager
def _working_beside(out: Path) -> Iterator[Path]:
    """The hidden folder of what is done so far: removed at the end, kept where something is left to do."""
    work = out.with_name(f".{out.name}.parts")
    lock = work / "lock"
    try:
        file = take_lock(lock)
    except BlockingIOError:
        raise ValueError(f"{out}: another process is writing it") from None
    except OSError as error:
        raise OSError(error.errno, f"can't write there: {error.strerror}", str(out)) from None
    with file:
        try:
            yield work
            shutil.rmtree(work, ignore_errors=True)
        finally:
            if work.exists() and list(work.iterdir()) == [lock]:
                shutil.rmtree(work, ignore_errors=True)


def _about(network: ResNet3D, card: Card, protocol: str, content: list[Any]) -> dict[str, str]:
    """The metadata of a file of features; ``content`` says whose."""
    facts = msgspec.to_builtins(card)
    told = [{**facts, "source": ""}, protocol, _weights_hash(network), content]
    return {
        "card": json.dumps(facts),
        "protocol": protocol,
        "engine_version": engine.__version__,
        "identity": hashlib.sha256(json.dumps(told).encode()).hexdigest()[:24],
    }


def _weights_hash(network: ResNet3D) -> str:
    digest = hashlib.sha256()
    for name, value in network.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
