"""Sources of an ingest: files, folders, and lists of files with labels and stretches of time."""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from engine.data.ingest.lists import SUFFIXES, Form, read_rows
from engine.data.ingest.tars import Member, read_tar
from engine.data.media.part import MediaFile, Part, head_of
from engine.data.media.webp import HEAD, is_animated
from engine.data.shards.index import is_shards

OTHER_SUFFIXES = frozenset(
    ".aac .aif .aiff .ass .bib .bmp .bz2 .c .cfg .ckpt .cls .conf .cpp .css .csv .db .doc .docx .exe .exif .flac .flo "
    ".gz .h .h5 .hdf5 .heic .htm .html .ini .ipynb .jpeg .jpg .js .json .jsonl .list .log .lst .m3u .m4a .mat "
    ".md .md5 .mid .mp2 .mp3 .nfo .npy .npz .odt .oga .ogg .opus .parquet .part .pdf .pgm .pickle .pkl .png .ppm .pt "
    ".pth .py .pyc .rar .rst .rtf .safetensors .sh .sha256 .sql .sqlite .srt .ssa .sub .svg .tar .tex .tfrecord .tgz "
    ".tif .tiff .toml .torrent .tsv .txt .url .vtt .wav .webp .wma .xls .xlsx .xml .xz .yaml .yml .zip .zst".split()
)
"""Files that are no videos by their names, and are passed over, but for moving pictures; all others are tried."""
RULES = f"1 {zlib.crc32(' '.join(sorted(OTHER_SUFFIXES)).encode()):08x}"
"""Names ``_may_be_video`` for lists that are kept; its number goes up with each change of it or of ``tars``."""
SUFFIXES_LEFT_OUT = (".mp4", ".webm", ".avi", ".mkv", ".mov")
"""Of videos that lists name without."""
PARTS = {"train": "train", "training": "train", "test": "test", "testing": "test"}
PARTS |= dict.fromkeys(("val", "valid", "validate", "validation"), "validation")
"""A split's parts, as lists call them."""
NO_FILE = "there is no such file"
PACKED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst", ".zip", ".rar", ".7z")
IS_PACKED = "it is packed: unpack it, or repack it as a .tar that isn't compressed"
Stretch = tuple[str, float | None, float | None]
"""A file, and from where to where, in seconds."""


@dataclass(frozen=True, slots=True)
class Source:
    """A file that may be a video, or a stretch of one."""

    folder: str
    relative: str
    """Path from ``folder``, with ``/``; it names the source in shards, so that these don't depend on where it lies."""
    label: str | None
    start: float | None = None
    end: float | None = None
    """The stretch, in seconds from the video's first frame; None: from its beginning, to its end."""
    splits: tuple[str, ...] = ()
    """Its part, "train", "test" or "validation", in splits 1, 2 ... of its data set; "" for none."""
    listed: str | None = None
    """The list and line that name it."""
    may_be_trimmed: bool = False
    """Whether a file that is no longer than the stretch is the stretch."""
    twin: int = 0
    """How many sources before it have the same path, start and end, from other folders."""
    member: Member | None = None
    """The file in a tar, whose path ``relative`` begins with; None for a file of its own."""

    @property
    def path(self) -> Path:
        """The file's path; of one in a tar, the tar's with its name in it."""
        return Path(self.folder, self.relative)

    @property
    def _file(self) -> str:
        """The file on the disk: the source's own, or the tar that holds it."""
        path = os.path.join(self.folder, self.relative)
        return path if self.member is None else path.removesuffix(f"/{self.member.name}")

    @property
    def media(self) -> MediaFile:
        """What is read."""
        if self.member is None:
            return self.path
        return Part(self._file, self.member.offset, self.member.size)

    def state(self) -> tuple[int, int]:
        """Its size in bytes, and when it or its tar was changed, in ns; zeros where that can't be looked up."""
        try:
            stat = os.stat(self._file)
        except OSError:  # a link to nowhere: reading it will tell
            return 0, 0
        return stat.st_size if self.member is None else self.member.size, stat.st_mtime_ns

    @property
    def key(self) -> Stretch:
        """Identifies it on the disk."""
        return os.path.abspath(os.path.join(self.folder, self.relative)), self.start, self.end

    @property
    def stretch(self) -> str | None:
        """The stretch in words."""
        if self.start is None and self.end is None:
            return None
        end = "the end" if self.end is None else f"{self.end:.3f}"
        return f"{self.start or 0.0:.3f} to {end} s"


