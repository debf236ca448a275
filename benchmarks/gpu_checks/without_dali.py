"""In the place of ``engine.data.dali`` on a machine without DALI: the same graphs by OpenCV and PyAV, on the CPU.

Everything after decoding can then be checked on the GPU. What decoding itself does there is not.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import av
import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

STAND_IN = True


@dataclass
class Held:
    """A batch as ``to_torch`` takes it."""

    tensor: Tensor


class Graph:
    """Computes its outputs when it is asked for them."""

    def __init__(
        self, compute: Callable[[dict[str, Any]], list[NDArray[Any]]], device: torch.device
    ) -> None:
        self.compute, self.device = compute, device
        self.inputs: dict[str, Any] = {}

    def feed_input(self, name: str, data: Any) -> None:
        """Take an input."""
        self.inputs[name] = data

    def schedule_run(self) -> None:
        """Take what was fed as the next run's."""
        self.scheduled, self.inputs = self.inputs, {}

    def share_outputs(self) -> tuple[Held, ...]:
        """The outputs, on the device."""
        outputs = self.compute(self.scheduled)
        return tuple(Held(torch.from_numpy(out).to(self.device)) for out in outputs)

    def release_outputs(self) -> None:
        """Nothing: each run has memory of its own."""

    def run(self) -> tuple[Held, ...]:
        """Both at once."""
        self.schedule_run()
        return self.share_outputs()


def _cut(picture: NDArray[np.uint8], start: Any, end: Any, flip: Any, size: int) -> Any:
    """The box between relative corners (top, left) and (bottom, right), at ``size``, mirrored."""
    h, w, _ = picture.shape
    scale = np.array([w / 1.0, h / 1.0])
    left_top, right_bottom = np.array(start)[::-1] * scale, np.array(end)[::-1] * scale
    step = (right_bottom - left_top) / size
    matrix = np.array(
        [
            [step[0], 0.0, left_top[0] + step[0] / 2 - 0.5],
            [0.0, step[1], left_top[1] + step[1] / 2 - 0.5],
        ]
    )
    how = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    if step.max() > 1.0:  # linear alone would skip pixels
        picture = cv2.blur(picture, tuple(max(round(x), 1) for x in step))
    out = cv2.warpAffine(picture, matrix, (size, size), flags=how, borderMode=cv2.BORDER_REPLICATE)
    return out[:, ::-1] if flip else out


def _mapped(threads: int, one: Callable[..., Any], *columns: Any) -> NDArray[Any]:
    with ThreadPoolExecutor(threads) as pool:
        return np.stack(list(pool.map(one, *columns)))


def frames_graph(
    *, size: int, batch_size: int, device: torch.device, threads: int, on_host: bool
) -> Graph:
    """JPEG bytes -> uint8 (size, size, 3) each."""

    def one(jpeg: Any, start: Any, end: Any, flip: Any) -> Any:
        picture = cv2.imdecode(jpeg, cv2.IMREAD_COLOR)
        if picture is None:
            raise RuntimeError("a picture can't be decoded")
        return _cut(cv2.cvtColor(picture, cv2.COLOR_BGR2RGB), start, end, flip, size)

    names = ("jpeg", "start", "end", "flip")
    return Graph(lambda given: [_mapped(threads, one, *(given[n] for n in names))], device)


def films_graph(
    *, size: int, batch_size: int, device: torch.device, threads: int, on_host: bool
) -> Graph:
    """Films and places of frames in them -> uint8 (F, size, size, 3) each."""

    def one(film: Any, places: Any, start: Any, end: Any, flip: Any) -> Any:
        with av.open(io.BytesIO(film.tobytes())) as file:
            shown = [frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]
        return np.stack([_cut(shown[int(place)], start, end, flip, size) for place in places])

    names = ("film", "places", "start", "end", "flip")
    return Graph(lambda given: [_mapped(threads, one, *(given[n] for n in names))], device)


def sound_graph(*, samples: int, batch_size: int, device: torch.device, threads: int) -> Graph:
    """FLAC bytes -> two windows of float32 (samples,); zeros outside the clip."""

    def one(flac: Any, start: Any, shifted: Any) -> Any:
        with av.open(io.BytesIO(flac.tobytes())) as file:
            parts = [frame.to_ndarray().reshape(-1) for frame in file.decode(audio=0)]
        wave = np.concatenate(parts).astype(np.float32) / 32768
        padded = np.zeros((2, samples), np.float32)
        for out, place in zip(padded, (int(start[0]), int(shifted[0])), strict=True):
            cut = wave[max(place, 0) : max(place + samples, 0)]
            out[max(-place, 0) :][: len(cut)] = cut
        return padded

    def both(given: dict[str, Any]) -> list[NDArray[Any]]:
        waves = _mapped(threads, one, given["flac"], given["start"], given["shifted"])
        return [np.ascontiguousarray(waves[:, i]) for i in (0, 1)]

    return Graph(both, device)


def flow_graph(*, batch_size: int, device: torch.device, threads: int) -> Graph:
    """None: raises RuntimeError, whereupon the CPU computes flow."""
    raise RuntimeError("DALI, which drives the flow engine, is not installed")


def to_torch(batch: Held) -> Tensor:
    """The batch."""
    return batch.tensor
