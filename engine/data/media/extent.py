"""How long a film is: what its head says, and where its data end, which in partial downloads is earlier.

Times are in seconds by the file's clock.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import av

from engine.data.media.container import Clock, open_media, packets, stamp_of, stream_of
from engine.data.media.part import MediaFile, head_of

LONGEST = 6 * 3600.0
"""Declared durations above this many seconds are checked against the packets."""
SLACK = 0.5
"""Seconds by which a film's data may end before the time that its head says."""
NEAR = 30.0
"""Seconds of film that are read one packet after the other to find the end of the data."""
RAW = ("rawvideo", "r210", "v210", "v410")
"""Codecs whose pictures may be all zeros."""
AVI_HEAD = slice(32, 52)
"""Bytes of an AVI's main header from its frame interval to its number of frames."""


def length_of(
    path: MediaFile, container: Any, video: Any, start: float, clock: Clock
) -> tuple[float, float]:
    """Seconds of video that are there, and those that the head promises where the data end before, else 0.

    ``container`` is the file opened, of which ``video``'s first frame, at ``start``, may have been decoded.
    """
    duration = float(video.duration * video.time_base) if video.duration else 0.0
    declared = bool(duration)
    if not declared and container.duration:
        duration = container.duration / 1e6
    if 0.0 < duration <= LONGEST:
        # Where only the container tells a duration, some count it from zero and some from the start.
        end = duration + (start if declared else min(start, 0.0))
        there = _end_of_data(container, [video], start, end, clock)
        if there < end - SLACK:
            sound = (
                [] if declared else container.streams.audio
            )  # the container's may be the sound's
            whole = bool(sound) and _end_of_data(container, sound, start, end, clock) == end
            return max(0.0, there - start), 0.0 if whole else duration
    if not 0.0 < duration <= LONGEST or (not declared and abs(start) > 0.1):
        return scan_duration(path, clock), 0.0
    promised = _avi_promise(path) if container.format.name == "avi" else 0.0
    if promised:  # FFmpeg's own duration is an estimate from the bytes that are there
        there = scan_duration(path, clock)
        return there, promised if there < promised - SLACK else 0.0
    return duration, 0.0


def _end_of_data(
    container: Any, streams: Sequence[Any], start: float, end: float, clock: Clock
) -> float:
    """Find where the streams' data end, looking near ``end`` first, then by halving the time that is left."""
    low = _last(container, streams, end - SLACK, end - SLACK, clock, least=start)
    if low >= end - SLACK:
        return end
    high = end
    while high - low > NEAR:
        middle = (low + high) / 2
        last = _last(container, streams, middle, middle, clock, least=low)
        low, high = (last, high) if last >= middle else (last, middle)
    return _last(container, streams, low, end, clock, least=low)


def _last(
    container: Any,
    streams: Sequence[Any],
    sought: float,
    until: float,
    clock: Clock,
    *,
    least: float,
) -> float:
    """Find where the last whole packet ends, reading from ``sought`` on up to ``until``; ``least`` where none is."""
    last = least
    step = 1.0 / float(getattr(streams[0], "average_rate", None) or 25)
    with suppress(av.FFmpegError):
        container.seek(int(sought / streams[0].time_base), stream=streams[0], any_frame=True)
        for packet in packets(container, streams, clock):
            stamp = stamp_of(packet)
            if stamp is not None and _is_whole(packet):
                last = max(last, stamp + (float((packet.duration or 0) * packet.time_base) or step))
            if last >= until or (stamp is not None and stamp > last + 2 * NEAR):
                break
    return last


def _is_whole(packet: Any) -> bool:
    """Whether a packet is neither cut off nor a picture of zeros alone, as in files that await their download."""
    if not packet.size or packet.is_corrupt:
        return False
    context = packet.stream.codec_context
    may_be_zeros = packet.stream.type != "video" or (context is not None and context.name in RAW)
    return may_be_zeros or any(bytes(packet))


def scan_duration(path: MediaFile, clock: Clock) -> float:
    """Seconds of video by the packets' time stamps, for files that declare nothing believable."""
    first, last, total = None, 0.0, 0.0
    with open_media(path) as container, suppress(av.FFmpegError):
        for packet in packets(container, [stream_of(container, "video")], clock):
            length = float((packet.duration or 0) * packet.time_base) if packet.size else 0.0
            begin, total = stamp_of(packet), total + length
            if begin is not None:
                first = begin if first is None else min(first, begin)
                last = max(last, begin + length)
    return total if first is None else max(0.0, last - first)


def _avi_promise(path: MediaFile) -> float:
    """Seconds that an AVI's main header says where the file is shorter than its first bytes say, else 0."""
    head, size = head_of(path, AVI_HEAD.stop)
    whole = int.from_bytes(head[4:8], "little") + 8 <= size
    interval, frames = (int.from_bytes(head[AVI_HEAD][i : i + 4], "little") for i in (0, 16))
    return 0.0 if whole else interval * frames / 1e6
