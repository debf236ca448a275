"""Encoded bytes to ClipBatch: one DALI graph for frames and one for sound and flow, on a CPU or a GPU.

Frames are stored one by one, so the first graph's samples are frames: N x F of them are decoded, cropped,
resized and flipped side by side, then regrouped to N clips. The second graph's samples are clips: it decodes
sound, cuts the aligned and the misaligned window out of it, and on a GPU computes optical flow. On a CPU flow
comes from ``engine.data.flow``. Flow is computed after crop, resize and flip, so it follows them exactly.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from nvidia.dali import fn, pipeline_def, types
from torch import Tensor

from engine.data.flow import dis_flow
from engine.data.plan import ClipPlan, square_boxes
from engine.data.shards import ClipIndex, EncodedClip
from engine.recipe import Audio, Clip


@dataclass(frozen=True)
class ClipBatch:
    """N decoded clips of T input and P future frames, on the pipeline's device."""

    rgb: Tensor
    """uint8 (N, T+P, H, W, 3)."""
    flow: Tensor | None
    """float32 (N, T+P-1, H, W, 2), pixels from each frame to the next; None where not asked for."""
    wave: Tensor | None
    """float32 (N, samples) in [-1, 1], over the T+P frames' time; zeros without sound; None where not asked for."""
    wave_shifted: Tensor | None
    """Like ``wave``, from another moment of the same clip."""
    has_audio: Tensor
    """bool (N,)."""
    has_shift: Tensor
    """bool (N,): the clip has sound, and room for a misaligned window."""
    order: Tensor
    """int64 (N, T): the shuffled copy's order of frames."""
    clip: NDArray[np.int64]
    """(N,) indices into the data set."""

    def __post_init__(self) -> None:
        n, f, h, w, _ = self.rgb.shape
        assert self.rgb.dtype == torch.uint8
        assert self.flow is None or self.flow.shape == (n, f - 1, h, w, 2)
        assert self.wave is None or self.wave.shape[0] == n

    def __len__(self) -> int:
        return len(self.clip)


def _frames_graph(*, size: int, batch_size: int, device: torch.device, threads: int) -> Any:
    """JPEG bytes -> uint8 (size, size, 3) each: decode, crop, resize, flip."""
    gpu = device.type == "cuda"

    @pipeline_def(
        batch_size=batch_size,
        num_threads=threads,
        device_id=(device.index or 0) if gpu else None,
        prefetch_queue_depth=1,
    )
    def graph() -> Any:
        jpeg = fn.external_source(name="jpeg", dtype=types.UINT8, ndim=1)
        start = fn.external_source(name="start", dtype=types.FLOAT, ndim=1)
        end = fn.external_source(name="end", dtype=types.FLOAT, ndim=1)
        flip = fn.external_source(name="flip", dtype=types.INT32, ndim=0)
        image = fn.decoders.image(jpeg, device="mixed" if gpu else "cpu", output_type=types.RGB)
        image = fn.resize(image, size=[size, size], roi_start=start, roi_end=end, roi_relative=True)
        return fn.flip(image, horizontal=flip)

    return graph()


def _sound_graph(*, samples: int, batch_size: int, device: torch.device, threads: int) -> Any:
    """FLAC bytes -> two windows of float32 (samples,): one decode, two cuts; zeros outside the clip."""
    gpu = device.type == "cuda"

    @pipeline_def(
        batch_size=batch_size,
        num_threads=threads,
        device_id=(device.index or 0) if gpu else None,
        prefetch_queue_depth=1,
    )
    def graph() -> Any:
        flac = fn.external_source(name="flac", dtype=types.UINT8, ndim=1)
        start = fn.external_source(name="start", dtype=types.INT32, ndim=1)
        shifted = fn.external_source(name="shifted", dtype=types.INT32, ndim=1)
        wave, _ = fn.decoders.audio(flac, dtype=types.FLOAT, downmix=True)
        cuts = [
            fn.slice(wave, start=s, shape=[samples], axes=[0], out_of_bounds_policy="pad")
            for s in (start, shifted)
        ]
        return tuple(cut.gpu() for cut in cuts) if gpu else tuple(cuts)

    return graph()


def _flow_graph(*, batch_size: int, device: torch.device, threads: int) -> Any:
    """uint8 clips (F, H, W, 3) on a GPU -> float32 (F-1, H, W, 2) by the flow engine."""

    @pipeline_def(
        batch_size=batch_size,
        num_threads=threads,
        device_id=device.index or 0,
        prefetch_queue_depth=1,
    )
    def graph() -> Any:
        clip = fn.external_source(
            name="clip", device="gpu", dtype=types.UINT8, layout="FHWC", ndim=4
        )
        return fn.optical_flow(clip, output_grid=1)

    return graph()


