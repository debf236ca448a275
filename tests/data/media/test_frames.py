from __future__ import annotations

import av
import numpy as np
import pytest

from engine.data.media.decode import Window
from engine.data.media.frames import to_i420


@pytest.mark.parametrize("turns", [0, 1, 2, 3])
def test_frames_are_turned_upright(turns: int) -> None:
    rgb = np.zeros((32, 48, 3), np.uint8)
    rgb[:16, :24] = (250, 40, 40)
    rgb[16:, 24:] = (40, 40, 250)
    frame = av.VideoFrame.from_ndarray(rgb, format="rgb24")
    size = (32, 48) if turns % 2 else (48, 32)
    planes = to_i420(frame, size, turns)
    shown = Window(planes[None], None, None).rgb()[0]
    assert np.abs(shown.astype(int) - np.rot90(rgb, turns)).mean() < 4


@pytest.mark.parametrize(("matrix", "kr", "kb"), [(1, 0.2126, 0.0722), (5, 0.299, 0.114)])
@pytest.mark.parametrize("full", [False, True])
def test_colours_become_full_range_bt601(matrix: int, kr: float, kb: float, full: bool) -> None:
    rgb = np.array([200.0, 60.0, 90.0])

    def planes_of(kr: float, kb: float, full: bool) -> np.ndarray:  # ITU-R BT.601 and BT.709
        y = kr * rgb[0] + (1 - kr - kb) * rgb[1] + kb * rgb[2]
        cb, cr = (rgb[2] - y) / (2 * (1 - kb)), (rgb[0] - y) / (2 * (1 - kr))
        scale = (1.0, 1.0) if full else (219 / 255, 224 / 255)
        return np.array(
            [y * scale[0] + (0 if full else 16), *(c * scale[1] + 128 for c in (cb, cr))]
        )

    source = np.round(planes_of(kr, kb, full)).astype(np.uint8)
    stored = np.concatenate(
        [np.full(n, v, np.uint8) for n, v in zip((4096, 1024, 1024), source, strict=True)]
    )
    frame = av.VideoFrame.from_ndarray(stored.reshape(96, 64), format="yuv420p")
    frame.colorspace, frame.color_range = matrix, 2 if full else 1
    out = to_i420(frame, (32, 32), 0).reshape(-1)
    found = np.array([out[:1024].mean(), out[1024:1280].mean(), out[1280:].mean()])
    assert np.abs(found - planes_of(0.299, 0.114, True)).max() < 2.5
