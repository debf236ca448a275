"""Groups of sources that share a shard; their borders depend on the sources' names near them, not on their number.

A new or changed file therefore changes the shard that it falls into (or splits it in two), and all others are
kept: a group's fingerprint says whether its shard is already there.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from engine.data.ingest.cut import Settings
from engine.data.ingest.sources import Source
from engine.data.media.decode import SAMPLE_RATE

LEAST, MOST = 256, 1024
"""Weight of a group: a source counts 1, and 1 more for each WEIGHED_BYTES."""
WEIGHED_BYTES = 1 << 24
ONE_IN = 128
"""Sources of which one, by its name, ends a group that is heavy enough."""
EVERY = 10_000
"""Sources between two calls of ``progress``."""


@dataclass(frozen=True)
class Group:
    """The sources of one shard."""

    fingerprint: str
    """32 hex digits: of the settings and of each source's name, stretch, label, splits, size and time of change."""
    sources: Sequence[Source]
    prints: Sequence[bytes]
    """Each source's own fingerprint."""

    @property
    def shard(self) -> str:
        """The shard's file name."""
        return f"shard-{self.fingerprint[:16]}.tar"


def group(
    sources: Sequence[Source],
    settings: Settings,
    *,
    progress: Callable[[int], None] | None = None,
) -> list[Group]:
    """Divide sources, in their order, into groups; files are looked up, and not read.

    ``progress`` is called with the number of sources looked up.
    """
    base = json.dumps([settings.identity(), SAMPLE_RATE]).encode()
    groups: list[Group] = []
    inside: list[Source] = []
    prints: list[bytes] = []
    weight = 0

    def close() -> None:
        nonlocal weight
        whole = hashlib.sha256(b"".join(prints)).hexdigest()[:32]
        groups.append(Group(whole, tuple(inside), tuple(prints)))
        inside.clear()
        prints.clear()
        weight = 0

    for number, source in enumerate(sources):
        if progress is not None and number % EVERY == 0:
            progress(number)
        size, changed = source.state()
        facts = [source.relative, source.label, source.start, source.end, source.splits]
        facts += [source.may_be_trimmed, source.twin, size, changed]
        inside.append(source)
        prints.append(hashlib.sha256(base + json.dumps(facts).encode()).digest()[:16])
        weight += 1 + size // WEIGHED_BYTES
        name = hashlib.sha256(source.relative.encode(errors="surrogateescape")).digest()
        ends = int.from_bytes(name[:4], "little") % ONE_IN == 0
        if weight >= MOST or (ends and weight >= LEAST):
            close()
    if inside:
        close()
    return groups


def clip_key(source: Source, number: int) -> str:
    """The name of a source's clip in its shard: 16 hex digits of the source's name, and the clip's number in it."""
    name = json.dumps([source.relative, source.start, source.end, source.twin])
    return f"{hashlib.sha256(name.encode()).hexdigest()[:16]}-{number:04d}"
