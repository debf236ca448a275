"""Progress where there is no terminal, and in a run's log: plain lines, none lost, and how the run ended."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
from rich.console import Console

from engine.core import display
from engine.core.display import Display
from engine.core.run import RunLog, how_ended


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "recipe.toml").write_text('name = "x"')
    return tmp_path


def lines_of(run: Path) -> list[str]:
    lines = (run / "log.txt").read_text().splitlines()
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ", line) for line in lines)
    return [line[20:] for line in lines]


def test_log_and_output_say_the_same(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = [100.0]
    monkeypatch.setattr(display.time, "monotonic", lambda: clock[0])
    with Display(every=10.0, log=run) as shown:
        shown.say("run folder runs/x")
        shown.start("evolving losses", 8)
        for k in range(40):
            clock[0] += 1.0
            shown.update("evolving losses", (k + 1) / 5, 8, note="best 0.300")
        shown.note("only in the log")
    out = capsys.readouterr().out.splitlines()
    assert out == [
        "run folder runs/x",
        "evolving losses",
        "evolving losses: 2/8  best 0.300  30 s left",
        "evolving losses: 4/8  best 0.300  20 s left",
        "evolving losses: 6/8  best 0.300  10 s left",
        "evolving losses: 8/8  best 0.300  0 s left",
    ]
    assert lines_of(run) == [*out, "only in the log", "ended: finished"]


def test_the_first_of_many_does_not_tell_the_time_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Workers started before it, which takes as long as hundreds of videos."""
    clock = [100.0]
    monkeypatch.setattr(display.time, "monotonic", lambda: clock[0])
    with Display(every=1.0) as shown:
        for done in (0, 1, 2):
            clock[0] += 10.0
            shown.prepare("reading videos", done, 400)
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["reading videos: 0/400", "reading videos: 1/400"]
    assert lines[2].startswith("reading videos: 2/400") and lines[2].endswith(" left")


def test_a_terminal_gets_bars_and_the_log_lines(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(display.time, "monotonic", lambda: clock[0])
    screen = io.StringIO()
    monkeypatch.setattr(
        display, "Console", lambda **more: Console(file=screen, force_terminal=True, **more)
    )
    with Display(every=10.0, log=run) as shown:
        shown.start("evolving losses", 8)
        for k in range(20):
            clock[0] += 1.0
            shown.update("evolving losses", k / 4, 8)
    assert "\x1b[" in screen.getvalue()
    told = lines_of(run)
    assert told[0] == "evolving losses" and told[-1] == "ended: finished" and len(told) == 4
    assert all(c.isprintable() for line in told for c in line)


def test_how_it_ended(run: Path) -> None:
    assert how_ended(run) is None
    with pytest.raises(KeyboardInterrupt), Display(log=run) as shown:
        raise KeyboardInterrupt
    assert how_ended(run) == ("interrupted", "")
    with pytest.raises(RuntimeError), Display(log=run) as shown:
        raise RuntimeError("no room\nleft: \x1b[31mall gone")
    assert how_ended(run) == ("failed", "no room left:  [31mall gone")
    with Display(log=run) as shown:
        shown.say("going on")
        assert how_ended(run) is None
    assert how_ended(run) == ("finished", "")


def test_lines_wait_until_the_folder_holds_a_run(tmp_path: Path) -> None:
    folder = tmp_path / "new"
    log = RunLog(folder)
    log.write("before")
    assert not folder.exists()
    folder.mkdir()
    log.write("still no run")
    assert not (folder / "log.txt").exists()
    (folder / "recipe.toml").write_text("")
    log.write("after")
    assert lines_of(folder) == ["before", "still no run", "after"]


def test_a_log_that_can_not_be_written_ends_no_run(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / "log.txt").mkdir()
    with Display(log=run) as shown:
        shown.say("one")
        shown.say("two")
    out = capsys.readouterr().out
    assert out.count("log.txt ends here") == 1 and "two" in out
