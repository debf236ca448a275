"""Writing shards, in the format that ``shards`` describes: files appear whole or not at all.

Equal clips give equal bytes.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
import zlib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

import engine
from engine.data.media.codecs import JPEG, Pictures
from engine.data.shards.record import (
    CODEC_SHIFT,
    HAS_AUDIO,
    PARTIAL,
    RECORD,
    codec_of,
    crc_of,
    split_bits,
    told_splits,
)
from engine.data.shards.index import FORMAT
from engine.core.files import StorageError, storing, write_atomic

BLOCK = 512
"""Bytes that a tar's parts are multiples of."""
END = bytes(2 * BLOCK)
"""What ends a tar."""


@dataclass(frozen=True)
class NewClip:
    """A clip on its way into a shard."""

    pictures: Pictures
    width: int
    height: int
    """Pixels of a picture as it is to be seen: its sides' ratio counts, where a decoded one differs."""
    source: str
    """Path of the video it was cut from, relative to the folder that was given."""
    start: float
    """Seconds from the video's first frame."""
    sound: bytes | None = None
    """A FLAC file."""
    label: str | None = None
    """Name of its class."""
    note: str | None = None
    """What is missing of it; set for a clip that ends before it should."""
    splits: tuple[str, ...] = ()
    """Its part, "train", "test" or "validation", in splits 1, 2 ... of its data set; "" for none."""


class ClipTar:
    """One tar of clips on its way: their members, records and labels; ``finish`` or ``discard`` it.

    ``path`` appears whole, by ``finish``, or not at all. Raises StorageError.
    """

    def __init__(self, path: Path, *, fps: float) -> None:
        self.path, self._fps = path, fps
        self._records = bytearray()
        self.labels: list[str | None] = []
        self._at = self._crc = 0
        # of this writer alone: one that was taken for dead may still be at work
        self._temp = path.with_name(f".{path.name}.{os.urandom(4).hex()}.tmp")
        with storing(path):
            self._file: IO[bytes] | None = open(self._temp, "wb")

    @property
    def records(self) -> NDArray[np.void]:
        """One RECORD a clip; ``shard`` and ``label`` are left to whoever knows the whole set."""
        return np.frombuffer(bytes(self._records), RECORD)

    def add(self, clip: NewClip, *, key: str) -> None:
        """Append one clip of at least one frame; ``key`` names its members and has no dot."""
        assert clip.pictures.num_frames
        assert "." not in key
        try:
            with storing(self.path):
                self._write(clip, key)
        except StorageError:
            self.discard()
            raise

    def append(self, data: bytes) -> None:
        """Add bytes that follow the members: clips that another tar's writer made, or what is no clip."""
        try:
            with storing(self.path):
                self._put(data)
        except StorageError:
            self.discard()
            raise

    @property
    def size(self) -> int:
        """Bytes so far."""
        return self._at

    @property
    def crc32(self) -> int:
        """Of the bytes so far."""
        return self._crc

    def finish(self, *, durable: bool = True) -> None:
        """Put the file in its place; ``durable``: only once it is on the disk."""
        assert self._file is not None
        try:
            with storing(self.path):
                self._file.flush()
                if durable:
                    os.fsync(self._file.fileno())
                self._file.close()
                os.replace(self._temp, self.path)
        except StorageError:
            self.discard()
            raise
        self._file = None

    def discard(self) -> None:
        """Drop what was written."""
        if self._file is not None:
            with suppress(OSError):
                self._file.close()
            with suppress(OSError):
                self._temp.unlink()
            self._file = None

    def _write(self, clip: NewClip, key: str) -> None:
        num_frames, codec = clip.pictures.num_frames, clip.pictures.codec
        facts: dict[str, Any] = {"source": clip.source, "start": clip.start, "class": clip.label}
        facts |= {"fps": self._fps, "num_frames": num_frames, "duration": num_frames / self._fps}
        facts |= {"width": clip.width, "height": clip.height}
        facts |= {"note": clip.note} if clip.note else {}
        facts |= {"splits": told_splits(clip.splits)} if any(clip.splits) else {}
        facts |= {} if codec is JPEG else {"codec": codec.name}
        blob, places = clip.pictures.packed(width=clip.width, height=clip.height, fps=self._fps)
        buffer = io.BytesIO()
        np.save(buffer, places)
        table = buffer.getvalue()
        told, sound = json.dumps(facts).encode(), clip.sound or b""
        at = self._member(f"{key}.json", told)
        kind = "offsets" if clip.pictures.shown is None else "shown"
        table_at = self._member(f"{key}.{kind}.npy", table) + len(table) - places.nbytes
        frames_at = self._member(f"{key}.{codec.suffix}", blob)
        sound_at = self._member(f"{key}.flac", sound) if sound else at
        record = np.zeros((), RECORD)
        record["at"], record["json_size"] = at, len(told)
        record["table"], record["frames"], record["sound"] = (
            table_at - at,
            frames_at - at,
            sound_at - at,
        )
        record["frames_size"], record["sound_size"] = len(blob), len(sound)
        record["num_frames"], record["width"], record["height"] = (
            num_frames,
            clip.width,
            clip.height,
        )
        record["flags"] = (HAS_AUDIO if sound else 0) | (PARTIAL if clip.note else 0)
        record["flags"] |= split_bits(clip.splits) | codec.number << CODEC_SHIFT
        record["crc32"] = crc_of(told, places.tobytes(), blob, sound)
        self._records += record.tobytes()
        self.labels.append(clip.label)

    def _member(self, name: str, data: bytes) -> int:
        """Append one file to the tar; gives the offset of its data."""
        info = tarfile.TarInfo(name)
        info.size = len(data)
        self._put(info.tobuf(tarfile.USTAR_FORMAT))
        at = self._at
        self._put(data + bytes(-len(data) % BLOCK))
        return at

    def _put(self, data: bytes) -> None:
        assert self._file is not None
        self._file.write(data)
        self._at += len(data)
        self._crc = zlib.crc32(data, self._crc)


