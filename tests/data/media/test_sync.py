"""A flash and a beep at the same moment, from a raw file to the batch that training sees."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from engine.core.recipe import Audio, Clip
from engine.data.ingest.run import ingest
from engine.data.pipeline import InputPipeline
from engine.data.plan import plan_views
from engine.data.shards.index import ClipIndex
from tests.data.films import beep_at, flash_pictures, write_film

FPS, FLASH, COUNT = 25, 40, 100
CASES = {
    "plain": {"sound_from": 0.0},
    "late": {"sound_from": 0.9},
    "early": {"sound_from": -0.7, "start": 1.0},
    "offset": {"sound_from": 0.0, "start": 5.0},
    "offset_late": {"sound_from": 0.52, "start": 5.0},
}
KINDS = ("mp4", "mkv", "webm", "avi", "mov", "ts", "flv", "ogv")


@pytest.fixture(scope="module")
def batch(tmp_path_factory: pytest.TempPathFactory) -> tuple[ClipIndex, dict[str, int]]:
    """Every case in every container, ingested together; gives clip numbers by file name."""
    root = tmp_path_factory.mktemp("sync")
    (root / "videos").mkdir()
    for name, case in CASES.items():
        for kind in KINDS:
            write_film(
                root / "videos" / f"{name}.{kind}",
                flash_pictures(COUNT, FLASH),
                fps=FPS,
                sound=beep_at(FLASH / FPS),
                sound_to=COUNT / FPS,
                sound_codec="pcm_s16le" if kind == "avi" and name != "plain" else None,
                **case,
            )
    report = ingest([root / "videos"], root / "set", short_side=32, workers=1)
    assert not report.rejects
    index = ClipIndex([root / "set"])
    return index, {index.facts(i)["source"]: i for i in range(len(index))}


def loaded(index: ClipIndex, clip: int, first: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean brightness of 50 frames from ``first`` on, and their sound, by the pipeline itself."""
    settings = Clip(num_frames=46, num_future_frames=4, frame_stride=1, size=32, min_area=1.0)
    pipeline = InputPipeline(
        index,
        settings,
        audio=Audio(),
        device=torch.device("cpu"),
        batch_size=1,
        num_frames=50,
        threads=1,
        flow=False,
    )
    plan = replace(
        plan_views(index, settings, clips=np.array([clip]), view=0, num_views=1),
        frames=np.arange(first, first + 50)[None],
        sound_start=np.array([first / index.fps]),
    )
    got = pipeline.load(plan)
    assert got.has_audio.all() and got.wave is not None
    return got.rgb[0].float().mean(dim=(1, 2, 3)).numpy(), got.wave[0].numpy()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CASES)
def test_flash_and_beep_stay_within_20_ms(batch, name: str, kind: str) -> None:
    index, clips = batch
    first = 11
    bright, wave = loaded(index, clips[f"{name}.{kind}"], first)
    flash = int(bright.argmax()) / FPS
    assert bright.max() > bright.mean() + 100
    beep = int(np.argmax(np.abs(wave) > 0.3 * np.abs(wave).max())) / 16000
    assert abs(beep - flash) < 0.02, f"beep {1e3 * (beep - flash):+.1f} ms after the flash"
    assert flash + first / FPS == pytest.approx(FLASH / FPS, abs=0.041)


@pytest.mark.parametrize("kind", KINDS)
def test_what_comes_before_late_sound_is_silent(batch, kind: str) -> None:
    index, clips = batch
    _, wave = loaded(index, clips[f"late.{kind}"], 0)
    assert np.abs(wave[: round(0.8 * 16000)]).max() < 0.02
    assert np.abs(wave[round(1.0 * 16000) : round(1.4 * 16000)]).max() > 0.004  # the hum
