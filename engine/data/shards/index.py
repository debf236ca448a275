"""The on-disk format of training clips and its reader: WebDataset tars of encoded frames, with an index.

A folder holds ``dataset.json`` (facts of the whole, and the names of the rest), ``index-CRC.bin`` (one RECORD a
clip), ``shard-*.tar`` and ``rejects.jsonl``. In a tar a clip is KEY.json (facts), its pictures (``codecs``) and, with
sound, KEY.flac. Pictures are KEY.mjpg (JPEG, one after the other: a raw MJPEG stream) or KEY.ivf (VP9), with
KEY.offsets.npy (uint32, num_frames + 1, into them); or KEY.mp4, with KEY.shown.npy (uint32, num_frames: which of
the film's frames each is). ``shard_writer`` writes it.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import threading
import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from engine.data.media.codecs import Codec, DamagedPictures, build, table_length, taken
from engine.data.shards.damage import (
    Damage,
    DamagedClip,
    damaged_shards,
    index_name,
    size_problem,
    substitutes,
)
from engine.data.shards.record import (
    HAS_AUDIO,
    MAX_SPLITS,
    PARTS,
    RECORD,
    SPLIT_SHIFT,
    codec_of,
    crc_of,
)

FORMAT = 1
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


def data_digest(folders: Iterable[Path]) -> str:
    """Identifies data by their folders' ``dataset.json``, which hold every shard's checksum: 12 hex digits."""
    digest = hashlib.sha256()
    for folder in folders:
        digest.update((folder / "dataset.json").read_bytes())
    return digest.hexdigest()[:12]


COLUMNS = ("label", "shard", "flags", "num_frames", "width", "height", "has_audio", "duration")
"""What an index holds of each clip."""


@dataclass(frozen=True)
class EncodedClip:
    """Bytes of the frames asked for, and of the clip's whole sound."""

    frames: list[NDArray[np.uint8]]
    """JPEG files, uint8 (bytes,) each, in the order asked for; none of a film."""
    film: NDArray[np.uint8] | None
    """An IVF or mp4 file, uint8 (bytes,), that holds the frames."""
    places: NDArray[np.int32] | None
    """(frames,): where they lie in the film, in the order asked for."""
    sound: NDArray[np.uint8] | None
    """A FLAC file, uint8 (bytes,)."""
    clip: int
    """The clip that was read: the one asked for, or the one in its place where that is damaged."""


