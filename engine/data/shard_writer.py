"""Writing shards, in the format that ``shards`` describes: files appear whole or not at all.

Equal clips give equal bytes.
"""

from __future__ import annotations

import errno
import io
import json
import os
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

import engine
from engine.data.shards import FORMAT, HAS_AUDIO, PARTIAL, RECORD

BLOCK = 512
"""Bytes that a tar's parts are multiples of."""


class StorageError(OSError):
    """Shards that can't be written: the message names the file and says why, in one line."""


@contextmanager
def storing(path: Path) -> Iterator[None]:
    """Turn an OSError of the block into a StorageError about ``path``."""
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        hint = "; free some space or choose another folder" if error.errno == errno.ENOSPC else ""
        told = StorageError(f"can't write {path}: {error.strerror or error}{hint}")
        told.errno = error.errno
        raise told from error


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file that appears whole or not at all; raises StorageError."""
    temp = path.with_name(f".{path.name}.tmp")
    with storing(path):
        try:
            with open(temp, "wb") as file:
                file.write(data)
                _sync(file)
            os.replace(temp, path)
        finally:
            with suppress(FileNotFoundError):
                temp.unlink()


def _sync(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())


@dataclass(frozen=True)
class NewClip:
    """A clip on its way into a shard."""

    frames: list[bytes]
    """JPEG files, one a frame."""
    width: int
    height: int
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
        self._records = bytearray()
        self._labels: list[str | None] = []
        self._shards: list[dict[str, Any]] = []
        self._file: IO[bytes] | None = None
        self._at = self._crc = self._in_shard = 0
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
        assert clip.frames
        try:
            with storing(self._shard_path()):
                self._write(clip)
                if self._in_shard == self._clips_per_shard:
                    self._finish_shard()
        except StorageError:
            self.discard()
            raise

    def close(self, **facts: Any) -> None:
        """Finish the last shard, write the index and then ``dataset.json``, with ``facts`` added to it."""
        if self._file is not None:
            try:
                with storing(self._shard_path()):
                    self._finish_shard()
            except StorageError:
                self.discard()
                raise
        classes = sorted({name for name in self._labels if name is not None})
        number = {name: i for i, name in enumerate(classes)}
        index = np.frombuffer(self._records, RECORD).copy()
        index["label"] = [-1 if name is None else number[name] for name in self._labels]
        write_atomic(self.folder / "index.bin", index.tobytes())
        dataset = {
            "format": FORMAT,
            "engine": getattr(engine, "__version__", "unknown"),
            "codec": "jpeg",
            **self._facts,
            "clips": len(index),
            "index_crc32": zlib.crc32(index.tobytes()),
            "classes": classes,
            "shards": self._shards,
            **facts,
        }
        write_atomic(self.folder / "dataset.json", json.dumps(dataset, indent=1).encode())

    def discard(self) -> None:
        """Drop the unfinished shard."""
        if self._file is not None:
            with suppress(OSError):
                self._file.close()
            with suppress(OSError):
                self._temp_path().unlink()
            self._file = None

    def _shard_path(self) -> Path:
        return self.folder / f"shard-{len(self._shards):05d}.tar"

    def _temp_path(self) -> Path:
        return self._shard_path().with_name(f".{self._shard_path().name}.tmp")

    def _write(self, clip: NewClip) -> None:
        if self._file is None:
            self._file = open(self._temp_path(), "wb")
            self._at = self._crc = self._in_shard = 0
        num_frames = len(clip.frames)
        facts: dict[str, Any] = {"source": clip.source, "start": clip.start, "class": clip.label}
        facts |= {"fps": self._fps, "num_frames": num_frames, "duration": num_frames / self._fps}
        facts |= {"width": clip.width, "height": clip.height}
        facts |= {"note": clip.note} if clip.note else {}
        offsets = np.cumsum([0, *map(len, clip.frames)]).astype("<u4")
        buffer = io.BytesIO()
        np.save(buffer, offsets)
        table = buffer.getvalue()
        told, blob, sound = json.dumps(facts).encode(), b"".join(clip.frames), clip.sound or b""
        key = f"{len(self._labels):09d}"
        at = self._member(f"{key}.json", told)
        table_at = self._member(f"{key}.offsets.npy", table) + len(table) - offsets.nbytes
        frames_at = self._member(f"{key}.mjpg", blob)
        sound_at = self._member(f"{key}.flac", sound) if sound else at
        record = np.zeros((), RECORD)
        record["at"], record["shard"], record["json_size"] = at, len(self._shards), len(told)
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
        record["crc32"] = _crc(told, offsets.tobytes(), blob, sound)
        self._records += record.tobytes()
        self._labels.append(clip.label)
        self._in_shard += 1

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

    def _finish_shard(self) -> None:
        assert self._file is not None
        self._put(bytes(2 * BLOCK))
        _sync(self._file)
        self._file.close()
        path = self._shard_path()
        os.replace(self._temp_path(), path)
        self._file = None
        self._shards.append(
            {"file": path.name, "clips": self._in_shard, "bytes": self._at, "crc32": self._crc}
        )


def _crc(*parts: bytes) -> int:
    crc = 0
    for part in parts:
        crc = zlib.crc32(part, crc)
    return crc
