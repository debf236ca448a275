"""From a media file to its frames: opening, packets within limits, frames in the order of time.

Nothing here trusts a file. Every loop over packets ends: by time, by the number of faults, and by how much is
decoded before the first frame that is needed. The limits count in film seconds and packets, so that they fall
alike on every machine; the clock's is far beyond what an honest file needs.
"""

from __future__ import annotations

import faulthandler
import math
import multiprocessing
import os
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import count, takewhile
from typing import IO, Any

import av
import av.filter

from engine.data.media import webp
from engine.data.media.part import MediaFile, Part, head_of, opened, url_of

ATTACHED_PICTURE = 0x400
TEXT_FORMATS = frozenset({"adf", "bin", "idf", "tty", "xbin"})
"""FFmpeg's readers of text-mode art, which take plain text files by their suffix."""
BLOCK = 4096
"""Bytes of an unreadable file that are looked at."""
MAX_PIXELS = 8192 * 4320
"""Largest picture."""
HELD = {"h264": 8, "hevc": 7, "libdav1d": 5, "av1": 6, "vp9": 5}
"""Pictures that decoders were seen to hold at once, ours included; HELD_ELSE by others."""
HELD_ELSE = 4
MAX_HELD = 336 * 2**20
"""Bytes that a decoder's pictures may take: with what else a worker needs, 400 MiB."""
TIME_LIMIT = 120.0
"""Seconds that one call may read and decode."""
GRACE = 30.0
"""Seconds beyond a limit after which a worker process counts as stuck."""
MAX_LEAD = 120.0
"""Seconds of film that are decoded to reach a moment from the key frame before it."""
MAX_FAULTS = 1000
"""Packets that may fail in a row before a stream counts as undecodable."""
MAX_STRAY = 1000
"""Frames that may stand before one already shown before the stream counts as out of order."""


class MediaError(Exception):
    """A media file that can't be used; the message says why in words for the file's owner."""


class Clock:
    """Limits how long one call may take.

    As a context it also ends a worker process that is stuck inside a decoder, where no exception reaches, GRACE
    seconds after the time is up; whoever runs the workers sees one that died of this file.
    """

    def __init__(self, limit: float = TIME_LIMIT) -> None:
        self.limit, self.end = limit, time.monotonic() + limit

    def check(self) -> None:
        """Raise MediaError where the time is up."""
        if time.monotonic() > self.end:
            raise MediaError(f"reading it takes more than {self.limit:g} s")

    def __enter__(self) -> Clock:
        self.nowhere: IO[str] | None = None
        if multiprocessing.parent_process() is not None:
            self.nowhere = open(os.devnull, "w")
            faulthandler.dump_traceback_later(self.limit + GRACE, exit=True, file=self.nowhere)
        return self

    def __exit__(self, *_: object) -> None:
        if self.nowhere is not None:
            faulthandler.cancel_dump_traceback_later()
            self.nowhere.close()


def open_media(path: MediaFile, *, limit: float = TIME_LIMIT) -> Any:
    """Open a file for reading; raises MediaError. ``limit`` bounds each single wait for data, in seconds."""
    try:
        container = av.open(
            _webp_film(path) or url_of(path),
            metadata_errors="replace",
            # a play list must not reach into the network
            options={"protocol_whitelist": "subfile,file" if isinstance(path, Part) else "file"},
            timeout=limit,
        )
    except av.FFmpegError as error:
        raise MediaError(_why_unreadable(path, error)) from error
    if container.format.name in TEXT_FORMATS:
        container.close()
        raise MediaError("it is text, not video")
    return container


def _webp_film(path: MediaFile) -> IO[bytes] | None:
    """The pictures of an animated WebP as a film; None for other files."""
    try:
        head, size = head_of(path, webp.HEAD)
        return webp.as_film(head_of(path, size)[0]) if webp.is_animated(head) else None
    except OSError:  # opening it will tell
        return None
    except ValueError as error:
        raise MediaError(str(error)) from error


def _why_unreadable(path: MediaFile, error: Exception) -> str:
    """Why a file can't be opened, as far as its first bytes and its MP4 boxes tell."""
    with suppress(OSError):
        head, _ = head_of(path, BLOCK)
        if not any(head):
            return "it is empty" if not head else "it begins with zeros: was its download begun?"
        if head.lstrip()[:14].lower().startswith((b"<!doctype html", b"<html")):
            return "it is a web page, not a video: its download failed"
        if head[4:8] == b"ftyp" and not _has_index(path):
            return "it is cut off: its index (moov), which stands at its end, is missing"
    return f"can't be opened as a video: {reason_of(error)}"


