"""The on-disk format of training clips: WebDataset tars of JPEG frames, with an index for random access.

A folder holds ``dataset.json`` (facts of the whole), ``index.bin`` (one RECORD a clip), ``shard-00000.tar`` ...
and ``rejects.jsonl``. In a tar a clip is KEY.json (facts), KEY.offsets.npy (uint32, num_frames + 1, into the
next), KEY.mjpg (its JPEG frames, one after the other: a raw MJPEG stream) and, with sound, KEY.flac.
Equal clips give equal bytes.
"""

from __future__ import annotations

import errno
import io
import json
import os
import tarfile
import threading
import zlib
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

import engine

FORMAT = 1
RECORD = np.dtype(
    [
        ("at", "<u8"),  # of the json in its shard; what follows lies at the distances below
        ("shard", "<u4"),
        ("json_size", "<u4"),
        ("table", "<u4"),  # from "at" to the first offset
        ("frames", "<u4"),  # from "at" to the first frame
        ("frames_size", "<u4"),
        ("sound", "<u4"),  # from "at" to the sound
        ("sound_size", "<u4"),
        ("num_frames", "<u4"),
        ("label", "<i4"),  # -1: none
        ("width", "<u2"),
        ("height", "<u2"),
        ("crc32", "<u4"),  # of json, table, frames and sound, in this order
        ("flags", "<u4"),
        ("spare", "<u8"),
    ]
)
HAS_AUDIO, PARTIAL = 1, 2
BLOCK = 512
OPEN_SHARDS = 256
"""Shards that one process keeps open."""


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


