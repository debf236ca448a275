from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import pytest

from engine.data.flow import dis_flow


def read_flo(path: Path) -> np.ndarray:
    data = path.read_bytes()
    assert data[:4] == b"PIEH"
    width, height = np.frombuffer(data, np.int32, 2, 4)
    flow = np.frombuffer(data, np.float32, width * height * 2, 12).reshape(height, width, 2)
    return np.where(np.abs(flow) > 1e6, 0.0, flow)  # unknown pixels


def test_a_shift_is_found_with_the_right_sign() -> None:
    texture = cv2.GaussianBlur(
        np.random.default_rng(0).integers(0, 255, (96, 96, 3), np.uint8), (0, 0), 2
    )
    texture = cv2.normalize(texture, None, 0, 255, cv2.NORM_MINMAX)
    moved = np.roll(texture, (2, 3), axis=(0, 1))  # 2 px down, 3 px to the right
    flow = dis_flow(np.stack([texture, moved])[None])
    assert flow.shape == (1, 1, 96, 96, 2)
    np.testing.assert_allclose(np.median(flow[0, 0, 16:-16, 16:-16], axis=(0, 1)), [3, 2], atol=0.3)


@pytest.mark.data
@pytest.mark.parametrize(
    ("pair", "truth", "at_most"),
    [
        ("middlebury_rubberwhale/rubberwhale{}.png", "middlebury_rubberwhale/flow10.flo", 0.5),
        ("flyingchairs/0img{}.ppm", "flyingchairs/0flow.flo", 0.7),
        ("flyingchairs/1img{}.ppm", "flyingchairs/1flow.flo", 0.4),
    ],
)
def test_end_point_error_on_ground_truth(real_data, pair, truth, at_most) -> None:
    """In shares of the error that no flow at all would make, at full size."""
    folder = real_data / "flow_gt"
    names = [pair.format(n) for n in ((1, 2) if "whale" in pair else (0, 1))]
    frames = np.stack([cv2.imread(str(folder / name))[..., ::-1] for name in names])
    flow, true = dis_flow(frames[None])[0, 0], read_flo(folder / truth)
    error = np.linalg.norm(flow - true, axis=-1).mean() / np.linalg.norm(true, axis=-1).mean()
    assert error < at_most


def test_threads_change_nothing() -> None:
    clips = np.random.default_rng(1).integers(0, 255, (4, 3, 32, 32, 3), np.uint8)
    with ThreadPoolExecutor(2) as pool:
        np.testing.assert_array_equal(dis_flow(clips, pool=pool), dis_flow(clips))


@pytest.mark.parametrize("small", [16, 24, 32, 40])
def test_flow_does_not_depend_on_what_came_before(small: int) -> None:
    """OpenCV's searcher changes its own settings when it meets a small picture."""
    random = np.random.default_rng(2)
    clip = random.integers(0, 255, (1, 3, 48, 48, 3), np.uint8)
    before = dis_flow(clip)
    tiny = random.integers(0, 255, (1, 3, small, small, 3), np.uint8)
    once, again = dis_flow(tiny), dis_flow(tiny)
    np.testing.assert_array_equal(once, again)
    np.testing.assert_array_equal(dis_flow(clip), before)
