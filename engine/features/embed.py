"""Features of videos by a trained RGB network: of folders into a file that survives a kill, or of one video at once.

While one chunk's videos are cut by processes, the one before is decoded in threads and the network works on the one
before that. Each chunk's rows are a file of their own until all are there.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from torch import Tensor

import engine
from engine.core.files import take_lock
from engine.core.prefetch import prefetch
from engine.core.runtime import Runtime, choose_runtime, num_cores
from engine.data.ingest.sources import SourceList, find_sources
from engine.data.library import Report
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
)
from engine.features.readout import NAMES, read_out_by
from engine.features.segments import Chunk, Cutter, Cutting, EmbedSettings, Segments, shard_chunks
from engine.model.network_file import Card
from engine.model.resnet3d import ResNet3D


@dataclass(frozen=True)
class EmbedReport:
    """The outcome of ``embed``."""

    rows: int
    rejects: list[dict[str, Any]]
    reused: int
    """Chunks whose rows an earlier run had made."""
    protocol: str


def protocol_of(card: Card, settings: EmbedSettings, *, amp: bool) -> str:
    """The protocol in words: network, frames, views, averages, number format."""
    clip, s, fps = card.input, Cutting.of(card.input, settings), settings.fps
    how = settings.readout
    scaled = "" if how == "raw" else f"; {NAMES[how]}, by mean and scale over training clips"
    return (
        f"{card.arch}{' with pool' if card.pool else ''} of width {card.width:g}, {clip.num_frames} frames"
        f" {clip.frame_stride} apart, central {clip.size}x{clip.size}; raw videos at {fps:g} frames/s in clips of"
        f" {s.length / fps:g} s every {s.every / fps:g} s, shards' clips whole; {settings.views} views a clip,"
        f" averaged; a row a {settings.per}; running batch norm; {'bfloat16' if amp else 'float32'}"
        f"{scaled}"
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
    left in a hidden folder beside ``out`` is used. Where something gave no row, ``out`` with ``.rejects.jsonl``
    after it lists what and why. ``workers`` counts the processes that cut raw videos (None: one a core).
    Raises ValueError for videos that are not there or give no row, an ``out`` that is something else, and a read-out
    that the card has no numbers for; OSError where it can't be written.
    """
    settings, runtime = settings or EmbedSettings(), runtime or choose_runtime()
    protocol = protocol_of(card, settings, amp=runtime.amp)
    scaled = read_out_by(card, settings.readout)
    count = workers or num_cores()
    with _working_beside(out) as work, closing(Cutter(card.input, settings, work, count)) as cutter:
        chunks, listed = _chunks(videos, cutter, report)
        content = [protocol, _weights_hash(network), [listed, *(chunk.key for chunk in chunks)]]
        about = _about(card, settings, protocol, content)
        if out.exists():
            if identity_of(out) != about["identity"]:
                raise ValueError(
                    f"{out} is there already, and not with these features: give another --out, or delete it"
                )
            return EmbedReport(count_rows(out), read_rejects(out), len(chunks), protocol)
        embedder = Embedder(network, card, settings, runtime, cutter.stopping, warn)
        parts, reused = _write_parts(embedder, chunks, work, report)
        per_video = settings.per == "video"
        rows, rejects = merge_parts(
            parts, out, videos=per_video, about=about, listed=listed, scaled=scaled
        )
    if not rows:
        raise ValueError(
            f"no video gave a row: {len(rejects)} were rejected; the first, {rejects[0]['path']}: "
            f"{rejects[0]['reason']} (all reasons: {rejects_file(out)})"
        )
    return EmbedReport(rows, rejects, reused, protocol)


def _write_parts(
    embedder: Embedder, chunks: Sequence[Chunk], work: Path, report: Report | None
) -> tuple[list[Path], int]:
    """The files of all chunks' rows in ``work``, and how many of them were there before."""
    parts = {chunk.key: work / f"{chunk.key}.parquet" for chunk in chunks}
    missing = [chunk for chunk in chunks if not is_part(parts[chunk.key])]
    left, total = (sum(chunk.units for chunk in some) for some in (missing, chunks))
    with closing(embedder.features(missing)) as features:
        for chunk, (segments, rows) in zip(missing, features, strict=True):
            write_part(parts[chunk.key], rows)
            segments.close()
            left -= chunk.units
            if report is not None:
                report("embedding", total - left, total)
    return list(parts.values()), len(chunks) - len(missing)


def embed_video(
    network: ResNet3D,
    card: Card,
    *,
    video: Path,
    settings: EmbedSettings | None = None,
    runtime: Runtime | None = None,
) -> FeatureRows:
    """The features of one video file, or of a folder of shards, a row a segment, as ``embed`` makes them.

    Works in this process alone. Raises ValueError with the reason for a video that gives none.
    """
    settings, runtime = settings or EmbedSettings(), runtime or choose_runtime()
    scaled = read_out_by(card, settings.readout)
    with (
        tempfile.TemporaryDirectory() as folder,
        closing(Cutter(card.input, settings, Path(folder), 1)) as cutter,
    ):
        chunks, _ = _chunks([video], cutter)
        embedder = Embedder(network, card, settings, runtime, cutter.stopping, warnings.warn)
        rows = joined([rows for _, rows in embedder.features(chunks)])
        rows = replace(rows, vector=scaled(rows.vector))
    if not len(rows):
        raise ValueError(f"{video}: {rows.rejects[0]['reason']}")
    return rows


