"""Features as a Parquet file: a row a clip or a video, and in the file's metadata what made them.

Columns: path (string), start and end (seconds, float64), label (string, null where unknown), vector (D float32);
a file of videos has clips (int32) too, how many were averaged. Metadata of the schema, all UTF-8: ``card`` (JSON),
``protocol``, ``engine_version``, ``rejected`` (how many sources or segments gave no row) and ``identity``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from engine.core.files import replacing, write_atomic

STORED: dict[str, Any] = {"use_dictionary": ["path", "label"], "compression": "zstd"}
"""Settings of the writer; vectors, which are all different, get no dictionary."""


@dataclass(frozen=True)
class FeatureRows:
    """Segments of videos and their features; N rows of D features."""

    path: list[str]
    """The video, as it was named."""
    start: NDArray[np.float64]
    end: NDArray[np.float64]
    """(N,) seconds from the video's first frame."""
    label: list[str | None]
    vector: NDArray[np.float32]
    """(N, D)"""
    clips: NDArray[np.int32] | None = None
    """(N,) clips that were averaged, for rows that are videos."""
    rejects: list[dict[str, Any]] = field(default_factory=list)
    """Videos and segments that gave no row: path, reason, place (see ``engine.data.ingest.sources.Reject``)."""

    def __len__(self) -> int:
        return len(self.path)

    def take(self, keep: NDArray[np.bool_] | slice) -> FeatureRows:
        """Some of the rows."""
        chosen = np.arange(len(self))[keep]
        return replace(
            self,
            path=[self.path[i] for i in chosen],
            start=self.start[keep],
            end=self.end[keep],
            label=[self.label[i] for i in chosen],
            vector=self.vector[keep],
            clips=None if self.clips is None else self.clips[keep],
        )


def write_part(path: Path, rows: FeatureRows) -> None:
    """Write rows that are done, with their rejects; whole or not at all. Raises OSError."""
    schema = _schema(rows.vector.shape[1], videos=False)
    schema = schema.with_metadata({"rejects": json.dumps(rows.rejects)})
    with replacing(path) as temporary, pq.ParquetWriter(temporary, schema, **STORED) as writer:
        writer.write_table(_table(rows, schema))


def is_part(path: Path) -> bool:
    """Whether ``write_part`` has written this file, as far as its end tells."""
    return b"rejects" in _metadata(path)


def read_features(path: Path) -> FeatureRows:
    """Read a file of features; raises OSError or pyarrow's errors where it is none."""
    table = pq.read_table(path)
    vectors = table["vector"].combine_chunks()
    flat = vectors.flatten().to_numpy() if len(table) else np.zeros(0, np.float32)
    return FeatureRows(
        table["path"].to_pylist(),
        table["start"].to_numpy(),
        table["end"].to_numpy(),
        table["label"].to_pylist(),
        flat.reshape(len(table), table.schema.field("vector").type.list_size),
        table["clips"].to_numpy() if "clips" in table.column_names else None,
        _rejects(table.schema),
    )


def merge_parts(
    parts: Sequence[Path],
    out: Path,
    *,
    videos: bool,
    about: Mapping[str, str],
    listed: Sequence[dict[str, Any]] = (),
    scaled: Callable[[NDArray[np.float32]], NDArray[np.float32]] = lambda vectors: vectors,
) -> tuple[int, list[dict[str, Any]]]:
    """Write the rows of all parts, in their order, as ``out``; gives how many, and what was rejected.

    ``videos`` makes one row of a video's clips that follow one another and have one label: the mean of their
    vectors. ``scaled`` is applied to the vectors of the rows. ``about`` goes into the metadata, with the number of
    rejects, of which ``listed`` are of no part; they are written beside ``out`` before it is there. Only one part is in
    memory at a time. ``out`` appears whole or not at all, and not without rows. Raises OSError.
    """
    schemas = [pq.read_schema(part) for part in parts]
    rejects = [*listed, *(reject for schema in schemas for reject in _rejects(schema))]
    schema = _schema(schemas[0].field("vector").type.list_size, videos=videos)
    schema = schema.with_metadata({**about, "rejected": str(len(rejects))})
    write_rejects(out, rejects)
    if not sum(pq.read_metadata(part).num_rows for part in parts):
        return 0, rejects
    count, sources = 0, (read_features(part) for part in parts)
    with replacing(out) as temporary, pq.ParquetWriter(temporary, schema, **STORED) as writer:
        for rows in _videos(sources) if videos else sources:
            scaled_rows = replace(rows, vector=scaled(rows.vector))
            writer.write_table(_table(scaled_rows, schema))
            count += len(rows)
    return count, rejects


