"""The on-disk format of training clips and its reader: WebDataset tars of JPEG frames, with an index.

A folder holds ``dataset.json`` (facts of the whole), ``index.bin`` (one RECORD a clip), ``shard-00000.tar`` ...
and ``rejects.jsonl``. In a tar a clip is KEY.json (facts), KEY.offsets.npy (uint32, num_frames + 1, into the
next), KEY.mjpg (its JPEG frames, one after the other: a raw MJPEG stream) and, with sound, KEY.flac.
``shard_writer`` writes it.
"""

from __future__ import annotations

import json
import os
import threading
import zlib
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

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
OPEN_SHARDS = 256
"""Shards that one process keeps open."""


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
        self.num_frames = np.concatenate([m["num_frames"] for m in self._maps]).astype(np.int32)
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
        if len(frames) and not 0 <= min(frames) <= max(frames) < n:
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