def is_shards(folder: Path) -> bool:
    """Whether a folder holds a finished data set of any format version."""
    try:
        facts = json.loads((folder / "dataset.json").read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(facts, dict) and "format" in facts and "shards" in facts


def read_dataset(folder: Path) -> dict[str, Any]:
    """The contents of ``dataset.json``; raises ValueError for no shards and for another format version."""
    if not is_shards(folder):
        raise ValueError(
            f"{folder} holds no shards (dataset.json): make them from videos with `engine ingest`"
        )
    facts: dict[str, Any] = json.loads((folder / "dataset.json").read_bytes())
    if facts["format"] != FORMAT:
        raise ValueError(
            f"{folder} is in shard format {facts['format']}, and this version reads {FORMAT}: ingest the videos again"
        )
    return facts


@dataclass(frozen=True)
class EncodedClip:
    """Bytes of the frames asked for, and of the clip's whole sound."""

    frames: list[NDArray[np.uint8]]
    """JPEG files, uint8 (bytes,) each, in the order asked for."""
    sound: NDArray[np.uint8] | None
    """A FLAC file, uint8 (bytes,)."""


class ClipIndex:
    """One or several folders of shards as one data set; clips are numbered in the order of the folders.

    Safe to pickle and to read from several threads. Raises ValueError that names the folder or file: for no
    shards, another format version, a missing or truncated shard, and folders that differ in ``fps`` or
    ``sample_rate``.
    """

    fps: float
    sample_rate: int
    classes: tuple[str, ...]
    """Names of the classes of all folders, sorted."""
    num_frames: NDArray[np.int32]
    """(clips,)"""
    width: NDArray[np.int32]
    height: NDArray[np.int32]
    """(clips,) pixels of the stored frames."""
    label: NDArray[np.int32]
    """(clips,): the class's place in ``classes``, -1 for none."""
    has_audio: NDArray[np.bool_]
    """(clips,)"""
    duration: NDArray[np.float64]
    """(clips,) seconds."""
    width: NDArray[np.int32]
    height: NDArray[np.int32]
    """(clips,) pixels."""

    def __init__(self, folders: Sequence[Path]) -> None:
        if not folders:
            raise ValueError("no folder of shards given")
        self.folders = tuple(Path(folder) for folder in folders)
        facts = [read_dataset(folder) for folder in self.folders]
        self.fps, self.sample_rate = float(facts[0]["fps"]), int(facts[0]["sample_rate"])
        for folder, other in zip(self.folders, facts, strict=True):
            for key in ("fps", "sample_rate"):
                if other[key] != facts[0][key]:
                    raise ValueError(
                        f"{self.folders[0]} and {folder} differ in {key}"
                        f" ({facts[0][key]} and {other[key]}): ingest one of them again"
                    )
        self.classes = tuple(sorted({name for fact in facts for name in fact["classes"]}))
        self._shards: list[list[Path]] = []
        self._open_index(facts)
        self.duration = self.num_frames / self.fps
        self._init_files()

    def _open_index(self, facts: list[dict[str, Any]]) -> None:
        self._maps: list[NDArray[np.void]] = []
        labels = []
        for folder, fact in zip(self.folders, facts, strict=True):
            for problem in _shard_problems(folder, fact):
                raise ValueError(f"{problem}: ingest the videos again")
            self._shards.append([folder / shard["file"] for shard in fact["shards"]])
            self._maps.append(_map_index(folder))
            number = [self.classes.index(name) for name in fact["classes"]] + [-1]
            labels.append(np.array(number, np.int32)[self._maps[-1]["label"]])
        self._first = np.cumsum([0, *(len(m) for m in self._maps)])
        self.label = np.concatenate(labels)
        for name in ("num_frames", "width", "height"):
            column = np.concatenate([m[name] for m in self._maps]).astype(np.int32)
            setattr(self, name, column)
        self.width = np.concatenate([m["width"] for m in self._maps]).astype(np.int32)
        self.height = np.concatenate([m["height"] for m in self._maps]).astype(np.int32)
        self.has_audio = np.concatenate([m["flags"] & HAS_AUDIO for m in self._maps]) > 0

    def _init_files(self) -> None:
        self._files: OrderedDict[Path, IO[bytes]] = OrderedDict()
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_files", "_lock", "_maps")}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.__dict__.update(state)
        self._maps = [_map_index(folder) for folder in self.folders]
        self._init_files()

    def __len__(self) -> int:
        return len(self.num_frames)

    def read(self, clip: int, frames: Sequence[int]) -> EncodedClip:
        """Read the frames with these numbers, and the sound, and nothing else.

        Raises ValueError for a clip or frame that is not there and for a shard that was damaged or replaced.
        """
        path, record = self._find(clip)
        n = int(record["num_frames"])
        if frames and not 0 <= min(frames) <= max(frames) < n:
            raise ValueError(
                f"clip {clip} has frames 0 to {n - 1}, not {min(frames)} to {max(frames)}"
            )
        at = int(record["at"])
        offsets = (
            self._pread(path, at + int(record["table"]), 4 * (n + 1)).view("<u4").astype(np.int64)
        )
        begin = at + int(record["frames"])
        found = [
            self._pread(path, begin + offsets[i], int(offsets[i + 1] - offsets[i])) for i in frames
        ]
        if any(f[:2].tobytes() != b"\xff\xd8" for f in found):
            raise ValueError(
                f"{path}: clip {clip} is damaged (no JPEG where one should be): ingest again"
            )
        size = int(record["sound_size"])
        sound = self._pread(path, at + int(record["sound"]), size) if size else None
        return EncodedClip(found, sound)

    def facts(self, clip: int) -> dict[str, Any]:
        """What the shard says of a clip: source, start, class, fps, num_frames, duration, width, height, note."""
        path, record = self._find(clip)
        told: dict[str, Any] = json.loads(
            self._pread(path, int(record["at"]), int(record["json_size"])).tobytes()
        )
        return told

    def _find(self, clip: int) -> tuple[Path, np.void]:
        if not 0 <= clip < len(self):
            raise ValueError(
                f"there is no clip {clip}: the data set has clips 0 to {len(self) - 1}"
            )
        folder = int(np.searchsorted(self._first, clip, side="right")) - 1
        record = self._maps[folder][clip - self._first[folder]]
        return self._shards[folder][int(record["shard"])], record

    def _pread(self, path: Path, at: int, size: int) -> NDArray[np.uint8]:
        with self._lock:  # an evicted file closes when its last reader lets go of it
            file = self._files.get(path)
            if file is None:
                try:
                    file = open(path, "rb", buffering=0)
                except OSError as error:
                    raise ValueError(f"can't open {path}: {error.strerror}") from error
                self._files[path] = file
                if len(self._files) > OPEN_SHARDS:
                    self._files.popitem(last=False)
            self._files.move_to_end(path)
        data = os.pread(file.fileno(), size, at)
        if len(data) != size:
            raise ValueError(f"{path} is truncated: ingest the videos again")
        return np.frombuffer(data, np.uint8)


def _map_index(folder: Path) -> NDArray[np.void]:
    path = folder / "index.bin"
    if path.exists() and path.stat().st_size == 0:
        return np.zeros(0, RECORD)
    return np.memmap(path, dtype=RECORD, mode="r")


def _shard_problems(folder: Path, facts: Mapping[str, Any]) -> Iterator[str]:
    """Files that are missing or of the wrong size."""
    sizes = {"index.bin": facts["clips"] * RECORD.itemsize}
    sizes |= {shard["file"]: shard["bytes"] for shard in facts["shards"]}
    for name, size in sizes.items():
        path = folder / name
        found = path.stat().st_size if path.exists() else None
        if found is None:
            yield f"{path} is missing"
        elif found != size:
            yield f"{path} is {'truncated' if found < size else 'too long'}: {found} bytes of {size}"


def verify(folder: Path) -> list[str]:
    """Read every byte of a data set and tell what is damaged, one line a file; an empty list is a sound one."""
    facts = read_dataset(folder)
    problems = list(_shard_problems(folder, facts))
    sums = {"index.bin": facts["index_crc32"]} | {s["file"]: s["crc32"] for s in facts["shards"]}
    for name, expected in sums.items():
        path = folder / name
        if any(problem.startswith(f"{path} ") for problem in problems):
            continue
        crc = 0
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                crc = zlib.crc32(block, crc)
        if crc != expected:
            problems.append(f"{path} is damaged: its checksum is {crc:08x}, not {expected:08x}")
    return problems
