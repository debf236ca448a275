"""Raw video files to training shards: every file ends as clips or as a rejection with its reason.

The result is the same, byte for byte, whatever the number of worker processes: where clips are cut depends on
the seed and a file's relative path alone, and clips are written in the order of the sorted files.
"""

from __future__ import annotations

import hashlib
import json
import math
import multiprocessing
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np

from engine.data.media import (
    SAMPLE_RATE,
    MediaError,
    MediaFacts,
    decode_window,
    encode_flac,
    encode_jpeg,
    probe,
)
from engine.data.shards import (
    ClipIndex,
    NewClip,
    ShardWriter,
    is_shards,
    read_dataset,
    storing,
    write_atomic,
)

OTHER_SUFFIXES = frozenset(
    ".aac .aif .aiff .ass .bib .bmp .bz2 .c .cfg .ckpt .conf .cpp .css .csv .db .doc .docx .exe .exif .flac .flo .gif "
    ".gz .h .h5 .hdf5 .heic .htm .html .ini .ipynb .jpeg .jpg .js .json .jsonl .log .m3u .m4a .mat .md .md5 .mid .mp2 "
    ".mp3 .nfo .npy .npz .odt .oga .ogg .opus .parquet .part .pdf .pickle .pkl .png .ppm .pgm .pt .pth .py .pyc .rar "
    ".rst .rtf .safetensors .sha256 .sh .sql .sqlite .srt .ssa .sub .svg .tar .tex .tfrecord .tgz .tif .tiff .toml "
    ".torrent .tsv .txt .url .vtt .wav .webp .wma .xls .xlsx .xml .xz .yaml .yml .zip .zst".split()
)
"""Files that are no videos by their names, and are passed over; all others are tried."""
CHUNK = 8
"""Clips that a worker hands back at once: bounds the memory that a long film takes."""


class IngestError(ValueError):
    """Nothing could be ingested; one line says why."""


@dataclass(frozen=True)
class Source:
    """A file that may be a video."""

    path: Path
    relative: str
    """Path from the folder that was given, with ``/``; the file's name where the file itself was given."""
    label: str | None
    """Name of its folder, where that is a sub-folder of the folder that was given."""


@dataclass(frozen=True)
class Reject:
    """A file, or a stretch of one, that gave no clip."""

    path: str
    reason: str
    where: str | None = None
    """Which stretch, where the rest of the file gave clips."""


@dataclass(frozen=True)
class IngestReport:
    """What became of the files."""

    sources: int
    """Files tried."""
    clips: int
    seconds: float
    """Length of all clips."""
    rejects: list[Reject]


@dataclass(frozen=True)
class Settings:
    """What decides the bytes of a clip."""

    fps: float
    short_side: int
    clip_seconds: float
    clips_per_video: int | None
    min_seconds: float
    quality: int
    seed: int

    def __post_init__(self) -> None:
        for name in ("fps", "clip_seconds"):
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


@dataclass(frozen=True)
class Task:
    """Clips ``first`` to ``first + CHUNK`` of one file."""

    source: Source
    settings: Settings
    first: int = 0
    taken: int = 0
    """Clips of this file that earlier tasks gave."""
    lost: tuple[Reject, ...] = ()
    """Stretches of this file that earlier tasks could not use."""


@dataclass
class Outcome:
    """What a task gave, and the task that goes on with the file, if any."""

    clips: list[NewClip] = field(default_factory=list)
    rejects: list[Reject] = field(default_factory=list)
    then: Task | None = None


def find_videos(paths: Sequence[Path]) -> list[Source]:
    """List the files that may be videos: those given, and all below the folders given, sorted by path.

    In folders, hidden files and files that are no videos by their suffix are passed over, and files of
    unknown suffix are taken: reading them tells. Raises ValueError for a path that doesn't exist.
    """
    found: dict[Path, Source] = {}
    for path in map(Path, paths):
        if path.is_dir():
            for file in _files_below(path):
                relative = file.relative_to(path)
                label = relative.parent.name or None
                found.setdefault(file, Source(file, relative.as_posix(), label))
        elif path.exists():
            found.setdefault(path, Source(path, path.name, None))
        else:
            raise ValueError(f"{path} does not exist: give files or folders of videos")
    return sorted(found.values(), key=lambda source: os.fsencode(source.path))


