"""Films that end before their head says so, as partial downloads do: what is there is taken, and one line says it."""

from __future__ import annotations

from pathlib import Path

import av
import pytest

from engine.cli.common import say_rejects
from engine.core.display import Display
from engine.data.ingest.cut import Settings, cut_source
from engine.data.ingest.sources import Reject, Source, by_cause
from engine.data.media.container import stamp_of
from engine.data.media.decode import MediaError, MediaFacts, probe
from engine.data.media.part import Part
from engine.data.shards.writer import NewClip
from tests.data.films import beep_at, texture, write_film

SECONDS, FPS = 44, 10
KINDS = ("mp4", "mkv", "webm", "avi", "mov", "flv", "fragments.mp4", "bframes.mp4")
PARTS = (0.062, 0.5, 0.93)


def film(path: Path, *, seconds: int = SECONDS, fps: int = FPS) -> Path:
    flags = "dash+global_sidx" if "fragments" in path.name else "faststart"
    return write_film(
        path,
        (texture(i) for i in range(seconds * fps)),
        fps=fps,
        gop=20,
        sound=beep_at(0.5),
        sound_to=float(seconds),
        options={"preset": "medium"} if "bframes" in path.name else None,
        container_options={"movflags": flags} if path.suffix in (".mp4", ".mov") else None,
    )


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("whole")
    return {kind: film(root / f"film.{kind}") for kind in KINDS}


def whole_until(path: Path, size: int) -> float:
    """Seconds of video whose packets lie within the first ``size`` bytes, by their places in the whole file."""
    with av.open(str(path)) as container:
        found = [p for p in container.demux(video=0) if p.size and p.pts is not None]
    return sum(1 for p in found if p.pos + p.size <= size) / FPS


def cut(path: Path, **settings: object) -> tuple[list[NewClip], list[Reject]]:
    clips: list[NewClip] = []
    chosen = Settings(**{"fps": FPS, "short_side": 32, "clips_per_video": 5, **settings})  # type: ignore[arg-type]
    source = Source(str(path.parent), path.name, None)
    lost = cut_source(source, chosen, clips.append, trying=lambda number: None)
    return clips, lost


@pytest.mark.parametrize("zeros", [False, True], ids=["short", "zeros"])
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_there_is_cut_like_a_film_of_that_length(
    films: dict[str, Path], tmp_path: Path, kind: str, part: float, zeros: bool
) -> None:
    if zeros and kind in ("fragments.mp4", "avi"):
        pytest.skip("its index lies in the zeros, or FFmpeg searches them for frames")
    data = films[kind].read_bytes()
    size = round(len(data) * part)
    path = tmp_path / f"film.{kind}"
    path.write_bytes(data[:size] + bytes(len(data) - size if zeros else 0))
    there = whole_until(films[kind], size)
    near = 0.25 if kind not in ("bframes.mp4", "fragments.mp4") else 0.55  # not in order of time
    facts = probe(path)
    assert facts.duration == pytest.approx(there, abs=near)
    assert facts.promised == pytest.approx(SECONDS, abs=0.2)
    clips, lost = cut(path)
    assert [(r.reason, r.partial, r.where, r.more) for r in lost] == [(facts.cut, True, None, 0)]
    assert f"the file ends at {facts.duration:.1f} s of 4" in lost[0].reason
    assert len(clips) == (1 if there < 10 else 5)
    for clip in clips:
        whole = min(100, round(facts.duration * FPS))
        assert whole - near * FPS <= clip.pictures.num_frames <= whole
        assert clip.start + clip.pictures.num_frames / FPS <= there + near
        assert clip.sound is not None
        missing = clip.pictures.num_frames < 100
        assert (clip.note or "").startswith(facts.cut if missing else ("part of the sound", ""))


@pytest.mark.parametrize("kind", KINDS)
def test_whole_films_promise_no_more_than_they_hold(films: dict[str, Path], kind: str) -> None:
    assert probe(films[kind]).cut is None
    assert cut(films[kind])[1] == []


@pytest.mark.parametrize("kind", ["mkv", "webm", "flv"])
def test_clips_are_not_sought_beyond_the_pictures_where_the_sound_goes_on(
    tmp_path: Path, kind: str
) -> None:
    path = write_film(
        tmp_path / f"film.{kind}",
        (texture(i) for i in range(12 * FPS)),
        fps=FPS,
        sound=beep_at(0.5),
        sound_to=60.0,
    )
    facts = probe(path)
    assert facts.duration == pytest.approx(12, abs=0.2) and facts.cut is None
    clips, lost = cut(path, clip_seconds=4)
    assert lost == [] and [clip.pictures.num_frames for clip in clips] == [40] * 5


