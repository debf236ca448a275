"""Videos in tars, as WebDataset keeps them: whole files, read where they lie, with their labels beside them.

A tar has no table of contents: to list it is to read the head of every file in it. The user's cache keeps long lists.
"""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import msgspec

from engine.core.files import take_lock, user_cache, write_atomic
from engine.data.ingest.lists import COLUMNS

LARGEST_NOTE = 1 << 20
"""Bytes that are read of a file with a label."""
KEPT_FROM = 0.5
"""Seconds from which on reading a list costs more than keeping it."""
SETTLED = 2.0
"""Seconds after which a tar's time tells of any later change, on every file system."""
IsVideo = Callable[[str, Callable[[], bytes]], bool]


@dataclass(frozen=True, slots=True)
class Member:
    """A file in a tar."""

    name: str
    """Its path in the tar."""
    label: str | None
    offset: int
    """Bytes of the tar before it."""
    size: int
    """Bytes."""


class _Listing(msgspec.Struct, array_like=True):
    """A tar's videos as the cache keeps them, and of what state of the tar they are."""

    path: str
    size: int
    changed: int
    """When the tar was changed, in ns."""
    rules: str
    """By which files were taken for videos."""
    members: list[Member]
    why: str


def read_tar(path: Path, is_video: IsVideo, *, rules: str = "") -> tuple[list[Member], str]:
    """The videos in a tar, and why there are no more of them, if something is wrong.

    ``is_video`` tells by a file's name, and by its content, which it may ask for. A video's label is the text of the
    .cls file of its name, or a label in its .json file (one of ``COLUMNS``), or else the folder in the tar that holds
    it. A list that took as long as KEPT_FROM is kept until the tar's size or time changes, or ``rules``, which name
    what ``is_video`` does.
    """
    full = os.path.abspath(path)
    name = f"{path.name[:100]}-{hashlib.sha256(os.fsencode(full)).hexdigest()[:10]}.json"
    kept, state, began = user_cache() / "tars" / name, _state(path), time.perf_counter()
    with suppress(OSError, msgspec.DecodeError):
        old = msgspec.json.decode(kept.read_bytes(), type=_Listing)
        if (old.path, (old.size, old.changed), old.rules) == (full, state, rules):
            return old.members, old.why
    members, why = _scan(path, is_video)
    took = time.perf_counter() - began
    is_settled = time.time() - state[1] / 1e9 > SETTLED  # a writer may add to it within one tick
    if took >= KEPT_FROM and is_settled and state == _state(path):
        new = _Listing(full, *state, rules, members, why)
        # where it can't be kept, or another process is keeping it, it is read again
        with suppress(OSError, UnicodeEncodeError), take_lock(kept.parent / ".lock"):
            write_atomic(kept, msgspec.json.encode(new))
    return members, why


def _state(path: Path) -> tuple[int, int]:
    try:
        stat = path.stat()
    except OSError:  # reading it will tell
        return 0, 0
    return stat.st_size, stat.st_mtime_ns


def _scan(path: Path, is_video: IsVideo) -> tuple[list[Member], str]:
    videos: dict[str, tarfile.TarInfo] = {}
    labels: dict[str, str] = {}  # by what precedes a file's suffix, and by its key with a dot
    why, size = "", 0
    try:
        size = path.stat().st_size
        with tarfile.open(path, "r:") as tar:
            for info in tar:
                name = os.path.normpath(info.name).lstrip("/")
                if not info.isreg() or any(part.startswith(".") for part in name.split("/")):
                    continue
                if name.endswith((".cls", ".json")):
                    _add_label(labels, tar, info, name)
                elif is_video(name, partial(_content, tar, info)):
                    videos[name] = info  # the last of a name, as where a tar is unpacked
            why = _what_ends(tar)
    except (tarfile.TarError, OSError) as error:
        why = f"it can't be read as a tar: {getattr(error, 'strerror', None) or error}"
    if why and videos:
        why += f"; {len(videos)} videos before it are used"
    alone = Counter(map(_key_of, videos))
    members = []
    for name, info in videos.items():
        length = min(info.size, size - info.offset_data)  # the last one may be cut off
        members.append(Member(name, _label_of(name, labels, alone), info.offset_data, length))
    return members, why if videos or why else "it is a tar without videos"


def _what_ends(tar: tarfile.TarFile) -> str:
    """What is wrong where the tar's list of files ends."""
    assert tar.fileobj is not None
    tar.fileobj.seek(tar.offset)
    block = tar.fileobj.read(tarfile.BLOCKSIZE)
    return f"the tar is damaged or cut off at byte {tar.offset}" if any(block) else ""


def _label_of(name: str, labels: dict[str, str], alone: Counter[str]) -> str | None:
    """A video's label by the name before its suffix, or by WebDataset's key, where it is the key's only video."""
    key = _key_of(name)
    by_key = labels.get(f"{key}.") if alone[key] == 1 else None
    folder = os.path.basename(os.path.dirname(name))
    return labels.get(os.path.splitext(name)[0]) or by_key or folder or None


def _key_of(name: str) -> str:
    """WebDataset's key: a path up to the first dot in the file's name."""
    inside, file = os.path.split(name)
    return os.path.join(inside, file.partition(".")[0])


def _content(tar: tarfile.TarFile, info: tarfile.TarInfo) -> bytes:
    """A file's beginning."""
    assert tar.fileobj is not None
    tar.fileobj.seek(info.offset_data)
    return tar.fileobj.read(min(info.size, LARGEST_NOTE))


def _add_label(
    labels: dict[str, str], tar: tarfile.TarFile, info: tarfile.TarInfo, name: str
) -> None:
    """Note the label that a file in the tar holds, if it does, by the file's stem and key; .cls goes first."""
    stem, suffix = os.path.splitext(name)
    text = _content(tar, info)
    if suffix == ".cls":
        label = text.decode(errors="replace").strip()
        labels.update({stem: label, f"{_key_of(name)}.": label} if label else {})
        return
    try:
        facts = json.loads(text)
    except ValueError:
        return
    values = [facts.get(key) for key in COLUMNS["label"]] if isinstance(facts, dict) else []
    known = (str(v) for v in values if isinstance(v, str | int) and not isinstance(v, bool))
    label = next(filter(None, known), "")
    if label:
        labels.setdefault(stem, label)
        labels.setdefault(f"{_key_of(name)}.", label)
