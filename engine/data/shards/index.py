"""The on-disk format of training clips and its reader: WebDataset tars of encoded frames, with an index.

A folder holds ``dataset.json`` (facts of the whole, and the names of the rest), ``index-CRC.bin`` (one RECORD a
clip), ``shard-*.tar`` and ``rejects.jsonl``. In a tar a clip is KEY.json (facts), its pictures (``codecs``) and, with
sound, KEY.flac. Pictures are KEY.mjpg (JPEG, one after the other: a raw MJPEG stream) or KEY.ivf (VP9), with
KEY.offsets.npy (uint32, num_frames + 1, into them); or KEY.mp4, with KEY.shown.npy (uint32, num_frames: which of
the film's frames each is). ``writer`` writes it.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import threading
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from engine.data.media.codecs import CODECS, Codec, DamagedPictures, assemble, locate, table_length

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
"""Bits of ``flags``; from CODEC_SHIFT on, three bits say how its pictures are stored, and from SPLIT_SHIFT on, two
bits each its part in each split of its data set."""
CODEC_SHIFT = 2
SPLIT_SHIFT, MAX_SPLITS = 8, 12
PARTS = ("", "train", "test", "validation")
OPEN_SHARDS = 256
"""Shards that one process keeps open."""
TRIES = 64
"""Clips that are tried in the place of a damaged one."""
STREAM = 0xDA4A
"""Keeps the draws of substitutes apart from every other use of a clip's number."""


def codec_of(flags: Any) -> Codec:
    """The codec of a clip's pictures, by its ``flags``."""
    return CODECS[(int(flags) >> CODEC_SHIFT) & 7]


def split_bits(splits: Sequence[str]) -> int:
    """A clip's parts in splits 1, 2 ... as bits of ``flags``."""
    assert len(splits) <= MAX_SPLITS
    return sum(PARTS.index(part) << (SPLIT_SHIFT + 2 * i) for i, part in enumerate(splits))


def is_shards(folder: Path) -> bool:
    """Whether a folder holds a finished data set of any format version."""
    return _facts_of(folder) is not None


def read_dataset(folder: Path) -> dict[str, Any]:
    """Read ``dataset.json``; raises ValueError for no shards and for another format version."""
    facts = _facts_of(folder)
    if facts is None:
        raise ValueError(
            f"{folder} holds no shards (dataset.json): make them from videos with `engine ingest`"
        )
    if facts["format"] != FORMAT:
        raise ValueError(
            f"{folder} is in shard format {facts['format']}, and this version reads {FORMAT}: ingest the videos again"
        )
    return facts


def _facts_of(folder: Path) -> dict[str, Any] | None:
    try:
        facts = json.loads((folder / "dataset.json").read_bytes())
    except (OSError, ValueError):
        return None
    return facts if isinstance(facts, dict) and {"format", "shards"} <= facts.keys() else None


def data_digest(folders: Iterable[Path]) -> str:
    """Identifies data by their folders' ``dataset.json``, which hold every shard's checksum: 12 hex digits."""
    digest = hashlib.sha256()
    for folder in folders:
        digest.update((folder / "dataset.json").read_bytes())
    return digest.hexdigest()[:12]


class DamagedClip(ValueError):
    """Bytes of a clip that are missing or are not what was written; the message names the shard."""


@dataclass(frozen=True)
class Damage:
    """A file of a data set that is missing or of the wrong size."""

    path: Path
    problem: str
    """In words, such as "is missing"."""
    clips: int
    """Clips that it should hold."""

    def __str__(self) -> str:
        return f"{self.path} {self.problem}"


def index_name(facts: Mapping[str, Any]) -> str:
    """The index's file name, by ``dataset.json``'s contents."""
    return str(facts.get("index", "index.bin"))


def size_problem(path: Path, size: int) -> str | None:
    """Say what is wrong with a file that should have this size; None for nothing."""
    try:
        actual = path.stat().st_size
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"can't be read: {error.strerror}"
    if actual == size:
        return None
    return f"is {'truncated' if actual < size else 'too long'}: {actual} bytes of {size}"


def damaged_shards(folder: Path, facts: Mapping[str, Any]) -> dict[int, Damage]:
    """Shards that are missing or of the wrong size, by their place in ``dataset.json``."""
    damaged = {}
    for number, shard in enumerate(facts["shards"]):
        path = folder / shard["file"]
        problem = size_problem(path, shard["bytes"])
        if problem is not None:
            damaged[number] = Damage(path, problem, shard["clips"])
    return damaged


