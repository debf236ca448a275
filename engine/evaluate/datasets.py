"""Labelled data sets with the folds that their protocols train and test on: UCF101, HMDB51, Kinetics, class folders."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.data.ingest.run import ingest
from engine.data.ingest.sources import Reject, SourceList, find_sources
from engine.data.ingest.splits import MISSING, NUM_SPLITS, hmdb51, kinetics, own, ucf101
from engine.data.library import Report, reported
from engine.data.shards.index import ClipIndex, is_shards

Ints = NDArray[np.int64]

NAMES = ("ucf101", "hmdb51", "kinetics", "folders")
GROUP_PATTERNS = {
    "ucf101": r"_g(\d+)_c\d+",
    # the film that a clip is from: what comes before its class and the five marks
    "hmdb51": r"^(.+)_[fhlu]_(?:cm|nm)_np\d+_(?:ba|fr|le|ri)_(?:bad|goo|med)_\d+",
}
LISTS = {
    "ucf101": ("classInd.txt", "ucfTrainTestlist", "classInd.txt and trainlist01.txt ..."),
    "hmdb51": (
        "*_test_split1.txt",
        "testTrainMulti_7030_splits",
        "the files CLASS_test_split1.txt ...",
    ),
    "kinetics": ("*.csv", "annotations", "train.csv and validate.csv"),
}
"""A data set's lists: a file that is among them, the folder that they unpack as, and what to call them."""
CLIP_SECONDS = 60.0
"""Longest clip that is kept whole, so that test views are spread over all of a video."""


class IncompleteDataset(ValueError):
    """Videos that a data set lists are not there: the message counts them and names the first."""


@dataclass(frozen=True, eq=False)
class Fold:
    """The clips of one training and its test: indices, rising."""

    name: str
    train: Ints
    test: Ints


@dataclass(frozen=True, eq=False)
class Dataset:
    """Labelled clips of one data set, opened; a video, a group and a fold's part are made of whole clips."""

    name: str
    index: ClipIndex
    classes: tuple[str, ...]
    label: Ints
    """(clips,) place in ``classes``, -1 for none."""
    group: Ints
    """(clips,) number of the clip's group: alike clips, which never straddle train and held-out parts."""
    groups: tuple[str, ...]
    video: Ints
    """(clips,) number of the source video: a long one is stored as several clips."""
    videos: tuple[str, ...]
    folds: tuple[Fold, ...]
    folds_by: str
    """In words, for the protocol's string."""
    rejects: tuple[Reject, ...]
    listed: int
    """Videos that there should be."""
    warnings: tuple[str, ...] = ()
    decoded: dict[Any, Any] = field(default_factory=dict, repr=False)
    """Decoded views, kept between networks (``engine.features.extract``)."""

    @property
    def incomplete(self) -> str | None:
        """The number of videos that are missing, in words; None for a whole data set."""
        present = len(self.videos)
        if present >= self.listed:
            return None
        return f"incomplete: {present} of {self.listed} videos"


def open_dataset(
    root: Path | Sequence[Path],
    *,
    name: str,
    splits: Path | None = None,
    folds: str | None = None,
    group_pattern: str | None = None,
    cache: Path,
    report: Report,
    allow_missing: bool = False,
    short_side: int = 128,
    workers: int | None = None,
) -> Dataset:
    """Open a labelled data set: raw videos by way of shards that ``cache`` keeps, or shards as they are.

    ``name`` is one of NAMES. ``root`` is the folder of a download as it unpacks, class folders, or shards that
    ``engine ingest`` made with the data set's lists. ``splits`` holds the lists, which are otherwise looked for in
    and beside ``root``. ``folds``: "official" (the lists'; the default but for folders) or "group": each group is
    held out once. A clip's group is the first match of ``group_pattern`` in its file's name, or of that the first
    bracket that holds something. Raises IncompleteDataset where listed videos are missing, unless ``allow_missing``,
    and ValueError for what can't be used.
    """
    if name not in NAMES:
        raise ValueError(f"unknown data set {name!r}: {', '.join(NAMES)}")
    roots = [
        Path(p).expanduser().resolve() for p in ([root] if isinstance(root, str | Path) else root)
    ]
    absent = [path for path in roots if not path.exists()]
    if absent:
        raise ValueError(f"{absent[0]}: no such file or folder")
    folds = folds or ("group" if name == "folders" and splits is None else "official")
    if folds not in ("official", "group"):
        raise ValueError(f"--folds {folds}: write official or group")
    pattern = _pattern(group_pattern, name, folds)
    raw = not all(map(is_shards, roots))
    listing = (
        find(roots, name=name, splits=splits) if raw else SourceList(rejects=_rejects_of(roots))
    )
    missing = [reject.path for reject in listing.rejects if reject.reason.startswith(MISSING)]
    if missing and not allow_missing:
        raise _incomplete(name, roots, missing, listing)
    rejects, listed, folders = listing.rejects, 0, roots
    if raw:
        folders = [cache / _folder_name(name, roots, splits, short_side)]
        rejects = _ingested(listing, folders[0], short_side, workers, report)
        # several stretches of a file under one label are one video, as below
        listed = len({(s.relative, s.label) for s in listing.sources}) + len(missing)
    warnings: list[str] = []
    index = ClipIndex(folders, warn=warnings.append)
    return _described(index, name, folds == "group", pattern, rejects, warnings, listed)


