"""Read-outs by the card's mean and scale on films that are unlike: a threshold on cosines tells them apart."""

from __future__ import annotations

import shutil
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from engine.core.recipe import load_recipe
from engine.core.runtime import choose_runtime
from engine.data.ingest.run import ingest
from engine.data.media.encode import write_video
from engine.data.shards.index import ClipIndex
from engine.features.embed import embed, embed_video
from engine.features.extract import with_statistics
from engine.features.parquet import read_features
from engine.features.segments import EmbedSettings
from engine.model.network_file import Card, ClipInput, card_of
from engine.model.resnet3d import ResNet3D, video_network

CPU = choose_runtime("cpu")


def drawn(folder: Path, count: int, *, seed: int, frames: int = 64) -> list[Path]:
    """Films of a texture each, in a colour of its own, that moves across the picture at a speed of its own."""
    rng = np.random.default_rng(seed)
    folder.mkdir()
    films = []
    for number in range(count):
        small = rng.integers(0, 256, (rng.integers(2, 12), rng.integers(2, 12), 3)).astype(
            np.float32
        )
        texture = small.repeat(8, 0).repeat(8, 1)
        texture = np.tile(texture, (48 // len(texture) + 2, 64 // texture.shape[1] + 2, 1))
        texture *= rng.uniform(0.3, 1.0, 3)
        speed = rng.uniform(-2, 2, 2)
        shown = [
            np.roll(texture, (speed * i).round().astype(int), (0, 1))[:48, :64]
            for i in range(frames)
        ]
        path = folder / f"{number:02d}.mp4"
        write_video(path, [np.ascontiguousarray(f).astype(np.uint8) for f in shown], fps=25)
        films.append(path)
    return films


def network_on(shards: Path) -> tuple[ResNet3D, Card]:
    """An untrained network whose batch norm has seen the shards' clips, and its card with their statistics."""
    recipe = load_recipe("demo")
    torch.manual_seed(0)
    network = video_network(recipe.model)
    card = msgspec.structs.replace(card_of(recipe), input=ClipInput(8, 2, 24))
    seen = np.stack(clips_of(shards, card))
    rgb = torch.from_numpy(seen).float() / 255 - torch.tensor(card.mean)
    with torch.no_grad():
        network.train()((rgb / torch.tensor(card.std)).permute(0, 4, 1, 2, 3))
    state = network.eval().state_dict()
    return network, with_statistics(card, state, ClipIndex([shards]), runtime=CPU)


def clips_of(shards: Path, card: Card) -> list[np.ndarray]:
    from engine.features.extract import Cuts, Extractor

    index = ClipIndex([shards])
    cuts = Cuts(card.input, 1)
    frames = Extractor(index, np.arange(len(index)), cuts=cuts, runtime=CPU)._batches()
    return [clip for batch in frames for clip in batch.numpy()]


def told_apart(network: ResNet3D, card: Card, films: list[Path], out: Path, how: str) -> float:
    """Share of pairs that cosine 0.5 puts right: above it within a film, below it between films; the two averaged."""
    settings = EmbedSettings(readout=how)  # type: ignore[arg-type]
    embed(network, card, videos=films, out=out, settings=settings, runtime=CPU, workers=1)
    rows = read_features(out)
    unit = rows.vector / np.linalg.norm(rows.vector, axis=1, keepdims=True)
    cosine, film = unit @ unit.T, np.array(rows.path)
    same = film[:, None] == film
    within, between = same & ~np.eye(len(film), dtype=bool), ~same
    return float(((cosine[within] > 0.5).mean() + (cosine[between] <= 0.5).mean()) / 2)


def judge(network: ResNet3D, card: Card, films: list[Path], tmp_path: Path) -> None:
    shares = {
        how: told_apart(network, card, films, tmp_path / f"{how}.parquet", how)
        for how in ("raw", "unit", "zscore")
    }
    assert shares["raw"] < 0.6, shares  # all films look alike
    assert min(shares["unit"], shares["zscore"]) > 0.65, shares
    raw = read_features(tmp_path / "raw.parquet").vector.astype(np.float64)
    centred = raw - np.array(card.feature_mean)
    unit = read_features(tmp_path / "unit.parquet").vector
    np.testing.assert_allclose(
        unit, centred / np.linalg.norm(centred, axis=1, keepdims=True), atol=1e-6
    )
    zscore = read_features(tmp_path / "zscore.parquet").vector
    np.testing.assert_allclose(zscore, centred / np.array(card.feature_scale), rtol=1e-5, atol=1e-5)
    alone = embed_video(
        network, card, video=films[0], settings=EmbedSettings(readout="unit"), runtime=CPU
    )
    assert np.array_equal(alone.vector, unit[: len(alone)])


def test_films_that_are_drawn(tmp_path: Path) -> None:
    drawn(tmp_path / "train", 40, seed=1, frames=16)
    ingest([tmp_path / "train"], tmp_path / "shards", short_side=48, workers=1, min_seconds=0.5)
    network, card = network_on(tmp_path / "shards")
    judge(network, card, drawn(tmp_path / "films", 10, seed=2), tmp_path)


def test_real_films(tmp_path: Path, real_data: Path) -> None:
    (tmp_path / "train").mkdir()
    for path in sorted((real_data / "ucf101_subset").glob("*/*.avi"))[::6]:
        shutil.copy(path, tmp_path / "train")
    ingest([tmp_path / "train"], tmp_path / "shards", workers=1)
    network, card = network_on(tmp_path / "shards")
    films = sorted((real_data / "av_vggsound").glob("*.mp4"))[:3]
    judge(network, card, films, tmp_path)


@pytest.mark.parametrize("how", ["unit", "zscore"])
def test_without_statistics_the_read_out_is_refused(tmp_path: Path, how: str) -> None:
    recipe = load_recipe("demo")
    network, card = video_network(recipe.model), card_of(recipe, source="old.safetensors")
    settings = EmbedSettings(readout=how)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=f"old.safetensors does not say .* raw instead of {how}"):
        embed(network, card, videos=[tmp_path], out=tmp_path / "f", settings=settings, runtime=CPU)
