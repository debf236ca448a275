"""Optical flow on the CPU: dense inverse search (Kroeger et al., ECCV 2016) by OpenCV."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
from numpy.typing import NDArray

cv2.setNumThreads(1)  # clips run side by side instead: no thread start per frame pair
MIN_SIDE_OF_SCALE_1 = 46
"""Pixels: OpenCV starts from scale 1 or coarser, of 8-pixel patches, in pictures of this side and up."""


def dis_flow(
    clips: NDArray[np.uint8], *, pool: ThreadPoolExecutor | None = None
) -> NDArray[np.float32]:
    """Compute flow between neighbouring frames.

    ``clips``: uint8 (N, F, H, W, 3) RGB. Returns float32 (N, F-1, H, W, 2): for each pixel of a frame, the
    displacement (u to the right, v down) in pixels to the next frame. ``pool`` spreads clips over threads.
    """
    n, f, h, w, _ = clips.shape
    flow = np.empty((n, f - 1, h, w, 2), np.float32)

    def one(i: int) -> None:
        grey = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in clips[i]]
        dis = _searcher(h, w)
        for k in range(f - 1):
            flow[i, k] = dis.calc(grey[k], grey[k + 1], None)

    list(map(one, range(n)) if pool is None else pool.map(one, range(n)))
    return flow


def _searcher(height: int, width: int) -> cv2.DISOpticalFlow:
    """A searcher of a clip's own: OpenCV changes one's scales for good when it meets a small picture.

    Finest scale 1, because at training sizes the preset's 2 blurs small objects away; below that, 0.
    """
    dis = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_FAST)
    dis.setFinestScale(1 if min(height, width) >= MIN_SIDE_OF_SCALE_1 else 0)
    return dis
