"""A media file: a file of its own, or a part of another, such as a tar."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO


@dataclass(frozen=True, slots=True)
class Part:
    """The bytes of a file from ``offset`` on, ``size`` of them."""

    path: str
    offset: int
    size: int


MediaFile = Path | str | Part


def url_of(media: MediaFile) -> str:
    """What FFmpeg opens."""
    if isinstance(media, Part):
        end = media.offset + media.size
        return f"subfile,,start,{media.offset},end,{end},,:{os.path.abspath(media.path)}"
    # absolute, since FFmpeg takes what precedes a colon in a relative path for a protocol
    return os.path.abspath(media)


@contextmanager
def opened(media: MediaFile) -> Iterator[tuple[IO[bytes], int, int]]:
    """The file that holds it, where in that it begins, and its size, both in bytes."""
    with open(media.path if isinstance(media, Part) else media, "rb") as file:
        if isinstance(media, Part):
            yield file, media.offset, media.size
        else:
            yield file, 0, os.fstat(file.fileno()).st_size


def head_of(media: MediaFile, count: int) -> tuple[bytes, int]:
    """The first ``count`` bytes, and the size in bytes."""
    with opened(media) as (file, begin, size):
        file.seek(begin)
        return file.read(min(count, size)), size
