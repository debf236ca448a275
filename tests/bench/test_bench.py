"""``engine bench`` on sizes that take seconds: every part's rows, files, and what a user can get wrong."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from engine.bench import limits, timing
from engine.bench.rows import Row, read_json
from engine.cli.main import main

TINY = Path(__file__).parents[1] / "tiny.toml"


@pytest.fixture(autouse=True)
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A working folder of its own, and limits that are measured in no time."""
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setitem(limits.COPY_BYTES, "cpu", 2**22)
    monkeypatch.setitem(limits.MATRIX_SIDES, "cpu", (128,))
    monkeypatch.setitem(timing.FLUSH_BYTES, "cpu", 2**20)
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic)


def call(*arguments: object, code: int = 0) -> str:
    """Run the command; its output, or where it fails its one line."""
    result = CliRunner().invoke(main, ["bench", *map(str, arguments)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == code, (result.output, result.stderr)
    if code:
        lines = result.stderr.splitlines()
        assert len(lines) == 1 and lines[0].startswith("engine: "), result.stderr
        return lines[0]
    return result.stdout


def rows_of(part: str, *more: object) -> tuple[list[Row], str]:
    options = ("--quick", "--device", "cpu", "--recipe", TINY, "--json", "rows.jsonl")
    out = call(part, *options, *more)
    rows = read_json(Path("rows.jsonl"))
    assert all(row.part == part and row.ms[0] <= row.ms[1] <= row.ms[2] for row in rows)
    assert all(row.throughput > 0 and row.repeats >= 1 for row in rows)
    assert all(row.name in out for row in rows)
    for row in rows:
        assert row.limit is None or (row.limit.value > 0 and row.percent is not None)
        assert {"device", "versions", "git_sha", "seed", "started", "recipe_hash"} <= set(row.about)
    return rows, out


def test_views() -> None:
    rows, _ = rows_of("views", "--plot", "roof.svg")
    assert [row.name for row in rows] == ["kernels.clip_views", "eager"]
    assert [row.peer for row in rows] == [False, True]
    pixels = 4 * 6 * 32 * 32
    assert all(row.bytes == pixels * 19 and row.flops == pixels * 13 for row in rows)
    assert all(row.limit is not None and row.limit.unit == "GB/s" for row in rows)
    assert "roofline" not in Path("roof.svg").read_text()[:200] and Path("roof.svg").stat().st_size


def test_loss() -> None:
    rows, _ = rows_of("loss")
    assert [row.name for row in rows] == ["kernels.weighted_loss", "eager sum of mse_loss"]
    # three sides, three modalities, four bytes; the pooled maps of four clips of 4x32x32, 8 to 64 channels
    maps = [8 * 2 * 8 * 8, 8 * 2 * 8 * 8, 16 * 4 * 4, 32 * 2 * 2, 64]
    assert all(row.bytes == 3 * 3 * 4 * 4 * sum(maps) for row in rows)


def test_a_peer_that_computes_something_else_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.bench.loss.F.mse_loss", lambda s, t: (s - t).abs().mean())
    rows, out = rows_of("loss")
    assert [row.name for row in rows] == ["kernels.weighted_loss"]
    assert "eager sum of mse_loss is left out" in out


def test_kmeans() -> None:
    rows, _ = rows_of("kmeans")
    names = ["batched, all at once", "batched, one by one", "scikit-learn"]
    assert [row.name for row in rows] == names
    fitnesses = [row.figures["fitness"] for row in rows]
    assert fitnesses[0] == fitnesses[1] and min(fitnesses) > 0.2
    assert len({row.flops for row in rows}) == 1 and all(row.percent is not None for row in rows)


def test_input(tiny_shards: Path) -> None:
    rows, out = rows_of("input", "--videos", tiny_shards / "unlabelled")
    assert [row.stage for row in rows] == ["read", "decode", "sound", "flow", "views", "input"]
    assert all(row.limit is not None for row in rows)
    assert "bottleneck of input: " in out.splitlines()[-1]


@pytest.mark.slow
def test_step(tiny_shards: Path) -> None:
    rows, _ = rows_of("step", "--videos", tiny_shards / "unlabelled", "--plot", "roof.png")
    names = [row.name for row in rows]
    assert names[:2] == ["eager float32", "eager bf16"]
    assert rows[0].stage == "step" and not rows[0].peer
    assert all(row.flops == rows[0].flops and row.flops for row in rows)
    assert all(row.limit is not None and row.limit.unit == "TFLOP/s" for row in rows)
    assert Path("roof.png").stat().st_size > 1000


@pytest.mark.slow
def test_cohort(tiny_shards: Path) -> None:
    rows, out = rows_of("cohort", "--videos", tiny_shards / "unlabelled")
    cohort = next(row for row in rows if row.name == "one cohort")
    alone = next(row for row in rows if row.peer)
    gain = alone.ms[1] / cohort.ms[1]
    assert cohort.figures["gain"] == pytest.approx(gain)
    d, c = cohort.figures["D, ms"], cohort.figures["C, ms"]
    assert cohort.figures["possible gain"] == pytest.approx(4 * (d + c) / (d + 4 * c))
    assert cohort.percent == pytest.approx(100 * cohort.figures["share of the possible gain"])
    assert cohort.throughput == pytest.approx(4 * 3.6e6 / (3 * cohort.ms[1]))  # of three steps
    assert "times one process a member" in out


def test_compare(tmp_path: Path) -> None:
    rows_of("views")
    Path("rows.jsonl").rename("first.jsonl")
    rows_of("views", "--set", "clip.size=48")
    out = call("--compare", "first.jsonl", "first.jsonl")
    assert out.count("1.00") >= 2 and "only in" not in out
    out = call("--compare", "first.jsonl", "rows.jsonl")
    assert out.count("only in first.jsonl") == out.count("only in rows.jsonl") == 2


def test_what_a_user_can_get_wrong(tmp_path: Path) -> None:
    assert "did you mean kmeans" in call("kmean", code=2)
    assert "parts: input, views" in call("decoding", code=2)
    assert "nothing" in call("views", "--recipe", "nothing", code=2)
    assert "optim.stepz" in call("views", "--set", "optim.stepz=3", code=2)
    assert ".png or .svg" in call("views", "--plot", "roof.gif", code=2)
    assert "--json" in call("views", "--json", tmp_path / "none" / "rows.jsonl", code=2)
    assert "no such file" in call("input", "--videos", tmp_path / "none", code=2)
    assert "none.jsonl" in call("--compare", "none.jsonl", "none.jsonl", code=2)
    if not torch.cuda.is_available():
        assert "no CUDA GPU" in call("views", "--device", "cuda", code=2)