def _files_below(folder: Path) -> Iterator[Path]:
    def refuse(error: OSError) -> None:
        raise ValueError(f"can't list {error.filename}: {error.strerror}")

    seen: set[str] = set()  # links may lead in circles
    for parent, folders, files in os.walk(folder, followlinks=True, onerror=refuse):
        real = os.path.realpath(parent)
        folders[:] = [] if real in seen else [f for f in folders if not f.startswith(".")]
        for name in [] if real in seen else files:
            file = Path(parent) / name
            known = file.suffix.lower() in OTHER_SUFFIXES
            if not name.startswith(".") and not known and (file.is_file() or file.is_symlink()):
                yield file
        seen.add(real)


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


def run_task(task: Task) -> Outcome:
    """Cut a file's next clips; whatever goes wrong becomes rejects, and nothing is raised."""
    source, settings = task.source, task.settings
    clips: list[NewClip] = []
    lost = list(task.lost)
    starts = [0.0]
    try:
        facts = probe(source.path)
        starts = plan_starts(facts.duration, settings, source.relative)
        for start in starts[task.first : task.first + CHUNK]:
            _try_cut(source, facts, start, settings, clips, lost)
        upto, taken = task.first + CHUNK, task.taken + len(clips)
        if upto < len(starts):
            return Outcome(clips, then=replace(task, first=upto, taken=taken, lost=tuple(lost)))
        if not taken and starts[0] > 0.0:  # the head of a broken film is its likeliest intact part
            _try_cut(source, facts, 0.0, settings, clips, lost)
    except MediaError as error:
        lost.append(Reject(source.relative, str(error)))
    except Exception as error:  # a decoder's own fault must end this file alone
        lost.append(Reject(source.relative, f"unexpected {type(error).__name__}: {error}"))
    if not task.taken and not clips:
        lost = [Reject(source.relative, lost[0].reason)]
    return Outcome(clips, lost)


def plan_starts(duration: float, settings: Settings, relative: str) -> list[float]:
    """Where clips of a file start, in seconds: rising, distinct, spread over the file at random.

    A pure function of the settings (``seed`` among them) and the file's relative path.
    """
    spare = duration - settings.clip_seconds
    if spare * settings.fps < 1.0:  # less than a frame more than one clip
        return [0.0]
    count = settings.clips_per_video or math.ceil(duration / 60.0)
    key = hashlib.sha256(f"{settings.seed}/{relative}".encode(errors="surrogateescape"))
    random = np.random.default_rng(int.from_bytes(key.digest()[:8], "little"))
    drawn = (np.arange(count) + random.random(count)) / count * spare
    return [float(ms) / 1000 for ms in np.unique(np.floor(drawn * 1000))]


def _try_cut(
    source: Source,
    facts: MediaFacts,
    start: float,
    settings: Settings,
    clips: list[NewClip],
    lost: list[Reject],
) -> None:
    try:
        clips.append(_cut(source, facts, start, settings))
    except MediaError as error:
        lost.append(Reject(source.relative, str(error), f"{start:.3f} s"))


def _cut(source: Source, facts: MediaFacts, start: float, settings: Settings) -> NewClip:
    window = decode_window(
        source.path,
        facts,
        start=start,
        seconds=settings.clip_seconds,
        fps=settings.fps,
        short_side=settings.short_side,
    )
    num_frames, rows, width = window.frames.shape
    if num_frames < round(settings.min_seconds * settings.fps):
        why = f" ({window.note})" if window.note else ""
        raise MediaError(
            f"only {num_frames / settings.fps:.2f} s of video, less than {settings.min_seconds:g} s{why}"
        )
    return NewClip(
        frames=encode_jpeg(window.frames, quality=settings.quality),
        width=width,
        height=rows * 2 // 3,
        source=source.relative,
        start=start,
        sound=None if window.sound is None else encode_flac(window.sound),
        label=source.label,
        note=window.note,
    )
