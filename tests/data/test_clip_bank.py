"""The bank's batches against the pipeline's of the same plan, and what decides which clips are in it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from engine.core.recipe import Audio, Clip, RecipeError, load_recipe, override
from engine.core.runtime import choose_runtime, make_deterministic
from engine.data.clip_bank import ClipBank, bank_bytes
from engine.data.ingest.run import ingest
from engine.data.pipeline import ClipBatch, InputPipeline
from engine.data.plan import ClipPlan, plan_batch
from engine.data.shards.index import ClipIndex
from engine.features.extract import LabelledClips
from engine.objective.terms import check_weights
from engine.search.cohort import evaluate_cohort
from engine.search.members import Proposal
from engine.train.memory import CohortMemory
from engine.train.trainer import Trainer

CPU = torch.device("cpu")
AUDIO = Audio()
CLIP = Clip(num_frames=4, num_future_frames=2, size=32, min_area=0.4)
"""At a short side of 48, the bank keeps frames as they are stored."""
TINY = Path(__file__).parents[1] / "tiny.toml"


@pytest.fixture(scope="module")
def index(tiny_shards: Path) -> ClipIndex:
    return ClipIndex([tiny_shards / "unlabelled", tiny_shards / "labelled"])


@pytest.fixture(scope="module")
def bank(index: ClipIndex) -> ClipBank:
    return bank_of(index)


def bank_of(index: ClipIndex, clip: Clip = CLIP, *, size: int | str = 6, seed: int = 0) -> ClipBank:
    return ClipBank(index, clip, audio=AUDIO, size=size, seed=seed, device=CPU)


def planned(bank: ClipBank, clip: Clip = CLIP, *, step: int = 0, batch_size: int = 8) -> ClipPlan:
    return plan_batch(bank, clip, AUDIO, seed=5, step=step, batch_size=batch_size)


def piped(index: ClipIndex, bank: ClipBank, plan: ClipPlan, *, clip: Clip = CLIP) -> ClipBatch:
    """What the pipeline gives for the same crops, in shares of whole frames instead of the bank's squares."""
    clips = bank.clips[plan.clip]
    places = bank.places[plan.clip]
    box = plan.box.astype(np.float64)
    share = box[:, 2]
    for axis, length in ((0, index.width[clips]), (1, index.height[clips])):
        side = np.minimum(index.width[clips], index.height[clips])
        at = places[:, axis] * (length - side) + box[:, axis] * (1 - share) * side
        box[:, axis] = at / np.maximum(length - share * side, 1e-9)
    pipeline = InputPipeline(
        index,
        clip,
        audio=AUDIO,
        device=CPU,
        batch_size=len(plan),
        num_frames=clip.num_frames + clip.num_future_frames,
        threads=1,
    )
    return pipeline.load(replace(plan, clip=clips, box=box.astype(np.float32)))


def test_frames_and_sound_are_the_pipelines(index: ClipIndex, bank: ClipBank) -> None:
    assert bank.side == index.height.min() == 48
    for step in range(3):
        plan = planned(bank, step=step)
        ours, theirs = bank.load(plan, flow=True, sound=True), piped(index, bank, plan)
        assert plan.flip.any() and not plan.flip.all()
        off = (ours.rgb.int() - theirs.rgb.int()).abs()
        assert off.float().mean() < 0.02 and off.max() < 20
        assert off[:, :, 1:-1, 1:-1].max() <= 1  # rounding; at the square's edge no frame goes on
        assert ours.wave is not None and ours.wave_shifted is not None
        assert torch.equal(ours.wave, theirs.wave) and ours.wave.abs().max() > 0.01
        assert torch.equal(ours.wave_shifted, theirs.wave_shifted)
        for name in ("has_audio", "has_shift", "order"):
            assert torch.equal(getattr(ours, name), getattr(theirs, name))
        np.testing.assert_array_equal(ours.clip, theirs.clip)


def test_flow_of_the_whole_square_is_the_pipelines(index: ClipIndex) -> None:
    clip = msgspec.structs.replace(CLIP, size=48)
    bank = bank_of(index, clip)
    plan = planned(bank, clip)
    n = len(plan)
    plan = replace(plan, box=np.ones((n, 4), np.float32), flip=np.zeros(n, np.bool_))
    ours, theirs = bank.load(plan, flow=True, sound=False), piped(index, bank, plan, clip=clip)
    assert torch.equal(ours.rgb, theirs.rgb) and ours.wave is None
    assert ours.flow is not None and theirs.flow is not None and theirs.flow.abs().max() > 1.0
    torch.testing.assert_close(ours.flow, theirs.flow, rtol=1e-3, atol=1e-3)