def substitutes(clip: int, label: NDArray[np.int32]) -> Iterator[int]:
    """Clips of the same label to try in the place of a damaged one: a pure function of its arguments."""
    same = np.flatnonzero(label == label[clip])
    random = np.random.Generator(np.random.Philox(key=[clip, STREAM]))
    tried = {clip}
    for place in random.integers(0, len(same), 4 * TRIES):
        other = int(same[place])
        if other not in tried:
            tried.add(other)
            yield other
        if len(tried) > TRIES:
            return


COLUMNS = {
    "label": np.int32,
    "shard": np.int32,
    "flags": np.uint32,
    "num_frames": np.int32,
    "width": np.int32,
    "height": np.int32,
}
"""Columns of an index that are kept in memory, and their types there."""


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
    with their clips: ``damaged`` lists them, and ``warn`` (None: Python's warnings) is called, now as well as when a
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
    """Codecs of its pictures."""
    damaged: tuple[Damage, ...]
    """Shards that were left out."""
    substituted: Counter[int]
    """Clips that were found damaged while reading, and how often another took their place in this process."""
    _row: NDArray[np.int64]
    """(clips,): the clip's row in its folder's index."""
    _folder: NDArray[np.int64]
    """(clips,): its folder's place in ``folders``."""

    def __init__(
        self, folders: Sequence[Path], *, warn: Callable[[str], None] | None = None
    ) -> None:
        if not folders:
            raise ValueError("no folder of shards: name one at least")
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
        self._init_process(warn)
        self._open(facts)
        self._warn_of_damage()

    def _init_process(self, warn: Callable[[str], None] | None) -> None:
        # a file that falls out of the cache closes when its last reader lets go of it
        self._opened = lru_cache(OPEN_SHARDS)(_open_shard)
        self._lock = threading.Lock()
        self._maps = [_map_index(path) for path in self._indices]
        self._warn = warn or _warn
        self._warned: set[Path] = set()

    def _open(self, facts: list[dict[str, Any]]) -> None:
        self._paths: list[Path] = []
        damaged: list[Damage] = []
        tables: list[dict[str, NDArray[Any]]] = []
        for folder, (path, fact) in enumerate(zip(self._indices, facts, strict=True)):
            rows = self._maps[folder]
            problem = size_problem(path, fact["clips"] * RECORD.itemsize)
            if problem is not None:
                raise ValueError(f"{path} {problem}: ingest the videos again")
            bad = damaged_shards(self.folders[folder], fact)
            damaged += bad.values()
            kept = ~np.isin(rows["shard"], list(bad)) if bad else slice(None)
            table: dict[str, NDArray[Any]] = {
                key: rows[key][kept].astype(kind) for key, kind in COLUMNS.items()
            }
            number = [self.classes.index(name) for name in fact["classes"]] + [-1]
            table["label"] = np.array(number, np.int32)[table["label"]]
            table["shard"] += len(self._paths)
            table["_row"] = np.arange(len(rows))[kept]
            table["_folder"] = np.full_like(table["_row"], folder)
            tables.append(table)
            self._paths += [self.folders[folder] / shard["file"] for shard in fact["shards"]]
        for name in tables[0]:
            setattr(self, name, np.concatenate([table[name] for table in tables]))
        self.has_audio = self.flags & HAS_AUDIO > 0
        self.duration = self.num_frames / self.fps
        self.codecs = {codec_of(flags) for flags in np.unique(self.flags)}
        self.damaged, self.substituted = tuple(damaged), Counter()

    def _warn_of_damage(self) -> None:
        for damage in self.damaged:
            self._warn(
                f"{damage}: its {damage.clips} clips are left out"
                " (to make it again, ingest the videos again)"
            )
        if self.damaged and not len(self):
            raise ValueError(
                f"{self.damaged[0]}, and no other shard is left: ingest the videos again"
            )

    def __getstate__(self) -> dict[str, Any]:
        own = ("_opened", "_lock", "_maps", "_warn", "_warned")
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
        for name in (*COLUMNS, "has_audio", "duration", "_row", "_folder"):
            setattr(chosen, name, getattr(self, name)[clips])
        chosen.codecs = {codec_of(flags) for flags in np.unique(chosen.flags)}
        chosen.substituted, chosen._warn = Counter(), self._warn
        return chosen

    @property
    def splits(self) -> NDArray[np.uint32]:
        """(clips,): the clip's parts in all splits as one number, equal for clips of the same parts."""
        return np.asarray(self.flags >> SPLIT_SHIFT)

    def in_split(self, number: int, part: str) -> NDArray[np.bool_]:
        """Masks the clips in a part ("train", "test", "validation") of split 1, 2 ...: bool (clips,).

        Raises ValueError for another part or number.
        """
        if part not in PARTS[1:] or not 1 <= number <= MAX_SPLITS:
            raise ValueError(f"there is no part {part!r} of split {number}: {', '.join(PARTS[1:])}")
        bits = (self.splits >> (2 * (number - 1))) & 3
        return np.asarray(bits == PARTS.index(part))

    def read(self, clip: int, frames: Sequence[int], *, check: bool = False) -> EncodedClip:
        """Read the frames with these numbers, and the sound, and nothing else.

        Where they are damaged, a clip of the same label that depends on ``clip`` alone takes the clip's place,
        with the frames asked for as far as it has them; ``substituted`` counts that, and a warning tells of it once
        a shard. ``check`` reads and checks every byte of the clip, which finds damage that a decoder stumbles over.
        Raises ValueError for a clip or frame that is not there, and where no clip can be read.
        """
        try:
            return self.read_strictly(clip, frames, check=check)
        except DamagedClip as error:
            for other in substitutes(clip, self.label):
                last = int(self.num_frames[other]) - 1
                try:
                    nearest = [min(frame, last) for frame in frames]
                    encoded = self.read_strictly(other, nearest, check=check)
                except DamagedClip:
                    continue
                self._note_substitute(clip, error)
                return encoded
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
        table = self._pread(path, at + int(record["table"]), 4 * table_length(codec, n))
        begin, sound = at + int(record["frames"]), None
        width, height = int(record["width"]), int(record["height"])
        try:
            places = locate(codec, table.view("<u4"), int(record["frames_size"]), frames)
            blobs = [self._pread(path, begin + a, b - a) for a, b in places.ranges]
            pictures, film = assemble(places, blobs, width=width, height=height, fps=self.fps)
            if size := int(record["sound_size"]):
                sound = self._pread(path, at + int(record["sound"]), size)
                if sound[:4].tobytes() != b"fLaC":
                    raise DamagedPictures("its sound")
        except DamagedPictures as error:
            raise DamagedClip(f"{path}: clip {clip} is damaged ({error}): ingest again") from error
        return EncodedClip(pictures, film, places.frames, sound, clip)

    def _is_intact(self, path: Path, record: np.void) -> bool:
        length = table_length(codec_of(record["flags"]), int(record["num_frames"]))
        members = (
            (0, record["json_size"]),
            (record["table"], 4 * length),
            (record["frames"], record["frames_size"]),
            (record["sound"], record["sound_size"]),
        )
        at = int(record["at"])
        blobs = [self._pread(path, at + int(away), int(size)) for away, size in members]
        return zlib.crc32(np.concatenate(blobs).tobytes()) == int(record["crc32"])

    def _note_substitute(self, clip: int, error: DamagedClip) -> None:
        path, _ = self._find(clip)
        with self._lock:
            self.substituted[clip] += 1
            first = path not in self._warned
            self._warned.add(path)
        if first:
            self._warn(f"{error}; another clip takes its place, as for any other damaged one there")

    def facts(self, clip: int) -> dict[str, Any]:
        """Reads a clip's facts from its shard: source, start, class, fps, num_frames, duration, width, height, note."""
        path, record = self._find(clip)
        text = self._pread(path, int(record["at"]), int(record["json_size"])).tobytes()
        facts: dict[str, Any] = json.loads(text)
        return facts

    def _find(self, clip: int) -> tuple[Path, np.void]:
        if not 0 <= clip < len(self):
            raise ValueError(
                f"there is no clip {clip}: the data set has clips 0 to {len(self) - 1}"
            )
        return self._paths[self.shard[clip]], self._maps[self._folder[clip]][self._row[clip]]

    def _pread(self, path: Path, at: int, size: int) -> NDArray[np.uint8]:
        file = self._opened(path)
        try:
            data = os.pread(file.fileno(), size, at)
        except OSError as error:
            raise DamagedClip(f"can't read {path}: {error.strerror}") from error
        if len(data) != size:
            raise DamagedClip(f"{path} is truncated: ingest the videos again")
        return np.frombuffer(data, np.uint8)


def _open_shard(path: Path) -> IO[bytes]:
    try:
        return open(path, "rb", buffering=0)
    except OSError as error:
        raise DamagedClip(f"can't open {path}: {error.strerror}") from error


def _warn(text: str) -> None:
    warnings.warn(text, RuntimeWarning, stacklevel=4)


def _map_index(path: Path) -> NDArray[np.void]:
    """The index's rows; none where it is empty, absent or no whole number of records."""
    size = path.stat().st_size if path.exists() else 0
    if size == 0 or size % RECORD.itemsize:
        return np.zeros(0, RECORD)
    return np.memmap(path, dtype=RECORD, mode="r")
