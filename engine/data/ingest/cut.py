"""Cuts one source into clips: where they start, and what becomes of each.

Where clips are cut depends on the seed and a file's relative path alone.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from engine.core.files import StorageError
from engine.data.ingest.sources import Reject, Source, by_cause
from engine.data.media.codecs import JPEG, Pictures
from engine.data.media.decode import MediaError, MediaFacts, Window, decode_window, probe
from engine.data.media.encode import encode_flac, encode_jpeg
from engine.data.media.film import CopiedClip, copy_clip, encode_h264, encode_vp9
from engine.data.media.frames import Frames
from engine.data.shards.writer import NewClip

COPY = "copy"
CODEC_NAMES = ("jpeg", "vp9", "h264", COPY)
"""What pictures can be stored as: frame by frame, as a short film, or as the source has them."""
CRASHED = "decoding it crashed the worker process"
TRIM_SLACK = 1.5
"""Seconds by which a file may be longer than a stretch and still be taken for that stretch, trimmed."""


@dataclass(frozen=True)
class Settings:
    """Settings that decide the bytes of a clip."""

    fps: float = 25.0
    short_side: int = 128
    """Pixels."""
    clip_seconds: float = 10.0
    clips_per_video: int | None = None
    """Of a source that is longer than a clip, at random starts; None: one a started minute."""
    min_seconds: float = 1.0
    """Shorter clips are rejected."""
    quality: int = 85
    """Of JPEG pictures, 1 to 100."""
    seed: int = 0
    codec: str = "jpeg"
    """One of CODEC_NAMES."""
    every: float | None = None
    """Seconds from one clip's start to the next one's, over all of a source; None: random starts."""

    def __post_init__(self) -> None:
        for name in ("fps", "clip_seconds", *(["every"] if self.every is not None else [])):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be above 0, not {getattr(self, name)}")
        if self.clips_per_video is not None and self.clips_per_video < 1:
            raise ValueError(f"clips_per_video must be at least 1, not {self.clips_per_video}")
        if not 0 <= self.min_seconds <= self.clip_seconds:
            raise ValueError(f"min_seconds must be 0 to clip_seconds, not {self.min_seconds}")
        if self.short_side < 2 or self.short_side % 2:
            raise ValueError(f"short_side must be an even number of pixels, not {self.short_side}")
        if not 1 <= self.quality <= 100:
            raise ValueError(f"quality must be 1 to 100, not {self.quality}")
        if self.codec not in CODEC_NAMES:
            raise ValueError(f"codec must be one of {', '.join(CODEC_NAMES)}, not {self.codec}")

    def identity(self) -> dict[str, Any]:
        """The values that identify a data set; ``every`` is left out where it is not used, as older sets lack it."""
        return {k: v for k, v in asdict(self).items() if (k, v) != ("every", None)}


def cut_source(
    source: Source,
    settings: Settings,
    keep: Callable[[NewClip], None],
    *,
    trying: Callable[[int], object],
    skip: Collection[int] = (),
) -> list[Reject]:
    """Cut a source's clips and hand each to ``keep``; returns what could not be used, with reasons.

    ``trying`` is called with a clip's number before it is cut, where there are several; clips numbered in ``skip``
    are rejected unread, since they kill their process. Whatever is wrong with the file becomes a reject. Raises
    StorageError as ``keep`` does, and OSError where the folder of the videos itself is gone.
    """
    lost: list[Reject] = []
    kept = 0
    try:
        for clip in _clips(source, settings, lost, trying=trying, skip=skip):
            keep(clip)
            kept += 1
    except MediaError as error:
        lost.append(_reject(source, str(error)))
    except StorageError:
        raise
    except Exception as error:  # a decoder's own fault must end this file alone
        lost.append(_reject(source, f"unexpected {type(error).__name__}: {error}"))
    if lost and not os.path.isdir(source.folder):
        gone = f"{source.folder} can't be reached any more"
        raise OSError(f"{gone}: run the same command again later")
    lost = by_cause(lost)
    return lost if kept or not lost else [_reject(source, _whole_reason(lost))]


def _whole_reason(lost: Sequence[Reject]) -> str:
    """Why nothing of a source could be used: the first reason, with that it is cut off, where it is."""
    first = lost[0].reason
    if lost[0].where is not None or len(lost) == 1:
        return first
    second = lost[1].reason
    return second if first in second else f"{first}; {second}"


def _clips(
    source: Source,
    settings: Settings,
    lost: list[Reject],
    *,
    trying: Callable[[int], object],
    skip: Collection[int],
) -> Iterator[NewClip]:
    """Cut a source's clips one after the other, and add to ``lost`` what can't be cut."""
    facts = probe(source.media)
    begin, duration, longest = stretch_of(source, facts, least=settings.min_seconds)
    if facts.cut and begin + longest > facts.duration:
        lost.append(replace(_reject(source, facts.cut), partial=True))
    inner = replace(settings, clip_seconds=min(settings.clip_seconds, longest))
    starts = plan_starts(duration, inner, source.relative, begin=begin)
    head = [begin] if starts[0] > begin else []  # of a broken film the likeliest intact part
    kept = False
    for number, start in enumerate([*starts, *head]):
        if number == len(starts) and kept:
            return
        if number in skip:
            lost.append(_reject(source, CRASHED, start))
            continue
        if 1 < len(starts) > number:
            trying(number)
        left = max(begin + longest - start, settings.min_seconds)
        clip = replace(inner, clip_seconds=min(inner.clip_seconds, left))
        try:
            cut = _cut(source, facts, start, clip)
        except MediaError as error:
            lost.append(_reject(source, str(error), start))
        else:
            kept = True
            yield cut


def stretch_of(source: Source, facts: MediaFacts, *, least: float) -> tuple[float, float, float]:
    """Seconds at which the source's stretch begins, its length in the file, and the longest that a clip may be.

    All of the file where no stretch is named. Raises MediaError for a stretch beyond the file's end, and for one
    shorter than ``least`` seconds.
    """
    begin, end = source.start or 0.0, source.end
    whole = facts.promised or facts.duration
    if end is not None and source.may_be_trimmed and whole <= end - begin + TRIM_SLACK:
        begin, end = 0.0, None
    if facts.cut and begin and begin >= facts.duration:
        raise MediaError(f"{facts.cut}, and the stretch starts at {begin:.2f} s")
    if begin and begin >= facts.duration:
        raise MediaError(
            f"it is {facts.duration:.2f} s long and the stretch starts at {begin:.2f} s"
        )
    if end is None:
        return begin, facts.duration - begin, math.inf
    if end - begin < least:
        raise MediaError(f"only {end - begin:.2f} s of it are asked for, less than {least:g} s")
    return begin, min(facts.duration, end) - begin, end - begin


def _reject(source: Source, reason: str, start: float | None = None) -> Reject:
    where = source.stretch if start is None else f"{start:.3f} s"
    return Reject(source.relative, reason, where, source.listed, partial=start is not None)


def plan_starts(
    duration: float, settings: Settings, relative: str, *, begin: float = 0.0
) -> list[float]:
    """Starts of a file's clips, in seconds: rising, distinct, spread at random over ``duration`` from ``begin`` on.

    With ``settings.every`` they are that far apart, up to the last one that is ``min_seconds`` long. A pure function
    of the settings (``seed`` among them), the file's relative path, ``begin`` and ``duration``.
    """
    if settings.every is not None:
        more = math.floor((duration - settings.min_seconds) / settings.every + 1e-6)
        return [begin + number * settings.every for number in range(max(0, more) + 1)]
    spare = duration - settings.clip_seconds
    if spare * settings.fps < 1.0:  # less than a frame more than one clip
        return [begin]
    count = settings.clips_per_video or math.ceil(duration / 60.0)
    name = f"{settings.seed}/{relative}" + (f"@{begin:.3f}" if begin else "")
    key = hashlib.sha256(name.encode(errors="surrogateescape"))
    random = np.random.default_rng(int.from_bytes(key.digest()[:8], "little"))
    drawn = (np.arange(count) + random.random(count)) / count * spare
    return [begin + float(ms) / 1000 for ms in np.unique(np.floor(drawn * 1000))]


def _cut(source: Source, facts: MediaFacts, start: float, settings: Settings) -> NewClip:
    stretch: dict[str, Any] = {
        "start": start,
        "seconds": settings.clip_seconds,
        "fps": settings.fps,
    }
    cut: CopiedClip | Window
    if settings.codec == COPY:
        cut = copy_clip(source.media, facts, **stretch)
        num_frames, width, height = cut.pictures.num_frames, facts.width, facts.height
    else:
        cut = decode_window(source.media, facts, short_side=settings.short_side, **stretch)
        num_frames, height, width = cut.frames.shape
        height = height * 2 // 3
    if num_frames < round(settings.min_seconds * settings.fps):
        seconds, why = num_frames / settings.fps, f" ({cut.note})" if cut.note else ""
        raise MediaError(
            f"only {seconds:.2f} s of video, less than {settings.min_seconds:g} s{why}"
        )
    return NewClip(
        pictures=_encoded(cut.frames, settings) if isinstance(cut, Window) else cut.pictures,
        width=width,
        height=height,
        source=source.relative,
        start=start,
        sound=None if cut.sound is None else encode_flac(cut.sound),
        label=source.label,
        note=cut.note,
        splits=source.splits,
    )


def _encoded(frames: Frames, settings: Settings) -> Pictures:
    if settings.codec == "vp9":
        return encode_vp9(frames, fps=settings.fps)
    if settings.codec == "h264":
        return encode_h264(frames, fps=settings.fps)
    return Pictures(JPEG, tuple(encode_jpeg(frames, quality=settings.quality)))