class InputPipeline:
    """Reads, decodes and cuts the clips that plans ask for.

    ``flow`` and ``sound`` say whether batches carry them. One instance serves one thread at a time.
    """

    def __init__(
        self,
        index: ClipIndex,
        clip: Clip,
        *,
        audio: Audio,
        device: torch.device,
        batch_size: int,
        num_frames: int,
        threads: int = 2,
        flow: bool = True,
        sound: bool = True,
    ) -> None:
        self.index, self.clip, self.audio, self.device = index, clip, audio, device
        self.num_frames = num_frames
        self.samples = round(num_frames * clip.frame_stride / index.fps * audio.sample_rate)
        self._sizes: dict[str, Any] = {
            "batch_size": batch_size,
            "device": device,
            "threads": threads,
        }
        self._with_flow, self._with_sound = flow, sound
        gpu_flow = flow and device.type == "cuda"
        self._pool = ThreadPoolExecutor(threads, "flow") if flow and not gpu_flow else None
        self._build()

    def _build(self) -> None:
        """Make the graphs; one that has failed is of no more use."""
        sizes = self._sizes
        frames = {**sizes, "batch_size": sizes["batch_size"] * self.num_frames}
        self._frames = _frames_graph(size=self.clip.size, **frames)
        gpu_flow = self._with_flow and self._pool is None
        self._flow = _flow_graph(**sizes) if gpu_flow else None
        self._sound = _sound_graph(samples=self.samples, **sizes) if self._with_sound else None

    def load(self, plan: ClipPlan) -> ClipBatch:
        """Decode one planned batch; blocks until it is there."""
        try:
            return self._load(plan, check=False)
        except (
            RuntimeError
        ):  # a damaged clip, perhaps: look at every byte, and decode what is intact
            self._build()
            return self._load(plan, check=True)

    def _load(self, plan: ClipPlan, *, check: bool) -> ClipBatch:
        wanted = zip(plan.clip, plan.frames, strict=True)
        encoded = [self.index.read(int(c), f.tolist(), check=check) for c, f in wanted]
        rgb = self._decode_frames(plan, encoded)
        flow = self._compute_flow(rgb)
        has_audio = np.array([e.sound is not None for e in encoded]) & (self._sound is not None)
        waves = (
            self._decode_sound(plan, encoded, has_audio)
            if self._sound is not None
            else (None, None)
        )
        return ClipBatch(
            rgb=rgb,
            flow=flow,
            wave=waves[0],
            wave_shifted=waves[1],
            has_audio=self._to_device(has_audio),
            has_shift=self._to_device(has_audio & (plan.shift != 0.0)),
            order=self._to_device(plan.order),
            clip=plan.clip,
        )

    def batches(self, plans: Iterable[ClipPlan], *, depth: int = 2) -> Iterator[ClipBatch]:
        """Decode plans in a thread of their own, ``depth`` batches ahead of the reader."""
        ready: queue.Queue[ClipBatch | BaseException | None] = queue.Queue(maxsize=depth)
        stop = threading.Event()

        def put(item: ClipBatch | BaseException | None) -> bool:
            while not stop.is_set():
                try:
                    ready.put(item, timeout=0.1)
                    return True
                except queue.Full:
                    continue
            return False

        def work() -> None:
            try:
                for plan in plans:
                    if not put(self.load(plan)):
                        return
                put(None)
            except BaseException as error:
                put(error)

        thread = threading.Thread(target=work, name="input", daemon=True)
        thread.start()
        try:
            while (item := ready.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            stop.set()
            thread.join()

    def _decode_frames(self, plan: ClipPlan, encoded: list[EncodedClip]) -> Tensor:
        n, f = len(plan), self.num_frames
        read = [clip.clip for clip in encoded]  # not always plan.clip: one may stand in for another
        boxes = square_boxes(plan, self.index.width[read], self.index.height[read])
        per_frame = np.repeat(np.arange(n), f)
        start, end = boxes[:, [1, 0]][per_frame], boxes[:, [3, 2]][per_frame]
        self._frames.feed_input("jpeg", [frame for clip in encoded for frame in clip.frames])
        self._frames.feed_input("start", list(start))
        self._frames.feed_input("end", list(end))
        self._frames.feed_input("flip", list(plan.flip.astype(np.int32)[per_frame]))
        (images,) = self._frames.run()
        size = self.clip.size
        return _to_torch(images).reshape(n, f, size, size, 3)

    def _compute_flow(self, rgb: Tensor) -> Tensor | None:
        if self._flow is not None:
            self._flow.feed_input("clip", rgb.contiguous())
            (flow,) = self._flow.run()
            return _to_torch(flow)
        if self._pool is not None:
            return torch.from_numpy(dis_flow(rgb.numpy(), pool=self._pool))
        return None

    def _decode_sound(
        self, plan: ClipPlan, encoded: list[EncodedClip], has_audio: NDArray[np.bool_]
    ) -> tuple[Tensor, Tensor]:
        assert self._sound is not None
        waves = torch.zeros(2, len(plan), self.samples, device=self.device)
        (which,) = np.nonzero(has_audio)
        if len(which):
            rate = self.audio.sample_rate
            starts = np.round(plan.sound_start[which] * rate).astype(np.int32)
            shifted = np.round((plan.sound_start + plan.shift)[which] * rate).astype(np.int32)
            self._sound.feed_input("flac", [encoded[i].sound for i in which])
            self._sound.feed_input("start", list(starts[:, None]))
            self._sound.feed_input("shifted", list(shifted[:, None]))
            for row, cut in zip(waves, self._sound.run(), strict=True):
                row[torch.from_numpy(which).to(self.device)] = _to_torch(cut)
        return waves[0], waves[1]

    def _to_device(self, array: NDArray[Any]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device, non_blocking=True)


def _to_torch(batch: Any) -> Tensor:
    """Take a uniform DALI batch over to torch; copied, because DALI reuses its buffer in the next run."""
    return torch.utils.dlpack.from_dlpack(batch.as_tensor()).clone()
