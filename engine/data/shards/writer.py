"""Writing shards, in the format that ``index`` describes: files appear whole or not at all.

Equal clips give equal bytes.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

import engine
from engine.core.files import StorageError, storing, write_atomic
from engine.data.media.codecs import JPEG, Pictures
from engine.data.shards.index import (
    CODEC_SHIFT,
    FORMAT,
    HAS_AUDIO,
    PARTIAL,
    RECORD,
    codec_of,
    split_bits,
)

BLOCK = 512
"""Bytes that a tar's parts are multiples of."""
END = bytes(2 * BLOCK)
"""The end of a tar."""


@dataclass(frozen=True)
class NewClip:
    """A clip to be stored in a shard."""

    pictures: Pictures
    width: int
    height: int
    """Pixels of a picture as it is to be seen: its sides' ratio counts, where a decoded one differs."""
    source: str
    """Path of the video it was cut from, relative to the folder of the videos."""
    start: float
    """Seconds from the video's first frame."""
    sound: bytes | None = None
    """A FLAC file."""
    label: str | None = None
    """Name of its class."""
    note: str | None = None
    """The part that is missing; set for a clip that ends before it should."""
    splits: tuple[str, ...] = ()
    """Its part, "train", "test" or "validation", in splits 1, 2 ... of its data set; "" for none."""


@dataclass(frozen=True)
class Shard:
    """A finished shard."""

    file: str
    size: int
    crc32: int
    rows: bytes
    """A RECORD a clip; ``shard`` and ``label`` are left to ``write_dataset``."""
    labels: list[str | None]

    @property
    def records(self) -> NDArray[np.void]:
        """The rows, RECORD (clips,)."""
        return np.frombuffer(self.rows, RECORD)

    @property
    def num_frames(self) -> int:
        """Frames of all clips."""
        return int(self.records["num_frames"].sum())


class ClipTar:
    """Writes one tar of clips, and collects their rows of the index and labels; ``finish`` or ``discard`` it.

    ``path`` appears whole, by ``finish``, or not at all. Raises StorageError, and then the tar is discarded.
    """

    def __init__(self, path: Path, *, fps: float) -> None:
        self.path, self._fps = path, fps
        self.labels: list[str | None] = []
        self.size = self.crc32 = 0
        """Of the bytes so far."""
        self._rows = bytearray()
        # of this writer alone: one that was taken for dead may still be at work
        self._temp = path.with_name(f".{path.name}.{os.urandom(4).hex()}.tmp")
        with storing(path):
            self._file: IO[bytes] | None = open(self._temp, "wb")

    def shard(self) -> Shard:
        """The clips so far as a shard."""
        rows = bytes(self._rows)
        return Shard(self.path.name, self.size, self.crc32, rows, list(self.labels))

    def append(self, data: bytes) -> None:
        """Append bytes: another tar's members, or what is no clip."""
        with self._writing() as file:
            file.write(data)
        self.size += len(data)
        self.crc32 = zlib.crc32(data, self.crc32)

    def finish(self, *, durable: bool = True) -> None:
        """Put the file in its place; ``durable``: only once it is on the disk."""
        with self._writing() as file:
            file.flush()
            if durable:
                os.fsync(file.fileno())
            file.close()
            os.replace(self._temp, self.path)
        self._file = None

    def discard(self) -> None:
        """Drop what was written."""
        if self._file is not None:
            with suppress(OSError):
                self._file.close()
            with suppress(OSError):
                self._temp.unlink()
            self._file = None

    @contextmanager
    def _writing(self) -> Iterator[IO[bytes]]:
        """The open file, for a block whose failure discards the tar."""
        assert self._file is not None
        try:
            with storing(self.path):
                yield self._file
        except StorageError:
            self.discard()
            raise

    def add(self, clip: NewClip, *, key: str) -> None:
        """Append one clip of at least one frame; ``key`` names its members and has no dot."""
        assert clip.pictures.num_frames and "." not in key
        num_frames, codec = clip.pictures.num_frames, clip.pictures.codec
        blob, table = clip.pictures.packed(width=clip.width, height=clip.height, fps=self._fps)
        npy = io.BytesIO()
        np.save(npy, table)
        kind = "offsets" if clip.pictures.shown is None else "shown"
        facts, sound = json.dumps(self._facts(clip)).encode(), clip.sound or b""
        at = self._member(f"{key}.json", facts)
        table_end = self._member(f"{key}.{kind}.npy", npy.getvalue()) + npy.tell()
        frames_at = self._member(f"{key}.{codec.suffix}", blob)
        sound_at = self._member(f"{key}.flac", sound) if sound else at
        record = np.zeros((), RECORD)
        for name, value in {
            "at": at,
            "json_size": len(facts),
            "table": table_end - table.nbytes - at,
            "frames": frames_at - at,
            "frames_size": len(blob),
            "sound": sound_at - at,
            "sound_size": len(sound),
            "num_frames": num_frames,
            "width": clip.width,
            "height": clip.height,
            "crc32": zlib.crc32(facts + table.tobytes() + blob + sound),
            "flags": (HAS_AUDIO if sound else 0)
            | (PARTIAL if clip.note else 0)
            | split_bits(clip.splits)
            | codec.number << CODEC_SHIFT,
        }.items():
            record[name] = value
        self._rows += record.tobytes()
        self.labels.append(clip.label)

    def _facts(self, clip: NewClip) -> dict[str, Any]:
        """A clip's facts, for KEY.json."""
        num_frames, codec = clip.pictures.num_frames, clip.pictures.codec
        facts: dict[str, Any] = {"source": clip.source, "start": clip.start, "class": clip.label}
        facts |= {"fps": self._fps, "num_frames": num_frames, "duration": num_frames / self._fps}
        facts |= {"width": clip.width, "height": clip.height}
        facts |= {"note": clip.note} if clip.note else {}
        splits = {str(i): part for i, part in enumerate(clip.splits, start=1) if part}
        facts |= {"splits": splits} if splits else {}
        return facts if codec is JPEG else {**facts, "codec": codec.name}

    def _member(self, name: str, data: bytes) -> int:
        """Append one file to the tar; returns the offset of its data."""
        info = tarfile.TarInfo(name)
        info.size = len(data)
        self.append(info.tobuf(tarfile.USTAR_FORMAT))
        at = self.size
        self.append(data + bytes(-len(data) % BLOCK))
        return at


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