def _folder_name(name: str, roots: Sequence[Path], splits: Path | None, short_side: int) -> str:
    content = json.dumps([name, [str(root) for root in roots], str(splits or ""), short_side])
    return f"{name}-{roots[0].name}-{hashlib.sha256(content.encode()).hexdigest()[:10]}"


def _ingested(
    listing: SourceList, out: Path, short_side: int, workers: int | None, report: Report
) -> list[Reject]:
    return ingest(
        listing,
        out,
        short_side=short_side,
        clip_seconds=CLIP_SECONDS,
        min_seconds=0.0,  # the shortest labelled videos are half a second long
        workers=workers,
        progress=reported("the labelled videos", report),
    ).rejects


def _rejects_of(shards: Sequence[Path]) -> list[Reject]:
    """The rejects that ``engine ingest`` listed when it made the shards."""
    files = [path / "rejects.jsonl" for path in shards if (path / "rejects.jsonl").is_file()]
    lines = [line for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    return [Reject(**json.loads(line)) for line in lines]


def find(roots: Sequence[Path], *, name: str, splits: Path | None = None) -> SourceList:
    """The videos of a data set below ``roots``, by its lists; what is missing is among the rejects.

    Raises ValueError where the lists are not found.
    """
    if name == "folders":
        if splits is None:
            return find_sources(roots)
        if len(roots) > 1:
            raise ValueError(
                "--splits goes with one --root: the folder that the lists' paths count from"
            )
        return own(roots[0], splits)
    listings = []
    for root in roots:
        lists = splits or _find_lists(root, name)
        if name == "kinetics":
            files = sorted(lists.glob("*.csv")) if lists.is_dir() else [lists]
            listings.append(kinetics(root, files))
        else:
            listings.append({"ucf101": ucf101, "hmdb51": hmdb51}[name](root, lists))
    return listings[0] if len(listings) == 1 else SourceList.of(listings)


def _find_lists(root: Path, name: str) -> Path:
    """The folder of a data set's lists: in the videos' folder, or beside it."""
    sign, usual, what = LISTS[name]
    near = [root, root / usual, root.parent / usual, root / "lists", root / "splits"]
    within = [
        folder for each in (usual, "lists", "splits") for folder in sorted(root.glob(f"*/{each}"))
    ]
    beside = [*sorted(root.iterdir()), *within, root.parent, *sorted(root.parent.iterdir())]
    for folder in [*near, *(p for p in beside if p.is_dir())]:
        try:
            if next(folder.glob(sign), None) is not None:
                return folder
        except OSError:  # a folder beside it that this user may not read
            continue
    raise ValueError(
        f"{name}: its lists ({what}) are neither in {root} nor beside it: unpack {usual} there, or name their folder"
        " with --splits"
    )


def _incomplete(
    name: str, roots: Sequence[Path], missing: Sequence[str], listing: SourceList
) -> IncompleteDataset:
    packed = [p for root in roots for kind in ("*.rar", "*.zip") for p in root.glob(kind)]
    unpack = f"{packed[0].name} is packed still: unpack it" if packed else "unpack all of it there"
    few = ", ".join(sorted(missing)[:5]) + (", ..." if len(missing) > 5 else "")
    of = f" of {len(listing.sources) + len(listing.rejects)}" if listing.sources else ""
    return IncompleteDataset(
        f"{name}: {len(missing)}{of} listed videos are missing below {', '.join(map(str, roots))}: {few}; {unpack}, or"
        " go on with what is there by --allow-missing"
    )


def _pattern(pattern: str | None, name: str, folds: str) -> re.Pattern[str] | None:
    text = pattern or GROUP_PATTERNS.get(name)
    if text is None:
        if folds == "group" and name == "folders":
            raise ValueError(
                "class folders have no lists of train and test, so each group of videos (an actor, a film) is left out"
                " once: say by --group-pattern, a regular expression, what in a file's name is its group, such as"
                " '^[^_]+' in actor_action.avi; or give lists of train and test videos with --splits"
            )
        return None
    try:
        return re.compile(text)
    except re.error as error:
        raise ValueError(
            f"--group-pattern {text!r} is no regular expression ({error}): write one that finds the group in a file's"
            " name, such as '^[^_]+'"
        ) from None


def _described(
    index: ClipIndex,
    name: str,
    by_group: bool,
    pattern: re.Pattern[str] | None,
    rejects: Sequence[Reject],
    warnings: Sequence[str],
    listed: int,
) -> Dataset:
    """Videos, groups and folds of opened shards."""
    label = index.label.astype(np.int64)
    if not (label >= 0).any():
        raise ValueError("no labelled clips: put each class's videos into a folder of its own")
    clips = [(index.facts(i)["source"], int(label[i])) for i in range(len(index))]
    video, videos = _videos(index, clips)
    groups = [_group_of(s, pattern, None if c < 0 else index.classes[c]) for s, c in clips]
    unmatched = [s for (s, _), group in zip(clips, groups, strict=True) if group is None]
    if by_group and pattern is not None and unmatched:
        raise ValueError(
            f"the group pattern {pattern.pattern!r} finds nothing in {len(unmatched)} of {len(clips)} names, such as"
            f" {unmatched[0]}: give another with --group-pattern"
        )
    group, names = _numbered(
        [s if g is None else g for (s, _), g in zip(clips, groups, strict=True)]
    )
    folds = (
        _group_folds(group, names, label, index.classes)
        if by_group
        else _official(index, name, label)
    )
    official = f"{len(folds)} official split{'s'[: len(folds) > 1]}"
    official = "trained and tested by lists" if name == "folders" else official
    lost = {r.path for r in rejects if not r.partial} - {source for source, _ in clips}
    return Dataset(
        name=name,
        index=index,
        classes=index.classes,
        label=label,
        group=group,
        groups=names,
        video=video,
        videos=tuple(v.partition("\0")[0] for v in videos),
        folds=folds,
        folds_by=f"leave one group out, {len(folds)} folds" if by_group else official,
        rejects=tuple(rejects),
        listed=max(listed, len(videos) + len(lost)),
        warnings=tuple(warnings),
    )


def _videos(index: ClipIndex, clips: Sequence[tuple[str, int]]) -> tuple[Ints, tuple[str, ...]]:
    """Each clip's video, whose clips are averaged, and their names; ``clips``: source and label of each.

    One film may be listed with stretches of several classes, or for several parts of a split: a video has one each.
    """
    each = zip(clips, index.splits, strict=True)
    return _numbered([f"{source}\0{label}\0{parts}" for (source, label), parts in each])


def _group_of(source: str, pattern: re.Pattern[str] | None, label: str | None) -> str | None:
    match = pattern.search(source.rsplit("/", 1)[-1]) if pattern else None
    if match is None:
        return None
    # the first bracket that took part: there may be one for each way to write a name
    text = next((found for found in match.groups() if found), "" if match.re.groups else match[0])
    return text.removesuffix(f"_{label}") or None


def _numbered(names: Sequence[str]) -> tuple[Ints, tuple[str, ...]]:
    unique, number = np.unique(np.array(names), return_inverse=True)
    return number.astype(np.int64), tuple(map(str, unique))


def _official(index: ClipIndex, name: str, label: Ints) -> tuple[Fold, ...]:
    folds = []
    for number in range(1, 2 if name == "kinetics" else NUM_SPLITS + 1):
        train, test, validation = (
            np.flatnonzero((label >= 0) & index.in_split(number, part))
            for part in ("train", "test", "validation")
        )
        test = test if len(test) else validation
        if len(train) and len(test):
            folds.append(Fold(f"split{number}", train, test))
    if not folds:
        raise ValueError(
            f"{name}: no official split has clips both to train and to test on: the lists' videos are not here; for"
            " class folders, use --dataset folders --folds group"
        )
    return tuple(folds)


def _group_folds(
    group: Ints, names: Sequence[str], label: Ints, classes: Sequence[str]
) -> tuple[Fold, ...]:
    known = label >= 0
    held = [np.flatnonzero(known & (group == number)) for number in range(len(names))]
    if sum(map(bool, map(len, held))) < 2:
        raise ValueError(
            f"all labelled clips are of one group, {names[0]!r}: without it nothing is left to train on; give"
            " another --group-pattern"
        )
    folds = [
        Fold(name, np.flatnonzero(known & (group != number)), test)
        for number, (name, test) in enumerate(zip(names, held, strict=True))
        if len(test)
    ]
    for fold in folds:
        if len(left := np.unique(label[fold.train])) < 2:
            raise ValueError(
                f"without group {fold.name!r} only class {classes[left[0]]!r} is left to train on; give another"
                " --group-pattern"
            )
    return tuple(folds)