def test_a_long_films_end_is_found_without_reading_all_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures = [texture(i) for i in range(20)]
    path = write_film(
        tmp_path / "film.mp4",
        (pictures[i % 20] for i in range(7286)),
        fps=1,
        container_options={"movflags": "faststart"},
    )
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 4 // 5])
    stamps: list[float | None] = []

    def seen(packet: av.Packet) -> float | None:
        stamps.append(stamp_of(packet))
        return stamps[-1]

    monkeypatch.setattr("engine.data.media.extent.stamp_of", seen)
    facts = probe(path)
    assert 4000 < facts.duration < 7000
    assert facts.promised == pytest.approx(7286, abs=1)
    assert len(stamps) < 200
    clips, lost = cut(path, fps=1, clips_per_video=3)
    assert [r.reason for r in lost] == [facts.cut]
    assert [c.pictures.num_frames for c in clips] == [10, 10, 10]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        ("half", "cut off: its index (moov), which stands at its end, is missing"),
        ("none", "it is empty"),
        ("zeros", "it begins with zeros"),
        ("page", "it is a web page, not a video"),
    ],
)
def test_what_has_nothing_to_read_says_why(tmp_path: Path, data: str, reason: str) -> None:
    path = write_film(tmp_path / "film.mp4", (texture(i) for i in range(20)), fps=FPS)
    whole = path.read_bytes()
    half = whole[: len(whole) // 2]
    page = b"\n<!DOCTYPE html><html><body>This video is not available</body></html>"
    contents = {"half": half, "none": b"", "zeros": bytes(len(whole)), "page": page}
    path.write_bytes(contents[data])
    clips, lost = cut(path)
    assert not clips
    assert len(lost) == 1 and reason in lost[0].reason


def test_parts_of_a_larger_file_say_what_files_of_their_own_say(
    films: dict[str, Path], tmp_path: Path
) -> None:
    mp4 = films["mp4"].read_bytes()
    late = write_film(tmp_path / "late.mp4", (texture(i) for i in range(20)), fps=FPS).read_bytes()
    contents = {f"half.{kind}": films[kind].read_bytes() for kind in ("mp4", "mkv", "avi")}
    contents = {name: data[: len(data) // 2] for name, data in contents.items()}
    contents |= {
        "no-index.mp4": late[: len(late) // 2],
        "page.mp4": b"<!DOCTYPE html><html></html>",
    }
    for name, data in contents.items():
        own, larger = tmp_path / name, tmp_path / f"{name}.tar"
        own.write_bytes(data)
        larger.write_bytes(mp4[:5000] + data + mp4)  # whole films, and an index, on both sides
        found: list[MediaFacts | str] = []
        for media in (own, Part(str(larger), 5000, len(data))):
            try:
                found.append(probe(media))
            except MediaError as error:
                found.append(str(error))
        assert found[0] == found[1]
        assert isinstance(found[0], str) or found[0].cut is not None


def test_stretches_beyond_the_data_say_where_these_end(
    films: dict[str, Path], tmp_path: Path
) -> None:
    data = films["mp4"].read_bytes()
    path = tmp_path / "film.mp4"
    path.write_bytes(data[: len(data) // 2])

    def reasons(start: float, end: float, **more: bool) -> list[str]:
        source = Source(str(tmp_path), path.name, None, start, end, **more)
        keep: list[NewClip] = []
        lost = cut_source(
            source, Settings(fps=FPS, short_side=32), keep.append, trying=lambda n: None
        )
        return [*(f"{clip.start:.0f}" for clip in keep), *(reject.reason for reject in lost)]

    cut_off = probe(path).cut
    assert reasons(2, 12) == ["2"]
    assert reasons(30, 40) == [f"{cut_off}, and the stretch starts at 30.00 s"]
    assert reasons(15, 25) == ["15", cut_off]
    # 22 s of a film of 44 s are no trimmed stretch of 22 s
    assert reasons(30, 52, may_be_trimmed=True) == reasons(30, 52)


def test_damage_part_way_is_one_line_with_a_count(tmp_path: Path) -> None:
    path = film(tmp_path / "film.mkv")
    data = bytearray(path.read_bytes())
    third, end = len(data) // 3, len(data) * 9 // 10
    data[third:end] = bytes(end - third)
    path.write_bytes(data)
    clips, lost = cut(path, clips_per_video=20)
    assert clips
    assert len(lost) == len(by_cause(lost))
    assert max(reject.more for reject in lost) > 3
    assert len(clips) + sum(1 + reject.more for reject in lost) >= 20


def test_the_shown_lines_are_one_for_each_file_and_cause(
    capsys: pytest.CaptureFixture[str],
) -> None:
    far = [Reject("a.mp4", f"no frame can be decoded at {i}.25 s", f"{i} s") for i in range(5)]
    ends = Reject("a.mp4", "the file ends at 2.0 s of 9.0 s: it is cut off", partial=True)
    with Display() as display:
        say_rejects(display, [*far, ends, Reject("b.mp4", "it is empty")])
    assert capsys.readouterr().out.splitlines() == [
        "rejected a.mp4 (0 s) (and 4 more): no frame can be decoded at 0.25 s",
        "incomplete a.mp4: the file ends at 2.0 s of 9.0 s: it is cut off",
        "rejected b.mp4: it is empty",
    ]
