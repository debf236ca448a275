"""What the index of a data set says of a clip: one RECORD of 64 bytes, and what its flags mean."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from engine.data.media.codecs import CODECS, Codec

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


def codec_of(flags: Any) -> Codec:
    """How a clip's pictures are stored, by its ``flags``."""
    return CODECS[(int(flags) >> CODEC_SHIFT) & 7]


def crc_of(*parts: bytes) -> int:
    """The checksum of bytes that follow one another."""
    crc = 0
    for part in parts:
        crc = zlib.crc32(part, crc)
    return crc


def split_bits(splits: Sequence[str]) -> int:
    """A clip's parts in splits 1, 2 ... as bits of ``flags``."""
    assert len(splits) <= MAX_SPLITS
    return sum(PARTS.index(part) << (SPLIT_SHIFT + 2 * i) for i, part in enumerate(splits))


def told_splits(splits: Sequence[str]) -> dict[str, str]:
    """A clip's parts by the number of the split, as its facts tell them: ``{"1": "train", "3": "test"}``."""
    return {str(i): part for i, part in enumerate(splits, start=1) if part}