def _has_index(path: MediaFile) -> bool:
    """Whether a moov box is among an MP4's outer boxes."""
    at = 0
    with opened(path) as (file, begin, size):
        while at + 8 <= size:
            file.seek(begin + at)
            head = file.read(16)
            if head[4:8] == b"moov":
                return True
            length = int.from_bytes(head[:4], "big")
            length = int.from_bytes(head[8:16], "big") if length == 1 else length
            if length < 8:  # up to the file's end, or no box
                return False
            at += length
    return False


def reason_of(error: Exception) -> str:
    """A decoder's complaint in a line."""
    log = getattr(error, "log", None)
    detail = f" ({str(log[2]).strip().rstrip('.')})" if log else ""
    return f"{getattr(error, 'strerror', None) or error}{detail}"


def stream_of(container: Any, kind: str) -> Any:
    """The best video stream, or the sound that belongs to it; raises MediaError where there is none."""
    video = container.streams.best("video")
    if video is None or int(video.disposition) & ATTACHED_PICTURE:
        raise MediaError(
            "it holds no video, only sound" if container.streams.audio else "it holds no video"
        )
    stream = video if kind == "video" else container.streams.best(kind, related=video)
    if stream is None or stream.codec_context is None:
        raise MediaError(f"its {kind} is in a format that can't be decoded")
    context = stream.codec_context
    context.thread_count = 1  # processes share the cores; errors surface at the same frame
    if kind == "video":
        if context.width * context.height > MAX_PIXELS:
            raise MediaError(
                f"its picture of {context.width}x{context.height} is too large: "
                f"at most {MAX_PIXELS} pixels"
            )
        if held_bytes(context) > MAX_HELD:
            raise MediaError(
                f"decoding its picture of {context.width}x{context.height} takes more than "
                f"{MAX_HELD >> 20} MiB: make it smaller first"
            )
        context.options = {"max_pixels": str(MAX_PIXELS)}  # also where the stream changes its size
    return stream


def held_bytes(context: Any) -> int:
    """Estimate the bytes that a decoder's pictures take."""
    bits = context.format.padded_bits_per_pixel if context.format else 12
    picture = context.width * context.height * bits // 8
    return int(picture * HELD.get(context.name, HELD_ELSE))


def packets(container: Any, streams: Sequence[Any], clock: Clock) -> Iterator[Any]:
    """The streams' packets, the closing empty ones included, for as long as the clock allows."""
    source = container.demux(*streams)
    numbers = {stream.index for stream in streams}
    while True:
        try:
            packet = next(source, None)
        except IndexError:  # PyAV's own, at the end of a file in which streams turned up late
            return
        clock.check()
        if packet is None:
            return
        if packet.stream.index in numbers:
            yield packet


def stamp_of(packet: Any) -> float | None:
    """A packet's time in seconds."""
    stamp = packet.dts if packet.pts is None else packet.pts
    return None if stamp is None else float(stamp * packet.time_base)


def seek(container: Any, stream: Any, moment: float) -> bool:
    """Go to the key frame at or before ``moment``, in seconds; returns whether that worked."""
    try:
        container.seek(int(moment / stream.time_base), stream=stream)
    except av.FFmpegError:
        return False
    return True


def timed_frames(
    container: Any, stream: Any, problems: list[str], clock: Clock, *, skip: int = 0
) -> Iterator[tuple[float, Any]]:
    """Frames with rising time stamps in seconds, up to the end or the first damage after an intact frame.

    Where a file ends within a packet, frames before it that the decoder still holds count as intact. Damage before
    any frame (a stream cut into midway) is skipped, and so are the first ``skip`` packets. AVI stores no presentation
    times: with B-frames its packets' own are out of order, so there the decoding times count, which are in order.
    """
    use_dts = container.format.name == "avi"
    step = 1.0 / float(stream.average_rate or 25)
    last: float | None = None
    faults = stray = 0
    source = packets(container, [stream], clock)
    ended = False
    while faults < MAX_FAULTS and not ended:
        try:
            packet = next(source, None)
            if packet is None:
                return
            if skip > 0:
                skip -= 1
                continue
            frames = packet.decode()
            if any(frame.is_corrupt for frame in frames):
                raise av.InvalidDataError(0, "damaged frame")
        except (av.FFmpegError, UnicodeDecodeError) as error:
            faults += 1
            problems.append(reason_of(error))
            if isinstance(error, av.ExitError):
                return
            if last is None:
                continue
            frames, ended = _held_at_the_end(source, stream), True
        for frame in frames:
            moment = _time_of(frame, last, step, use_dts=use_dts)
            if last is not None and moment <= last:
                stray += 1
                if stray > MAX_STRAY:
                    problems.append("its time stamps jump back")
                    return
                continue
            if last is None:
                problems.clear()
            last, stray = moment, 0
            yield moment, frame


