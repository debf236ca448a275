"""Annotations of UCF101, HMDB51, Kinetics and one's own data: which files, of which class, in which splits.

What a list names and the disk lacks becomes a reject; files that no list names are counted and passed over.
"""

from __future__ import annotations

import csv
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from engine.data.ingest.lists import SUFFIXES, read_text
from engine.data.ingest.sources import (
    NO_FILE,
    PARTS,
    Reject,
    Source,
    SourceList,
    Stretch,
    files_below,
    in_order,
    read_list,
    seconds,
)

NUM_SPLITS = 3
MISSING = "missing: "
"""How the reason of a reject begins whose file is listed, and not on the disk."""
HMDB51_PARTS = {"0": "", "1": "train", "2": "test"}


@dataclass
class _Video:
    """A video as the lists have it."""

    label: str
    name: str
    """File name, as listed."""
    listed: str
    splits: list[str] = field(default_factory=lambda: [""] * NUM_SPLITS)

    def assign(self, split: int, part: str, where: str) -> None:
        """Put it into a part of a split; raises ValueError where it is in another already."""
        before = self.splits[split]
        if before and part and before != part:
            raise ValueError(
                f"{where}: {self.name} is in both the {before} and the {part} part of split {split + 1}"
            )
        self.splits[split] = part or before


class _Files:
    """The files below a folder, by name; the one in the class's folder is preferred."""

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise ValueError(f"{folder} is no folder: give the folder of the videos")
        self.folder = folder
        self._by_name: dict[str, list[str]] = defaultdict(list)
        self._by_stem: dict[str, list[str]] = defaultdict(list)
        for relative in sorted(files_below(folder)):
            name = os.path.basename(relative)
            if name not in self._by_name:
                self._by_stem[os.path.splitext(name)[0]].append(name)
            self._by_name[name].append(relative)
        self.count = sum(map(len, self._by_name.values()))

    def find(self, name: str, label: str | None) -> str | None:
        """The file of this name, in a folder of the class's name where there are several."""
        files = self._by_name.get(name, [])
        folder = _plain(label or "")
        fits = [f for f in files if _plain(os.path.basename(os.path.dirname(f))) == folder]
        return next(iter(fits or files), None)

    def find_stem(self, stem: str, label: str | None) -> str | None:
        """Like ``find``, for a name without its suffix."""
        names = self._by_stem.get(stem)
        return self.find(names[0], label) if names else None


def _plain(label: str) -> str:
    """A class's name without what its folder may spell otherwise."""
    return re.sub(r"[^0-9a-z]+", "_", label.lower()).strip("_")


def _lines(path: Path) -> Iterator[tuple[str, list[str]]]:
    """(list and line number, what comes before the last word and that word) of a list's lines that aren't empty."""
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        if line.strip():
            yield f"{path.name}:{number}", line.rsplit(maxsplit=1)


def ucf101(videos: Path, splits: Path) -> SourceList:
    """UCF101 by ``classInd.txt``, ``trainlist01.txt`` to ``03`` and ``testlist01.txt`` to ``03``.

    Classes are those of ``classInd.txt``; files are looked for by name, wherever they lie below ``videos``. Raises
    ValueError for a list that is missing or malformed.
    """
    lists = [
        (split, part, splits / f"{part}list{split + 1:02d}.txt")
        for split in range(NUM_SPLITS)
        for part in ("train", "test")
    ]
    for path in (splits / "classInd.txt", *(path for _, _, path in lists)):
        if not path.is_file():
            what = "the UCF101 lists are classInd.txt, trainlist01.txt ... testlist03.txt"
            raise ValueError(f"{path} is missing: {what}")
    classes = {words[-1] for _, words in _lines(splits / "classInd.txt")}
    entries: dict[str, _Video] = {}
    for split, part, path in lists:
        for where, words in _lines(path):
            label, _, name = words[0].rpartition("/")
            if label not in classes:
                raise ValueError(f"{where} ({path}): {label or words[0]!r} is no UCF101 class")
            entries.setdefault(words[0], _Video(label, name, where)).assign(split, part, where)
    return _look_up(entries.values(), _Files(videos))


def hmdb51(videos: Path, splits: Path) -> SourceList:
    """HMDB51 by its ``CLASS_test_split1.txt`` ... files; a 0 there means in no part of that split.

    Files are looked for by name, wherever they lie below ``videos``. Raises ValueError where there are no lists,
    and for a malformed one.
    """
    pattern = re.compile(r"(.+)_test_split([1-3])\.txt")
    names = sorted(os.listdir(splits)) if splits.is_dir() else []
    lists = [(m[1], int(m[2]) - 1, splits / n) for n in names if (m := pattern.fullmatch(n))]
    if not lists:
        raise ValueError(f"{splits} holds no HMDB51 lists (CLASS_test_split1.txt ...)")
    entries: dict[tuple[str, str], _Video] = {}
    for label, split, path in lists:
        for where, words in _lines(path):
            if len(words) != 2 or words[1] not in HMDB51_PARTS:
                raise ValueError(f"{where} ({path}): write NAME.avi and 0, 1 or 2")
            video = entries.setdefault((label, words[0]), _Video(label, words[0], where))
            video.assign(split, HMDB51_PARTS[words[1]], where)
    return _look_up(entries.values(), _Files(videos))


