"""Optical flow on the CPU: dense inverse search (Kroeger et al., ECCV 2016) by OpenCV.

End-point error as a share of zero flow's on RubberWhale, chairs 0 and chairs 1, ground truth and frames brought to
a short side, and milliseconds for a square clip of 12 frames of that side (``benchmarks/flow_presets.py``):

    side   fast                      fine                      best
      48   .67  1.03  .30    1.5     .62   .87  .32    3.7     .56   .70  .33     10
      64   .84   .96  .30    2.3     .47   .75  .33    6.0     .44   .67  .30     17
     112   .44   .72  .32    8.0     as fast                   .27   .58  .27     50
     128   .41   .77  .30    9.9     as fast                   .23   .58  .26     62
     224   .30   .60  .24     32     as fast                   .14   .56  .24    209

``fine`` is the cheapest setting that is at most half as wrong as no flow on RubberWhale and chairs 1 wherever one
is (at 48 none is: RubberWhale moves by 0.15 pixels there). On chairs 0 no setting is, at any resolution or cost:
the least seen is .53, since a large part of its motion is covered or uncovered between the frames.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Literal, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

cv2.setNumThreads(1)  # clips run side by side instead: no thread start per frame pair

FlowPreset = Literal["fast", "fine", "best"]


class Search(NamedTuple):
    """Settings of DIS, the search for a frame's flow."""

    finest_scale: int
    """Halvings of the frame down to which it searches."""
    patch: int = 8
    """Pixels a side of a patch."""
    stride: int = 4
    """Pixels between patches."""
    descents: int = 16
    """Steps of gradient descent a patch."""
    refinements: int = 5
    """Iterations of the variational refinement that follows on each scale."""


FAST = Search(1)
FINE = Search(0, stride=5, refinements=2)
BEST = Search(0, patch=4, stride=3, refinements=10)
MIN_SIDE_OF_SCALE_1 = 46
"""Pixels: OpenCV starts from scale 1 or coarser, of 8-pixel patches, in pictures of this side and up."""
FINE_BELOW = 104
"""Pixels: in larger pictures FAST is at most half as wrong as no flow, too, at a fourth of the time."""


def search_for(preset: FlowPreset, side: int) -> Search:
    """The search that a preset stands for in frames whose short side has ``side`` pixels."""
    if preset == "best":
        return BEST
    if preset == "fine" and side < FINE_BELOW:
        return FINE
    return FAST if side >= MIN_SIDE_OF_SCALE_1 else FAST._replace(finest_scale=0)


def dis_flow(
    clips: NDArray[np.uint8],
    *,
    preset: FlowPreset = "fine",
    pool: ThreadPoolExecutor | None = None,
) -> NDArray[np.float32]:
    """Compute flow between neighbouring frames.

    ``clips``: uint8 (N, F, H, W, 3) RGB. Returns float32 (N, F-1, H, W, 2): for each pixel of a frame, the
    displacement (u to the right, v down) in pixels to the next frame. ``pool`` spreads clips over threads.
    """
    n, f, h, w, _ = clips.shape
    flow = np.empty((n, f - 1, h, w, 2), np.float32)

    def one(i: int) -> None:
        grey = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in clips[i]]
        dis = searcher(search_for(preset, min(h, w)))
        for k in range(f - 1):
            flow[i, k] = dis.calc(grey[k], grey[k + 1], None)

    list(map(one, range(n)) if pool is None else pool.map(one, range(n)))
    return flow


def searcher(search: Search) -> cv2.DISOpticalFlow:
    """OpenCV's searcher, for one clip alone: it changes its own scales for good when it meets a small picture."""
    dis = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_FAST)
    dis.setFinestScale(search.finest_scale)
    dis.setPatchSize(search.patch)
    dis.setPatchStride(search.stride)
    dis.setGradientDescentIterations(search.descents)
    dis.setVariationalRefinementIterations(search.refinements)
    return dis
