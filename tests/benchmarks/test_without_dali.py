"""The stand-in for DALI of machines that lack it: the same batches, up to a resize filter's rounding."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.core.recipe import Audio, Clip
from engine.data import pipeline
from engine.data.pipeline import InputPipeline
from engine.data.plan import plan_batch
from engine.data.shards.index import ClipIndex

ROOT = Path(__file__).resolve().parents[2]
CHECKS = ROOT / "benchmarks" / "gpu_checks"


@pytest.mark.parametrize("codec", ["jpeg", "vp9"])
def test_batches_are_dalis(
    tiny_demo: Path, tmp_path: Path, codec: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from engine.data.ingest.run import ingest

    folder = tmp_path / "shards"
    ingest([tiny_demo / "unlabelled"], folder, short_side=64, workers=1, codec=codec)
    index, clip, audio = ClipIndex([folder]), Clip(size=48), Audio()
    sizes = {"device": torch.device("cpu"), "batch_size": 6, "num_frames": 12, "threads": 1}
    plan = plan_batch(index, clip, audio, seed=0, step=0, batch_size=6)
    want = InputPipeline(index, clip, audio=audio, **sizes, flow=False).load(plan)
    spec = importlib.util.spec_from_file_location("stand_in", CHECKS / "without_dali.py")
    stand_in = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "stand_in", stand_in)
    spec.loader.exec_module(stand_in)
    for name in ("frames_graph", "films_graph", "sound_graph", "to_torch"):
        monkeypatch.setattr(pipeline, name, getattr(stand_in, name))
    got = InputPipeline(index, clip, audio=audio, **sizes, flow=False).load(plan)
    error = (got.rgb.float() - want.rgb.float()).square().mean().item()
    assert 10 * np.log10(255**2 / error) > 28
    for name in ("wave", "wave_shifted"):
        torch.testing.assert_close(getattr(got, name), getattr(want, name), rtol=0, atol=1e-4)


def test_a_process_without_dali_gets_it() -> None:
    code = (
        "import sys; sys.modules['nvidia'] = None; import sitecustomize as s; "
        "print(s.absent()); sys.meta_path.insert(0, s.Finder()); "
        "import engine.data.dali as d; print(d.STAND_IN)"
    )
    path = os.pathsep.join([str(CHECKS / "site"), str(ROOT)])
    environment = {**os.environ, "PYTHONPATH": path}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.stdout.split() == ["True", "True"], done.stderr