def _look_up(videos: Iterable[_Video], files: _Files) -> SourceList:
    sources, rejects = [], []
    for video in videos:
        relative = files.find(video.name, video.label)
        if relative is None:
            missing = f"{MISSING}there is no such file below {files.folder}"
            rejects.append(Reject(f"{video.label}/{video.name}", missing, listed=video.listed))
            continue
        splits, where = tuple(video.splits), video.listed
        folder, label = str(files.folder), video.label
        sources.append(Source(folder, relative, label, splits=splits, listed=where))
    return _with_count(files, sources, rejects)


def _with_count(files: _Files, sources: list[Source], rejects: list[Reject]) -> SourceList:
    unlisted = files.count - len({source.relative for source in sources})
    return SourceList(in_order(sources), rejects, unlisted)


def kinetics(videos: Path, lists: Sequence[Path]) -> SourceList:
    """Kinetics by CSV files with the columns label (if known), youtube_id, time_start, time_end and split.

    Files are ``ID.mp4``, ``ID_000010_000020.mp4`` or such with another suffix, wherever they lie below ``videos``. Of
    an ``ID.mp4`` that is longer than the stretch, the stretch is taken. Its splits are parts of split 1. Raises
    ValueError for a list that can't be read or lacks columns.
    """
    files = _Files(videos)
    sources, rejects = [], []
    for path in lists:
        for number, row in _table(path):
            where = f"{path.name}:{number}"
            try:
                sources.append(_kinetics_source(files, row, where))
            except ValueError as error:
                rejects.append(Reject(row["youtube_id"].strip(), str(error), listed=where))
    return _with_count(files, sources, rejects)


def own(videos: Path, lists: Path) -> SourceList:
    """Any videos by lists of their parts: train.csv and test.csv or val.csv, or such words in names of other lists.

    ``lists`` is the lists' folder, or one list with a column ``split``; paths in them count from ``videos``, the
    lists' own folder or the current one (see ``read_list``). The validation part is read where there is no test part
    with labels. Raises ValueError where there is no list to train by, or none to test by, or several of a part.
    """
    if lists.is_file():
        result = read_list(lists, videos)
        result.sources = in_order(result.sources)
    else:
        result = _parts_of(videos, _lists_of_parts(lists))
    result.rejects = [
        replace(r, reason=f"{MISSING}{r.reason}") if r.reason.startswith(NO_FILE) else r
        for r in result.rejects
    ]
    return result


def _parts_of(videos: Path, lists: dict[str, Path]) -> SourceList:
    """What is trained on, and what is tested on: the validation part where the test part has no labels."""
    seen = dict[Stretch, Source]()
    train = read_list(lists["train"], videos, seen=seen, splits=("train",))
    for part in [part for part in ("test", "validation") if part in lists]:
        tested = read_list(lists[part], videos, seen=dict(seen), splits=(part,))
        if any(source.label for source in tested.sources):
            break
    return SourceList.of([train, tested])


def _lists_of_parts(folder: Path) -> dict[str, Path]:
    """The lists of a folder by the part that their names tell: "train", "test" or "validation"."""
    found: dict[str, list[Path]] = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        words = set(re.split(r"[^a-z]+", path.stem.lower())) & PARTS.keys()
        if path.suffix.lower() in SUFFIXES and len(words) == 1:
            found.setdefault(PARTS[words.pop()], []).append(path)
    several = next((paths for paths in found.values() if len(paths) > 1), None)
    if several is not None:
        names = " and ".join(path.name for path in several)
        raise ValueError(f"{folder} holds {names}: leave one list for each part in it")
    if "train" not in found or len(found) < 2:
        raise ValueError(
            f"{folder} needs a list to train by and one to test by: train.csv, test.csv"
        )
    return {part: paths[0] for part, paths in found.items()}


def _table(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    reader = csv.DictReader(read_text(path).splitlines())
    missing = sorted({"youtube_id", "time_start", "time_end"} - set(reader.fieldnames or ()))
    if missing:
        raise ValueError(f"{path} has no column {missing[0]}: give a Kinetics list")
    for row in reader:
        yield reader.line_num, {k: v or "" for k, v in row.items() if k is not None}


def _kinetics_source(files: _Files, row: dict[str, str], where: str) -> Source:
    name, label = row["youtube_id"].strip(), row.get("label", "").strip() or None
    start, end = (seconds(row[f"time_{key}"], what=f"time_{key}") for key in ("start", "end"))
    if start is None or end is None or end <= start:
        raise ValueError("its times are missing, or it ends before it starts")
    part = row.get("split", "").strip().lower()
    if part and part not in PARTS:
        raise ValueError(f"its split, {part!r}, is none of train, val and test")
    folder, splits = str(files.folder), (PARTS.get(part, ""),)
    trimmed = files.find_stem(f"{name}_{round(start):06d}_{round(end):06d}", label)
    if trimmed is not None:
        return Source(folder, trimmed, label, splits=splits, listed=where)
    whole = files.find_stem(name, label)
    if whole is None:
        raise ValueError(f"{MISSING}there is no such file below {files.folder}")
    return Source(folder, whole, label, start, end, splits, where, may_be_trimmed=True)