@dataclass(frozen=True)
class Reject:
    """A source, or a stretch of one, that gave no clip."""

    path: str
    reason: str
    where: str | None = None
    """Which stretch, where the rest of the file gave clips or where a list names a stretch."""
    listed: str | None = None
    """The list and line that name it."""
    partial: bool = False
    """Whether the rest of the source gave clips."""
    more: int = 0
    """Stretches beside this one that were lost for the same cause."""

    def as_dict(self) -> dict[str, Any]:
        """Its line in ``rejects.jsonl``."""
        return {key: value for key, value in asdict(self).items() if value}


def by_cause(rejects: Iterable[Reject]) -> list[Reject]:
    """One reject for each file and cause, the first, with the number of the others.

    Reasons that differ in their numbers alone, such as the second at which a clip begins, are one cause.
    """
    kept: dict[tuple[str, str, bool], Reject] = {}
    for reject in rejects:
        cause = (reject.path, re.sub(r"\d+(\.\d+)?", "#", reject.reason), reject.partial)
        first = kept.get(cause)
        more = 0 if first is None else first.more + 1 + reject.more
        kept[cause] = reject if first is None else replace(first, more=more)
    return list(kept.values())


@dataclass
class SourceList:
    """Sources, what can't be one, and files that the lists don't mention."""

    sources: list[Source] = field(default_factory=list)
    rejects: list[Reject] = field(default_factory=list)
    unlisted: int = 0
    """Files beside the listed ones that no official list names, and that are passed over."""
    notes: list[str] = field(default_factory=list)
    """How each list was understood, in a line."""

    @staticmethod
    def of(parts: Iterable[SourceList]) -> SourceList:
        """Several lists as one; sources in the order of their paths."""
        parts = list(parts)
        return SourceList(
            in_order(source for part in parts for source in part.sources),
            [reject for part in parts for reject in part.rejects],
            sum(part.unlisted for part in parts),
            [note for part in parts for note in part.notes],
        )


def find_sources(paths: Sequence[Path], root: Path | None = None) -> SourceList:
    """Files, those below folders and in tars, and those that lists (``lists.SUFFIXES``) name, in the paths' order.

    The lists' paths count from ``root`` first, if given. A file or tar that is in a folder and in a list is the list's.
    Raises ValueError for a path that doesn't exist, and for a list that can't be read as one.
    """
    lists = [p for p in map(Path, paths) if p.suffix.lower() in SUFFIXES and p.is_file()]
    files = _files([p for p in paths if p not in lists])
    seen: dict[Stretch, Source] = {}
    listed = [read_list(path, root, seen=seen) for path in lists]
    if seen:
        files = [source for source in files if source.key not in seen]
    videos = [source for source in files if not _is_tar(source.relative)]
    tars = [_in_tar(source) for source in files if _is_tar(source.relative)]
    return SourceList.of([SourceList(videos), *tars, *listed])


def in_order(sources: Iterable[Source]) -> list[Source]:
    """Sort by path and start, and tell apart those of the same name."""

    def place(source: Source) -> tuple[bytes, float, float]:
        path = os.fsencode(os.path.join(source.folder, source.relative))
        end = float("inf") if source.end is None else source.end
        return path, source.start or 0.0, end

    result, seen = [], dict[tuple[str, float | None, float | None], int]()
    for source in sorted(sources, key=place):
        key = (source.relative, source.start, source.end)
        twin = seen.get(key, 0)
        seen[key] = twin + 1
        result.append(replace(source, twin=twin) if twin else source)
    return result


def find_videos(paths: Sequence[Path]) -> list[Source]:
    """List the files that may be videos, those of ``paths`` and all below its folders, sorted by path.

    In folders, hidden files, shards and files that are no videos by their suffix are passed over; files of unknown
    suffix are taken, since reading them settles it. Raises ValueError for a path that doesn't exist.
    """
    return in_order(source for source in _files(paths) if not _is_tar(source.relative))


