"""Decoded frames to the pictures that clips keep: the right one for each moment, upright, scaled, as I420.

Pictures are uint8 (T, 3H/2, W): the full-range BT.601 planes that JPEG stores. Shape letters: T frames,
H height, W width.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.data.media import tone
from engine.data.media.container import MediaError

MATRICES = {1: 1, 4: 4, 5: 5, 6: 5, 7: 7, 9: 9}
"""FFmpeg's code for a YUV matrix (AVCOL_SPC) to swscale's (SWS_CS)."""
NO_MATRICES = {
    8: "YCgCo",
    10: "BT.2020 with constant luminance",
    11: "Y'D'zD'x",
    13: "constant luminance",
    14: "ICtCp",
    15: "IPT-PQ-C2",
    16: "YCgCo-Re",
    17: "YCgCo-Ro",
}
"""Codes of colours that no matrix turns into RGB, or none of swscale's."""

Frames = NDArray[np.uint8]


def show(
    frames: Iterator[tuple[float, Any]],
    times: NDArray[np.float64],
    *,
    fps: float,
    source_fps: float,
) -> Iterator[Any]:
    """The frame shown at each of ``times`` (rising, seconds, ``fps`` a second), up to the end of the video.

    ``frames`` are decoded frames with their time stamps. ``source_fps`` tells how long the last one lasts
    where it doesn't say so itself; 0 for unknown.
    """
    i, shown, since, lasts = 0, None, 0.0, 1.0 / (source_fps or fps)
    for time, frame in frames:
        if shown is not None:
            until = time - min((time - since) / 2, 0.5 / fps) + 1e-6
            while i < len(times) and times[i] <= until:
                yield shown
                i += 1
            if i == len(times):
                return
        shown, since = frame, time
    if shown is not None:
        if shown.duration:
            lasts = float(shown.duration * shown.time_base)
        left = round((since + lasts - times[0]) * fps)  # grid points up to the last frame's end
        for _ in range(i, min(left, len(times))):
            yield shown


def even(x: float) -> int:
    """The even number of pixels nearest to ``x``, at least 2."""
    return max(2, 2 * round(x / 2))


def unknown_colours(frame: Any) -> str | None:
    """Why a decoded frame's colours can't be converted; None where they can."""
    name = None if frame.format.is_rgb else NO_MATRICES.get(int(frame.colorspace))
    return None if name is None else f"its colours are {name}, which is not converted"


def to_i420(frame: Any, size: tuple[int, int], turns: int) -> Frames:
    """Scale a decoded frame to ``size`` (width, height as displayed) and turn it upright: (3H/2, W).

    The frame's own matrix and range count; where it names no matrix, BT.709 from 720 rows on and BT.601 below.
    High dynamic range and the colours of BT.2020 and P3 become standard ones (``tone``). Raises MediaError for colours
    that can't be converted.
    """
    if (why := unknown_colours(frame)) is not None:
        raise MediaError(why)
    width, height = size[::-1] if turns % 2 else size
    full = frame.color_range == 2 or frame.format.name.startswith("yuvj") or frame.format.is_rgb
    transfer, primaries = int(frame.color_trc), int(frame.color_primaries)
    wide = tone.needs_tone(transfer, primaries)
    small = frame.reformat(
        width=width,
        height=height,
        format="rgb48le" if wide else "yuv420p",
        src_colorspace=MATRICES.get(frame.colorspace, 1 if frame.height >= 720 else 5),
        dst_colorspace=5,
        src_color_range=2 if full else 1,
        dst_color_range=2,
        interpolation="AREA" if width < frame.width else "BICUBIC",
        threads=1,
    )
    if wide:
        planes = tone.to_i420(tone.to_standard(small.to_ndarray(), transfer, primaries))
    else:
        planes = small.to_ndarray()
    if turns:
        luma, chroma = planes[:height], planes[height:].reshape(2, height // 2, width // 2)
        upright = [np.rot90(luma, turns), *(np.rot90(c, turns) for c in chroma)]
        planes = np.concatenate([p.ravel() for p in upright]).reshape(size[1] * 3 // 2, size[0])
    return planes
