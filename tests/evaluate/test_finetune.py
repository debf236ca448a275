"""Fine-tuning: it learns what can be learnt and nothing else, goes on exactly, and refuses what does not fit."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine.core.recipe import Optim, Recipe, RecipeError, load_recipe, override
from engine.core.runtime import choose_runtime, make_deterministic
from engine.core.tensors import CheckpointError, load_tensors, save_tensors
from engine.evaluate.datasets import Dataset, Fold
from engine.evaluate.finetune import Classifier, Finetuning, check_recipe, from_scratch
from engine.train.optim import make_optimizer
from engine.train.trainer import NonFiniteLoss
from tests.labelled import network

RUNTIME = choose_runtime("cpu")
TINY = Path(__file__).with_name("finetune_tiny.toml")


@pytest.fixture(autouse=True)
def deterministic() -> Iterator[None]:
    make_deterministic(RUNTIME)
    yield
    torch.use_deterministic_algorithms(False)


def recipe_of(*changes: str) -> Recipe:
    return override(load_recipe(TINY), list(changes))


def one_fold(dataset: Dataset) -> Dataset:
    return replace(dataset, folds=dataset.folds[:1])


def twenty(dataset: Dataset) -> Dataset:
    """Twenty clips, four a class, to train and to test on."""
    some = np.sort(np.concatenate([np.flatnonzero(dataset.label == c)[:4] for c in range(5)]))
    return replace(dataset, folds=(Fold("same", some, some),))


def finetune(*arguments: Any, seeds: tuple[int, ...] = (0,), **more: Any) -> Any:
    return Finetuning(*arguments, **more).run(seeds)


def tuned(dataset: Dataset, *changes: str, **more: Any) -> Any:
    net, card = network()
    return finetune(net, card, dataset, recipe=recipe_of(*changes), runtime=RUNTIME, **more)


def test_twenty_videos_are_learnt_whole(colour_set: Dataset) -> None:
    """With labels that the colours say nothing of, so that each video has to be learnt by itself."""
    net, card = network()
    found = finetune(net, card, twenty(colour_set), recipe=recipe_of(), runtime=RUNTIME)
    assert found.value.mean == 1.0 and np.array_equal(found.confusion, 4 * np.eye(5))
    for name, tensor in network()[0].state_dict().items():  # what was given is left alone
        assert torch.equal(tensor, net.state_dict()[name])


def test_colours_are_learnt_and_labels_that_mean_nothing_are_not(colour_set: Dataset) -> None:
    found = tuned(one_fold(colour_set))
    assert found.metrics["video_top1"].mean > 0.9 and found.metrics["video_top5"].mean == 1.0
    assert set(found.metrics) == {f"{w}_top{k}" for w in ("video", "clip") for k in (1, 5)}
    drawn = np.random.default_rng(0).integers(0, 5, 60)
    wrong = tuned(replace(colour_set, label=drawn), "optim.steps=15")
    assert wrong.value.mean < 0.2 + 3 * np.sqrt(0.2 * 0.8 / 60)


def test_from_scratch_uses_no_weights_of_the_checkpoint(colour_set: Dataset) -> None:
    tiny = twenty(colour_set)
    change = ("finetune.init=scratch", "optim.steps=4", "optim.warmup_steps=1")
    net, card = network(1)
    other = finetune(net, card, tiny, recipe=recipe_of(*change), runtime=RUNTIME)
    again = tuned(tiny, *change)
    assert again.folds == other.folds and "from scratch" in again.protocol_string
    assert again.provenance["checkpoint"] == ""
    assert tuned(tiny, *change[1:]).folds != again.folds
    net, card = from_scratch(recipe_of(), RUNTIME)
    assert (card.arch, card.width, card.input.size) == ("r3d_18", 0.125, 32)


def test_what_is_continued_equals_what_was_never_interrupted(
    colour_set: Dataset, tmp_path: Path
) -> None:
    dataset = one_fold(colour_set)
    change = ("optim.steps=12",)
    whole = tuned(dataset, *change, folder=tmp_path / "whole", checkpoint_every=5)

    class Killed(Exception):
        pass

    def killed(what: str, done: int, total: int) -> None:
        if "fine-tuning" in what and done == 8:
            raise Killed

    folder = tmp_path / "parts"
    with pytest.raises(Killed):
        tuned(dataset, *change, folder=folder, checkpoint_every=5, on_progress=killed)
    assert load_tensors(folder / "checkpoints" / "split1-seed0.safetensors")[1]["step"] == 5
    said: list[str] = []
    parts = tuned(dataset, *change, folder=folder, checkpoint_every=5, say=said.append)
    assert said[0] == "split1-seed0: going on from step 5"
    assert parts.folds == whole.folds
    first, second = (
        load_tensors(tmp_path / name / "checkpoints" / "split1-seed0.safetensors")
        for name in ("whole", "parts")
    )
    assert first[1] == second[1] and first[0].keys() == second[0].keys()
    assert all(torch.equal(tensor, second[0][name]) for name, tensor in first[0].items())
    # what is finished is not trained again
    (folder / "checkpoints" / "split1-seed0.safetensors").unlink()
    said.clear()
    assert tuned(dataset, *change, folder=folder, say=said.append).folds == whole.folds and not said


def test_a_checkpoint_of_another_run_is_refused(colour_set: Dataset, tmp_path: Path) -> None:
    dataset = twenty(colour_set)
    change = ("optim.steps=4", "optim.warmup_steps=1")
    tuned(dataset, *change, folder=tmp_path)
    path = tmp_path / "checkpoints" / "same-seed0.safetensors"
    (tmp_path / "folds" / "same-seed0.json").unlink()
    tensors, facts = load_tensors(path)
    with pytest.raises(CheckpointError, match="its recipe_hash is"):
        tuned(dataset, *change, "optim.lr=0.5", folder=tmp_path)
    wrong: dict[str, tuple[dict[str, torch.Tensor], dict[str, Any]]] = {
        r"has no tensor fc\.bias": (
            {n: t for n, t in tensors.items() if "fc.bias" not in n},
            facts,
        ),
        r"has \d+ of the optimizer's \d+ tensors": (
            {n: t for n, t in tensors.items() if n != "optim.step.fc.bias"},
            facts,
        ),
        "has an unknown tensor extra": ({**tensors, "module.extra": torch.zeros(1)}, facts),
    }
    for reason, (held, told) in wrong.items():
        save_tensors(path, held, facts=told)
        with pytest.raises(CheckpointError, match=reason) as caught:
            tuned(dataset, *change, folder=tmp_path)
        assert "\n" not in str(caught.value)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="not a readable safetensors"):
        tuned(dataset, *change, folder=tmp_path)


def test_validation_is_held_out_by_group(colour_set: Dataset) -> None:
    dataset = one_fold(colour_set)
    net, card = network()
    work = Finetuning(net, card, dataset, recipe_of("finetune.validation=0.25"), RUNTIME)
    train, held = work._held_out(dataset.folds[0], 0)
    assert len(held) == 10 and sorted([*train, *held]) == dataset.folds[0].train.tolist()
    assert not set(dataset.group[train]) & set(dataset.group[held])
    assert (np.bincount(dataset.label[held]) == 2).all()
    found = tuned(dataset, "finetune.validation=0.25", "optim.steps=4", "optim.warmup_steps=1")
    assert "validation_video_top1" in found.metrics and found.folds[0]["train"] == 30
    assert "0.25 of train held out by group" in found.protocol_string
    alone = replace(dataset, group=np.zeros_like(dataset.group))
    with pytest.raises(ValueError, match=r"finetune\.validation: .* has no second group"):
        tuned(alone, "finetune.validation=0.25")


def test_the_layer_has_its_own_rate_and_biases_do_not_decay() -> None:
    torch.manual_seed(0)
    model = Classifier(network()[0], 5, dropout=0.5)
    parts = [(model.network, 1.0), (model.fc, 7.0)]
    settings = Optim(name="sgd", lr=0.1, weight_decay=0.3)
    optimizer = make_optimizer(parts, settings, fused=False)
    seen: dict[int, tuple[float, float]] = {}
    for group in optimizer.param_groups:
        for p in group["params"]:
            assert id(p) not in seen
            seen[id(p)] = (group["factor"], group["weight_decay"])
    assert len(seen) == len(list(model.parameters()))
    assert seen[id(model.fc.weight)] == (7.0, 0.3) and seen[id(model.fc.bias)] == (7.0, 0.0)
    assert seen[id(model.network.stem[0].weight)] == (1.0, 0.3)
    assert seen[id(model.network.stem[1].weight)] == (1.0, 0.0)


def test_a_loss_that_is_not_finite_ends_it(colour_set: Dataset) -> None:
    with pytest.raises(NonFiniteLoss, match=r"same-seed0: the loss is (nan|inf) at step"):
        tuned(twenty(colour_set), "optim.lr=1e30", "optim.grad_clip=1e30", "optim.name=sgd")


def test_recipes_for_other_classes_are_refused(colour_set: Dataset) -> None:
    for recipe, reason in (
        (load_recipe("ucf101_finetune"), "is for 101 classes, and ucf101 has 5"),
        (load_recipe("hmdb51_finetune"), "is for hmdb51, not for ucf101"),
    ):
        with pytest.raises(RecipeError, match=reason) as caught:
            check_recipe(recipe, colour_set)
        assert "\n" not in str(caught.value)
    for name, count in (("ucf101", 101), ("hmdb51", 51)):
        for kind in ("finetune", "linear"):
            f = load_recipe(f"{name}_{kind}").finetune
            assert (f.dataset, f.num_classes, f.protocol) == (name, count, kind)


def test_rows_are_for_json(colour_set: Dataset) -> None:
    found = tuned(twenty(colour_set), "optim.steps=2", "optim.warmup_steps=1")
    row = json.loads(json.dumps(found.row()))
    assert row["protocol"] == "finetune" and sum(map(sum, row["confusion"])) == 20
