"""A process that cuts one file after another, so that what kills or stops it ends no test run.

Reads paths, one a line, and answers each with a line of JSON: clips (frames and note of each), reasons of what was
rejected, seconds taken, and the peak of its memory in MiB.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from engine.data.cut import Settings, Source, Task, run_task

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
    clips, rejects = [], []
    task: Task | None = Task(Source(path, path.name, None), SETTINGS)
    while task is not None:
        outcome = run_task(task)
        clips += [(len(clip.frames), clip.note, clip.sound is not None) for clip in outcome.clips]
        rejects += [reject.reason for reject in outcome.rejects]
        task = outcome.then
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