class ClipIndex:
    """One or several folders of shards as one data set; clips are numbered in the order of the folders.

    Safe to pickle and to read from several threads. Shards that are missing or of the wrong size are left out,
    with their clips: ``damaged`` lists them, and ``warn`` (None: Python's warnings) is told, now as well as when a
    clip turns out damaged later. Raises ValueError that names the folder or file: for no shards, another format
    version, a damaged index, no clip left, and folders that differ in ``fps`` or ``sample_rate``.
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
    shard: NDArray[np.int32]
    """(clips,): number of the tar that holds the clip, rising over all folders."""
    flags: NDArray[np.uint32]
    """(clips,): HAS_AUDIO, PARTIAL and the bits of splits."""
    codecs: set[Codec]
    """How pictures are stored."""
    damaged: tuple[Damage, ...]
    """Shards that were left out."""
    substituted: Counter[int]
    """Clips that were found damaged while reading, and how often another took their place in this process."""

    def __init__(
        self, folders: Sequence[Path], *, warn: Callable[[str], None] | None = None
    ) -> None:
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
        self._indices = [f / index_name(fact) for f, fact in zip(self.folders, facts, strict=True)]
        self._shards: list[list[Path]] = []
        self._init_process(warn)
        self._open_index(facts)
        self.duration = self.num_frames / self.fps

    def _open_index(self, facts: list[dict[str, Any]]) -> None:
        self._rows: list[NDArray[np.int64] | None] = []
        damaged: list[Damage] = []
        columns: list[dict[str, NDArray[Any]]] = []
        for folder, fact, path, rows in zip(
            self.folders, facts, self._indices, self._maps, strict=True
        ):
            problem = size_problem(path, fact["clips"] * RECORD.itemsize)
            if problem is not None:
                raise ValueError(f"{path} {problem}: ingest the videos again")
            bad = damaged_shards(folder, fact)
            damaged += bad.values()
            kept = None
            if bad:
                kept = np.flatnonzero(~np.isin(rows["shard"], list(bad)))
            number = [self.classes.index(name) for name in fact["classes"]] + [-1]
            columns.append(_columns(rows if kept is None else rows[kept]))
            columns[-1]["label"] = np.array(number, np.int32)[columns[-1]["label"]]
            columns[-1]["shard"] += sum(map(len, self._shards))
            self._rows.append(kept)
            self._shards.append([folder / shard["file"] for shard in fact["shards"]])
        whole = {key: np.concatenate([c[key] for c in columns]) for key in columns[0]}
        self._first = np.cumsum([0, *(len(c["label"]) for c in columns)])
        self.label, self.shard, self.flags = whole["label"], whole["shard"], whole["flags"]
        self.num_frames, self.width, self.height = (
            whole[key] for key in ("num_frames", "width", "height")
        )
        self.has_audio = self.flags & HAS_AUDIO > 0
        self.damaged, self.substituted = tuple(damaged), Counter()
        self.codecs = {codec_of(flags) for flags in np.unique(self.flags)}
        self._tell_damage()

    def _tell_damage(self) -> None:
        for damage in self.damaged:
            self._warn(
                f"{damage}: its {damage.clips} clips are left out"
                " (to make it again, ingest the videos again)"
            )
        if self.damaged and not len(self):
            raise ValueError(
                f"{self.damaged[0]}, and no other shard is left: ingest the videos again"
            )

    def _init_process(self, warn: Callable[[str], None] | None) -> None:
        self._files: OrderedDict[Path, IO[bytes]] = OrderedDict()
        self._lock = threading.Lock()
        self._maps = [_map_index(path) for path in self._indices]
        self._warn = warn or _warn
        self._told: set[Path] = set()

    def __getstate__(self) -> dict[str, Any]:
        own = ("_files", "_lock", "_maps", "_warn", "_told")
        return {k: v for k, v in self.__dict__.items() if k not in own}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.__dict__.update(state)
        self._init_process(None)

    def __len__(self) -> int:
        return len(self.num_frames)

    def subset(self, clips: NDArray[np.int64]) -> ClipIndex:
        """The clips with these numbers, rising, as a data set of their own; nothing is copied on disk.

        A damaged clip's place is taken by another of the subset. Raises ValueError for no clips.
        """
        if not len(clips):
            raise ValueError("a subset of a data set needs a clip at least")
        assert (np.diff(clips) > 0).all() and 0 <= clips[0] and clips[-1] < len(self)
        chosen = copy.copy(self)
        for name in COLUMNS:
            setattr(chosen, name, getattr(self, name)[clips])
        chosen._rows = []
        for number, rows in enumerate(self._rows):
            first, end = self._first[number : number + 2]
            inside = clips[(clips >= first) & (clips < end)] - first
            chosen._rows.append(inside if rows is None else rows[inside])
        chosen._first = np.cumsum([0, *map(len, (r for r in chosen._rows if r is not None))])
        chosen.codecs = {codec_of(flags) for flags in np.unique(chosen.flags)}
        chosen.substituted, chosen._warn = Counter(), self._warn
        return chosen

    def in_split(self, number: int, part: str) -> NDArray[np.bool_]:
        """Which clips are in a part ("train", "test", "validation") of split 1, 2 ...: bool (clips,).

        Raises ValueError for another part or number.
        """
        if part not in PARTS[1:] or not 1 <= number <= MAX_SPLITS:
            raise ValueError(f"there is no part {part!r} of split {number}: {', '.join(PARTS[1:])}")
        bits = (self.flags >> (SPLIT_SHIFT + 2 * (number - 1))) & 3
        return np.asarray(bits == PARTS.index(part))

    def read(self, clip: int, frames: Sequence[int], *, check: bool = False) -> EncodedClip:
        """Read the frames with these numbers, and the sound, and nothing else.

        Where they are damaged, a clip of the same label that depends on ``clip`` alone takes the clip's place,
        with the frames asked for as far as it has them; that is counted in ``substituted``, and told once a
        shard. ``check`` reads and checks every byte of the clip, which finds damage that a decoder stumbles over.
        Raises ValueError for a clip or frame that is not there, and where no clip can be read.
        """
        try:
            return self.read_strictly(clip, frames, check=check)
        except DamagedClip as error:
            for other in substitutes(clip, self.label):
                last = int(self.num_frames[other]) - 1
                try:
                    wanted = [min(f, last) for f in frames]
                    found = self.read_strictly(other, wanted, check=check)
                except DamagedClip:
                    continue
                self._tell_substitution(clip, error)
                return found
            raise

    def read_strictly(
        self, clip: int, frames: Sequence[int], *, check: bool = False
    ) -> EncodedClip:
        """Like ``read``, but raises DamagedClip for a damaged clip."""
        path, record = self._find(clip)
        if check and not self._is_intact(path, record):
            raise DamagedClip(f"{path}: clip {clip} is damaged (its checksum): ingest again")
        n, at = int(record["num_frames"]), int(record["at"])
        if len(frames) and not 0 <= min(frames) <= max(frames) < n:
            raise ValueError(
                f"clip {clip} has frames 0 to {n - 1}, not {min(frames)} to {max(frames)}"
            )
        codec = codec_of(record["flags"])
        length = 4 * table_length(codec, n)
        table = self._pread(path, at + int(record["table"]), length).view("<u4")
        begin, sound = at + int(record["frames"]), None
        width, height = int(record["width"]), int(record["height"])
        try:
            want = taken(codec, table, int(record["frames_size"]), frames)
            parts = [self._pread(path, begin + a, b - a) for a, b in want.ranges]
            pictures, film = build(want, parts, width=width, height=height, fps=self.fps)
            if size := int(record["sound_size"]):
                sound = self._pread(path, at + int(record["sound"]), size)
                if sound[:4].tobytes() != b"fLaC":
                    raise DamagedPictures("its sound")
        except DamagedPictures as error:
            raise DamagedClip(f"{path}: clip {clip} is damaged ({error}): ingest again") from error
        return EncodedClip(pictures, film, want.places, sound, clip)

    def _is_intact(self, path: Path, record: np.void) -> bool:
        at, length = (
            int(record["at"]),
            table_length(codec_of(record["flags"]), int(record["num_frames"])),
        )
        sizes = [(0, record["json_size"]), (record["table"], 4 * length)]
        sizes += [
            (record["frames"], record["frames_size"]),
            (record["sound"], record["sound_size"]),
        ]
        parts = [self._pread(path, at + int(away), int(size)).tobytes() for away, size in sizes]
        return crc_of(*parts) == int(record["crc32"])

    def _tell_substitution(self, clip: int, error: DamagedClip) -> None:
        path, _ = self._find(clip)
        with self._lock:
            self.substituted[clip] += 1
            first = path not in self._told
            self._told.add(path)
        if first:
            self._warn(f"{error}; another clip takes its place, as for any other damaged one there")

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
        row, kept = clip - self._first[folder], self._rows[folder]
        record = self._maps[folder][row if kept is None else kept[row]]
        return self._shards[folder][int(record["shard"])], record

    def _pread(self, path: Path, at: int, size: int) -> NDArray[np.uint8]:
        with self._lock:  # an evicted file closes when its last reader lets go of it
            file = self._files.get(path)
            if file is None:
                try:
                    file = open(path, "rb", buffering=0)
                except OSError as error:
                    raise DamagedClip(f"can't open {path}: {error.strerror}") from error
                self._files[path] = file
                if len(self._files) > OPEN_SHARDS:
                    self._files.popitem(last=False)
            self._files.move_to_end(path)
        try:
            data = os.pread(file.fileno(), size, at)
        except OSError as error:
            raise DamagedClip(f"can't read {path}: {error.strerror}") from error
        if len(data) != size:
            raise DamagedClip(f"{path} is truncated: ingest the videos again")
        return np.frombuffer(data, np.uint8)


def _columns(rows: NDArray[np.void]) -> dict[str, NDArray[Any]]:
    """What is kept in memory of an index's rows, by name."""
    kinds = {"label": np.int32, "shard": np.int32, "num_frames": np.int32, "flags": np.uint32}
    kinds |= {"width": np.int32, "height": np.int32}
    return {key: rows[key].astype(kind) for key, kind in kinds.items()}


def _warn(text: str) -> None:
    warnings.warn(text, RuntimeWarning, stacklevel=4)


def _map_index(path: Path) -> NDArray[np.void]:
    """The index's rows; none where it is empty, absent or no whole number of records."""
    size = path.stat().st_size if path.exists() else 0
    if size == 0 or size % RECORD.itemsize:
        return np.zeros(0, RECORD)
    return np.memmap(path, dtype=RECORD, mode="r")
