"""Labelled clips that judge a loss: whose row is whose, and that taking features changes nothing."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from engine.core.recipe import Recipe, load_recipe, override
from engine.core.runtime import choose_runtime, make_deterministic
from engine.data.pipeline import InputPipeline
from engine.data.plan import plan_views
from engine.data.shards.index import ClipIndex
from engine.data.views import ViewMaker
from engine.features import extract as module
from engine.features.extract import LabelledClips, balanced
from engine.model.resnet3d import ResNet3D

TINY = Path(__file__).parents[1] / "tiny.toml"
RUNTIME = choose_runtime("cpu")


def recipe_of(*changes: str) -> Recipe:
    return override(load_recipe(TINY), ["fitness.views_per_clip=2", *changes])


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Threads within networks this small wait for each other."""
    make_deterministic(RUNTIME)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def index(tiny_shards: Path) -> ClipIndex:
    return ClipIndex([tiny_shards / "unlabelled", tiny_shards / "labelled"])


def labelled_clips(index: ClipIndex, *changes: str) -> LabelledClips:
    return LabelledClips(index, recipe_of(*changes), runtime=RUNTIME)


class Quadrants(nn.Module):
    """Features that tell clips apart: the mean colours of the frames' four quarters."""

    feature_dim = 12

    def forward(self, rgb: Tensor) -> Tensor:
        n, c, t, h, w = rgb.shape
        return rgb.reshape(n, c, t, 2, h // 2, 2, w // 2).mean((2, 4, 6)).flatten(1)


def one_by_one(index: ClipIndex, clips: np.ndarray, network: nn.Module) -> np.ndarray:
    """The mean over views of each clip's features, every clip decoded by itself."""
    recipe = recipe_of()
    clip, audio = recipe.clip, recipe.audio
    pipeline = InputPipeline(
        index,
        clip,
        audio=audio,
        device=RUNTIME.device,
        batch_size=1,
        num_frames=clip.num_frames,
        threads=1,
        flow=False,
        sound=False,
    )
    views = ViewMaker(clip, audio)

    def one(number: int, view: int) -> np.ndarray:
        plan = plan_views(index, clip, clips=np.array([number]), view=view, num_views=2)
        with torch.no_grad():
            return network(views.rgb_only(pipeline.load(plan).rgb))[0].numpy()

    return np.stack([(one(int(number), 0) + one(int(number), 1)) / 2 for number in clips])


def network() -> ResNet3D:
    torch.manual_seed(0)
    made = ResNet3D("r3d_18", 3, width=0.125, pool=True)
    for layer in made.modules():  # running statistics unlike any batch's
        if isinstance(layer, nn.BatchNorm3d):
            layer.running_mean.uniform_(-0.2, 0.2)
            layer.running_var.uniform_(0.8, 1.6)
    return made


@pytest.mark.parametrize("batch_size", [5, 32])
def test_rows_are_in_the_order_of_the_labels(index: ClipIndex, batch_size: int) -> None:
    labelled = labelled_clips(index, f"fitness.batch_size={batch_size}")
    (clips,) = np.nonzero(index.label >= 0)
    expected = one_by_one(index, clips, Quadrants())
    assert len(np.unique(expected.round(3), axis=0)) == len(clips)  # else no order could show
    (found,) = (x.numpy() for x in labelled.features([Quadrants()]))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert labelled.num_classes == 8 == len(set(labelled.labels))
    np.testing.assert_array_equal(labelled.labels, index.label[clips])


def test_each_network_gets_its_own_features(index: ClipIndex) -> None:
    labelled = labelled_clips(index)
    first, second = network(), Quadrants()
    both = labelled.features([first, second])
    assert both[0].shape == (24, first.feature_dim) and both[1].shape == (24, 12)
    np.testing.assert_array_equal(both[0], labelled.features([first])[0])
    np.testing.assert_array_equal(both[1], labelled.features([second])[0])


def test_running_statistics_are_those_of_an_evaluating_network(index: ClipIndex) -> None:
    labelled = labelled_clips(index, 'fitness.batch_norm="running"', "fitness.batch_size=7")
    used = network()
    (found,) = (x.numpy() for x in labelled.features([used]))
    expected = one_by_one(index, labelled.clips, copy.deepcopy(used).eval())
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_batch_statistics_are_those_of_a_training_network(index: ClipIndex) -> None:
    labelled = labelled_clips(index, "fitness.views_per_clip=1", "fitness.batch_size=64")
    used = network()
    (found,) = (x.numpy() for x in labelled.features([used]))
    (bank,) = labelled._extractor._bank.values()
    (frames,) = bank
    trained = copy.deepcopy(used).train()
    with torch.no_grad():
        expected = trained(ViewMaker(recipe_of().clip, recipe_of().audio).rgb_only(frames))
    order = np.lexsort(found.T)
    np.testing.assert_allclose(
        found[order], expected.numpy()[np.lexsort(expected.numpy().T)], rtol=1e-4, atol=1e-5
    )
    (running,) = labelled_clips(
        index, "fitness.views_per_clip=1", 'fitness.batch_norm="running"'
    ).features([used])
    assert np.abs(running.numpy() - found).max() > 0.01


@pytest.mark.parametrize("batch_norm", ["batch", "running"])
@pytest.mark.parametrize("training", [True, False])
def test_networks_are_left_as_they_were(index: ClipIndex, batch_norm: str, training: bool) -> None:
    labelled = labelled_clips(index, f'fitness.batch_norm="{batch_norm}"')
    used = network().train(training)
    used.layer2.eval()
    before = {name: t.clone() for name, t in used.state_dict().items()}
    modes = [layer.training for layer in used.modules()]
    labelled.features([used])
    after = used.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert [layer.training for layer in used.modules()] == modes
    assert all(
        layer.track_running_stats for layer in used.modules() if isinstance(layer, nn.BatchNorm3d)
    )


def test_networks_are_left_as_they_were_by_a_failure(index: ClipIndex) -> None:
    labelled = labelled_clips(index)
    used = network()

    def broken(*_: object) -> None:
        raise RuntimeError("no more")

    hook = used.layer4.register_forward_hook(broken)
    before = {name: t.clone() for name, t in used.state_dict().items()}
    with pytest.raises(RuntimeError, match="no more"):
        labelled.features([used])
    hook.remove()
    after = used.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    (found,) = (x.numpy() for x in labelled.features([used]))
    np.testing.assert_array_equal(found, labelled_clips(index).features([used])[0])


def test_decoded_clips_are_kept_and_give_the_same(
    index: ClipIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    used = network()
    kept = labelled_clips(index, "fitness.batch_size=9")
    (first,) = kept.features([used])
    with monkeypatch.context() as patched:
        patched.setattr(module, "InputPipeline", None)  # decoding again would fail
        (second,) = kept.features([used])
    np.testing.assert_array_equal(first, second)
    monkeypatch.setattr(module, "BANK_BYTES", 0)
    anew = labelled_clips(index, "fitness.batch_size=9")
    for _ in range(2):
        np.testing.assert_array_equal(anew.features([used])[0], first)
    assert anew._extractor._bank is None


@pytest.mark.parametrize(
    ("labels", "match"),
    [
        ([-1, -1], "no labelled clips: labels come from class folders"),
        ([], "no labelled clips"),
        ([3, 3, -1], "all of one class"),
        ([0, 1, 2, -1], "3 labelled clips for 3 classes"),
    ],
)
def test_labels_that_can_not_judge_are_refused(labels: list[int], match: str) -> None:
    index = SimpleNamespace(label=np.array(labels, np.int32))
    with pytest.raises(ValueError, match=match) as caught:
        LabelledClips(index, recipe_of(), runtime=RUNTIME)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_classes_without_a_clip_are_left_out(index: ClipIndex) -> None:
    some = copy.copy(index)
    some.label = np.where(index.label == 3, -1, index.label)
    labelled = labelled_clips(some)
    assert labelled.num_classes == 7 and set(labelled.labels) == set(range(7))
    assert (index.label[labelled.clips] != 3).all()


@pytest.mark.parametrize("count", [1, 2, 9, 32, 33, 63, 64, 65, 1000])
@pytest.mark.parametrize("largest", [2, 7, 32])
def test_batches_are_few_and_of_like_size(count: int, largest: int) -> None:
    sizes = balanced(count, largest)
    assert sum(sizes) == count and max(sizes) <= largest
    assert max(sizes) - min(sizes) <= 1
    assert largest * (len(sizes) - 1) < count


def test_clips_without_labels_judge_by_zipf(tiny_shards: Path) -> None:
    index = ClipIndex([tiny_shards / "unlabelled"])
    zipf = ('fitness.metric="zipf"', "fitness.num_clusters=3")
    found = labelled_clips(index, *zipf)
    assert found.labels is None and found.num_classes == 0
    np.testing.assert_array_equal(found.clips, np.arange(len(index)))
    (rows,) = (x.numpy() for x in found.features([Quadrants()]))
    np.testing.assert_allclose(rows, one_by_one(index, found.clips, Quadrants()), atol=1e-5)
    with pytest.raises(ValueError, match=r"set fitness\.num_clusters"):
        labelled_clips(index, zipf[0])
    with pytest.raises(ValueError, match="8 clips for 8 clusters"):
        labelled_clips(index, zipf[0], "fitness.num_clusters=8")


def test_labels_are_kept_beside_zipf(index: ClipIndex) -> None:
    found = labelled_clips(index, 'fitness.metric="zipf"')
    assert found.labels is not None and found.num_classes == 8
    np.testing.assert_array_equal(found.clips, labelled_clips(index).clips)


@pytest.mark.parametrize("metric", ["hungarian", "zipf"])
def test_a_subset_judges_where_there_are_too_many(index: ClipIndex, metric: str) -> None:
    kinds = (f'fitness.metric="{metric}"', "fitness.num_clusters=4")
    whole = labelled_clips(index, *kinds)
    some = labelled_clips(index, *kinds, "fitness.max_clips=15")
    assert len(some.clips) == 15 and set(some.clips) < set(whole.clips)
    assert list(some.clips) == sorted(some.clips)
    again = labelled_clips(index, *kinds, "fitness.max_clips=15")
    np.testing.assert_array_equal(some.clips, again.clips)
    other = labelled_clips(index, *kinds, "fitness.max_clips=15", "seed=1")
    assert set(other.clips) != set(some.clips)
    assert len(labelled_clips(index, *kinds, "fitness.max_clips=100").clips) == len(whole.clips)
    rows = [each.features([Quadrants()])[0].numpy() for each in (some, whole)]
    where = np.searchsorted(whole.clips, some.clips)
    np.testing.assert_allclose(rows[0], rows[1][where], atol=1e-5)


def test_no_more_unlabelled_clips_judge_than_are_needed() -> None:
    index = SimpleNamespace(label=np.full(5000, -1, np.int32))
    zipf = recipe_of('fitness.metric="zipf"', "fitness.num_clusters=10")
    found = LabelledClips(index, zipf, runtime=RUNTIME)  # type: ignore[arg-type]
    assert len(found.clips) == module.UNLABELLED_CLIPS
    assert found.clips.min() < 500 and found.clips.max() > 4500
