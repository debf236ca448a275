"""Features of videos as a file: what a row is, and that kills, damage and bad files change no other row."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from sklearn.preprocessing import normalize

from engine.core.recipe import load_recipe, override
from engine.core.runtime import choose_runtime
from engine.data.ingest.run import ingest
from engine.data.media.encode import write_video
from engine.data.shards.index import ClipIndex
from engine.features import embed as embed_module
from engine.features import segments
from engine.features.embed import EmbedReport, embed, embed_video
from engine.features.extract import LabelledClips
from engine.features.parquet import FeatureRows, read_features
from engine.features.segments import Cutting, EmbedSettings
from engine.model.network_file import Card, ClipInput, load_network, save_network
from engine.model.resnet3d import ResNet3D

ROOT = Path(__file__).resolve().parents[2]
CPU = choose_runtime("cpu")
INPUT = ClipInput(num_frames=4, frame_stride=2, size=32)  # 8 frames, 0.32 s at 25 frames/s
COLOURS = np.random.default_rng(3).integers(0, 256, (12, 3))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny network whose batch norm has seen some clips."""
    torch.manual_seed(0)
    network = ResNet3D("r3d_18", 3, width=0.125, pool=True).train()
    with torch.no_grad():
        for _ in range(3):
            network(torch.randn(8, 3, 4, 32, 32))
    path = tmp_path_factory.mktemp("run") / "rgb.safetensors"
    card = Card(arch="r3d_18", width=0.125, pool=True, input=INPUT)
    save_network(path, network.state_dict(), card)
    return path