def identity_of(path: Path) -> str | None:
    """The ``identity`` of a file of features; None where there is no such file."""
    return _metadata(path).get(b"identity", b"").decode() or None


def _metadata(path: Path) -> dict[bytes, bytes]:
    """The metadata of a Parquet file's schema; empty where there is no such file."""
    with suppress(OSError, pa.ArrowException):
        return pq.read_schema(path).metadata or {}
    return {}


def count_rows(path: Path) -> int:
    """The number of rows of a file of features."""
    return int(pq.read_metadata(path).num_rows)


def joined(parts: Sequence[FeatureRows]) -> FeatureRows:
    """Rows of clips one after the other, and all their rejects."""
    return FeatureRows(
        [path for rows in parts for path in rows.path],
        np.concatenate([rows.start for rows in parts]),
        np.concatenate([rows.end for rows in parts]),
        [label for rows in parts for label in rows.label],
        np.concatenate([rows.vector for rows in parts]),
        rejects=[reject for rows in parts for reject in rows.rejects],
    )


def rejects_file(out: Path) -> Path:
    """The file of the rejects of ``out``."""
    return out.with_name(f"{out.name}.rejects.jsonl")


def write_rejects(out: Path, rejects: Sequence[dict[str, Any]]) -> None:
    """Write the rejects, a JSON object a line; no file for none."""
    if rejects:
        text = "".join(f"{json.dumps(reject)}\n" for reject in rejects)
        write_atomic(rejects_file(out), text.encode())
    else:
        rejects_file(out).unlink(missing_ok=True)


def read_rejects(out: Path) -> list[dict[str, Any]]:
    """Read the rejects that ``write_rejects`` wrote."""
    with suppress(FileNotFoundError):
        return [json.loads(line) for line in rejects_file(out).read_text().splitlines()]
    return []


def _rejects(schema: pa.Schema) -> list[dict[str, Any]]:
    rejects: list[dict[str, Any]] = json.loads((schema.metadata or {}).get(b"rejects", b"[]"))
    return rejects


def _videos(sources: Iterator[FeatureRows]) -> Iterator[FeatureRows]:
    """Rows of clips to rows of videos; a video's clips may go on in the next part."""
    held: FeatureRows | None = None
    for rows in sources:
        rows = rows if held is None else joined([held, rows])
        if not len(rows):
            continue
        names = list(zip(rows.path, rows.label, strict=True))
        first = [i for i, name in enumerate(names) if i == 0 or name != names[i - 1]]
        if len(first) > 1:
            yield _averaged(rows.take(slice(0, first[-1])), first[:-1])
        held = rows.take(slice(first[-1], None))
    if held is not None:
        yield _averaged(held, [0])


def _averaged(rows: FeatureRows, first: Sequence[int]) -> FeatureRows:
    """One row for each group of rows that begins at ``first``."""
    size = np.diff([*first, len(rows)])
    mean = np.add.reduceat(rows.vector.astype(np.float64), first) / size[:, None]
    return FeatureRows(
        [rows.path[i] for i in first],
        np.minimum.reduceat(rows.start, first),
        np.maximum.reduceat(rows.end, first),
        [rows.label[i] for i in first],
        mean.astype(np.float32),
        size.astype(np.int32),
    )


def _schema(dim: int, *, videos: bool) -> pa.Schema:
    columns = {"path": pa.string(), "start": pa.float64(), "end": pa.float64()}
    columns |= {"label": pa.string(), "vector": pa.list_(pa.float32(), dim)}
    return pa.schema(columns | ({"clips": pa.int32()} if videos else {}))


def _table(rows: FeatureRows, schema: pa.Schema) -> pa.Table:
    flat = pa.array(np.ascontiguousarray(rows.vector, np.float32).ravel())
    columns = {
        "path": [_utf8(path) for path in rows.path],
        "start": rows.start,
        "end": rows.end,
        "label": [None if label is None else _utf8(label) for label in rows.label],
        "vector": pa.FixedSizeListArray.from_arrays(flat, rows.vector.shape[1]),
    }
    columns |= {} if rows.clips is None else {"clips": rows.clips}
    return pa.table(columns, schema=schema)


def _utf8(name: str) -> str:
    """A name whose bytes are no UTF-8 with those bytes written out."""
    return os.fsencode(name).decode(errors="backslashreplace")