def _held_at_the_end(source: Iterator[Any], stream: Any) -> list[Any]:
    """Intact frames that the decoder holds where no packet is left; none where damage lies part-way."""
    with suppress(av.FFmpegError):
        packet = next(source, None)
        if packet is not None and packet.size:
            return []
    closing = av.Packet()
    closing.stream, closing.time_base = stream, stream.time_base
    frames: list[Any] = []
    with suppress(av.FFmpegError):
        frames = closing.decode()
    return list(takewhile(lambda frame: not frame.is_corrupt, frames))


def _time_of(frame: Any, last: float | None, step: float, *, use_dts: bool) -> float:
    stamp = frame.pts if not use_dts or frame.dts is None else frame.dts
    stamp = frame.dts if stamp is None else stamp
    if stamp is None or (use_dts and frame.dts is None and last is not None):
        # no stamp, or frames that AVI's decoder gives up at the end of the file
        return 0.0 if last is None else last + step
    return float(stamp * frame.time_base)


def frames_from(
    path: MediaFile, moment: float, start: float, problems: list[str], clock: Clock
) -> Iterator[tuple[float, Any]]:
    """Timed frames from the key frame before ``moment`` on, or from further back where seeking overshoots.

    Both times are in seconds by the file's clock; ``start`` is the first frame's. Where no seeking helps, the
    packets before the last key frame are read and left undecoded. Raises MediaError where more than MAX_LEAD
    seconds of film lie between that key frame and ``moment``.
    """
    for preroll in (0.0, 2.0, 15.0, math.inf):  # seconds; the last one means from the file's start
        with open_media(path) as container:
            stream = stream_of(container, "video")
            skip = 0
            sought = moment - preroll > start
            if sought:
                if not seek(container, stream, moment - preroll):
                    continue
            elif moment - start > MAX_LEAD:
                skip = _packets_before(path, moment, clock)
            problems.clear()
            frames = timed_frames(container, stream, problems, clock, skip=skip)
            first = next(frames, None)
            if sought and (first is None or first[0] > moment + 1e-6):
                continue
            if first is not None:
                if moment - first[0] > MAX_LEAD:
                    raise MediaError(
                        f"its key frame before {moment - start:.2f} s lies {moment - first[0]:.0f} s back, "
                        f"more than {MAX_LEAD:g} s"
                    )
                yield first
                first = None  # no picture is kept longer than it is shown: they can be large
                yield from frames
            return


def _packets_before(path: MediaFile, moment: float, clock: Clock) -> int:
    """Count the packets before the last key frame at or before ``moment``."""
    last = 0
    with open_media(path) as container, suppress(av.FFmpegError):
        for i, packet in enumerate(packets(container, [stream_of(container, "video")], clock)):
            stamp = stamp_of(packet)
            if stamp is not None and packet.is_keyframe and stamp <= moment:
                last = i
    return last


def progressive(frames: Iterable[tuple[float, Any]]) -> Iterator[tuple[float, Any]]:
    """The same frames at the same times; those marked as interlaced are de-interlaced by bwdif.

    Frames before the first interlaced one pass as they are. A picture stands for its first field's time.
    """
    graph: Any = None
    shape: tuple[Any, ...] = ()
    times: deque[float] = deque()
    numbers = count()
    for moment, frame in frames:
        now = (frame.width, frame.height, frame.format.name)
        if graph is not None and now != shape:
            yield from _filtered(graph, None, times)
            graph = None
        if graph is None and frame.interlaced_frame:
            graph, shape = _deinterlacer(frame), now
        if graph is None:
            yield moment, frame
            continue
        frame.pts = next(numbers)  # the filter doubles time stamps; ours wait in line instead
        times.append(moment)
        yield from _filtered(graph, frame, times)
    if graph is not None:
        yield from _filtered(graph, None, times)


def _deinterlacer(frame: Any) -> Any:
    graph = av.filter.Graph()
    graph.threads = 1
    source = graph.add(
        "buffer",
        video_size=f"{frame.width}x{frame.height}",
        pix_fmt=frame.format.name,
        time_base="1/25",
        colorspace=str(int(frame.colorspace)),
        range=str(int(frame.color_range)),
    )
    graph.link_nodes(
        source, graph.add("bwdif", mode="send_frame", deint="interlaced"), graph.add("buffersink")
    ).configure()
    return graph


def _filtered(graph: Any, frame: Any, times: deque[float]) -> Iterator[tuple[float, Any]]:
    """Push a frame, or None at the end, and pull what the filter has ready."""
    graph.push(frame)
    with suppress(av.BlockingIOError, av.EOFError):
        while times:
            frame = graph.pull()
            yield times.popleft(), frame