def _files(paths: Sequence[Path]) -> list[Source]:
    """The files that may be videos, and tars."""
    files: dict[str, Source] = {}
    for path in map(Path, paths):
        if path.is_dir():
            folder = str(path)
            for relative in files_below(path, tars=True):
                parent = os.path.basename(os.path.dirname(relative))
                source = Source(folder, relative, parent or None)
                files.setdefault(os.path.join(folder, relative), source)
        elif path.exists():
            if path.name.lower().endswith(PACKED):
                raise ValueError(f"{path}: {IS_PACKED}")
            files.setdefault(str(path), Source(str(path.parent), path.name, None))
        else:
            raise ValueError(f"{path} does not exist: give files or folders of videos")
    return list(files.values())


def _is_tar(name: str) -> bool:
    return name.lower().endswith(".tar")


def _in_tar(tar: Source) -> SourceList:
    """The videos in a tar, named by its path and theirs in it; a list's label is that of all."""
    members, why = read_tar(tar.path, _may_be_video, rules=RULES)
    label = tar.label if tar.listed else None  # else it is the folder's name, and means the tar
    videos = [
        replace(
            tar,
            relative=f"{tar.relative}/{member.name}",
            label=label or member.label,
            member=member,
        )
        for member in members
    ]
    return SourceList(videos, [Reject(tar.relative, why, listed=tar.listed)] if why else [])


def _may_be_video(name: str, head: Callable[[], bytes]) -> bool:
    """Whether a file is tried; ``head`` reads its beginning."""
    suffix = os.path.splitext(name)[1].lower()
    if suffix == ".webp":  # most are still pictures, such as thumbnails beside downloaded videos
        return is_animated(head()[:HEAD])
    return suffix not in OTHER_SUFFIXES


def _head_of(path: Path) -> bytes:
    try:
        return head_of(path, HEAD)[0]
    except OSError:
        return b""


def files_below(folder: Path, *, tars: bool = False) -> Iterator[str]:
    """Relative paths of the files that may be videos, and of tars if asked; links to folders are followed once."""
    seen: set[str] = set()  # links may lead in circles
    waiting = [""]
    while waiting:
        inside = waiting.pop()
        parent = folder / inside
        real = os.path.realpath(parent)
        if real in seen or is_shards(parent):
            continue
        seen.add(real)
        try:
            entries = sorted(os.scandir(parent), key=lambda entry: entry.name)
        except OSError as error:
            raise ValueError(f"can't list {error.filename}: {error.strerror}") from error
        for entry in entries:
            if entry.name.startswith("."):
                continue
            name = f"{inside}{entry.name}"
            if entry.is_dir():
                waiting.append(f"{name}/")
            elif entry.is_file() or entry.is_symlink():
                head = partial(_head_of, Path(entry.path))
                if _may_be_video(entry.name, head) or (tars and _is_tar(entry.name)):
                    yield name


def read_list(
    path: Path,
    root: Path | None = None,
    *,
    seen: dict[Stretch, Source] | None = None,
    splits: tuple[str, ...] = (),
) -> SourceList:
    """Read a list of videos: a path a line, or a table, with columns named by its first line or without (``lists``).

    Paths count from ``root`` if that is given and they are there, or else from the list's folder, or the current one;
    a name without a suffix stands for the video file of that name. Several lines of one file with other times are
    several sources; a tar is all videos in it. A line that can't be used, or names what is in ``seen``, becomes a
    reject with its number. Raises ValueError for a list that can't be read, and one with columns but no path.
    """
    bases = list(dict.fromkeys([*([root] if root else []), path.parent, Path.cwd()]))
    find = partial(_found, bases)
    form, rows = read_rows(path, lambda name: find(name) is not None)
    videos, seen = SourceList(), {} if seen is None else seen
    for number, row in rows:
        where = f"{path.name}:{number}"
        base, name = find(row.get("path", "")) or (None, row.get("path", ""))
        try:
            source = _source(base or bases[0], name, row, where)
            source = replace(source, splits=splits or source.splits)
            first = seen.setdefault(source.key, source)
            if first is not source:
                raise ValueError(_repeats(source, first))
            if base is None:
                raise ValueError(NO_FILE + _left_over(name, find))
            if not source.path.is_file():
                raise ValueError("it is a folder, and only video files are read")
            if name.lower().endswith(PACKED):
                raise ValueError(IS_PACKED)
            if _is_tar(name) and source.stretch:
                raise ValueError("it is a tar: times are those of one video")
        except ValueError as error:
            videos.rejects.append(Reject(name, str(error), listed=where))
        else:
            tar = _in_tar(source) if _is_tar(name) else SourceList([source])
            videos.sources += tar.sources
            videos.rejects += tar.rejects
    videos.notes.append(_as_understood(path, form, rows, videos))
    return videos


