"""Error and cost of the CPU's optical flow: our presets, OpenCV's, and settings around them, by resolution.

    python benchmarks/flow_presets.py FLOW_GT --json benchmarks/results/flow_presets-cpu.jsonl

FLOW_GT holds Middlebury's RubberWhale and two pairs of FlyingChairs with their ground truth.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, get_args

import click
import cv2
import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from engine.core.provenance import provenance
from engine.core.runtime import choose_runtime
from engine.data.flow import FlowPreset, Search, search_for, searcher

FRAMES = 12
"""Of the clip that is timed: eight input and four future frames."""
PAIRS = {
    "RubberWhale": (
        "middlebury_rubberwhale/rubberwhale1.png",
        "middlebury_rubberwhale/rubberwhale2.png",
        "middlebury_rubberwhale/flow10.flo",
    ),
    "chairs 0": tuple(f"flyingchairs/0{n}" for n in ("img0.ppm", "img1.ppm", "flow.flo")),
    "chairs 1": tuple(f"flyingchairs/1{n}" for n in ("img0.ppm", "img1.ppm", "flow.flo")),
}
Grey = NDArray[np.uint8]
Method = Callable[[Grey, Grey], NDArray[np.float32]]


class Case(NamedTuple):
    """Two frames in grey, the flow between them in pixels, and where it is known."""

    first: Grey
    second: Grey
    truth: NDArray[np.float32]
    known: NDArray[np.bool_]


def read_flo(path: Path) -> NDArray[np.float32]:
    """Read a Middlebury .flo file: float32 (H, W, 2) in pixels."""
    data = path.read_bytes()
    width, height = np.frombuffer(data, np.int32, 2, 4)
    return np.frombuffer(data, np.float32, width * height * 2, 12).reshape(height, width, 2)


def load_case(folder: Path, names: tuple[str, ...], side: int) -> Case:
    """Bring a pair and its flow to a short side by area averaging."""
    frames = [cv2.imread(str(folder / name), cv2.IMREAD_GRAYSCALE) for name in names[:2]]
    flow = read_flo(folder / names[2])
    height, width = flow.shape[:2]
    scale = side / min(height, width)
    size = (round(width * scale), round(height * scale))
    known = (np.abs(flow) < 1e6).all(axis=-1)

    def shrink(image: NDArray[Any]) -> NDArray[Any]:
        return cv2.resize(image, size, interpolation=cv2.INTER_AREA)

    share = shrink(known.astype(np.float32))
    truth = shrink(np.where(known[..., None], flow, 0)) / np.maximum(share, 1e-6)[..., None]
    return Case(
        shrink(frames[0]),
        shrink(frames[1]),
        (truth * [size[0] / width, size[1] / height]).astype(np.float32),
        share > 0.5,
    )


def methods(side: int) -> dict[str, tuple[Method, Search | None]]:
    """Everything that is compared at one resolution."""

    def dis(search: Search) -> Method:
        return lambda a, b: searcher(search).calc(a, b, None)

    def opencv(preset: int, scale: int) -> Method:
        def run(a: Grey, b: Grey) -> NDArray[np.float32]:
            one = cv2.DISOpticalFlow_create(preset)
            one.setFinestScale(scale)
            return one.calc(a, b, None)

        return run

    def doubled(a: Grey, b: Grey) -> NDArray[np.float32]:
        large = [cv2.resize(x, None, fx=2, fy=2, interpolation=cv2.INTER_CUBIC) for x in (a, b)]
        flow = searcher(Search(1)).calc(*large, None)
        return cv2.resize(flow, a.shape[::-1], interpolation=cv2.INTER_AREA) / 2

    def filtered(a: Grey, b: Grey) -> NDArray[np.float32]:
        flow = searcher(Search(0)).calc(a, b, None)
        parts = [cv2.medianBlur(np.ascontiguousarray(flow[..., i]), 5) for i in range(2)]
        return np.stack(parts, axis=-1)

    def farneback(a: Grey, b: Grey) -> NDArray[np.float32]:
        return cv2.calcOpticalFlowFarneback(a, b, None, 0.5, 4, 15, 3, 5, 1.2, 0)

    found: dict[str, tuple[Method, Search | None]] = {}
    for name in get_args(FlowPreset):
        search = search_for(name, side)
        found[f"ours: {name}"] = dis(search), search
    for name in ("ULTRAFAST", "FAST", "MEDIUM"):
        for scale in (0, 1, 2):
            preset = getattr(cv2, f"DISOPTICAL_FLOW_PRESET_{name}")
            found[f"OpenCV {name.lower()}, finest scale {scale}"] = opencv(preset, scale), None
    for search in (
        Search(0, stride=5, refinements=2),
        Search(0, stride=3),
        Search(0, patch=6, stride=3, refinements=10),
        Search(0, patch=4, stride=3),
        Search(0, patch=4, stride=2, refinements=10),
        Search(0, patch=4, stride=1, refinements=10),
        Search(0, refinements=20),
    ):
        found[", ".join(f"{k} {v}" for k, v in search._asdict().items())] = dis(search), search
    found["frames doubled, finest scale 1"] = doubled, None
    found["finest scale 0, median 5x5"] = filtered, None
    found["Farneback"] = farneback, None
    return found


def clip_of(case: Case, side: int) -> list[Grey]:
    """A square clip that goes to and fro between a pair's frames."""
    frames = []
    for i in range(FRAMES):
        image = (case.first, case.second)[i % 2]
        top, left = ((n - side) // 2 for n in image.shape)
        frames.append(np.ascontiguousarray(image[top : top + side, left : left + side]))
    return frames


def clip_milliseconds(methods: list[Method], clips: list[list[Grey]]) -> list[float]:
    """Median over rounds in which the methods take turns."""
    times: list[list[float]] = [[] for _ in methods]
    for _ in range(3):
        for clip in clips:
            for method, own in zip(methods, times, strict=True):
                began = time.perf_counter()
                for a, b in pairwise(clip):
                    method(a, b)
                own.append(1e3 * (time.perf_counter() - began))
    return [float(np.median(own)) for own in times]


def rows_at(side: int, folder: Path, facts: dict[str, Any]) -> list[dict[str, Any]]:
    """One row a method: end-point errors, their shares of zero flow's, and the time for a clip."""
    cases = {name: load_case(folder, names, side) for name, names in PAIRS.items()}
    compared = methods(side)
    clips = [clip_of(case, side) for case in cases.values()]
    times = clip_milliseconds([method for method, _ in compared.values()], clips)
    rows = []
    for (name, (method, search)), milliseconds in zip(compared.items(), times, strict=True):
        errors, shares = {}, {}
        for pair, case in cases.items():
            flow = method(case.first, case.second)
            error = np.linalg.norm(flow - case.truth, axis=-1)[case.known].mean()
            zero = np.linalg.norm(case.truth, axis=-1)[case.known].mean()
            errors[pair], shares[pair] = float(error), float(error / zero)
        rows.append(
            {
                "benchmark": "flow_presets",
                "method": name,
                "search": None if search is None else search._asdict(),
                "side": side,
                "endpoint_error_px": errors,
                "share_of_zero_flow": shares,
                "ms_per_clip": milliseconds,
                "frames": FRAMES,
                "opencv": cv2.__version__,
                **facts,
            }
        )
    return rows


def table_of(rows: list[dict[str, Any]], side: int) -> Table:
    table = Table(title=f"short side {side}: share of zero flow's error")
    for column in ("method", *PAIRS, f"ms a clip of {FRAMES}"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for row in rows:
        shares = [f"{row['share_of_zero_flow'][pair]:.2f}" for pair in PAIRS]
        table.add_row(row["method"], *shares, f"{row['ms_per_clip']:.1f}")
    return table


@click.command()
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--side", "sides", type=int, multiple=True, default=(48, 64, 112, 128, 224))
@click.option("--json", "out", type=click.Path(path_type=Path), help="Append a row a method.")
def main(folder: Path, sides: tuple[int, ...], out: Path | None) -> None:
    """Print a table a resolution."""
    facts = {"seed": None, "recipe_hash": None, **provenance(choose_runtime(amp="off"))}
    facts.pop("command")  # it holds paths of this machine
    for side in sides:
        rows = rows_at(side, folder, facts)
        Console(width=120).print(table_of(rows, side))
        if out is not None:
            out.parent.mkdir(parents=True, exist_ok=True)
            with out.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)


if __name__ == "__main__":
    main()
