"""``engine ingest``: raw videos to training shards, and what shards hold."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from engine.cli.common import FAILURE, PATH, errors_explained

if TYPE_CHECKING:
    from engine.core.display import Display
    from engine.data.ingest.run import IngestReport, Progress
    from engine.data.ingest.sources import Found

SHOWN = 20
"""Rejects that are shown; all are in the file."""


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
@click.option("--fps", type=click.FloatRange(min=1), default=25.0, show_default=True)
@click.option(
    "--short-side", type=click.IntRange(min=16), default=128, show_default=True, help="In pixels."
)
@click.option("--clip-seconds", type=click.FloatRange(min=0.5), default=10.0, show_default=True)
@click.option(
    "--clips-per-video", type=click.IntRange(min=1), help="[default: one per started minute]"
)
@click.option(
    "--min-seconds",
    type=click.FloatRange(min=0),
    default=1.0,
    show_default=True,
    help="Shorter clips are rejected.",
)
@click.option(
    "--quality",
    type=click.IntRange(1, 100),
    default=85,
    show_default=True,
    help="Of the JPEG frames.",
)
@click.option(
    "--codec",
    type=click.Choice(["jpeg", "vp9", "h264", "copy"]),
    default="jpeg",
    show_default=True,
    help="jpeg: any frame at once; vp9: a fifth of the room; h264: for GPUs; copy: the source's own stream, for GPUs.",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option("--workers", type=click.IntRange(min=1), help="Processes [default: one a core].")
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

    VIDEOS are files, folders, and lists: a .txt file of paths, a line each, or a .csv or .tsv table with a header
    (path, and if wanted label, start and end in seconds); paths count from the list's folder, and several rows of
    one file are several clips. Labels of files in folders are the names of their folders.

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
        _describe(describe)
    elif contact_sheet is not None:
        png = out or Path(f"{contact_sheet.resolve().name}.png")
        _draw(contact_sheet, png, seed=options["seed"])
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
    **options: Any,
) -> None:
    from engine.core.display import Display
    from engine.core.files import StorageError
    from engine.data.ingest.run import ingest as run
    from engine.data.ingest.sources import Found, find_sources
    from engine.data.ingest.splits import hmdb51 as read_hmdb51
    from engine.data.ingest.splits import kinetics as read_kinetics
    from engine.data.ingest.splits import ucf101 as read_ucf101

    if not (videos or hmdb51 or ucf101 or kinetics):
        raise ValueError("no videos given: name files, folders or lists, or --hmdb51, --ucf101 ...")
    parts = [find_sources(videos)] if videos else []
    parts += [read_hmdb51(*hmdb51)] if hmdb51 else []
    parts += [read_ucf101(*ucf101)] if ucf101 else []
    for folder in dict.fromkeys(folder for folder, _ in kinetics):
        parts.append(read_kinetics(folder, [path for f, path in kinetics if f == folder]))
    found = Found.of(parts)
    if not found.sources and not found.rejects:
        raise ValueError(f"no videos found in {', '.join(map(str, videos))}")
    with Display() as display:
        try:
            report = run(found, out, progress=_shown(display), **options)
        except StorageError as error:
            raise RuntimeError(
                f"{error}; what was finished is kept for the same command"
            ) from error
        except KeyboardInterrupt:
            raise RuntimeError("interrupted; the same command goes on from here") from None
        _say(display, report, found, out)


def _shown(display: Display) -> Callable[[Progress], None]:
    """Show an ingest's progress: files, clips, hours of video, files a second."""
    what, began = "looking up files", 0.0

    def show(now: Progress) -> None:
        nonlocal what, began
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


def _say(display: Display, report: IngestReport, found: Found, out: Path) -> None:
    from engine.core.display import table
    from engine.data.ingest.splits import MISSING

    told = sorted(report.rejects, key=lambda r: r.reason.startswith(MISSING))  # known gaps last
    for r in told[:SHOWN]:
        where = "".join(f" ({note})" for note in (r.where, r.listed) if note)
        display.say(f"rejected {r.path}{where}: {r.reason}")
    if len(told) > SHOWN:
        display.say(f"... and {len(told) - SHOWN} more")
    before = sum(reject.reason.startswith(MISSING) for reject in found.rejects)
    rows = {
        "sources": report.sources,
        "gave clips": report.sources - report.rejected,
        "rejected": report.rejected,
        "of these listed, but not on the disk": before,
        "stretches rejected of sources that gave clips": len(report.rejects) - report.rejected,
        "sources of an earlier run, kept": report.reused,
        "files in no list, passed over": report.unlisted,
    }
    always = ("sources", "gave clips", "rejected")
    shown = [[name, str(count)] for name, count in rows.items() if count or name in always]
    shown += [["clips", str(report.clips)], ["hours of video", f"{report.seconds / 3600:.2f}"]]
    display.console.print(table("", ["", "number"], shown))
    where = f" (all rejects: {out / 'rejects.jsonl'})" if told else ""
    display.say(
        f"{report.sources} files: {report.clips} clips, {report.seconds / 3600:.2f} hours, "
        f"{report.rejected} rejected{where} -> {out}"
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


def _describe(shards: Path) -> None:
    from engine.core.display import Display, table
    from engine.data.shards.inspect import describe

    found = describe(shards)
    facts = found.facts
    share = found.with_sound / found.clips if found.clips else 0.0
    rows = [
        ["clips", str(found.clips)],
        ["hours", f"{found.seconds / 3600:.2f}"],
        ["shards", f"{found.num_shards}, {found.bytes / 1e9:.3f} GB"],
        ["codec", f"{facts['codec']}, {facts['fps']:g} frames/s, short side {facts['short_side']}"],
        ["pictures", ", ".join(f"{n} {size}" for size, n in list(found.sizes.items())[:6])],
        ["with sound", f"{found.with_sound} ({share:.0%})"],
        ["cut short", str(found.partial)],
        ["without a class", str(found.unlabelled)],
        *([name, str(count)] for name, count in found.splits.items()),
        ["settings", ", ".join(f"{k} {v}" for k, v in facts.get("settings", {}).items())],
        ["made by", f"engine {facts['engine']}"],
        *(["left out", problem] for problem in found.damaged),
    ]
    console = Display().console
    console.print(table(str(shards), ["", "what it holds"], rows))
    if found.classes:
        counts = [[name, str(count)] for name, count in found.classes.items()]
        console.print(table(f"{len(counts)} classes", ["class", "clips"], counts))


def _draw(shards: Path, png: Path, *, seed: int) -> None:
    from engine.report.contact_sheet import contact_sheet

    contact_sheet(shards, png, seed=seed)
    click.echo(f"contact sheet: {png}")
