"""Sources of an ingest: files, folders, and lists of files with labels and stretches of time."""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from engine.data.shards.index import is_shards

OTHER_SUFFIXES = frozenset(
    ".aac .aif .aiff .ass .bib .bmp .bz2 .c .cfg .ckpt .conf .cpp .css .csv .db .doc .docx .exe .exif .flac .flo .gif "
    ".gz .h .h5 .hdf5 .heic .htm .html .ini .ipynb .jpeg .jpg .js .json .jsonl .log .m3u .m4a .mat .md .md5 .mid .mp2 "
    ".mp3 .nfo .npy .npz .odt .oga .ogg .opus .parquet .part .pdf .pickle .pkl .png .ppm .pgm .pt .pth .py .pyc .rar "
    ".rst .rtf .safetensors .sha256 .sh .sql .sqlite .srt .ssa .sub .svg .tar .tex .tfrecord .tgz .tif .tiff .toml "
    ".torrent .tsv .txt .url .vtt .wav .webp .wma .xls .xlsx .xml .xz .yaml .yml .zip .zst".split()
)
"""Files that are no videos by their names, and are passed over; all others are tried."""
LIST_SUFFIXES = (".txt", ".csv", ".tsv")
COLUMNS = {
    "path": ("path", "video", "filename", "file", "video_path"),
    "label": ("label", "class"),
    "start": ("start", "time_start", "start_time"),
    "end": ("end", "time_end", "end_time"),
}
"""Names that the columns of a list may have."""


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

    @property
    def path(self) -> Path:
        """The file's path."""
        return Path(self.folder, self.relative)

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

    @staticmethod
    def of(parts: Iterable[SourceList]) -> SourceList:
        """Several lists as one; sources in the order of their paths."""
        parts = list(parts)
        return SourceList(
            in_order(source for part in parts for source in part.sources),
            [reject for part in parts for reject in part.rejects],
            sum(part.unlisted for part in parts),
        )


def find_sources(paths: Sequence[Path]) -> SourceList:
    """Files, those below folders, and those that lists (.txt, .csv, .tsv) name, in the order of their paths.

    Raises ValueError for a path that doesn't exist, and for a list that can't be read as one.
    """
    lists = [p for p in map(Path, paths) if p.suffix.lower() in LIST_SUFFIXES and p.is_file()]
    videos = SourceList(find_videos([p for p in paths if p not in lists]))
    return SourceList.of([videos, *map(read_list, lists)])


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
    videos: dict[str, Source] = {}
    for path in map(Path, paths):
        if path.is_dir():
            folder = str(path)
            for relative in files_below(path):
                parent = os.path.basename(os.path.dirname(relative))
                source = Source(folder, relative, parent or None)
                videos.setdefault(os.path.join(folder, relative), source)
        elif path.exists():
            videos.setdefault(str(path), Source(str(path.parent), path.name, None))
        else:
            raise ValueError(f"{path} does not exist: give files or folders of videos")
    return in_order(videos.values())


def files_below(folder: Path) -> Iterator[str]:
    """Relative paths of the files that may be videos, in no order; links to folders are followed once."""
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
                if os.path.splitext(entry.name)[1].lower() not in OTHER_SUFFIXES:
                    yield name


def read_list(path: Path) -> SourceList:
    """Read a list of videos, relative to its own folder: a path a line (.txt), or a table (.csv, .tsv).

    A table's first line may name its columns (path, label, start, end: see COLUMNS); without it they come in this
    order. Several lines of one file with other times are several sources. A line that can't be used becomes a
    reject with its number. Raises ValueError for a list that can't be read, and one with columns but no path.
    """
    videos = SourceList()
    lines: dict[tuple[str, float | None, float | None], int] = {}
    for number, row in _rows(path):
        where = f"{path.name}:{number}"
        name = (row.get("path") or "").strip()
        try:
            source = _source(path.parent, name, row, where)
            first = lines.setdefault((source.relative, source.start, source.end), number)
            if first != number:
                raise ValueError(f"line {first} names the same stretch of the same file")
            if not source.path.is_file():
                raise ValueError("there is no such file")
        except ValueError as error:
            videos.rejects.append(Reject(name, str(error), listed=where))
        else:
            videos.sources.append(source)
    return videos


def _source(folder: Path, name: str, row: dict[str, str], where: str) -> Source:
    if not name:
        raise ValueError("the line names no file")
    start, end = (seconds(row.get(key), what=key) for key in ("start", "end"))
    if end is not None and end <= (start or 0.0):
        raise ValueError(f"it ends at {end:g} s, before it starts at {start or 0.0:g} s")
    label = (row.get("label") or "").strip() or None
    return Source(str(folder), os.path.normpath(name), label, start, end, listed=where)


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


def read_text(path: Path) -> str:
    """A list's text; names that are no UTF-8 keep their bytes. Raises ValueError where it can't be read."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ValueError(f"can't read the list {path}: {error.strerror}") from error
    return data.decode("utf-8-sig", errors="surrogateescape")


def _rows(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """(line number, column -> text) of a list's lines that aren't empty."""
    lines = read_text(path).splitlines()
    if path.suffix.lower() == ".txt":
        yield from ((n, {"path": line}) for n, line in enumerate(lines, 1) if line.strip())
        return
    columns: list[str | None] | None = None
    reader = csv.reader(lines, delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
    for cells in reader:
        if not any(cell.strip() for cell in cells):
            continue
        if columns is None:
            known = {name: key for key, names in COLUMNS.items() for name in names}
            named = [known.get(cell.strip().lower()) for cell in cells]
            columns = named if any(named) else list(COLUMNS)
            if "path" not in columns:
                raise ValueError(
                    f"{path} has no column with the videos' paths: call one path, video or filename"
                    " (--kinetics reads lists of YouTube ids)"
                )
            if any(named):
                continue
        yield reader.line_num, {k: c for k, c in zip(columns, cells, strict=False) if k is not None}
