"""Protocols from videos to numbers: against scikit-learn on the same features, and with labels that mean nothing."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_info, threadpool_limits

from engine.core.recipe import Evaluation
from engine.core.runtime import choose_runtime
from engine.evaluate import linear, protocols
from engine.evaluate.datasets import Dataset, Fold
from engine.evaluate.protocols import (
    Judge,
    Videos,
    evaluate_many,
    take_features,
    used_clips,
    videos_of,
)
from engine.evaluate.scores import append_rows
from engine.features import extract
from engine.model.network_file import IMAGENET_MEAN, IMAGENET_STD, Card, ClipInput, load_network
from engine.model.resnet3d import ResNet3D
from tests.labelled import network

RUNTIME = choose_runtime("cpu")
SETTINGS = Evaluation(
    views=2, kmeans_init=2, kmeans_seeds=3, strengths=(1e-3, 0.1), holdout_turns=2
)
SHARED: dict[str, Any] = {"settings": SETTINGS, "runtime": RUNTIME}


def evaluate(net: ResNet3D, card: Card, dataset: Dataset, *, protocol: str, **how: Any) -> Any:
    """One network by one protocol."""
    (by_protocol,) = evaluate_many([(net, card)], dataset, protocols=[protocol], **how)
    return by_protocol[protocol]


def twenty(dataset: Dataset) -> Dataset:
    """Twenty clips, four a class, to train and to test on."""
    some = np.concatenate([np.flatnonzero(dataset.label == c)[:4] for c in range(5)])
    return replace(dataset, folds=(Fold("same", np.sort(some), np.sort(some)),))


def shuffled(dataset: Dataset, seed: int) -> Dataset:
    """With labels drawn one by one: of shuffled ones, a class that test has more of is rarer in train."""
    return replace(dataset, label=np.random.default_rng(seed).integers(0, 5, len(dataset.label)))


def test_twenty_videos_are_learnt_whole(colour_set: Dataset) -> None:
    net, card = network()
    found = evaluate(net, card, twenty(colour_set), protocol="linear", **SHARED)
    assert found.metrics["video_top1"].mean == found.metrics["train_video_top1"].mean == 1.0
    assert np.array_equal(found.confusion, 4 * np.eye(5))


def test_colours_are_told_apart_and_shuffled_labels_are_not(colour_set: Dataset) -> None:
    net, card = network()
    found = evaluate(net, card, colour_set, protocol="linear", **SHARED)
    assert found.value.mean > 0.9 and found.value.n == 3
    (views,) = take_features([(net, card)], colour_set, **SHARED)
    values = []
    for seed in range(6):
        dataset = shuffled(colour_set, seed)
        judge = Judge(dataset, videos_of(dataset, views), SETTINGS, RUNTIME, card)
        values.append(judge.judged("linear", [0], {}).value.mean)
    # chance is 0.2; 360 test videos in all, so three standard deviations are 0.064
    assert abs(np.mean(values) - 0.2) < 0.064


def test_linear_is_what_scikit_learn_finds_on_the_same_views(colour_set: Dataset) -> None:
    net, card = network()
    dataset = shuffled(colour_set, 9)  # hard enough that not all is right
    found = evaluate(net, card, dataset, protocol="linear", **SHARED)
    (views,) = take_features([(net, card)], dataset, **SHARED)
    for fold, row in zip(dataset.folds, found.folds, strict=True):
        x, each = (views[part].double().numpy() for part in (fold.train, fold.test))
        model = make_pipeline(
            StandardScaler(), LogisticRegression(C=row["C"] / 2, tol=1e-8, max_iter=10000)
        )
        model.fit(x.reshape(-1, x.shape[2]), np.repeat(dataset.label[fold.train], 2))
        chances = model.predict_proba(each.reshape(-1, x.shape[2]))
        truth = dataset.label[fold.test]
        right = (chances.argmax(1) == np.repeat(truth, 2)).mean()
        assert row["clip_top1"] == pytest.approx(right, abs=0.026)  # a tie at most
        of_videos = chances.reshape(len(truth), 2, -1).mean(1)
        right = (of_videos.argmax(1) == truth).mean()
        assert row["video_top1"] == pytest.approx(right, abs=0.051)


def test_a_layer_on_video_means_is_what_scikit_learn_finds(colour_set: Dataset) -> None:
    net, card = network()
    dataset = shuffled(colour_set, 9)
    means = {**SHARED, "settings": msgspec.structs.replace(SETTINGS, examples="videos")}
    found = evaluate(net, card, dataset, protocol="linear", **means)
    (views,) = take_features([(net, card)], dataset, **SHARED)
    x = views.double().mean(1).numpy()
    for fold, row in zip(dataset.folds, found.folds, strict=True):
        scaler = StandardScaler().fit(x[fold.train])
        model = LogisticRegression(C=row["C"], tol=1e-8, max_iter=10000)
        model.fit(scaler.transform(x[fold.train]), dataset.label[fold.train])
        right = model.score(scaler.transform(x[fold.test]), dataset.label[fold.test])
        assert row["video_top1"] == pytest.approx(right, abs=0.051)  # a tie at most
        each = views[fold.test].double().flatten(0, 1).numpy()
        right = model.score(scaler.transform(each), np.repeat(dataset.label[fold.test], 2))
        assert row["clip_top1"] == pytest.approx(right, abs=0.051)
    assert "standardised video means" in found.protocol_string


def test_retrieval_is_what_scikit_learn_finds(colour_set: Dataset) -> None:
    net, card = network()
    dataset = shuffled(colour_set, 9)
    found = evaluate(net, card, dataset, protocol="retrieval", **SHARED)
    (views,) = take_features([(net, card)], dataset, **SHARED)
    x = views.double().mean(1).numpy()
    for fold, row in zip(dataset.folds, found.folds, strict=True):
        model = KNeighborsClassifier(1, metric="cosine").fit(
            x[fold.train], dataset.label[fold.train]
        )
        assert row["r@1"] == pytest.approx(model.score(x[fold.test], dataset.label[fold.test]))
    assert list(found.metrics) == ["r@1", "r@5", "r@10", "r@20", "r@50"]


def test_kmeans_on_train_on_test_and_from_train_to_test(colour_set: Dataset) -> None:
    net, card = network()
    found = evaluate(net, card, colour_set, protocol="kmeans", **SHARED)
    names = {
        f"{part}_{m}"
        for part in ("train", "test")
        for m in ("accuracy", "nmi", "ari", "purity", "v_measure")
    }
    assert set(found.metrics) == names | {"assigned_accuracy"} and found.headline == "test_accuracy"
    for row in found.folds:
        assert len(row["train_accuracy_runs"]) == 3
        assert row["train_accuracy"] == pytest.approx(np.mean(row["train_accuracy_runs"]))
        assert row["test_purity"] >= row["test_accuracy"] > 0.2


def test_groups_are_clustered_all_at_once_too(colour_set: Dataset) -> None:
    net, card = network()
    by_group = replace(colour_set, folds_by="leave one group out, 3 folds")
    found = evaluate(net, card, by_group, protocol="kmeans", **SHARED)
    assert found.headline == "all_accuracy" and found.value.n == 3
    assert found.value.mean == pytest.approx(np.mean(found.folds[-1]["all_accuracy_runs"]))


def test_parts_too_small_to_cluster_are_left_out(colour_set: Dataset) -> None:
    net, card = network()
    tiny = replace(colour_set, folds=(Fold("tiny", np.arange(40), np.array([0, 59])),))
    found = evaluate(net, card, tiny, protocol="kmeans", **SHARED)
    assert not any(name.startswith("test_") for name in found.metrics)
    same = np.flatnonzero(colour_set.label == colour_set.label[0])
    one_class = replace(colour_set, folds=(Fold("one", np.arange(40), same[:4]),))
    found = evaluate(net, card, one_class, protocol="kmeans", **SHARED)
    assert not any(name.startswith("test_") for name in found.metrics)
    nothing = replace(colour_set, folds=(Fold("none", np.array([0, 30]), np.array([1, 59])),))
    with pytest.raises(ValueError, match="clusters would say nothing"):
        evaluate(net, card, nothing, protocol="kmeans", **SHARED)


def test_confusion_matrices_have_their_rows_numbers(colour_set: Dataset, tmp_path: Path) -> None:
    net, card = network()
    found = evaluate(net, card, colour_set, protocol="linear", **SHARED)
    for _ in range(2):
        append_rows(tmp_path / "rows.jsonl", [found], {})
    names = sorted(path.name for path in tmp_path.glob("*.csv"))
    assert names == ["rows-0-linear-confusion.csv", "rows-1-linear-confusion.csv"]


def test_several_networks_of_other_inputs_at_once(colour_set: Dataset) -> None:
    net, card = network()
    other = msgspec.structs.replace(network(1)[1], input=ClipInput(2, 3, 16), labels_used=True)
    pairs = [(net, card), (network(1)[0], other), network(2)]
    every = evaluate_many(pairs, colour_set, protocols=["retrieval", "linear"], **SHARED)
    for pair, found in zip(pairs, every, strict=True):
        assert list(found) == ["retrieval", "linear"]
        alone = evaluate(*pair, colour_set, protocol="linear", **SHARED)
        assert alone.metrics == found["linear"].metrics
    assert [found["linear"].labels_used for found in every] == [False, True, False]
    assert "2 views of 2x16x16 stride 3" in every[1]["linear"].protocol_string


def test_a_published_image_network_is_normalised_by_its_own_statistics(
    colour_set: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Inflated from torchvision's names: labels were used, and ImageNet's mean and std count."""
    image = {}
    for name, tensor in ResNet3D("r3d_18", 3).state_dict().items():
        name = re.sub(r"^stem\.0", "conv1", re.sub(r"^stem\.1", "bn1", name))
        name = re.sub(r"^(layer\d\.\d)\.conv(\d)\.0", r"\1.conv\2", name)
        name = re.sub(r"^(layer\d\.\d)\.conv(\d)\.1", r"\1.bn\2", name)
        image[name] = tensor[:, :, 0].clone() if tensor.ndim == 5 else tensor
    torch.save(image, tmp_path / "resnet18.pth")
    net, card = load_network(tmp_path / "resnet18.pth")
    card = msgspec.structs.replace(card, input=ClipInput(2, 2, 32))
    seen = []

    def noted(frames: torch.Tensor, card: Card, device: torch.device) -> torch.Tensor:
        seen.append((card.mean, card.std))
        return real(frames, card, device)

    real = extract.normalised
    monkeypatch.setattr(extract, "normalised", noted)
    found = evaluate(net, card, colour_set, protocol="retrieval", **SHARED)
    assert found.labels_used and set(seen) == {(IMAGENET_MEAN, IMAGENET_STD)}


