"""Encoded bytes to ClipBatch: DALI's graphs (``graphs``) for pictures, sound and flow, on a CPU or a GPU.

Pictures that are stored one by one enter one by one: N x F of them are decoded, cropped, resized and flipped side
by side, then regrouped to N clips. Films enter whole, with the places of the frames wanted. Sound is decoded
once, and the aligned and the misaligned window are cut out of it. Flow is computed after crop, resize and
flip, so it follows them exactly: on a GPU by its flow engine, on a CPU by ``engine.data.flow``.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.core.prefetch import ahead
from engine.core.recipe import Audio, Clip
from engine.data.dali import films_graph, flow_graph, frames_graph, sound_graph, to_torch
from engine.data.flow import dis_flow
from engine.data.media.codecs import JPEG, VP9, VP9_MP4
from engine.data.plan import ClipPlan, square_boxes
from engine.data.shards.index import ClipIndex, EncodedClip


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


GPU_LEAST = 128
"""Smallest side in pixels of the VP9 pictures that a GPU decodes."""


class InputPipeline:
    """Reads, decodes and cuts the clips that plans ask for.

    ``flow`` and ``sound`` say whether batches carry them. One instance serves one thread at a time. A clip that a
    decoder refuses, and whose bytes are not those that were written, is replaced as ``ClipIndex.read`` does it.
    Films that a GPU can't decode are decoded by the CPU where that can, and ``warn`` is told once. Raises ValueError
    for clips that nothing here decodes.
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
        warn: Callable[[str], object] = warnings.warn,
    ) -> None:
        self.index, self.clip, self.audio, self.device = index, clip, audio, device
        self.num_frames = num_frames
        self.samples = round(num_frames * clip.frame_stride / index.fps * audio.sample_rate)
        self._batch_size, self._threads, self._wants_sound = batch_size, threads, sound
        self._warn = warn
        self._films_on_host = self._choose_host()
        self._build_decoders()
        gpu_flow = flow and device.type == "cuda"
        self._flow = (
            flow_graph(batch_size=batch_size, device=device, threads=threads) if gpu_flow else None
        )
        self._pool = ThreadPoolExecutor(threads, "flow") if flow and not gpu_flow else None

    def _choose_host(self) -> bool:
        """Whether films are decoded by the CPU from the start; raises ValueError where nothing decodes them."""
        if self.device.type == "cuda":
            small = np.minimum(self.index.width, self.index.height) < GPU_LEAST
            return bool(small.any()) and self.index.codecs <= {JPEG, VP9, VP9_MP4}
        lost = sorted({codec.name for codec in self.index.codecs if not codec.on_cpu})
        if lost:
            raise ValueError(
                f"{', '.join(map(str, self.index.folders))}: clips are stored as {' and '.join(lost)}, "
                "which only a GPU decodes here: ingest the videos with --codec jpeg or vp9, or run on a GPU"
            )
        return True

    def _build_decoders(self) -> None:
        """Graphs of pictures and sound, anew: an error ends a graph."""
        size, device, threads = self.clip.size, self.device, self._threads
        n = self._batch_size
        self._frames: Any = None
        self._films: Any = None
        self._sound: Any = None
        if JPEG in self.index.codecs:
            self._frames = frames_graph(
                size=size, batch_size=n * self.num_frames, device=device, threads=threads
            )
        if self.index.codecs - {JPEG}:
            self._films = films_graph(
                size=size, batch_size=n, device=device, threads=threads, on_host=self._films_on_host
            )
        if self._wants_sound:
            self._sound = sound_graph(
                samples=self.samples, batch_size=n, device=device, threads=threads
            )

    def load(self, plan: ClipPlan) -> ClipBatch:
        """Decode one planned batch; blocks until it is there."""
        return self._with_flow(self._decoded(plan, self._read(plan)))

    def _with_flow(self, batch: ClipBatch) -> ClipBatch:
        return replace(batch, flow=self._compute_flow(batch.rgb))

    def _decoded(self, plan: ClipPlan, encoded: list[EncodedClip]) -> ClipBatch:
        """The batch without its flow."""
        try:
            rgb, waves = self._decode(plan, encoded)
        except RuntimeError as error:
            encoded = self._after_error(plan, encoded, error)
            rgb, waves = self._decode(plan, encoded)
        has_audio = self._heard(encoded)
        return ClipBatch(
            rgb=rgb,
            flow=None,
            wave=waves[0],
            wave_shifted=waves[1],
            has_audio=self._to_device(has_audio),
            has_shift=self._to_device(has_audio & (plan.shift != 0.0)),
            order=self._to_device(plan.order),
            clip=plan.clip,
        )

    def _read(self, plan: ClipPlan, *, check: bool = False) -> list[EncodedClip]:
        pairs = zip(plan.clip, plan.frames, strict=True)
        return [self.index.read(int(clip), frames.tolist(), check=check) for clip, frames in pairs]

    def _decode(
        self, plan: ClipPlan, encoded: list[EncodedClip]
    ) -> tuple[Tensor, tuple[Tensor, Tensor] | tuple[None, None]]:
        frames = self._start_frames(plan, encoded)
        if self._sound is None:
            return frames(), (None, None)
        sound = self._start_sound(plan, encoded, self._heard(encoded))
        return frames(), sound()

    def _heard(self, encoded: list[EncodedClip]) -> NDArray[np.bool_]:
        return np.array([e.sound is not None for e in encoded]) & self._wants_sound

    def _after_error(
        self, plan: ClipPlan, encoded: list[EncodedClip], error: RuntimeError
    ) -> list[EncodedClip]:
        """What to decode instead, by new graphs; raises ``error`` where neither data nor decoder is to blame.

        It depends on this batch alone, so that a resumed run takes the same clips.
        """
        checked = self._read(plan, check=True)
        if [clip.clip for clip in checked] == [clip.clip for clip in encoded]:
            if self._films_on_host or not self.index.codecs & {VP9, VP9_MP4}:
                raise error
            if not self.index.codecs <= {JPEG, VP9, VP9_MP4}:
                raise error
            self._films_on_host = True
            self._warn(f"the GPU can't decode VP9 ({_last_line(error)}): the CPU does")
        self._build_decoders()
        return checked

    def batches(self, plans: Iterable[ClipPlan], *, depth: int = 2) -> Iterator[ClipBatch]:
        """Decode plans, ``depth`` batches ahead of the reader.

        While one batch's flow is computed, the next one's pictures are decoded, and the one's after it read.
        """
        read = ahead(((plan, self._read(plan)) for plan in plans), depth=1, name="input-read")
        decoded = ahead((self._decoded(*each) for each in read), depth=1, name="input-decode")
        whole = (self._with_flow(batch) for batch in decoded)
        return ahead(whole, depth=depth, name="input-flow")

    def _start_frames(self, plan: ClipPlan, encoded: list[EncodedClip]) -> Callable[[], Tensor]:
        """Begin to decode; the call that is returned waits for the frames, uint8 (N, F, H, W, 3)."""
        read = [clip.clip for clip in encoded]  # not always plan.clip: one may stand in for another
        boxes = square_boxes(plan, self.index.width[read], self.index.height[read])
        flip = plan.flip.astype(np.int32)
        films = np.array([clip.film is not None for clip in encoded])
        at_work: list[tuple[NDArray[np.int64], Any]] = []
        for which, feed in (
            (np.flatnonzero(~films), self._feed_pictures),
            (np.flatnonzero(films), self._feed_films),
        ):
            if len(which):
                graph = feed([encoded[i] for i in which], boxes[which], flip[which])
                graph.schedule_run()
                at_work.append((which, graph))

        def collect() -> Tensor:
            shape = (self.num_frames, self.clip.size, self.clip.size, 3)
            found = [(which, _outputs(graph)[0].reshape(-1, *shape)) for which, graph in at_work]
            if len(found) == 1:
                return found[0][1]
            rgb = torch.empty((len(encoded), *shape), dtype=torch.uint8, device=self.device)
            for which, pictures in found:
                rgb[torch.from_numpy(which).to(self.device)] = pictures
            return rgb

        return collect

    def _feed_pictures(
        self, clips: list[EncodedClip], boxes: NDArray[np.float32], flip: NDArray[np.int32]
    ) -> Any:
        per_frame = np.repeat(np.arange(len(clips)), self.num_frames)
        self._frames.feed_input("jpeg", [frame for clip in clips for frame in clip.frames])
        return _feed_boxes(self._frames, boxes[per_frame], flip[per_frame])

    def _feed_films(
        self, clips: list[EncodedClip], boxes: NDArray[np.float32], flip: NDArray[np.int32]
    ) -> Any:
        self._films.feed_input("film", [clip.film for clip in clips])
        self._films.feed_input("places", [clip.places for clip in clips])
        return _feed_boxes(self._films, boxes, flip)

    def _compute_flow(self, rgb: Tensor) -> Tensor | None:
        if self._flow is not None:
            self._flow.feed_input("clip", rgb.contiguous())
            (flow,) = self._flow.run()
            return to_torch(flow)
        if self._pool is not None:
            return torch.from_numpy(dis_flow(rgb.numpy(), preset=self.clip.flow, pool=self._pool))
        return None

    def _start_sound(
        self, plan: ClipPlan, encoded: list[EncodedClip], has_audio: NDArray[np.bool_]
    ) -> Callable[[], tuple[Tensor, Tensor]]:
        """Begin to decode; the call that is returned waits for ``wave`` and ``wave_shifted``."""
        assert self._sound is not None
        which = np.flatnonzero(has_audio)
        if len(which):
            rate = self.audio.sample_rate
            starts = np.round(plan.sound_start[which] * rate).astype(np.int32)
            shifted = np.round((plan.sound_start + plan.shift)[which] * rate).astype(np.int32)
            self._sound.feed_input("flac", [encoded[i].sound for i in which])
            self._sound.feed_input("start", starts[:, None])
            self._sound.feed_input("shifted", shifted[:, None])
            self._sound.schedule_run()

        def collect() -> tuple[Tensor, Tensor]:
            waves = torch.zeros(2, len(plan), self.samples, device=self.device)
            if len(which):
                places = torch.from_numpy(which).to(self.device)
                for row, cut in zip(waves, _outputs(self._sound), strict=True):
                    row[places] = cut
            return waves[0], waves[1]

        return collect

    def _to_device(self, array: NDArray[Any]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device, non_blocking=True)


def _feed_boxes(graph: Any, boxes: NDArray[np.float32], flip: NDArray[np.int32]) -> Any:
    """Feed the boxes, (n, 4) as left, top, right and bottom, and flips of n pictures or films; gives the graph."""
    graph.feed_input("start", np.ascontiguousarray(boxes[:, [1, 0]]))
    graph.feed_input("end", np.ascontiguousarray(boxes[:, [3, 2]]))
    graph.feed_input("flip", flip)
    return graph


def _outputs(graph: Any) -> list[Tensor]:
    """What a graph that was scheduled gives, once it is done."""
    try:
        return [to_torch(output) for output in graph.share_outputs()]
    finally:
        graph.release_outputs()


def _last_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines or [type(error).__name__])[0]
