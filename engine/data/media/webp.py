"""Animated WebP, which FFmpeg doesn't decode: Pillow does, and FFmpeg gets its frames as a film without loss."""

from __future__ import annotations

import io
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import av
import numpy as np
from PIL import Image, ImageSequence

HEAD, ANIMATION = 32, 0x02
"""Bytes of a file's head, and its flag in byte 20 for moving pictures."""
MAX_CANVAS = 2560 * 2560
"""Pixels: Pillow holds a few pictures of four bytes each."""
MAX_FILM = 128 * 2**20
"""Bytes that the film may take."""
FASTEST, SLOW = 20, 100
"""Milliseconds: pictures that are to be shown for less than FASTEST are shown for SLOW, as browsers do."""


def is_animated(head: bytes) -> bool:
    """Whether a file of this head, HEAD bytes long, is an animated WebP."""
    whole = len(head) == HEAD and head[:4] == b"RIFF" and head[8:16] == b"WEBPVP8X"
    return whole and bool(head[20] & ANIMATION)


def as_film(content: bytes) -> io.BytesIO:
    """An animation as a Matroska file of the same pictures, over white, at the same times.

    Raises ValueError with the reason where that can't be done.
    """
    width, height = (int.from_bytes(content[i : i + 3], "little") + 1 for i in (24, 27))
    if width * height > MAX_CANVAS:
        raise ValueError(f"its picture of {width}x{height} is too large for an animated WebP")
    film = io.BytesIO()
    with av.open(film, "w", format="matroska") as out:
        stream: Any = None
        moment = 0
        for picture, milliseconds in _pictures(content):
            if stream is None:
                rate = Fraction(1000, milliseconds).limit_denominator(1001)
                stream = out.add_stream("ffv1", rate=rate)
                stream.width, stream.height, stream.pix_fmt = *picture.size, "bgr0"
                stream.codec_context.time_base = Fraction(1, 1000)
            frame = av.VideoFrame.from_ndarray(np.asarray(picture), format="rgb24")
            frame.pts, frame.time_base = moment, Fraction(1, 1000)
            for packet in stream.encode(frame):  # one a picture, at once
                packet.duration = milliseconds
                out.mux(packet)
            moment += milliseconds
            if film.tell() > MAX_FILM:
                raise ValueError("it is too long for an animated WebP: convert it to MP4")
    film.seek(0)
    return film


def _pictures(content: bytes) -> Iterator[tuple[Image.Image, int]]:
    """The animation's pictures, and for how many milliseconds each is shown."""
    try:
        with Image.open(io.BytesIO(content), formats=["WEBP"]) as animation:
            white = Image.new("RGBA", animation.size, "white")
            for picture in ImageSequence.Iterator(animation):
                shown = Image.alpha_composite(white, picture.convert("RGBA")).convert("RGB")
                milliseconds = int(picture.info.get("duration", SLOW))
                yield shown, milliseconds if milliseconds >= FASTEST else SLOW
    except (OSError, SyntaxError, EOFError, ValueError) as error:
        raise ValueError(f"its pictures can't be decoded: {error}") from error
