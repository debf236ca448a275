"""The official annotations of UCF101, HMDB51 and Kinetics: which files, of which class, in which splits.

What a list names and the disk lacks becomes a reject; files that no list names are counted and passed over.
"""

from __future__ import annotations

import csv
import os
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from engine.data.ingest.sources import Found, Reject, Source, files_below, read_text, seconds

NUM_SPLITS = 3
MISSING = "missing: "
"""How the reason of a reject begins whose file is listed, and not on the disk."""
HMDB51_PARTS = {"0": "", "1": "train", "2": "test"}
KINETICS_PARTS = {"train": "train", "test": "test", "val": "validation", "validate": "validation"}
KINETICS_PARTS |= {"validation": "validation", "": ""}


@dataclass
class _Entry:
    """What the lists say of one video."""

    label: str
    name: str
    """File name, as listed."""
    listed: str
    splits: list[str] = field(default_factory=lambda: [""] * NUM_SPLITS)


class _Files:
    """The files below a folder, by name; the one in the class's folder is preferred."""

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise ValueError(f"{folder} is no folder: give the folder of the videos")
        self.folder = folder
        self._by_name: dict[str, list[str]] = defaultdict(list)
        for relative in sorted(files_below(folder)):
            self._by_name[os.path.basename(relative)].append(relative)
        self.count = sum(map(len, self._by_name.values()))

    def names(self) -> Iterator[str]:
        """Names of all files."""
        return iter(self._by_name)

    def find(self, name: str, label: str | None) -> str | None:
        """The file of this name, in a folder of the class's name where there are several."""
        found = self._by_name.get(name, [])
        folder = _plain(label or "")
        fits = [f for f in found if _plain(os.path.basename(os.path.dirname(f))) == folder]
        return next(iter(fits or found), None)


def _plain(label: str) -> str:
    """A class's name without what its folder may spell otherwise."""
    return re.sub(r"[^0-9a-z]+", "_", label.lower()).strip("_")


def _lines(path: Path) -> Iterator[tuple[str, list[str]]]:
    """(list and line number, what comes before the last word and that word) of a list's lines that aren't empty."""
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        if line.strip():
            yield f"{path.name}:{number}", line.rsplit(maxsplit=1)


def _existing(path: Path, what: str) -> Path:
    if not path.is_file():
        raise ValueError(f"{path} is missing: {what}")
    return path


def ucf101(videos: Path, splits: Path) -> Found:
    """UCF101 by ``classInd.txt``, ``trainlist01.txt`` to ``03`` and ``testlist01.txt`` to ``03``.

    Classes are those of ``classInd.txt``; files are looked for by name, wherever they lie below ``videos``. Raises
    ValueError for a list that is missing or malformed.
    """
    what = "the UCF101 lists are classInd.txt, trainlist01.txt ... testlist03.txt"
    index = _existing(splits / "classInd.txt", what)
    classes = {words[-1] for _, words in _lines(index)}
    entries: dict[str, _Entry] = {}
    for split in range(NUM_SPLITS):
        for part in ("train", "test"):
            path = _existing(splits / f"{part}list{split + 1:02d}.txt", what)
            for where, words in _lines(path):
                label, _, name = words[0].rpartition("/")
                if label not in classes:
                    raise ValueError(f"{where} ({path}): {label or words[0]!r} is no UCF101 class")
                entry = entries.setdefault(words[0], _Entry(label, name, where))
                _assign(entry, split, part, where)
    return _look_up(list(entries.values()), _Files(videos))


def hmdb51(videos: Path, splits: Path) -> Found:
    """HMDB51 by its ``CLASS_test_split1.txt`` ... files; a 0 there means in no part of that split.

    Files are looked for by name, wherever they lie below ``videos``. Raises ValueError where there are no lists,
    and for a malformed one.
    """
    pattern = re.compile(r"(.+)_test_split([1-3])\.txt")
    names = sorted(os.listdir(splits)) if splits.is_dir() else []
    lists = [(m[1], int(m[2]) - 1, splits / n) for n in names if (m := pattern.fullmatch(n))]
    if not lists:
        raise ValueError(f"{splits} holds no HMDB51 lists (CLASS_test_split1.txt ...)")
    entries: dict[tuple[str, str], _Entry] = {}
    for label, split, path in lists:
        for where, words in _lines(path):
            if len(words) != 2 or words[1] not in HMDB51_PARTS:
                raise ValueError(f"{where} ({path}): write NAME.avi and 0, 1 or 2")
            entry = entries.setdefault((label, words[0]), _Entry(label, words[0], where))
            _assign(entry, split, HMDB51_PARTS[words[1]], where)
    return _look_up(list(entries.values()), _Files(videos))