def _found(bases: Sequence[Path], name: str) -> tuple[Path, str] | None:
    """The first of ``bases`` in which there is a file or folder of that name, and its name as it is there."""
    names = [name] if name else []
    if name and not os.path.splitext(name)[1]:
        names += [name + suffix for suffix in SUFFIXES_LEFT_OUT]
    if "\\" in name:  # a list that was made on Windows
        names.append(name.replace("\\", "/"))
    for full in names:
        for base in bases:
            if os.path.exists(os.path.join(base, full)):
                return base, full
    return None


def _left_over(name: str, find: Callable[[str], object]) -> str:
    """What a line holds besides a path, where that is why no file was found."""
    words = name.split(" ")
    for count in range(len(words) - 1, 0, -1):
        if find(" ".join(words[:count])) is not None:
            more = " ".join(words[count:])
            return f"; there is {' '.join(words[:count])}, but {more!r} after it can't be read: give one label a line"
    return ""


def _repeats(source: Source, first: Source) -> str:
    """Why a source is one too many."""
    name, _, line = (first.listed or "").rpartition(":")
    there = f"line {line}" if (source.listed or "").startswith(f"{name}:") else f"{name}:{line}"
    reason = f"{there} names the same {'stretch of the same ' if source.stretch else ''}file"
    if source.label != first.label:
        reason += f" with another label: {first.label} there, which is kept, {source.label} here"
    return reason


def _as_understood(
    path: Path, form: Form, rows: Sequence[tuple[int, dict[str, str]]], videos: SourceList
) -> str:
    """How a list was understood, in a line."""
    if not rows:
        return f"{path} is empty"
    first = rows[0][1]
    label = f", label {first['label']}" if first.get("label") else ""
    parts = [
        f"{path}: {len(rows)} row{'s' * (len(rows) > 1)} of {form}",
        _classes_of(videos.sources),
        f"the first: {first.get('path', '')}{label}",
    ]
    folders = dict.fromkeys(os.path.abspath(source.folder) for source in videos.sources)
    parts += [f"paths below {' and '.join(folders)}"] if folders else []
    return "; ".join(parts)


def _classes_of(sources: Sequence[Source]) -> str:
    labels = sorted({source.label for source in sources if source.label is not None})
    if not labels:
        return "no labels"
    if all(label.isdecimal() for label in labels):
        labels.sort(key=int)
    few = labels if len(labels) < 4 else [labels[0], "...", labels[-1]]
    return f"{len(labels)} class{'es' * (len(labels) > 1)} ({', '.join(few)})"


def _source(folder: Path, name: str, row: dict[str, str], where: str) -> Source:
    if not name:
        raise ValueError("the line names no file")
    start, end = (seconds(row.get(key), what=key) for key in ("start", "end"))
    if end is not None and end <= (start or 0.0):
        raise ValueError(f"it ends at {end:g} s, before it starts at {start or 0.0:g} s")
    label = row.get("label") or None
    if label == "-1":  # as the field's lists write none
        label = None
    part = row.get("split", "").lower()
    if part and part not in PARTS:
        raise ValueError(f"its split, {part!r}, is none of train, val and test")
    splits = (PARTS[part],) if part else ()
    return Source(str(folder), os.path.normpath(name), label, start, end, splits, where)


def seconds(text: str | None, *, what: str) -> float | None:
    """A time in seconds, from ``12.5`` or ``1:02:03.5``; None for an empty text. Raises ValueError."""
    text = (text or "").strip()
    if not text:
        return None
    if not re.fullmatch(r"(\d+:){0,2}\d+(\.\d*)?", text):
        raise ValueError(f"its {what}, {text!r}, is no time in seconds")
    total = 0.0
    for part in text.split(":"):
        total = total * 60 + float(part)
    return total