def coloured(path: Path, *, frames: int = 29, fps: int = 25, every: int = 8) -> Path:
    """A film whose colour changes every so many frames."""
    path.parent.mkdir(parents=True, exist_ok=True)
    shown = [COLOURS[i // every] for i in range(frames)]
    pictures = [np.broadcast_to(c.astype(np.uint8), (48, 64, 3)).copy() for c in shown]
    write_video(path, pictures, fps=fps)
    return path


def expected(network: ResNet3D, card: Card, colours: list[Any]) -> np.ndarray[Any, Any]:
    """The features of still clips, each of one colour, by hand."""
    mean, std = torch.tensor(card.mean), torch.tensor(card.std)
    rgb = (torch.tensor(np.array(colours)) / 255 - mean) / std
    clips = rgb.float()[:, :, None, None, None].expand(-1, -1, 4, 32, 32)
    with torch.no_grad():
        return network(clips.contiguous()).numpy()


def run(checkpoint: Path, out: Path, *videos: Path, **options: Any) -> EmbedReport:
    network, card = load_network(checkpoint)
    workers = options.pop("workers", 1)
    settings = EmbedSettings(**{"batch_size": 4, **options})
    return embed(
        network, card, videos=videos, out=out, settings=settings, runtime=CPU, workers=workers
    )


def close(rows: FeatureRows, wanted: np.ndarray[Any, Any]) -> None:
    """Equal up to what storing colours as JPEG costs, and no other order of rows is as near."""
    scale = np.abs(wanted - wanted.mean(0)).mean()
    distance = np.abs(rows.vector[:, None] - wanted).mean(2) / scale
    assert (np.diag(distance) < 0.1).all(), distance
    assert (distance.argmin(1) == np.arange(len(wanted))).all(), distance


def test_a_raw_video_is_cut_end_to_end(tmp_path: Path, checkpoint: Path) -> None:
    video = coloured(tmp_path / "films" / "red" / "a.mp4")  # 29 frames: three clips and 5 frames
    out = tmp_path / "new" / "features.parquet"
    report = run(checkpoint, out, tmp_path / "films")
    rows = read_features(out)
    assert report.rows == len(rows) == 4 and not report.rejects
    assert rows.path == [str(video)] * 4 and rows.label == ["red"] * 4
    np.testing.assert_allclose(rows.start, [0, 0.32, 0.64, 0.96], atol=1e-9)
    np.testing.assert_allclose(rows.end, [0.32, 0.64, 0.96, 1.16], atol=1e-9)
    network, card = load_network(checkpoint)
    close(rows, expected(network, card, list(COLOURS[:4])))
    alone = embed_video(
        network, card, video=video, settings=EmbedSettings(batch_size=4), runtime=CPU
    )
    assert np.array_equal(alone.vector, rows.vector)
    assert not (out.parent / ".features.parquet.parts").exists()
    assert not Path(f"{out}.rejects.jsonl").exists()


def test_vectors_are_scaled_by_the_card_after_averaging(tmp_path: Path, checkpoint: Path) -> None:
    coloured(tmp_path / "films" / "a.mp4", frames=40)
    coloured(tmp_path / "films" / "b.mp4", frames=24)
    network, plain = load_network(checkpoint)
    rng = np.random.default_rng(0)
    mean, scale = (tuple(rng.uniform(0.1, 1, 64).astype(np.float32).tolist()) for _ in range(2))
    card = msgspec.structs.replace(plain, feature_mean=mean, feature_scale=scale)
    how = {"per": "video", "batch_size": 4}
    for name, settings, made in (
        ("raw", EmbedSettings(**how), plain),
        ("same", EmbedSettings(**how), card),
        ("unit", EmbedSettings(**how, readout="unit"), card),
        ("zscore", EmbedSettings(**how, readout="zscore"), card),
    ):
        embed(
            network,
            made,
            videos=[tmp_path / "films"],
            out=tmp_path / name,
            settings=settings,
            runtime=CPU,
            workers=1,
        )
    raw, same, unit, zscore = (
        read_features(tmp_path / name).vector for name in ("raw", "same", "unit", "zscore")
    )
    assert np.array_equal(raw, same)
    centred = raw - np.float64(mean)
    np.testing.assert_allclose(unit, normalize(centred), rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(zscore, centred / np.float64(scale), rtol=1e-6, atol=1e-7)
    about = {name: pq.read_schema(tmp_path / name).metadata for name in ("raw", "same", "unit")}
    assert about["raw"][b"identity"] == about["same"][b"identity"] != about["unit"][b"identity"]
    assert b"centred features of unit length, by mean and scale" in about["unit"][b"protocol"]


def test_settings_say_how_long_and_how_often(tmp_path: Path, checkpoint: Path) -> None:
    """Clips of 16 frames every 8: each sees two colours, by a view each."""
    coloured(tmp_path / "a.mp4", frames=40)
    run(checkpoint, tmp_path / "f", tmp_path / "a.mp4", clip_seconds=0.64, every=0.32, views=2)
    rows = read_features(tmp_path / "f")
    # the last but one is as long as the others; of the last one half is left, which is enough
    np.testing.assert_allclose(rows.start, np.arange(5) * 0.32, atol=1e-9)
    np.testing.assert_allclose(rows.end - rows.start, [0.64] * 4 + [0.32], atol=1e-9)
    # views of 7 frames in 16 begin at floor(9 / 4) and floor(27 / 4): frames 2 4 6 8, and 6 8 10 12
    network, card = load_network(checkpoint)
    short = Cutting.of(card.input, EmbedSettings(clip_seconds=0.64, every=0.32))
    assert (short.length, short.every, short.least) == (16, 8, 8)
    still = expected(network, card, list(COLOURS[:5]))
    nearest = np.abs(rows.vector[:, None] - still).mean(2).argmin(1)
    assert set(nearest - np.arange(5)) <= {0, 1} and nearest[-1] == 4
    with pytest.raises(ValueError, match="a frame or more"):
        run(checkpoint, tmp_path / "g", tmp_path / "a.mp4", every=0.001)


def test_a_long_video_is_stored_in_several_clips_and_misses_nothing(
    tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(segments, "STORED_SECONDS", 0.7)  # two stretches, 0.64 s
    coloured(tmp_path / "a.mp4", frames=8 * 9 + 3)
    run(checkpoint, tmp_path / "f", tmp_path / "a.mp4")
    rows = read_features(tmp_path / "f")
    np.testing.assert_allclose(rows.start, np.arange(9) * 0.32, atol=1e-9)
    network, card = load_network(checkpoint)
    close(rows, expected(network, card, list(COLOURS[:9])))


def test_a_listed_stretch_is_not_left(tmp_path: Path, checkpoint: Path) -> None:
    coloured(tmp_path / "a.mp4", frames=80)
    (tmp_path / "list.csv").write_text(
        "path,label,start,end\na.mp4,x,0.64,1.28\nnone.mp4,x,,\na.mp4,y,1.92,2.24\n"
    )
    report = run(checkpoint, tmp_path / "f", tmp_path / "list.csv")
    rows = read_features(tmp_path / "f")
    np.testing.assert_allclose(rows.start, [0.64, 0.96, 1.92], atol=1e-9)
    assert rows.label == ["x", "x", "y"]
    network, card = load_network(checkpoint)
    close(rows, expected(network, card, list(COLOURS[[2, 3, 6]])))
    assert [r["path"] for r in report.rejects] == ["none.mp4"]
    told = [json.loads(line) for line in Path(f"{tmp_path / 'f'}.rejects.jsonl").open()]
    assert told == report.rejects
    assert pq.read_schema(tmp_path / "f").metadata[b"rejected"] == b"1"


def test_shards_give_what_fitness_sees(tmp_path: Path, tiny_shards: Path, checkpoint: Path) -> None:
    """By another way through the engine: the features of the labelled clips."""
    network, _ = load_network(checkpoint)
    recipe = override(
        load_recipe("demo"),
        [
            "clip.num_frames=4",
            "clip.size=32",
            "fitness.views_per_clip=2",
            "fitness.batch_norm=running",
        ],
    )
    index = ClipIndex([tiny_shards / "labelled"])
    (wanted,) = LabelledClips(index, recipe, runtime=CPU).features([network])
    run(checkpoint, tmp_path / "f", tiny_shards / "labelled", views=2)
    rows = read_features(tmp_path / "f")
    np.testing.assert_allclose(rows.vector, wanted.numpy(), rtol=1e-4, atol=1e-5)
    facts = [index.facts(i) for i in range(len(index))]
    assert rows.path == [f["source"] for f in facts] and rows.label == [f["class"] for f in facts]
    np.testing.assert_allclose(rows.end - rows.start, index.duration)


def test_videos_are_means_over_their_clips_in_whatever_chunks(
    tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for i, frames in enumerate((29, 8, 80)):
        coloured(tmp_path / "films" / f"{i}.mp4", frames=frames)
    cut = {"clip_seconds": 0.32, "every": 0.32, "min_seconds": 0.16, "workers": 1}
    ingest([tmp_path / "films"], tmp_path / "shards", short_side=32, **cut)
    monkeypatch.setattr(segments, "CLIPS_A_CHUNK", 3)  # a video's clips in several chunks
    for name in ("films", "shards"):
        source = tmp_path / name
        run(checkpoint, tmp_path / "clips", source)
        run(checkpoint, tmp_path / "videos", source, per="video")
        clips, videos = read_features(tmp_path / "clips"), read_features(tmp_path / "videos")
        for i, path in enumerate(dict.fromkeys(clips.path)):
            own = [k for k, other in enumerate(clips.path) if other == path]
            wanted = clips.vector[own].astype(np.float64).mean(0)
            np.testing.assert_allclose(videos.vector[i], wanted, rtol=1e-6, atol=1e-7)
            assert videos.path[i] == path
            assert (videos.start[i], videos.end[i]) == (clips.start[own[0]], clips.end[own[-1]])
        assert videos.clips is not None and videos.clips.sum() == len(clips)
        assert len(videos) == 3
        (tmp_path / "clips").unlink()
        (tmp_path / "videos").unlink()


def test_a_kill_after_the_file_is_there_loses_no_reject(
    tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    films, merged = tmp_path / "films", embed_module.merge_parts
    coloured(films / "good.mp4")
    (films / "noise.mp4").write_bytes(os.urandom(4000))

    def merge_parts(*parts: Any, **how: Any) -> Any:
        merged(*parts, **how)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(embed_module, "merge_parts", merge_parts)
        with pytest.raises(KeyboardInterrupt):
            run(checkpoint, tmp_path / "f", films)
    report = run(checkpoint, tmp_path / "f", films)
    assert [Path(reject["path"]).name for reject in report.rejects] == ["noise.mp4"]


def test_what_gives_no_row_is_told(tmp_path: Path, checkpoint: Path) -> None:
    films = tmp_path / "films"
    coloured(films / "good.mp4")
    coloured(films / "short.mp4", frames=3)
    (films / "noise.mp4").write_bytes(os.urandom(4000))
    report = run(checkpoint, tmp_path / "f", films)
    reasons = {Path(r["path"]).name: r["reason"] for r in report.rejects}
    assert reasons.keys() == {"short.mp4", "noise.mp4"} and report.rows == 4
    assert "less than 0.16 s" in reasons["short.mp4"]
    (films / "good.mp4").unlink()
    with pytest.raises(ValueError, match="no video gave a row: 2 were rejected") as caught:
        run(checkpoint, tmp_path / "g", films)
    assert str(films) in str(caught.value) and not (tmp_path / "g").exists()
    assert len(Path(f"{tmp_path / 'g'}.rejects.jsonl").read_text().splitlines()) == 2
    network, card = load_network(checkpoint)
    with pytest.raises(ValueError, match=r"noise.mp4: can't be opened"):
        embed_video(network, card, video=films / "noise.mp4", runtime=CPU)


def test_a_film_that_breaks_off_is_told(tmp_path: Path, checkpoint: Path, real_data: Path) -> None:
    broken = real_data / "odd" / "decord" / "corrupted.mp4"
    report = run(checkpoint, tmp_path / "f", broken)
    rows = read_features(tmp_path / "f")
    (reject,) = report.rejects
    assert "decoding stops at 2.80 s" in reject["reason"] and reject["path"] == str(broken)
    assert rows.end.max() == pytest.approx(2.8, abs=0.01)


def test_a_damaged_clip_is_no_other_clip(
    tmp_path: Path, tiny_shards: Path, checkpoint: Path
) -> None:
    """Training takes another clip in its place; features of it would lie."""
    shards = tmp_path / "shards"
    shutil.copytree(tiny_shards / "unlabelled", shards)
    run(checkpoint, tmp_path / "whole", shards)
    (tar,) = shards.glob("*.tar")
    data = bytearray(tar.read_bytes())
    at = data.index(b"\xff\xd8\xff", len(data) // 2)
    data[at : at + 2] = b"\0\0"
    tar.write_bytes(data)
    index = ClipIndex([shards], warn=lambda _: None)
    for clip in range(len(index)):
        index.read(clip, range(int(index.num_frames[clip])))
    (bad,) = index.substituted
    # the frame that is damaged must be one that is looked at: take views all over the clip
    report = run(checkpoint, tmp_path / "f", shards, views=40)
    run(checkpoint, tmp_path / "one", tiny_shards / "unlabelled", views=40)
    whole, rows = read_features(tmp_path / "one"), read_features(tmp_path / "f")
    keep = np.arange(len(whole)) != bad
    assert [r["path"] for r in report.rejects] == [index.facts(bad)["source"]]
    assert "damaged" in report.rejects[0]["reason"]
    assert rows.path == [p for p, k in zip(whole.path, keep, strict=True) if k]
    np.testing.assert_allclose(rows.vector, whole.vector[keep], rtol=1e-5, atol=1e-6)


def test_the_same_again_does_nothing_and_another_does_not_overwrite(
    tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    video, out = coloured(tmp_path / "a.mp4"), tmp_path / "f"
    run(checkpoint, out, video)
    before = out.stat().st_mtime_ns
    again = run(checkpoint, out, video)
    assert again.rows == 4 and out.stat().st_mtime_ns == before
    for other in ({"views": 2}, {"per": "video"}):
        with pytest.raises(ValueError, match="not with these features"):
            run(checkpoint, out, video, **other)
    torch.manual_seed(5)
    network = ResNet3D("r3d_18", 3, width=0.125, pool=True)
    card = Card(arch="r3d_18", width=0.125, pool=True, input=INPUT)
    save_network(tmp_path / "other.safetensors", network.state_dict(), card)
    with pytest.raises(ValueError, match="not with these features"):
        run(tmp_path / "other.safetensors", out, video)
    out.write_text("something else")
    with pytest.raises(ValueError, match="give another --out, or delete it"):
        run(checkpoint, out, video)
    assert out.read_text() == "something else"
    assert not out.with_name(".f.parts").exists()


def test_features_that_are_not_finite_are_rejected(tmp_path: Path, checkpoint: Path) -> None:
    network, card = load_network(checkpoint)
    with torch.no_grad():
        network.stem[0].weight.fill_(float("inf"))  # type: ignore[operator]
    save_network(tmp_path / "nan.safetensors", network.state_dict(), card)
    with pytest.raises(ValueError, match="its features are not finite"):
        run(tmp_path / "nan.safetensors", tmp_path / "f", coloured(tmp_path / "a.mp4"))


@pytest.mark.parametrize("done", [0, 1, 3])
def test_after_an_error_the_rest_is_done(
    tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, done: int
) -> None:
    for i in range(8):
        coloured(tmp_path / "films" / f"{i}.mp4", frames=20 + i)
    (tmp_path / "films" / "bad.mp4").write_bytes(b"no video")
    run(checkpoint, tmp_path / "whole", tmp_path / "films")
    written: list[Path] = []
    write = embed_module.write_part

    def stop(path: Path, rows: FeatureRows) -> None:
        if len(written) == done:
            raise KeyboardInterrupt
        write(path, rows)
        written.append(path)

    with monkeypatch.context() as patched:
        patched.setattr(embed_module, "write_part", stop)
        with pytest.raises(KeyboardInterrupt):
            run(checkpoint, tmp_path / "f", tmp_path / "films")
    assert not (tmp_path / "f").exists()
    report = run(checkpoint, tmp_path / "f", tmp_path / "films")
    assert report.reused == done
    assert (tmp_path / "f").read_bytes() == (tmp_path / "whole").read_bytes()
    rejects = [Path(f"{tmp_path / name}.rejects.jsonl").read_text() for name in ("f", "whole")]
    assert rejects[0] == rejects[1] != ""


@pytest.mark.slow
def test_a_killed_command_goes_on(tmp_path: Path, checkpoint: Path) -> None:
    """By SIGKILL as soon as something is done, with processes that cut, as a user runs it."""
    for i in range(12):
        coloured(tmp_path / "films" / f"{i}.mp4", frames=75, every=40)
    program = "from engine.cli.main import main; main()"

    def start(name: str) -> subprocess.Popen[bytes]:
        options = ["--checkpoint", checkpoint, "--out", tmp_path / name, "--workers", 2]
        command = [sys.executable, "-c", program, "embed", tmp_path / "films", *options]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(list(map(str, command)), env=environment, stdout=-1, stderr=-1)

    assert start("whole").wait() == 0
    process = start("f")
    parts = tmp_path / ".f.parts"
    while process.poll() is None and not list(parts.glob("*.parquet")):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "f").exists(), "too fast to be killed in the middle"
    again = start("f")
    assert again.wait() == 0, again.communicate()
    assert (tmp_path / "f").read_bytes() == (tmp_path / "whole").read_bytes()
    assert not parts.exists()