def test_flow_follows_crop_and_flip(index: ClipIndex, bank: ClipBank) -> None:
    plan = planned(bank, batch_size=24)
    crops = bank.load(plan, flow=True, sound=False)
    mirrored = bank.load(replace(plan, flip=~plan.flip), flow=True, sound=False)
    assert crops.flow is not None and mirrored.flow is not None
    back = mirrored.flow.flip(3) * torch.tensor([-1.0, 1.0])
    torch.testing.assert_close(crops.flow, back, atol=1e-5, rtol=1e-5)
    assert torch.equal(crops.rgb, mirrored.rgb.flip(3))
    # the flow that is computed on the crops themselves agrees, in direction and in size
    theirs = piped(index, bank, plan).flow
    assert theirs is not None
    for axis in (0, 1):
        a, b = crops.flow[..., axis].flatten(), theirs[..., axis].flatten()
        slope = float((a * b).sum() / (b * b).sum())
        assert float(torch.corrcoef(torch.stack([a, b]))[0, 1]) > 0.6
        assert 0.7 < slope < 1.2


def test_scale_of_cropped_flow(bank: ClipBank) -> None:
    """A flow of one value everywhere is that value, in pixels of the crop."""
    kept = bank._flow.clone()
    try:
        bank._flow[:] = torch.tensor([3.0, -2.0])[None, :, None, None]
        plan = planned(bank)
        found = bank.load(plan, flow=True, sound=False).flow
        assert found is not None
        by = 32 / (48 * plan.box[:, 2])
        u = np.where(plan.flip, -3.0, 3.0) * by
        np.testing.assert_allclose(found[..., 0].amin((1, 2, 3)), u, rtol=1e-5)
        np.testing.assert_allclose(found[..., 0].amax((1, 2, 3)), u, rtol=1e-5)
        np.testing.assert_allclose(found[..., 1].mean((1, 2, 3)), -2.0 * by, rtol=1e-5)
    finally:
        bank._flow.copy_(kept)


def test_clips_shorter_than_a_batchs_clip(index: ClipIndex) -> None:
    clip = msgspec.structs.replace(CLIP, frame_stride=30, size=48)
    bank = bank_of(index, clip, size=3)
    assert bank.num_frames.max() < 5 * 30
    plan = planned(bank, clip)
    assert (plan.frames[:, -1] == plan.frames[:, -2]).any()  # the last frame repeats
    plan = replace(plan, box=np.ones((8, 4), np.float32), flip=np.zeros(8, np.bool_))
    ours, theirs = bank.load(plan, flow=True, sound=True), piped(index, bank, plan, clip=clip)
    assert torch.equal(ours.rgb, theirs.rgb) and torch.equal(ours.wave, theirs.wave)
    torch.testing.assert_close(ours.flow, theirs.flow, rtol=1e-3, atol=2e-3)


def test_larger_frames_are_kept_no_larger_than_crops_need(tiny_demo: Path, tmp_path: Path) -> None:
    ingest([tiny_demo / "unlabelled"], tmp_path, short_side=96, workers=1)
    index = ClipIndex([tmp_path])
    clip = msgspec.structs.replace(CLIP, min_area=0.5)
    bank = bank_of(index, clip)
    assert bank.side == 46  # 32 / sqrt(0.5), rounded up
    plan = planned(bank, clip)
    ours, theirs = bank.load(plan, flow=False, sound=False), piped(index, bank, plan, clip=clip)
    assert ours.flow is None and ours.wave is None and not ours.has_audio.any()
    off = (ours.rgb.float() - theirs.rgb.float()).abs().mean()
    spread = (theirs.rgb.float() - theirs.rgb.float().mean()).abs().mean()
    assert off < 0.1 * spread  # the same picture, a little softer


def test_batches_are_the_plans_in_their_order(bank: ClipBank) -> None:
    plans = [planned(bank, step=step) for step in range(3)]
    found = list(bank.batches(plans, flow=True, sound=True))
    for plan, batch in zip(plans, found, strict=True):
        alone = bank.load(plan, flow=True, sound=True)
        assert torch.equal(batch.rgb, alone.rgb) and torch.equal(batch.flow, alone.flow)
        np.testing.assert_array_equal(batch.clip, bank.clips[plan.clip])


def test_which_clips_depends_on_the_seed_alone(index: ClipIndex, bank: ClipBank) -> None:
    again = bank_of(index)
    np.testing.assert_array_equal(again.clips, bank.clips)
    assert torch.equal(again._rgb, bank._rgb) and torch.equal(again._flow, bank._flow)
    assert set(bank_of(index, seed=1).clips) != set(bank.clips)
    more = bank_of(index, size=9)
    assert set(bank.clips) < set(more.clips) and list(more.clips) == sorted(more.clips)
    assert len(bank_of(index, size=10_000)) == len(index)


