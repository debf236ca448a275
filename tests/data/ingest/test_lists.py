"""Lists as PySlowFast, VideoMAE, V-JEPA, MMAction2 and pandas write them."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from engine.cli.main import main
from engine.data.ingest.sources import SourceList, find_sources, read_list
from engine.data.shards.index import ClipIndex

VIDEOS = ("v/a.mp4", "v/b c.mp4", "v/d,e.mp4", "v/f|g.mp4")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "v").mkdir()
    for name in VIDEOS:
        (tmp_path / name).write_bytes(b"")
    return tmp_path


def labelled(found: SourceList) -> list[tuple[str, str | None]]:
    return [(source.relative, source.label) for source in found.sources]


def read(root: Path, name: str, text: str) -> SourceList:
    (root / name).write_text(text)
    found = read_list(root / name)
    assert not found.rejects
    assert len(found.notes) == 1
    return found


@pytest.mark.parametrize("between", [" ", "\t", "  ", "|", ";", ","])
@pytest.mark.parametrize("name", ["l.txt", "l.csv", "l.tsv", "l.list"])
def test_path_and_label_without_a_header(root: Path, name: str, between: str) -> None:
    """PySlowFast's, VideoMAE's and V-JEPA's lists are .csv files separated by a space."""
    videos = [video for video in VIDEOS if between not in (",", "|") or between not in video]
    text = "".join(f"{video}{between}{i * 7}\r\n" for i, video in enumerate(videos))
    found = read(root, name, text)
    assert labelled(found) == [(video, str(i * 7)) for i, video in enumerate(videos)]


@pytest.mark.parametrize(
    "header", ["file,label", "video_path,label", "path|label", "filename\tclass", "path label"]
)
@pytest.mark.parametrize("name", ["l.txt", "l.csv"])
def test_headers(root: Path, name: str, header: str) -> None:
    between = next(c for c in ",|\t " if c in header)
    found = read(root, name, f"{header}\nv/a.mp4{between}walk\nv/b c.mp4{between}run\n")
    assert labelled(found) == [("v/a.mp4", "walk"), ("v/b c.mp4", "run")]
    assert "with a header" in found.notes[0]


def test_as_pandas_writes_them(root: Path) -> None:
    """With its index, and separated by spaces, where it puts quotes around a path that holds spaces."""
    expected = [("v/a.mp4", "2"), ("v/b c.mp4", "0"), ("v/d,e.mp4", "1")]
    text = ',video_path,label\n0,v/a.mp4,2\n1,v/b c.mp4,0\n2,"v/d,e.mp4",1\n'
    assert labelled(read(root, "l.csv", text)) == expected
    text = 'v/a.mp4 2\n"v/b c.mp4" 0\nv/d,e.mp4 1\n'
    assert labelled(read(root, "l.csv", text)) == expected
    (root / "video").mkdir()  # which is no row's file
    text = "video|label\nv/a.mp4|2\nv/b c.mp4|0\nv/d,e.mp4|1\n"
    assert labelled(read(root, "l.csv", text)) == expected


def test_names_as_labels(root: Path) -> None:
    found = read(root, "l.tsv", "v/a.mp4\tplaying guitar\nv/b c.mp4\tvideo\n")
    assert labelled(found) == [("v/a.mp4", "playing guitar"), ("v/b c.mp4", "video")]
    found = read(root, "l.txt", "v/a.mp4 video\nv/b c.mp4 class\n")
    assert labelled(found) == [("v/a.mp4", "video"), ("v/b c.mp4", "class")]


def test_paths_alone_stay_whole(root: Path) -> None:
    for name in ("l.txt", "l.csv"):
        text = "v/b c.mp4\nv/a.mp4\n" if name == "l.csv" else "v/b c.mp4\nv/d,e.mp4\n"
        assert [label for _, label in labelled(read(root, name, text))] == [None, None]
    (root / "l.txt").write_text("v/gone 1.mp4\nv/gone 2.mp4\n")
    assert [reject.path for reject in read_list(root / "l.txt").rejects] == [
        "v/gone 1.mp4",
        "v/gone 2.mp4",
    ]


def test_lists_of_videomae_v2_for_pretraining_and_of_frame_counts(root: Path) -> None:
    assert labelled(read(root, "l.csv", "v/a.mp4 0 -1\nv/b c.mp4 0 -1\n")) == [
        ("v/a.mp4", None),
        ("v/b c.mp4", None),
    ]
    assert labelled(read(root, "l.txt", "v/a.mp4 161 1\nv/b c.mp4 90 0\n")) == [
        ("v/a.mp4", "1"),
        ("v/b c.mp4", "0"),
    ]


def test_names_without_a_suffix(root: Path) -> None:
    """As Something-Something's lists have them: an id, a number of frames, a label."""
    (root / "v" / "78687.webm").touch()
    (root / "v" / "signer0_sample1.mp4").touch()
    found = read(root, "l.txt", "v/78687 90 174\nv/a 12 3\n")
    assert labelled(found) == [("v/78687.webm", "174"), ("v/a.mp4", "3")]
    assert labelled(read(root, "l.csv", "v/signer0_sample1,41\n")) == [
        ("v/signer0_sample1.mp4", "41")
    ]


