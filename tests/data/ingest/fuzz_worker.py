"""A process that cuts one file after another, so that what kills or stops it ends no test run.

Reads paths, one a line, and answers each with a line of JSON: clips (frames and note of each), reasons of what was
rejected, seconds taken, and the peak of its memory in MiB.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from engine.data.ingest.cut import Settings, cut_source
from engine.data.ingest.sources import Source
from engine.data.shards.writer import NewClip

SETTINGS = Settings(
    fps=25,
    short_side=32,
    clip_seconds=1.0,
    clips_per_video=2,
    min_seconds=0.2,
    quality=85,
    seed=0,
)


def cut(path: Path) -> dict[str, object]:
    """All clips and rejects of a file."""
    began = time.monotonic()
    taken: list[NewClip] = []
    source = Source(str(path.parent), path.name, None)
    lost = cut_source(source, SETTINGS, taken.append, trying=lambda _: None)
    clips = [(clip.pictures.num_frames, clip.note, clip.sound is not None) for clip in taken]
    rejects = [reject.reason for reject in lost]
    seconds = time.monotonic() - began
    return {"clips": clips, "rejects": rejects, "seconds": seconds, "peak": peak_memory()}


def peak_memory() -> float:
    """MiB that this process has held at most; what getrusage tells counts the parent's from before exec."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def main() -> None:
    """Answer until the input ends."""
    for line in sys.stdin:
        print(json.dumps(cut(Path(line.rstrip("\n")))), flush=True)


if __name__ == "__main__":
    main()
