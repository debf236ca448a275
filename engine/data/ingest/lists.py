"""Lists of videos as text: how a list is written, found by trying, and its rows."""

from __future__ import annotations

import codecs
import csv
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

SUFFIXES = (".txt", ".csv", ".tsv", ".list", ".lst")
COLUMNS = {
    "path": (
        "path video file filename video_path file_path filepath file_name video_name clip"
    ).split(),
    "label": ("label class class_name label_name category action target class_id label_id").split(),
    "start": "start time_start start_time".split(),
    "end": "end time_end end_time".split(),
    "split": "split subset partition".split(),
}
"""Names that a list's columns may have; of several for one thing the first counts."""
LOOKED_AT = 100
"""Rows by which the ways to read a list are compared."""


@dataclass(frozen=True)
class Form:
    """A way to read a list."""

    separator: str = ""
    """Of csv's kind; a space for fields at the line's end; empty: the whole line is a path."""
    columns: tuple[str, ...] = ("path",)
    """Names from COLUMNS; "" for what isn't used."""
    has_header: bool = False

    def rows(self, lines: Sequence[str]) -> Iterator[tuple[int, dict[str, str]]]:
        """(line number, column -> text) of the lines that aren't empty, but for the header. Raises csv.Error."""
        header = self.has_header
        for number, cells in self._cells(lines):
            if not any(cell.strip() for cell in cells):
                continue
            if not header:
                row = zip(self.columns, cells, strict=False)
                yield number, {key: cell.strip() for key, cell in row if key}
            header = False

    def _cells(self, lines: Sequence[str]) -> Iterator[tuple[int, list[str]]]:
        if self.separator in ("", " "):
            for number, line in enumerate(lines, 1):
                yield number, self._fields(line.strip())
        else:
            reader = csv.reader(lines, delimiter=self.separator)
            yield from ((reader.line_num, cells) for cells in reader)

    def _fields(self, line: str) -> list[str]:
        """The path, which may hold spaces, and what stands after it."""
        if not self.separator:
            return [line]
        if line.startswith('"'):  # as pandas writes a path that holds spaces
            return next(csv.reader([line], delimiter=" ", skipinitialspace=True))
        return line.rsplit(maxsplit=len(self.columns) - 1)

    def with_header(self, lines: Sequence[str]) -> Form:
        """The form with the columns that the first line names, if it does."""
        first = next((cells for _, cells in self._cells(lines) if any(map(str.strip, cells))), [])
        names = [cell.strip().lower() for cell in first]
        found = {key: _first(known, names) for key, known in COLUMNS.items()}
        is_header = any(found.values()) and not any(map(_is_like_a_video, first))
        if not is_header or (self.separator in ("", " ") and not found["path"]):
            return self
        columns = {name: key for key, name in found.items() if name}
        named = tuple(
            columns.get(name, "") if names.index(name) == place else ""
            for place, name in enumerate(names)
        )
        return Form(self.separator, named, has_header=True)

    def __str__(self) -> str:
        if not self.separator:
            return "one path a line"
        by = {"\t": "a tab", " ": "spaces"}.get(self.separator, repr(self.separator))
        names = " ".join(name.upper() or "(unused)" for name in self.columns)
        return f"{names}, separated by {by}" + ", with a header" * self.has_header


ORDER = ("path", "label", "start", "end")
"""Columns of a table without a header."""
WHOLE, TAB, COMMA = Form(), Form("\t", ORDER), Form(",", ORDER)
FIELDS = (
    Form("|", ORDER),
    Form(";", ORDER),
    Form(" ", ("path", "label")),
    Form(" ", ("path", "", "label")),  # a number of frames, as lists of frame folders have it
)
FORMS = {".csv": (COMMA, TAB, *FIELDS, WHOLE), ".tsv": (TAB, COMMA, *FIELDS, WHOLE)}
OTHER_FORMS = (WHOLE, TAB, COMMA, *FIELDS)
"""Ways to read a list, by its suffix; of those that do equally well the first is taken."""


def _first(known: Sequence[str], names: Sequence[str]) -> str | None:
    return next((name for name in known if name in names), None)


def read_rows(
    path: Path, exists: Callable[[str], bool]
) -> tuple[Form, list[tuple[int, dict[str, str]]]]:
    """How a list is written, and its rows by line number.

    That way is taken by which most of the paths are there, as ``exists`` tells, or else look like a video's. Raises
    ValueError for a list that can't be read, and for one with a header that names no paths.
    """
    lines = read_text(path).splitlines()
    try:
        form = _form_of(lines, FORMS.get(path.suffix.lower(), OTHER_FORMS), exists)
        if "path" not in form.columns:
            raise ValueError(
                f"{path} has no column with the videos' paths: call one path, video or filename"
                " (--kinetics reads lists of YouTube ids)"
            )
        return form, list(form.rows(lines))
    except csv.Error as error:
        raise ValueError(f"{path} can't be read as a table: {error}") from error


def _form_of(lines: Sequence[str], forms: Sequence[Form], exists: Callable[[str], bool]) -> Form:
    filled = [line for line in lines if line.strip()]
    some = filled[:: -(-len(filled) // LOOKED_AT)] if filled else []
    best, most = forms[0], (-1, -1, -1)
    for plain in forms:
        form = plain.with_header(some)
        try:
            paths = [row.get("path", "") for _, row in form.rows(some)]
        except csv.Error:
            continue
        found, alike = sum(map(exists, paths)), sum(map(_is_like_a_video, paths))
        if (form.has_header, found, alike) > most:
            best, most = form, (form.has_header, found, alike)
    return best


def _is_like_a_video(name: str) -> bool:
    return re.fullmatch(r"\.[a-z]\w{1,4}", os.path.splitext(name.strip())[1].lower()) is not None


def read_text(path: Path) -> str:
    """A list's text; names that are no UTF-8 keep their bytes. Raises ValueError where it can't be read."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ValueError(f"can't read the list {path}: {error.strerror}") from error
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):  # as Excel's "Unicode text"
        return data.decode("utf-16", errors="replace")
    return data.decode("utf-8-sig", errors="surrogateescape")
