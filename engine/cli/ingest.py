"""``engine ingest``: raw videos to training shards, and what shards hold."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from engine.cli.common import COUNT, FAILURE, NATURAL, PATH, WORKERS, errors_explained, say_rejects

if TYPE_CHECKING:
    from engine.core.display import Display
    from engine.data.ingest.run import IngestReport, Progress
    from engine.data.ingest.sources import SourceList


@click.command()
@click.argument("videos", nargs=-1, type=PATH)
@click.option("--out", type=PATH, help="Folder for the shards (or the contact sheet's file).")
@click.option(
    "--hmdb51",
    nargs=2,
    type=PATH,
    metavar="VIDEOS SPLITS",
    help="HMDB51 and its official lists (CLASS_test_split1.txt ...).",
)
@click.option(
    "--ucf101",
    nargs=2,
    type=PATH,
    metavar="VIDEOS SPLITS",
    help="UCF101 and its official lists (classInd.txt, trainlist01.txt ...).",
)
@click.option(
    "--kinetics",
    nargs=2,
    type=PATH,
    multiple=True,
    metavar="VIDEOS CSV",
    help="Kinetics and a list (label,youtube_id,time_start,time_end,split); may be given again.",
)
@click.option(
    "--root",
    type=PATH,
    help="Folder that lists' paths count from [default: the list's own, or else the current one].",
)
@click.option("--fps", type=click.FloatRange(min=1), default=25.0)
@click.option("--short-side", type=click.IntRange(min=16), default=128, help="In pixels.")
@click.option("--clip-seconds", type=click.FloatRange(min=0.5), default=10.0)
@click.option("--clips-per-video", type=COUNT, help="[default: one per started minute]")
@click.option(
    "--min-seconds", type=click.FloatRange(min=0), default=1.0, help="Shorter clips are rejected."
)
@click.option("--quality", type=click.IntRange(1, 100), default=85, help="Of the JPEG frames.")
@click.option(
    "--codec",
    type=click.Choice(["jpeg", "vp9", "h264", "copy"]),
    default="jpeg",
    help="jpeg: any frame at once; vp9: a sixth of the room; h264: for GPUs; copy: the source's own stream, for GPUs.",
)
@click.option("--seed", type=NATURAL, default=0)
@WORKERS
@click.option(
    "--address",
    metavar="auto|HOST:PORT",
    help="Run on a Ray cluster, all of whose nodes see the videos and --out under the same paths.",
)
@click.option(
    "--verify", type=PATH, metavar="SHARDS", help="Only check every byte of these shards."
)
@click.option("--describe", type=PATH, metavar="SHARDS", help="Only say what these shards hold.")
@click.option(
    "--contact-sheet",
    type=PATH,
    metavar="SHARDS",
    help="Only draw random clips of these shards: frames, flow, sound; --out names the picture.",
)
@errors_explained
def ingest(
    videos: tuple[Path, ...],
    out: Path | None,
    verify: Path | None,
    describe: Path | None,
    contact_sheet: Path | None,
    **options: Any,
) -> None:
    """Turn raw videos into training shards, once.

    VIDEOS are files, folders, tars of videos, and lists (.txt, .csv, .tsv, .list): a path a line, PATH LABEL with
    spaces, a tab, a comma, ; or | between them, or a table whose header names path, label, start and end (in seconds).
    A line says how a list was understood. Several rows of one file with other times are several clips. Labels of
    files in folders are the names of their folders.

    The same command again, after a kill or with new files, does only what is missing, and gives the same bytes as
    one run over everything. Every source ends as clips or as a line of rejects.jsonl in the shards' folder.

    Exit code: 0 where there are clips, though some sources may be rejected; 1 where shards can't be written, or
    --verify finds damage; 2 for a mistake in the command, and where no source gives a clip.
    """
    chosen = [path for path in (verify, describe, contact_sheet) if path is not None]
    if len(chosen) > 1 or (chosen and videos):
        raise ValueError("give only one of VIDEOS, --verify, --describe and --contact-sheet")
    if verify is not None:
        _verify(verify)
    elif describe is not None:
        from engine.cli.tables import print_shards
        from engine.data.shards.inspect import describe as described

        print_shards(described(describe), title=str(describe))
    elif contact_sheet is not None:
        from engine.report.figures.contact_sheet import contact_sheet as draw

        png = out or Path(f"{contact_sheet.resolve().name}.png")
        draw(contact_sheet, png, seed=options["seed"])
        click.echo(f"contact sheet: {png}")
    elif out is None:
        raise ValueError("--out is missing: the folder for the shards")
    else:
        _ingest(videos, out, **options)


def _ingest(
    videos: Sequence[Path],
    out: Path,
    *,
    hmdb51: tuple[Path, Path] | None,
    ucf101: tuple[Path, Path] | None,
    kinetics: Sequence[tuple[Path, Path]],
    root: Path | None,
    **options: Any,
) -> None:
    from engine.core.display import Display
    from engine.core.files import StorageError
    from engine.data.ingest import splits
    from engine.data.ingest.run import ingest as run
    from engine.data.ingest.sources import SourceList, find_sources

    if not (videos or hmdb51 or ucf101 or kinetics):
        raise ValueError("no videos given: name files, folders or lists, or --hmdb51, --ucf101 ...")
    if root is not None and not root.is_dir():
        raise ValueError(f"--root {root}: no such folder")
    every = [find_sources(videos, root)] if videos else []
    every += [splits.hmdb51(*hmdb51)] if hmdb51 else []
    every += [splits.ucf101(*ucf101)] if ucf101 else []
    for folder in dict.fromkeys(folder for folder, _ in kinetics):
        every.append(splits.kinetics(folder, [path for f, path in kinetics if f == folder]))
    sources = SourceList.of(every)
    if not sources.sources and not sources.rejects:
        raise ValueError(f"no videos found in {', '.join(map(str, videos))}")
    with Display() as display:
        try:
            report = run(sources, out, progress=_shown(display), **options)
        except StorageError as error:
            raise RuntimeError(
                f"{error}; what was finished is kept for the same command"
            ) from error
        _say(display, report, sources, out)


def _shown(display: Display) -> Callable[[Progress], None]:
    """Show an ingest's progress: files, clips, hours of video, files a second."""
    what, began = "looking up files", 0.0

    def show(now: Progress) -> None:
        nonlocal what, began
        if now.note:
            display.say(now.note)
            return
        if now.waiting:
            display.say("another process is at work on these shards: waiting for it")
            return
        if not now.total:
            if now.done:
                display.update(what, now.done, now.done)
            return
        if not began:
            began = time.monotonic()
            again = f", {now.reused} of them done before" if now.reused else ""
            what = "reading videos"
            display.start(f"{what}: {now.total}{again}", now.total, done=now.done)
        took = max(time.monotonic() - began, 1e-3)
        rate = (now.done - now.reused) / took
        note = f"{now.clips} clips  {now.seconds / 3600:.2f} h  {rate:.1f} files/s"
        note += f"  {now.rejects} rejects" if now.rejects else ""
        display.update(what, now.done, now.total, note=note)

    return show