def test_a_budget_of_bytes_is_kept(index: ClipIndex) -> None:
    bank = bank_of(index, size="4MB")
    assert 0 < len(bank) < len(index)
    assert bank.nbytes <= 4e6 * 1.02  # sound goes on for a stride
    each = bank.nbytes / len(bank)
    assert bank.nbytes > 4e6 - 2 * each
    with pytest.raises(ValueError, match="holds no clip: the first needs"):
        bank_of(index, size="1KB")


def test_sizes_in_a_recipe() -> None:
    assert bank_bytes("2GiB") == 2 * 2**30 and bank_bytes("1.5 MB") == 1.5e6
    with pytest.raises(ValueError, match="write a number of clips, or a size such as 2GiB"):
        bank_bytes("many")
    recipe = load_recipe(TINY)
    assert recipe.search.clip_bank == 0
    assert override(recipe, ["search.clip_bank=12"]).search.clip_bank == 12
    assert override(recipe, ["search.clip_bank=2GiB"]).search.clip_bank == "2GiB"
    with pytest.raises(RecipeError, match="clip_bank"):
        override(recipe, ["search.clip_bank=many"])


def test_a_cohort_trains_on_the_bank(tiny_shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = choose_runtime("cpu")
    make_deterministic(runtime)
    recipe = override(load_recipe(TINY), ["search.clip_bank=5"])
    trainer = Trainer(recipe, ClipIndex([tiny_shards / "unlabelled"]), runtime)
    labelled = LabelledClips(ClipIndex([tiny_shards / "labelled"]), recipe, runtime=runtime)
    jobs = [
        Proposal(0, check_weights({"rgb/to_flow": 1.0, "rgb/align_audio": 0.3})),
        Proposal(0, check_weights({"rgb/reconstruct": 0.5})),
    ]
    seen: set[int] = set()
    original = Trainer.batches

    def batches(self: Trainer, **how: object) -> object:
        for batch in original(self, **how):  # type: ignore[arg-type]
            seen.update(batch.clip.tolist())
            yield batch

    monkeypatch.setattr(Trainer, "batches", batches)
    memory = CohortMemory()
    first = evaluate_cohort(trainer, labelled, members=jobs, seeds=[0], memory=memory)
    made = memory.bank
    assert made is not None and seen == set(made.clips.tolist()) and len(seen) == 5
    again = evaluate_cohort(trainer, labelled, members=jobs[1:], seeds=[0], memory=memory)
    assert memory.bank is made
    assert (
        again[0].fitness == first[1].fitness
        and again[0].learnt["terms"] == first[1].learnt["terms"]
    )
    evaluate_cohort(trainer, labelled, members=jobs[1:], seeds=[0], memory=memory, full=True)
    assert len(seen) > 5 and memory.bank is made


def test_a_bank_too_small_for_the_videos_says_so(tiny_shards: Path) -> None:
    index = ClipIndex([tiny_shards / "unlabelled"])
    said: list[str] = []
    trainer = Trainer(load_recipe(TINY), index, choose_runtime("cpu"), warn=said.append)
    whole = trainer.open_bank("1GiB")
    assert len(whole) == len(index) and not said
    small = trainer.open_bank(f"{whole.nbytes / 2000:.0f}KB")
    assert 0 < len(small) < len(index)
    (line,) = said
    assert f"members train on {len(small)} of {len(index)} clips" in line


def test_a_bank_without_sound_leaves_out_what_needs_it_and_says_so(tiny_shards: Path) -> None:
    index = ClipIndex([tiny_shards / "unlabelled"])
    assert 0 < index.has_audio.sum() < len(index)
    silent = next(
        s for s in range(100) if not index.has_audio[bank_of(index, size=1, seed=s).clips]
    )
    recipe = override(load_recipe(TINY), [f"seed={silent}"])
    said: list[str] = []
    trainer = Trainer(recipe, index, choose_runtime("cpu"), warn=said.append)
    bank = trainer.open_bank(1)
    assert len(said) == 1 and "none of its 1 clips has sound" in said[0]
    weights = check_weights({"rgb/to_flow": 1.0, "rgb/align_audio": 0.3})
    assert "rgb/align_audio" in trainer.member(weights, seed=0).active
    member = trainer.member(weights, seed=0, bank=bank)
    assert member.active == ("rgb/to_flow",) and "audio" not in member.alive.modalities
    with pytest.raises(ValueError, match="does without sound"):
        trainer.member(check_weights({"rgb/align_audio": 1.0}), seed=0, bank=bank)