def _assign(entry: _Entry, split: int, part: str, where: str) -> None:
    before = entry.splits[split]
    if before and part and before != part:
        raise ValueError(
            f"{where}: {entry.name} is in both the {before} and the {part} part of split {split + 1}"
        )
    entry.splits[split] = part or before


def _look_up(entries: Sequence[_Entry], files: _Files) -> Found:
    found = Found()
    for entry in entries:
        relative = files.find(entry.name, entry.label)
        if relative is None:
            missing = f"{MISSING}there is no such file below {files.folder}"
            path = f"{entry.label}/{entry.name}"
            found.rejects.append(Reject(path, missing, listed=entry.listed))
            continue
        splits = tuple(entry.splits)
        source = Source(
            str(files.folder), relative, entry.label, splits=splits, listed=entry.listed
        )
        found.sources.append(source)
    found.unlisted = files.count - len({s.relative for s in found.sources})
    return Found.of([found])


def kinetics(videos: Path, lists: Sequence[Path]) -> Found:
    """Kinetics by CSV files with the columns label (if known), youtube_id, time_start, time_end and split.

    Files are ``ID.mp4``, ``ID_000010_000020.mp4`` or such with another suffix, wherever they lie below ``videos``. Of
    an ``ID.mp4`` that is longer than the stretch, the stretch is taken. Splits are told as split 1. Raises
    ValueError for a list that can't be read or lacks columns.
    """
    files = _Files(videos)
    by_stem = _stems(files)
    found = Found()
    used: set[str] = set()
    for path in lists:
        for number, row in _table(path):
            where = f"{path.name}:{number}"
            name = row.get("youtube_id", "").strip()
            try:
                source = _kinetics_source(files, by_stem, row, where)
            except ValueError as error:
                found.rejects.append(Reject(name, str(error), listed=where))
                continue
            used.add(source.relative)
            found.sources.append(source)
    found.unlisted = files.count - len(used)
    return Found.of([found])


def _stems(files: _Files) -> dict[str, list[str]]:
    stems: dict[str, list[str]] = defaultdict(list)
    for name in files.names():
        stems[os.path.splitext(name)[0]].append(name)
    return stems


def _table(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    reader = csv.DictReader(read_text(path).splitlines())
    wanted = {"youtube_id", "time_start", "time_end"}
    missing = sorted(wanted - set(reader.fieldnames or ()))
    if missing:
        raise ValueError(f"{path} has no column {missing[0]}: give a Kinetics list")
    for row in reader:
        yield reader.line_num, {k: v or "" for k, v in row.items() if k is not None}


def _kinetics_source(
    files: _Files, by_stem: dict[str, list[str]], row: dict[str, str], where: str
) -> Source:
    name, label = row["youtube_id"].strip(), row.get("label", "").strip() or None
    start, end = (seconds(row[f"time_{key}"], what=f"time_{key}") for key in ("start", "end"))
    if start is None or end is None or end <= start:
        raise ValueError("its times are missing, or it ends before it starts")
    part = row.get("split", "").strip().lower()
    if part not in KINETICS_PARTS:
        raise ValueError(f"its split, {part!r}, is none of train, val and test")
    trimmed = f"{name}_{round(start):06d}_{round(end):06d}"
    for stem in (trimmed, name):
        for file in by_stem.get(stem, []):
            relative = files.find(file, label)
            assert relative is not None
            whole = stem == trimmed
            return Source(
                str(files.folder),
                relative,
                label,
                start=None if whole else start,
                end=None if whole else end,
                splits=(KINETICS_PARTS[part],),
                listed=where,
                may_be_trimmed=not whole,
            )
    raise ValueError(f"{MISSING}there is no such file below {files.folder}")