def _chunks(
    videos: Sequence[Path], cutter: Cutter, report: Report | None = None
) -> tuple[list[Chunk], list[dict[str, Any]]]:
    """Chunks of what can be embedded, and rejects by the lists' and shards' own account."""
    paths = list(dict.fromkeys(videos))
    raw = [path for path in paths if not is_shards(path)]
    sources = find_sources(raw) if raw else SourceList()
    if report is not None:
        for note in sources.notes:
            report(note, 0, 0)
    chunks = list(cutter.chunks(sources))
    rejects = [reject.as_dict() for reject in sources.rejects]
    for path in [path for path in paths if path not in raw]:
        index = ClipIndex([path], warn=lambda text: None)
        chunks += shard_chunks(index)
        rejects += [{"path": str(path), "reason": str(damage)} for damage in index.damaged]
    if not chunks:
        why = f": {rejects[0]['path']}: {rejects[0]['reason']}" if rejects else ""
        raise ValueError(f"no videos found in {', '.join(map(str, paths))}{why}")
    return chunks, rejects


@dataclass
class Embedder:
    """Runs a network on chunks of segments."""

    network: ResNet3D
    card: Card
    settings: EmbedSettings
    runtime: Runtime
    stopping: threading.Event
    """Set when nobody waits for features any more."""
    warn: Callable[[str], object]

    def __post_init__(self) -> None:
        self.network.eval().to(self.runtime.device)
        self.clip = clip_of(self.card.input)

    def features(
        self, chunks: Sequence[Chunk]
    ) -> Generator[tuple[Segments, FeatureRows], None, None]:
        """Each chunk's rows, in order; the chunks after it are cut and decoded meanwhile."""
        opened = prefetch((chunk.open() for chunk in chunks), depth=1, name="embed-cut")
        batches = prefetch(self.decoded(opened), depth=2, name="embed-decode")
        outputs: list[Tensor] = []
        try:
            for segments, frames in batches:
                if frames is not None:
                    outputs.append(self.embed_clips(frames))
                    continue
                yield segments, self._rows(segments, outputs)
                outputs = []
        finally:
            self.stopping.set()
            batches.close()

    def embed_clips(self, frames: Tensor) -> Tensor:
        """Features float32 (n, D) of uint8 (n, T, H, W, 3), on the device."""
        networks, cards = [self.network], [self.card]
        (features,) = forward(networks, cards, frames, runtime=self.runtime, all_cores=True)
        return features

    def decoded(self, chunks: Iterator[Segments]) -> Iterator[tuple[Segments, Tensor | None]]:
        """The chunks' batches, uint8 (n, T, H, W, 3), and None after the last one of each."""
        size = self.settings.batch_size
        how: dict[str, Any] = {"clip": self.clip, "runtime": self.runtime, "warn": self.warn}
        try:
            for segments in chunks:
                if segments.index is not None and len(segments.clip):
                    plans = self._plans(segments)
                    for batch in decoded(segments.index, plans, batch_size=size, **how):
                        yield segments, batch.rgb
                yield segments, None
        finally:
            chunks.close()  # type: ignore[attr-defined]

    def _plans(self, segments: Segments) -> Iterator[ClipPlan]:
        """Every view of every segment, a segment's views one after the other."""
        views, size = self.settings.views, self.settings.batch_size
        for first in range(0, len(segments.clip) * views, size):
            items = np.arange(first, min(first + size, len(segments.clip) * views))
            row, view = items // views, items % views
            yield segments.plan(row, self.clip, place=(view + 0.5) / views)

    def _rows(self, segments: Segments, outputs: list[Tensor]) -> FeatureRows:
        """A chunk's rows: means over views, without clips that are damaged or whose features are not finite."""
        n, dim = len(segments.clip), self.network.feature_dim
        every = torch.cat(outputs) if outputs else torch.zeros(0, dim)
        vectors = every.view(n, self.settings.views, dim).mean(1).cpu().numpy()
        end, lost = segments.start, Counter[int]()
        if segments.index is not None:
            end = segments.start + segments.size / segments.index.fps
            lost = segments.index.substituted
        finite = np.isfinite(vectors).all(1)
        intact = np.array([clip not in lost for clip in segments.clip.tolist()], np.bool_)
        rejects = list(segments.rejects)
        for i in np.flatnonzero(~(finite & intact)):
            why = "its features are not finite" if intact[i] else "it is damaged in its shard"
            where = f"{segments.start[i]:.3f} s"
            reject = {"path": segments.path[i], "reason": why, "where": where, "partial": True}
            rejects.append(reject)
        s = segments
        rows = FeatureRows(s.path, s.start, end, s.label, vectors, rejects=rejects)
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


def _about(
    card: Card, settings: EmbedSettings, protocol: str, content: list[Any]
) -> dict[str, str]:
    """The metadata of a file of features; ``content`` identifies protocol, weights and videos."""
    facts = msgspec.to_builtins(card)
    uncounted = ["feature_mean", "feature_scale"] if settings.readout == "raw" else []
    same = {**{name: fact for name, fact in facts.items() if name not in uncounted}, "source": ""}
    whole = [same, *content]
    return {
        "card": json.dumps(facts),
        "protocol": protocol,
        "engine_version": engine.__version__,
        "identity": hashlib.sha256(json.dumps(whole).encode()).hexdigest()[:24],
    }


def _weights_hash(network: ResNet3D) -> str:
    digest = hashlib.sha256()
    for name, value in network.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
