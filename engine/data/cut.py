"""One source file into clips: which files are tried, where clips start, and what becomes of each.

Where clips are cut depends on the seed and a file's relative path alone.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from engine.data.encode import encode_flac, encode_jpeg
from engine.data.media import MediaError, MediaFacts, decode_window, probe
from engine.data.shard_writer import NewClip

OTHER_SUFFIXES = frozenset(
    ".aac .aif .aiff .ass .bib .bmp .bz2 .c .cfg .ckpt .conf .cpp .css .csv .db .doc .docx .exe .exif .flac .flo .gif "
    ".gz .h .h5 .hdf5 .heic .htm .html .ini .ipynb .jpeg .jpg .js .json .jsonl .log .m3u .m4a .mat .md .md5 .mid .mp2 "
    ".mp3 .nfo .npy .npz .odt .oga .ogg .opus .parquet .part .pdf .pickle .pkl .png .ppm .pgm .pt .pth .py .pyc .rar "
    ".rst .rtf .safetensors .sha256 .sh .sql .sqlite .srt .ssa .sub .svg .tar .tex .tfrecord .tgz .tif .tiff .toml "
    ".torrent .tsv .txt .url .vtt .wav .webp .wma .xls .xlsx .xml .xz .yaml .yml .zip .zst".split()
)
"""Files that are no videos by their names, and are passed over; all others are tried."""
CHUNK = 8
"""Clips that a worker hands back at once: bounds the memory that a long film takes."""


@dataclass(frozen=True)
class Source:
    """A file that may be a video."""

    path: Path
    relative: str
    """Path from the folder that was given, with ``/``; the file's name where the file itself was given."""
    label: str | None
    """Name of its folder, where that is a sub-folder of the folder that was given."""


@dataclass(frozen=True)
class Reject:
    """A file, or a stretch of one, that gave no clip."""

    path: str
    reason: str
    where: str | None = None
    """Which stretch, where the rest of the file gave clips."""