def test_what_a_number_is_told_with(colour_set: Dataset) -> None:
    net, card = network()
    part = replace(colour_set, listed=99)
    (found,) = evaluate_many([(net, card)], part, protocols=["linear"], seed=4, seeds=2, **SHARED)
    words = found["linear"].protocol_string
    for each in (
        "linear",
        "ucf101: 3 official splits",
        "2 views of 4x32x32 stride 2",
        "running batch-norm statistics",
        "C chosen on held-out train groups",
        "seeds 4 to 5",
        "incomplete: 60 of 99 videos",
    ):
        assert each in words
    row = json.loads(json.dumps(found["linear"].row()))
    assert row["labels_used"] is False and row["metrics"]["video_top1"]["n"] == 6
    assert row["provenance"]["checkpoint"] == "net0" and row["provenance"]["versions"]["torch"]
    assert [fold["seed"] for fold in row["folds"]] == [4, 4, 4, 5, 5, 5]
    assert row["folds"][0]["train"] == 40 and row["folds"][0]["test"] == 20


def test_folds_are_told_one_by_one(colour_set: Dataset) -> None:
    net, card = network()
    seen: list[tuple[str, int, int]] = []
    many: dict[str, Any] = {"protocols": ["linear", "retrieval"], "seeds": 2}
    evaluate_many(
        [(net, card)], colour_set, on_progress=lambda *each: seen.append(each), **many, **SHARED
    )
    assert [each for each in seen if each[0] == "linear, folds"] == [
        ("linear, folds", number, 6) for number in range(1, 7)
    ]
    assert ("retrieval, folds", 3, 3) in seen  # which has nothing to draw