def _say(display: Display, report: IngestReport, sources: SourceList, out: Path) -> None:
    """Shows the rejects, a table of counts, and where the shards are."""
    from engine.core.display import table
    from engine.data.ingest.splits import MISSING

    rejects = sorted(report.rejects, key=lambda r: r.reason.startswith(MISSING))  # known gaps last
    say_rejects(display, rejects)
    hours = f"{report.seconds / 3600:.2f}"
    missing = sum(reject.reason.startswith(MISSING) for reject in sources.rejects)
    counts = {
        "sources": report.sources,
        "gave clips": report.sources - report.rejected,
        "rejected": report.rejected,
        "of these listed, but not on the disk": missing,
        "stretches rejected of sources that gave clips": sum(
            1 + reject.more for reject in rejects if reject.partial and reject.where is not None
        ),
        "sources of an earlier run, kept": report.reused,
        "files in no list, passed over": report.unlisted,
        "clips": report.clips,
    }
    always = ("sources", "gave clips", "rejected", "clips")
    rows = [[name, str(count)] for name, count in counts.items() if count or name in always]
    display.console.print(table("", ["", "number"], [*rows, ["hours of video", hours]]))
    where = f" (all rejects: {out / 'rejects.jsonl'})" if rejects else ""
    display.say(
        f"{report.sources} files: {report.clips} clips, {hours} hours, {report.rejected} rejected{where} -> {out}"
    )


def _verify(shards: Path) -> None:
    from engine.core.display import Display
    from engine.data.shards.inspect import verify

    with Display() as display:
        display.start(f"checking {shards}", 0)
        problems = verify(
            shards,
            progress=lambda done, total: display.update("checking MB", done >> 20, total >> 20),
        )
        for problem in problems:
            display.say(problem)
    if problems:
        click.echo(
            f"engine: {len(problems)} files of {shards} are damaged: delete the shards among them"
            " and run their `engine ingest` again, which makes these alone",
            err=True,
        )
        sys.exit(FAILURE)
    click.echo(f"{shards} is sound")
