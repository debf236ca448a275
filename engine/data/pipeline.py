"""Encoded bytes to ClipBatch: DALI's graphs (``dali``) for pictures, sound and flow, on a CPU or a GPU.

Pictures that are stored one by one enter one by one: N x F of them are decoded, cropped, resized and flipped side
by side, then regrouped to N clips. Films enter whole, with the places of their frames to decode. Sound is decoded
once, and the aligned and the misaligned window are cut out of it. Flow is computed after crop, resize and
flip, so it follows them exactly: on a GPU by its flow engine, on a CPU by ``engine.data.flow``.

On a GPU all of this runs on a stream of its own, beside training (``core.streams``): a batch crosses to its reader's
stream when it is handed over. What the GPU or its driver lacks, the CPU does (``hardware``).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.core.prefetch import prefetch
from engine.core.recipe import Audio, Clip
from engine.core.streams import SideStream, cross, finish, upload
from engine.data.dali import films_graph, flow_graph, frames_graph, sound_graph, to_torch
from engine.data.flow import dis_flow
from engine.data.hardware import film_fault, first_line, flow_fault, picture_fault
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
    What this GPU can't do is found out here, ``warn`` is called with what the CPU does instead, and why. Raises
    ValueError for clips that nothing here decodes.
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
        self._side = SideStream(device)
        self._pictures_on_host = self._choose_pictures_host()
        self._films_on_host = self._choose_films_host()
        self._build_decoders()
        self._flow: Any = None
        self._pool: ThreadPoolExecutor | None = None
        if flow and self._has_flow_engine():
            self._flow = flow_graph(batch_size=batch_size, device=device, threads=threads)
        elif flow:
            self._pool = ThreadPoolExecutor(threads, "flow")

    def _choose_pictures_host(self) -> bool:
        """Decide whether the CPU decodes pictures."""
        if self.device.type != "cuda" or JPEG not in self.index.codecs:
            return True
        if fault := picture_fault(self.device):
            self._warn(f"the CPU decodes JPEG pictures, because the GPU can't: {fault}")
        return bool(fault)

    def _choose_films_host(self) -> bool:
        """Decide whether the CPU decodes films; raises ValueError where nothing decodes them."""
        films = self.index.codecs - {JPEG}
        lost = " and ".join(sorted(codec.name for codec in films if not codec.on_cpu))
        if self.device.type != "cuda":
            fault = "this runs on the CPU"
        else:
            fault = film_fault() if films else ""
            small = np.minimum(self.index.width, self.index.height) < GPU_LEAST
            if not lost and small.any():
                return True
            if fault and not lost:
                self._warn(f"the CPU decodes VP9, because the GPU can't: {fault}")
        if fault and lost:
            raise ValueError(
                f"{', '.join(map(str, self.index.folders))}: clips are stored as {lost}, which only a GPU decodes, "
                f"and {fault}; or ingest the videos with --codec jpeg or vp9"
            )
        return bool(fault)

    def _has_flow_engine(self) -> bool:
        if self.device.type != "cuda":
            return False
        if fault := flow_fault(self.device, self.clip.size):
            self._warn(f"the CPU computes flow (OpenCV's DIS), because the GPU can't: {fault}")
        return not fault

    def _build_decoders(self) -> None:
        """Build the graphs of pictures and sound, also anew: an error ends a graph."""
        n, size = self._batch_size, self.clip.size
        where: dict[str, Any] = {"device": self.device, "threads": self._threads}
        self._frames = self._films = self._sound = None
        if JPEG in self.index.codecs:
            on_host = self._pictures_on_host
            many = n * self.num_frames
            self._frames = frames_graph(size=size, batch_size=many, on_host=on_host, **where)
        if self.index.codecs - {JPEG}:
            on_host = self._films_on_host
            self._films = films_graph(size=size, batch_size=n, on_host=on_host, **where)
        if self._wants_sound:
            self._sound = sound_graph(samples=self.samples, batch_size=n, **where)

    def load(self, plan: ClipPlan) -> ClipBatch:
        """Decode one planned batch; blocks until it is there."""
        return cross(*self._with_flow(self._decoded(plan, self._read(plan))))

    def _with_flow(self, batch: ClipBatch) -> tuple[ClipBatch, torch.cuda.Event | None]:
        """The whole batch, and the event after which it is there."""
        with self._side.work():
            batch = replace(batch, flow=self._compute_flow(batch.rgb))
            return batch, self._side.mark()

    def _decoded(self, plan: ClipPlan, encoded: list[EncodedClip]) -> ClipBatch:
        """Decode a batch without its flow."""
        with self._side.work():
            return self._decoded_here(plan, encoded)

    def _decoded_here(self, plan: ClipPlan, encoded: list[EncodedClip]) -> ClipBatch:
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
        """Reads what to decode instead, by new graphs; raises ``error`` where neither data nor decoder is to blame.

        It depends on this batch alone, so that a resumed run takes the same clips.
        """
        checked = self._read(plan, check=True)
        if [clip.clip for clip in checked] == [clip.clip for clip in encoded]:
            codecs, on_cpu = self.index.codecs, {JPEG, VP9, VP9_MP4}
            if self._films_on_host or codecs == {JPEG} or not codecs <= on_cpu:
                raise error
            self._films_on_host = True
            self._warn(f"the CPU decodes VP9, because the GPU can't: {first_line(error)}")
        self._build_decoders()
        return checked

    def batches(self, plans: Iterable[ClipPlan], *, depth: int = 2) -> Iterator[ClipBatch]:
        """Decode plans, ``depth`` batches ahead of the reader.

        While one batch's flow is computed, the next one's pictures are decoded, and the one's after it read.
        """
        read = prefetch(((plan, self._read(plan)) for plan in plans), depth=1, name="input-read")
        decoded = prefetch((self._decoded(*each) for each in read), depth=1, name="input-decode")
        whole = (self._with_flow(batch) for batch in decoded)
        with closing(prefetch(whole, depth=depth, name="input-flow")) as ready:
            for batch, event in ready:
                yield cross(batch, event)

    def _start_frames(self, plan: ClipPlan, encoded: list[EncodedClip]) -> Callable[[], Tensor]:
        """Begin to decode; the call that is returned waits for the frames, uint8 (N, F, H, W, 3)."""
        read = [clip.clip for clip in encoded]  # not always plan.clip: one may stand in for another
        boxes = square_boxes(plan, self.index.width[read], self.index.height[read])
        flip = plan.flip.astype(np.int32)
        is_film = np.array([clip.film is not None for clip in encoded])
        running: list[tuple[NDArray[np.int64], Any]] = []
        if len(which := np.flatnonzero(~is_film)):
            jpeg = [frame for i in which for frame in encoded[i].frames]
            each = np.repeat(which, self.num_frames)
            inputs = {"jpeg": jpeg, **_crop_inputs(boxes[each], flip[each])}
            running.append((which, _start(self._frames, inputs)))
        if len(which := np.flatnonzero(is_film)):
            films, places = zip(*((encoded[i].film, encoded[i].places) for i in which), strict=True)
            inputs = {"film": list(films), "places": list(places)}
            inputs |= _crop_inputs(boxes[which], flip[which])
            running.append((which, _start(self._films, inputs)))

        def collect() -> Tensor:
            shape = (self.num_frames, self.clip.size, self.clip.size, 3)
            parts = [
                (which, self._outputs(graph)[0].reshape(-1, *shape)) for which, graph in running
            ]
            if len(parts) == 1:
                return parts[0][1]
            rgb = torch.empty((len(encoded), *shape), dtype=torch.uint8, device=self.device)
            for which, pictures in parts:
                rgb[self._to_device(which)] = pictures
            return rgb

        return collect

    def _compute_flow(self, rgb: Tensor) -> Tensor | None:
        if self._flow is not None:
            (flow,) = self._outputs(_start(self._flow, {"clip": rgb.contiguous()}))
            return flow
        if self._pool is not None:
            frames = rgb.cpu().numpy()
            return self._to_device(dis_flow(frames, preset=self.clip.flow, pool=self._pool))
        return None

    def _start_sound(
        self, plan: ClipPlan, encoded: list[EncodedClip], has_audio: NDArray[np.bool_]
    ) -> Callable[[], tuple[Tensor, Tensor]]:
        """Begin to decode; the call that is returned waits for ``wave`` and ``wave_shifted``."""
        which = np.flatnonzero(has_audio)
        if len(which):
            times = {"start": plan.sound_start, "shifted": plan.sound_start + plan.shift}
            inputs: dict[str, Any] = {
                name: np.round(seconds[which] * self.audio.sample_rate).astype(np.int32)[:, None]
                for name, seconds in times.items()
            }
            _start(self._sound, inputs | {"flac": [encoded[i].sound for i in which]})

        def collect() -> tuple[Tensor, Tensor]:
            waves = torch.zeros(2, len(plan), self.samples, device=self.device)
            if len(which):
                places = self._to_device(which)
                for row, cut in zip(waves, self._outputs(self._sound), strict=True):
                    row[places] = cut
            return waves[0], waves[1]

        return collect

    def _outputs(self, graph: Any) -> list[Tensor]:
        """Wait for a graph that runs, and take over its outputs."""
        try:
            outputs = graph.share_outputs()
            taken = [to_torch(output) for output in outputs]
            finish(self.device)  # from here on DALI may write where these copies read
            return taken
        finally:
            graph.release_outputs()

    def _to_device(self, array: NDArray[Any]) -> Tensor:
        return upload(torch.from_numpy(np.ascontiguousarray(array)), self.device)


def _crop_inputs(boxes: NDArray[np.float32], flip: NDArray[np.int32]) -> dict[str, Any]:
    """A graph's inputs for boxes, (n, 4) as left, top, right and bottom, and flips of n pictures or films."""
    start, end = (np.ascontiguousarray(boxes[:, corner]) for corner in ([1, 0], [3, 2]))
    return {"start": start, "end": end, "flip": flip}


def _start(graph: Any, inputs: dict[str, Any]) -> Any:
    """Feed a graph and let it run; ``_outputs`` waits for it."""
    for name, data in inputs.items():
        graph.feed_input(name, data)
    graph.schedule_run()
    return graph
