"""How a clip's pictures are stored: its codecs, the bytes of each, and which of them some frames need.

JPEG pictures are stored one after the other, and each can be taken alone. VP9 is an IVF file with a key frame every
KEY_EVERY frames: taken is the stretch from the key frame before the first frame wanted to the last one. Streams that
only a GPU decodes, and those that were copied from their source, are mp4 files, taken whole: the decoder seeks in them.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

KEY_EVERY = 16
"""Frames from one key frame of an IVF file to the next."""
IVF_HEADER, IVF_FRAME = struct.Struct("<4sHH4sHHIIII"), struct.Struct("<IQ")
"""Signature, version, header's size, codec, width, height, rate, scale, frames, unused; size, time."""


@dataclass(frozen=True)
class Codec:
    """One way in which pictures are stored."""

    number: int
    """As the index has it."""
    name: str
    suffix: str
    """Of its file in a shard."""
    on_cpu: bool
    """Whether a CPU's decoder in DALI knows it."""


JPEG = Codec(0, "jpeg", "mjpg", on_cpu=True)
VP9 = Codec(1, "vp9", "ivf", on_cpu=True)
H264 = Codec(2, "h264", "mp4", on_cpu=False)
HEVC = Codec(3, "hevc", "mp4", on_cpu=False)
VP9_MP4 = Codec(4, "vp9 in mp4", "mp4", on_cpu=True)
MPEG4 = Codec(5, "mpeg4", "mp4", on_cpu=False)
CODECS = (JPEG, VP9, H264, HEVC, VP9_MP4, MPEG4)
"""By number; at most eight."""
COPIED = {"h264": H264, "hevc": HEVC, "vp9": VP9_MP4, "libvpx-vp9": VP9_MP4, "mpeg4": MPEG4}
"""What a source's stream is stored as where it is copied, by FFmpeg's name of its decoder."""


class DamagedPictures(ValueError):
    """Bytes that are not those of a clip's pictures; the message says what is wrong with them."""


@dataclass(frozen=True)
class Pictures:
    """A clip's pictures on their way into a shard."""

    codec: Codec
    pieces: tuple[bytes, ...]
    """JPEG files or VP9 packets, one a frame; or a whole mp4 file."""
    shown: tuple[int, ...] | None = None
    """Of an mp4 file: the place, in the order of showing, of the frame that each of the clip's frames is."""

    @property
    def num_frames(self) -> int:
        """The clip's frames."""
        return len(self.pieces) if self.shown is None else len(self.shown)

    def packed(self, *, width: int, height: int, fps: float) -> tuple[bytes, NDArray[np.uint32]]:
        """The bytes to store, and the table that ``Taken`` needs, uint32: num_frames + 1 offsets, or ``shown``."""
        if self.shown is not None:
            (film,) = self.pieces
            return film, np.array(self.shown, "<u4")
        if self.codec is JPEG:
            return b"".join(self.pieces), np.cumsum([0, *map(len, self.pieces)]).astype("<u4")
        framed = [IVF_FRAME.pack(len(p), i) + p for i, p in enumerate(self.pieces)]
        head = ivf_header(width=width, height=height, fps=fps, frames=len(framed))
        return head + b"".join(framed), np.cumsum([len(head), *map(len, framed)]).astype("<u4")


def ivf_header(*, width: int, height: int, fps: float, frames: int) -> bytes:
    """The beginning of an IVF file of VP9."""
    rate, scale = round(fps * 1000), 1000
    size = IVF_HEADER.size
    return IVF_HEADER.pack(b"DKIF", 0, size, b"VP90", width, height, rate, scale, frames, 0)


def table_length(codec: Codec, num_frames: int) -> int:
    """Entries of a clip's table."""
    return num_frames if codec.suffix == "mp4" else num_frames + 1


@dataclass(frozen=True)
class Taken:
    """Which of a clip's stored bytes some of its frames need; ``build`` makes of these what decoders read."""

    codec: Codec
    ranges: tuple[tuple[int, int], ...]
    """(begin, end) of bytes."""
    places: NDArray[np.int32] | None
    """Where in the film the frames lie; None for JPEG."""


def taken(codec: Codec, table: NDArray[np.uint32], size: int, frames: Sequence[int]) -> Taken:
    """What ``frames`` of a clip need; ``size`` counts the bytes that are stored of its pictures.

    Raises DamagedPictures for a table that does not belong to a clip.
    """
    wanted = np.asarray(frames, np.int64)
    if codec.suffix == "mp4":
        return Taken(codec, ((0, size),), table[wanted].astype(np.int32))
    offsets = table.astype(np.int64)
    if offsets[-1] != size or (np.diff(offsets) < 4).any():
        raise DamagedPictures("its table of frames")
    if codec is JPEG:
        return Taken(codec, tuple((int(offsets[i]), int(offsets[i + 1])) for i in wanted), None)
    if not len(wanted):
        return Taken(codec, (), np.zeros(0, np.int32))
    first = int(wanted.min()) // KEY_EVERY * KEY_EVERY
    stretch = (int(offsets[first]), int(offsets[wanted.max() + 1]))
    return Taken(codec, (stretch,), (wanted - first).astype(np.int32))


def build(
    want: Taken, parts: Sequence[NDArray[np.uint8]], *, width: int, height: int, fps: float
) -> tuple[list[NDArray[np.uint8]], NDArray[np.uint8] | None]:
    """JPEG files, or the film, of the bytes that ``want`` asked for.

    Raises DamagedPictures for bytes that are plainly neither.
    """
    if want.codec is JPEG:
        if any(p[:2].tobytes() != b"\xff\xd8" or p[-2:].tobytes() != b"\xff\xd9" for p in parts):
            raise DamagedPictures("no JPEG where one should be")
        return list(parts), None
    if not parts:
        return [], np.zeros(0, np.uint8)
    (film,) = parts
    if want.codec is not VP9:
        if film[4:8].tobytes() != b"ftyp":
            raise DamagedPictures("no mp4 file where one should be")
        return [], film
    assert want.places is not None
    at, count = 0, 0
    while at < len(film):
        if at + IVF_FRAME.size > len(film):
            raise DamagedPictures("its packets")
        length, _ = IVF_FRAME.unpack(film[at : at + IVF_FRAME.size].tobytes())
        at, count = at + IVF_FRAME.size + length, count + 1
    if at != len(film) or count <= int(want.places.max()):
        raise DamagedPictures("its packets")
    head = ivf_header(width=width, height=height, fps=fps, frames=count)
    return [], np.concatenate([np.frombuffer(head, np.uint8), film])
