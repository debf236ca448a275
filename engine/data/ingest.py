"""Raw video files to training shards: every file ends as clips or as a rejection with its reason.

The result is the same, byte for byte, whatever the number of worker processes: where clips are cut depends on
the seed and a file's relative path alone, and clips are written in the order of the sorted files.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path

from engine.data.cut import CHUNK, Outcome, Reject, Settings, Source, Task, find_videos, run_task
from engine.data.media import SAMPLE_RATE
from engine.data.shard_writer import ShardWriter, storing, write_atomic
from engine.data.shards import ClipIndex, is_shards, read_dataset


class IngestError(ValueError):
    """Nothing could be ingested; one line says why."""


@dataclass(frozen=True)
class IngestReport:
    """What became of the files."""

    sources: int
    """Files tried."""
    clips: int
    seconds: float
    """Length of all clips."""
    rejects: list[Reject]


def ingest(
    videos: Sequence[Path],
    out: Path,
    *,
    fps: float = 25.0,
    short_side: int = 128,
    clip_seconds: float = 10.0,
    clips_per_video: int | None = None,
    min_seconds: float = 1.0,
    quality: int = 85,
    seed: int = 0,
    workers: int | None = None,
    progress: Callable[[int, int, int], None] | None = None,
) -> IngestReport:
    """Cut clips from video files and write them as the shards ``out``.

    A file no longer than ``clip_seconds`` is one clip; from a longer one ``clips_per_video`` clips are cut at
    random starts (None: one per started minute). Clips shorter than ``min_seconds`` are rejected. ``workers``
    counts processes (None: one a core; 1: this one). ``progress`` is called with the files done, all files
    and the clips so far. Shards in ``out`` that the same files and settings gave are kept as they are; others
    are replaced once the new ones are whole. Raises IngestError where no file gives a clip, ValueError for
    settings out of range and an ``out`` that holds other files, and StorageError where writing fails.
    """
    out = Path(out)
    settings = Settings(
        fps=fps,
        short_side=short_side,
        clip_seconds=clip_seconds,
        clips_per_video=clips_per_video,
        min_seconds=min_seconds,
        quality=quality,
        seed=seed,
    )
    if workers is not None and workers < 1:
        raise ValueError(f"workers must be at least 1, not {workers}")
    _check_out(out)
    sources = find_videos(videos)
    if not sources:
        raise IngestError(f"no videos found in {', '.join(map(str, videos))}")
    fingerprint = _fingerprint(sources, settings)
    kept = _kept(out, fingerprint)
    if kept is not None:
        return kept
    return _replace(out, sources, settings, fingerprint, workers=workers, progress=progress)


def _replace(
    out: Path,
    sources: Sequence[Source],
    settings: Settings,
    fingerprint: str,
    *,
    workers: int | None,
    progress: Callable[[int, int, int], None] | None,
) -> IngestReport:
    """Write shards beside ``out`` and, when they are whole, put them in its place."""
    temp = out.with_name(f".{out.name}.ingest")
    shutil.rmtree(temp, ignore_errors=True)  # what a killed run left
    try:
        report = _write(sources, temp, settings, fingerprint, workers=workers, progress=progress)
        if not report.clips:
            listed = out.with_name(f"{out.name}.rejects.jsonl")
            os.replace(temp / "rejects.jsonl", listed)
            first = report.rejects[0]
            raise IngestError(
                f"all {len(sources)} files were rejected; the first, {first.path}: {first.reason}"
                f" (all reasons: {listed})"
            )
        _swap(temp, out)
    finally:
        shutil.rmtree(temp, ignore_errors=True)
    return report


def _check_out(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file: give a folder for the shards")
    if not out.is_dir():
        return
    ours = {"dataset.json", "index.bin", "rejects.jsonl"}
    for file in sorted(out.iterdir()):
        shard = file.name.startswith("shard-") and file.suffix == ".tar"
        if file.name not in ours and not shard:
            raise ValueError(
                f"{out} holds {file.name}, which is no shard: give another folder for the shards"
            )


def _fingerprint(sources: Sequence[Source], settings: Settings) -> str:
    files = []
    for source in sources:
        path = os.path.abspath(source.path)
        try:
            stat = source.path.stat()
            state = [stat.st_size, stat.st_mtime_ns]
        except OSError:  # a link to nowhere: reading it will tell
            state = [0, 0]
        files.append([path, source.relative, source.label, *state])
    whole = json.dumps([asdict(settings), SAMPLE_RATE, files])
    return hashlib.sha256(whole.encode()).hexdigest()


def _kept(out: Path, fingerprint: str) -> IngestReport | None:
    """The report of the shards in ``out``, where the same files and settings gave them and they are whole."""
    if not is_shards(out):
        return None
    try:
        facts = read_dataset(out)
        if facts.get("fingerprint") != fingerprint:
            return None
        index = ClipIndex([out])
        lines = (out / "rejects.jsonl").read_text().splitlines()
    except (ValueError, OSError):
        return None
    rejects = [Reject(**json.loads(line)) for line in lines]
    return IngestReport(facts["sources"], len(index), float(facts["seconds"]), rejects)


def _write(
    sources: Sequence[Source],
    folder: Path,
    settings: Settings,
    fingerprint: str,
    *,
    workers: int | None,
    progress: Callable[[int, int, int], None] | None,
) -> IngestReport:
    writer = ShardWriter(
        folder, fps=settings.fps, short_side=settings.short_side, sample_rate=SAMPLE_RATE
    )
    rejects: list[Reject] = []
    done = clips = frames = 0
    tasks = [Task(source, settings) for source in sources]
    workers = min(workers or len(os.sched_getaffinity(0)), len(tasks))
    try:
        for outcome in _in_process(tasks) if workers == 1 else _in_pool(tasks, workers):
            for clip in outcome.clips:
                writer.add(clip)
                clips, frames = clips + 1, frames + len(clip.frames)
            rejects += outcome.rejects
            if outcome.then is None:
                done += 1
                if progress is not None:
                    progress(done, len(sources), clips)
    except BaseException:
        writer.discard()
        raise
    lines = [{k: v for k, v in asdict(r).items() if v is not None} for r in rejects]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    write_atomic(folder / "rejects.jsonl", text.encode())
    seconds = frames / settings.fps
    writer.close(
        sources=len(sources), seconds=seconds, settings=asdict(settings), fingerprint=fingerprint
    )
    return IngestReport(len(sources), clips, seconds, rejects)


def _swap(temp: Path, out: Path) -> None:
    """Put finished shards in the place of ``out``; a crash in between leaves one of the two whole."""
    old = out.with_name(f".{out.name}.old")
    with storing(out):
        shutil.rmtree(old, ignore_errors=True)
        if out.exists():
            os.replace(out, old)
        os.replace(temp, out)
        shutil.rmtree(old, ignore_errors=True)


def _in_process(tasks: Sequence[Task]) -> Iterator[Outcome]:
    for task in tasks:
        then: Task | None = task
        while then is not None:
            outcome = run_task(then)
            then = outcome.then
            yield outcome


@dataclass
class _Job:
    task: Task
    future: Future[Outcome] | None = None


def _in_pool(tasks: Sequence[Task], workers: int) -> Iterator[Outcome]:
    """Outcomes in the order of the tasks; a task that kills its worker process is rejected.

    A dead worker fails every task then in flight, and nothing tells which one killed it: those are run again,
    one at a time, so that only the guilty one is rejected.
    """
    waiting, running = deque(tasks), deque[_Job]()
    suspects = 0  # tasks to be run one at a time
    pool = _pool(workers)
    try:
        while waiting or running:
            try:
                while waiting and len(running) < (1 if suspects else 2 * workers):
                    running.append(_Job(waiting.popleft()))
                for job in running:
                    job.future = job.future or pool.submit(run_task, job.task)
                assert running[0].future is not None
                outcome = running[0].future.result()
            except BrokenProcessPool:
                pool.shutdown(wait=False)
                pool = _pool(workers)
                if not suspects or running[0].future is None:
                    suspects = len(running)
                    waiting.extendleft(job.task for job in reversed(running))
                    running.clear()
                    continue
                outcome = _crashed(running[0].task)
            job = running.popleft()
            yield outcome
            if outcome.then is not None:
                running.appendleft(_Job(outcome.then))
            else:
                suspects = max(0, suspects - 1)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _pool(workers: int) -> ProcessPoolExecutor:
    pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))
    try:
        pool.submit(os.getpid).result()
    except BrokenProcessPool as error:
        raise IngestError(
            "worker processes can't start: call ingest below `if __name__ == '__main__':`, or with workers=1"
        ) from error
    return pool


def _crashed(task: Task) -> Outcome:
    where = f"clip {task.first + 1} or one of the {CHUNK - 1} after it" if task.taken else None
    reject = Reject(task.source.relative, "decoding it crashed the worker process", where)
    return Outcome(rejects=[*task.lost, reject])