@dataclass(frozen=True)
class Settings:
    """What decides the bytes of a clip."""

    fps: float
    short_side: int
    clip_seconds: float
    clips_per_video: int | None
    min_seconds: float
    quality: int
    seed: int

    def __post_init__(self) -> None:
        for name in ("fps", "clip_seconds"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be above 0, not {getattr(self, name)}")
        if self.clips_per_video is not None and self.clips_per_video < 1:
            raise ValueError(f"clips_per_video must be at least 1, not {self.clips_per_video}")
        if not 0 <= self.min_seconds <= self.clip_seconds:
            raise ValueError(f"min_seconds must be 0 to clip_seconds, not {self.min_seconds}")
        if self.short_side < 2 or self.short_side % 2:
            raise ValueError(f"short_side must be an even number of pixels, not {self.short_side}")
        if not 1 <= self.quality <= 100:
            raise ValueError(f"quality must be 1 to 100, not {self.quality}")


@dataclass(frozen=True)
class Task:
    """Clips ``first`` to ``first + CHUNK`` of one file."""

    source: Source
    settings: Settings
    first: int = 0
    taken: int = 0
    """Clips of this file that earlier tasks gave."""
    lost: tuple[Reject, ...] = ()
    """Stretches of this file that earlier tasks could not use."""


@dataclass
class Outcome:
    """What a task gave, and the task that goes on with the file, if any."""

    clips: list[NewClip] = field(default_factory=list)
    rejects: list[Reject] = field(default_factory=list)
    then: Task | None = None


def find_videos(paths: Sequence[Path]) -> list[Source]:
    """List the files that may be videos: those given, and all below the folders given, sorted by path.

    In folders, hidden files and files that are no videos by their suffix are passed over, and files of
    unknown suffix are taken: reading them tells. Raises ValueError for a path that doesn't exist.
    """
    found: dict[Path, Source] = {}
    for path in map(Path, paths):
        if path.is_dir():
            for file in _files_below(path):
                relative = file.relative_to(path)
                label = relative.parent.name or None
                found.setdefault(file, Source(file, relative.as_posix(), label))
        elif path.exists():
            found.setdefault(path, Source(path, path.name, None))
        else:
            raise ValueError(f"{path} does not exist: give files or folders of videos")
    return sorted(found.values(), key=lambda source: os.fsencode(source.path))


def _files_below(folder: Path) -> Iterator[Path]:
    def refuse(error: OSError) -> None:
        raise ValueError(f"can't list {error.filename}: {error.strerror}")

    seen: set[str] = set()  # links may lead in circles
    for parent, folders, files in os.walk(folder, followlinks=True, onerror=refuse):
        real = os.path.realpath(parent)
        folders[:] = [] if real in seen else [f for f in folders if not f.startswith(".")]
        for name in [] if real in seen else files:
            file = Path(parent) / name
            known = file.suffix.lower() in OTHER_SUFFIXES
            if not name.startswith(".") and not known and (file.is_file() or file.is_symlink()):
                yield file
        seen.add(real)


def run_task(task: Task) -> Outcome:
    """Cut a file's next clips; whatever goes wrong becomes rejects, and nothing is raised."""
    source, settings = task.source, task.settings
    clips: list[NewClip] = []
    lost = list(task.lost)
    starts = [0.0]
    try:
        facts = probe(source.path)
        starts = plan_starts(facts.duration, settings, source.relative)
        for start in starts[task.first : task.first + CHUNK]:
            _try_cut(source, facts, start, settings, clips, lost)
        upto, taken = task.first + CHUNK, task.taken + len(clips)
        if upto < len(starts):
            return Outcome(clips, then=replace(task, first=upto, taken=taken, lost=tuple(lost)))
        if not taken and starts[0] > 0.0:  # the head of a broken film is its likeliest intact part
            _try_cut(source, facts, 0.0, settings, clips, lost)
    except MediaError as error:
        lost.append(Reject(source.relative, str(error)))
    except Exception as error:  # a decoder's own fault must end this file alone
        lost.append(Reject(source.relative, f"unexpected {type(error).__name__}: {error}"))
    if not task.taken and not clips:
        lost = [Reject(source.relative, lost[0].reason)]
    return Outcome(clips, lost)


def plan_starts(duration: float, settings: Settings, relative: str) -> list[float]:
    """Where clips of a file start, in seconds: rising, distinct, spread over the file at random.

    A pure function of the settings (``seed`` among them) and the file's relative path.
    """
    spare = duration - settings.clip_seconds
    if spare * settings.fps < 1.0:  # less than a frame more than one clip
        return [0.0]
    count = settings.clips_per_video or math.ceil(duration / 60.0)
    key = hashlib.sha256(f"{settings.seed}/{relative}".encode(errors="surrogateescape"))
    random = np.random.default_rng(int.from_bytes(key.digest()[:8], "little"))
    drawn = (np.arange(count) + random.random(count)) / count * spare
    return [float(ms) / 1000 for ms in np.unique(np.floor(drawn * 1000))]


def _try_cut(
    source: Source,
    facts: MediaFacts,
    start: float,
    settings: Settings,
    clips: list[NewClip],
    lost: list[Reject],
) -> None:
    try:
        clips.append(_cut(source, facts, start, settings))
    except MediaError as error:
        lost.append(Reject(source.relative, str(error), f"{start:.3f} s"))


def _cut(source: Source, facts: MediaFacts, start: float, settings: Settings) -> NewClip:
    window = decode_window(
        source.path,
        facts,
        start=start,
        seconds=settings.clip_seconds,
        fps=settings.fps,
        short_side=settings.short_side,
    )
    num_frames, rows, width = window.frames.shape
    if num_frames < round(settings.min_seconds * settings.fps):
        why = f" ({window.note})" if window.note else ""
        raise MediaError(
            f"only {num_frames / settings.fps:.2f} s of video, less than {settings.min_seconds:g} s{why}"
        )
    return NewClip(
        frames=encode_jpeg(window.frames, quality=settings.quality),
        width=width,
        height=rows * 2 // 3,
        source=source.relative,
        start=start,
        sound=None if window.sound is None else encode_flac(window.sound),
        label=source.label,
        note=window.note,
    )