class ShardWriter:
    """Writes clips, in the order given, as a folder of shards; use it as a context manager or call ``close``.

    Nothing but whole shards is ever visible, and without ``dataset.json``, which comes last, the folder is no
    data set. Leaving the block by an exception discards the unfinished shard. Raises StorageError.
    """

    def __init__(
        self,
        folder: Path,
        *,
        fps: float,
        short_side: int,
        sample_rate: int,
        clips_per_shard: int = 1000,
    ) -> None:
        self.folder = folder
        self._facts = {"fps": fps, "short_side": short_side, "sample_rate": sample_rate}
        self._fps, self._clips_per_shard = fps, clips_per_shard
        self._clips = 0
        self._tar: ClipTar | None = None
        self._shards: list[Shard] = []
        with storing(folder):
            folder.mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            self.discard()

    def add(self, clip: NewClip) -> None:
        """Append one clip of at least one frame."""
        if self._tar is None:
            path = self.folder / f"shard-{len(self._shards):05d}.tar"
            self._tar = ClipTar(path, fps=self._fps)
        self._tar.add(clip, key=f"{self._clips:09d}")
        self._clips += 1
        if len(self._tar.labels) == self._clips_per_shard:
            self._finish_shard()

    def close(self, **facts: Any) -> None:
        """Finish the last shard, write the index and then ``dataset.json``, with ``facts`` added to it."""
        if self._tar is not None:
            self._finish_shard()
        write_dataset(self.folder, self._shards, **self._facts, **facts)

    def discard(self) -> None:
        """Drop the unfinished shard."""
        if self._tar is not None:
            self._tar.discard()
            self._tar = None

    def _finish_shard(self) -> None:
        tar, self._tar = self._tar, None
        assert tar is not None
        tar.append(END)
        tar.finish()
        self._shards.append(Shard(tar.path.name, tar.size, tar.crc32, tar.records, tar.labels))


@dataclass(frozen=True)
class Shard:
    """A finished shard."""

    file: str
    size: int
    crc32: int
    records: NDArray[np.void]
    """(clips,) RECORD."""
    labels: list[str | None]


def write_dataset(folder: Path, shards: Sequence[Shard], **facts: Any) -> None:
    """Write the index of finished shards and then ``dataset.json``, which makes them the folder's data set.

    What the folder's earlier data set needs stays untouched until then. Raises StorageError.
    """
    classes = sorted({name for s in shards for name in s.labels if name is not None})
    number = {name: i for i, name in enumerate(classes)} | {None: -1}
    records = [s.records for s in shards] or [np.zeros(0, RECORD)]
    index = np.concatenate(records)
    index["shard"] = np.repeat(np.arange(len(shards)), [len(s.records) for s in shards])
    index["label"] = [number[name] for s in shards for name in s.labels]
    crc = zlib.crc32(index.tobytes())
    name = f"index-{crc:08x}.bin"  # a name of its own, so that dataset.json alone switches sets
    write_atomic(folder / name, index.tobytes())
    listed = [
        {"file": s.file, "clips": len(s.records), "bytes": s.size, "crc32": s.crc32} for s in shards
    ]
    dataset = {
        "format": FORMAT,
        "engine": getattr(engine, "__version__", "unknown"),
        "codec": ", ".join(sorted({codec_of(flags).name for flags in np.unique(index["flags"])})),
        "clips": len(index),
        "index": name,
        "index_crc32": crc,
        "classes": classes,
        "shards": listed,
        **facts,
    }
    write_atomic(folder / "dataset.json", json.dumps(dataset, indent=1).encode())