def test_lists_made_on_windows(root: Path) -> None:
    text = "video\tlabel\r\nv\\a.mp4\t1\r\n.\\v\\b c.mp4\t2\r\n"
    for encoding in ("utf-8-sig", "utf-16"):  # as Notepad and Excel save them
        (root / "l.txt").write_bytes(text.encode(encoding))
        assert labelled(read_list(root / "l.txt")) == [("v/a.mp4", "1"), ("v/b c.mp4", "2")]


def test_several_labels_a_line_are_refused_with_the_reason(root: Path) -> None:
    """MMAction2's multi-class lists."""
    (root / "l.txt").write_text("v/a.mp4 1 3 5\nv/b c.mp4 2 6 10\n")
    found = read_list(root / "l.txt")
    assert not found.sources
    assert [reject.reason for reject in found.rejects] == [
        "there is no such file; there is v/a.mp4, but '1 3 5' after it can't be read: give one label a line",
        "there is no such file; there is v/b c.mp4, but '2 6 10' after it can't be read: give one label a line",
    ]


def test_files_that_are_all_missing_are_named(root: Path) -> None:
    (root / "l.csv").write_text("gone/a b.mp4 3\ngone/c.mp4 12\n")
    found = read_list(root / "l.csv")
    assert [(r.path, r.listed) for r in found.rejects] == [
        ("gone/a b.mp4", "l.csv:1"),
        ("gone/c.mp4", "l.csv:2"),
    ]
    for text in ("v 161 1\n", "v 1\n"):
        (root / "l.txt").write_text(text)
        (reject,) = read_list(root / "l.txt").rejects
        assert (reject.path, reject.reason) == (
            "v",
            "it is a folder, and only video files are read",
        )


def test_where_paths_count_from(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (root / "lists").mkdir()
    path = root / "lists" / "l.txt"
    path.write_text("v/a.mp4 0\n")
    assert read_list(path).rejects
    assert read_list(path, root).sources[0].path == root / "v/a.mp4"
    monkeypatch.chdir(root)
    assert read_list(path).sources[0].path == root / "v/a.mp4"
    path.write_text("a.mp4 0\nb c.mp4 1\n")
    assert [s.relative for s in find_sources([path], root / "v").sources] == ["a.mp4", "b c.mp4"]


def test_how_a_list_was_understood(root: Path) -> None:
    found = read(root, "l.csv", "v/b c.mp4 10\nv/a.mp4 9\nv/d,e.mp4 9\n")
    assert found.notes == [
        f"{root}/l.csv: 3 rows of PATH LABEL, separated by spaces; 2 classes (9, 10); the first: v/b c.mp4,"
        f" label 10; paths below {root}"
    ]


def test_one_file_with_two_labels(root: Path) -> None:
    (root / "l.txt").write_text("v/a.mp4 walk\nv/b c.mp4 walk\n./v/a.mp4 run\nv/b c.mp4 walk\n")
    found = read_list(root / "l.txt")
    assert labelled(found) == [("v/a.mp4", "walk"), ("v/b c.mp4", "walk")]
    same = "line 1 names the same file"
    assert [(r.listed, r.reason) for r in found.rejects] == [
        ("l.txt:3", f"{same} with another label: walk there, which is kept, run here"),
        ("l.txt:4", "line 2 names the same file"),
    ]


def test_one_file_in_several_lists_and_folders_counts_once(root: Path) -> None:
    (root / "one.txt").write_text("v/a.mp4 walk\n")
    (root / "v" / "two.txt").write_text("a.mp4 run\nb c.mp4 run\n")
    found = find_sources([root / "v", root / "one.txt", root / "v" / "two.txt"])
    told = {(source.path.name, source.label, source.twin) for source in found.sources}
    assert told == {
        ("a.mp4", "walk", 0),
        ("b c.mp4", "run", 0),
        ("d,e.mp4", None, 0),
        ("f|g.mp4", None, 0),
    }
    (reject,) = found.rejects
    assert reject.listed == "two.txt:1"
    assert reject.reason.startswith("one.txt:1 names the same")


def test_a_quote_that_never_ends_is_no_traceback(root: Path) -> None:
    (root / "l.csv").write_text('path,label\n"' + "v/a.mp4,1\n" * 20_000)
    with pytest.raises(ValueError, match=r"l.csv can't be read as a table"):
        read_list(root / "l.csv")


def test_the_command_says_how_it_understood_a_list(real_data: Path, tmp_path: Path) -> None:
    weizmann = real_data / "weizmann"
    names = sorted(path.relative_to(weizmann) for path in weizmann.glob("*/daria_*.avi"))[:3]
    (tmp_path / "train.csv").write_text("".join(f"{name} {i}\n" for i, name in enumerate(names)))
    run = [str(tmp_path / "train.csv"), "--out", str(tmp_path / "set"), "--workers", "1"]
    result = CliRunner().invoke(main, ["ingest", *run, "--root", str(weizmann)])
    assert result.exit_code == 0, result.output
    assert "3 rows of PATH LABEL, separated by spaces; 3 classes (0, 1, 2); the first:" in (
        result.output
    )
    index = ClipIndex([tmp_path / "set"])
    facts = {(f["source"], f["class"]) for f in map(index.facts, range(len(index)))}
    assert facts == {(str(name), str(i)) for i, name in enumerate(names)}
    result = CliRunner().invoke(main, ["ingest", *run, "--root", str(tmp_path / "none")])
    assert result.exit_code == 2
    assert "no such folder" in result.output