def test_small_fits_are_one_threads(colour_set: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """With two, products this small wait a hundred times longer than they compute."""
    seen: set[int] = set()

    class Spy(LogisticRegression):  # type: ignore[misc]
        def fit(self, *args: Any) -> Any:
            seen.update(pool["num_threads"] for pool in threadpool_info())
            seen.add(torch.get_num_threads())
            return super().fit(*args)

    monkeypatch.setattr(linear.linear_model, "LogisticRegression", Spy)
    net, card = network()
    with threadpool_limits(2):
        before = threadpool_info()
        evaluate(net, card, colour_set, protocol="linear", **SHARED)
        assert threadpool_info() == before
    assert seen == {1}


def test_test_labels_decide_nothing_but_the_scores(colour_set: Dataset) -> None:
    """The layer and its C are the same whatever the test part's labels say."""
    net, card = network()
    (views,) = take_features([(net, card)], colour_set, **SHARED)
    fold = colour_set.folds[0]
    lied = colour_set.label.copy()
    lied[fold.test] = 0
    chosen = []
    for label in (colour_set.label, lied):
        dataset = replace(colour_set, label=label, folds=(fold,))
        judge = Judge(dataset, videos_of(dataset, views), SETTINGS, RUNTIME, card)
        rows = (judge.videos.of(clips) for clips in (fold.train, fold.test))
        row, predicted = judge._linear(*rows, 0)
        chosen.append((row["C"], row["train_video_top1"], predicted.tolist()))
    assert chosen[0] == chosen[1]


def test_a_layer_is_fitted_to_all_views_of_a_videos_clips(colour_set: Dataset) -> None:
    """A video of two clips counts as two, and has one score: the mean softmax of its four views."""
    net, card = network()
    pairs = np.arange(60) // 2
    dataset = replace(shuffled(colour_set, 9), video=pairs)
    dataset = replace(dataset, label=dataset.label[2 * pairs])  # those of a video's first clip
    (views,) = take_features([(net, card)], dataset, **SHARED)
    judge = Judge(dataset, videos_of(dataset, views), SETTINGS, RUNTIME, card)
    (fold, *_), (row, *_) = dataset.folds, judge.judged("linear", [0], {}).folds
    x, each = (
        views[part].double().numpy().reshape(-1, views.shape[-1])
        for part in (fold.train, fold.test)
    )
    layer = LogisticRegression(C=row["C"] / 2, tol=1e-8, max_iter=10000)
    model = make_pipeline(StandardScaler(), layer)
    model.fit(x, np.repeat(dataset.label[fold.train], 2))
    guess = model.predict_proba(each).reshape(len(fold.test) // 2, 4, -1).mean(1).argmax(1)
    right = (guess == dataset.label[fold.test][::2]).mean()
    assert row["test"] == 10 and row["video_top1"] == pytest.approx(
        right, abs=0.11
    )  # a tie at most


def test_one_video_a_class_leaves_the_strength_alone(colour_set: Dataset) -> None:
    """Nothing held out can be right then: C is the middle one, and not the smallest."""
    net, card = network()
    first = np.array([np.flatnonzero(colour_set.label == c)[2 * c] for c in range(5)])
    dataset = replace(colour_set, folds=(Fold("few", np.sort(first), np.arange(60)),))
    settings = msgspec.structs.replace(SETTINGS, views=5, strengths=(1e-3, 0.1, 1.0))
    found = evaluate(net, card, dataset, protocol="linear", settings=settings, runtime=RUNTIME)
    assert found.folds[0]["C"] == 0.1


def test_more_views_than_memory_holds_are_refused_before_they_are_decoded(
    colour_set: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocols, "MOST_BYTES", 1000)
    monkeypatch.setattr(protocols, "take_features", None)
    with pytest.raises(ValueError, match=r"--set evaluation\.examples=videos"):
        evaluate(*network(), colour_set, protocol="linear", **SHARED)


def test_videos_of_several_clips_are_judged_as_one(colour_set: Dataset) -> None:
    pairs = np.arange(60) // 2  # clips c01 and c02 of a group as one video
    dataset = replace(colour_set, video=pairs)
    views = torch.arange(120.0).reshape(60, 2, 1)
    videos: Videos = videos_of(dataset, views)
    assert videos.features.flatten().tolist() == [4.0 * i + 1.5 for i in range(30)]
    assert videos.of(dataset.folds[0].test).tolist() == sorted(set(pairs[dataset.folds[0].test]))
    assert len(used_clips(dataset)) == 60


def test_features_that_are_not_finite_are_told(colour_set: Dataset) -> None:
    net, card = network()
    with torch.no_grad():
        net.layer4[0].conv1[0].weight.fill_(float("nan"))
    with pytest.raises(
        ValueError, match="net0: features of 60 of 60 videos of ucf101 are not finite"
    ):
        evaluate(net, card, colour_set, protocol="linear", **SHARED)


def test_unknown_protocols() -> None:
    net, card = network()
    for protocol, reason in (("svm", "unknown protocol 'svm'"), ("finetune", "needs a recipe")):
        with pytest.raises(ValueError, match=reason):
            evaluate(net, card, None, protocol=protocol, **SHARED)  # type: ignore[arg-type]
