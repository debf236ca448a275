"""Optical flow on the CPU: dense inverse search (Kroeger et al., ECCV 2016) by OpenCV."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
from numpy.typing import NDArray

cv2.setNumThreads(1)  # clips run side by side instead: no thread start per frame pair
_local = threading.local()


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
        dis = _searcher()
        for k in range(f - 1):
            flow[i, k] = dis.calc(grey[k], grey[k + 1], None)

    list(map(one, range(n)) if pool is None else pool.map(one, range(n)))
    return flow


def _searcher() -> cv2.DISOpticalFlow:
    """This thread's own searcher: one keeps buffers between calls and can't be shared."""
    if not hasattr(_local, "dis"):
        _local.dis = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_FAST)
        _local.dis.setFinestScale(
            1
        )  # at training sizes the preset's scale 2 blurs small objects away
    return _local.dis
