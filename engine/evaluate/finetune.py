"""Fine-tuning: the whole network with a new layer on top, trained with labels, fold by fold, and tested.

Batches, augmentation and dropout are functions of (seed, step), so a run that is continued equals one that was never
interrupted, bit for bit on a CPU.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.metrics import confusion_matrix  # type: ignore[import-untyped]
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

from engine.core.files import write_text_atomic
from engine.core.provenance import provenance
from engine.core.recipe import Recipe, RecipeError, recipe_hash
from engine.core.runtime import Runtime, set_seed
from engine.core.streams import upload
from engine.data.library import Report
from engine.data.plan import plan_batch
from engine.data.shards.index import ClipIndex
from engine.evaluate import scores
from engine.evaluate.datasets import Dataset, Fold
from engine.evaluate.linear import deal_groups
from engine.evaluate.scores import Evaluated, words
from engine.features import extract
from engine.features.extract import Cuts, Extractor, check_undamaged
from engine.model.network_file import Card, ClipInput, card_of
from engine.model.resnet3d import ResNet3D, video_network
from engine.train.checkpoint import load_state, save_state
from engine.train.compiled import compile_mode
from engine.train.optim import descend, learning_rate, make_optimizer
from engine.train.trainer import NonFiniteLoss

Ints = NDArray[np.int64]

LOG_EVERY = 10
"""Steps between points in TensorBoard, and between checks that the loss is finite."""
HEAD_SD = 0.01
"""Standard deviation of the new layer's first weights."""


class Classifier(nn.Module):
    """A network, dropout and a new fully connected layer: clips (N, 3, T, H, W) to logits (N, K)."""

    def __init__(self, network: ResNet3D, num_classes: int, *, dropout: float) -> None:
        super().__init__()
        self.network = network
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(network.feature_dim, num_classes)
        nn.init.normal_(self.fc.weight, std=HEAD_SD)
        nn.init.zeros_(self.fc.bias)

    def forward(self, clips: Tensor) -> Tensor:
        """Logits."""
        return cast(Tensor, self.fc(self.dropout(self.network(clips))))


@dataclass
class Finetuning:
    """Fine-tunes a network on a data set's folds and tests it.

    ``run`` raises CheckpointError for a checkpoint of another run, and NonFiniteLoss where training diverges.
    """

    network: ResNet3D
    card: Card
    dataset: Dataset
    recipe: Recipe
    runtime: Runtime
    folder: Path | None = None
    """The run's, for checkpoints, TensorBoard and finished folds; None keeps nothing."""
    checkpoint_every: int = 200
    on_progress: Report | None = None
    say: Callable[[str], object] = lambda text: None

    def __post_init__(self) -> None:
        """Raises RecipeError for a recipe that is for another data set or number of classes."""
        check_recipe(self.recipe, self.dataset)
        clip = self.recipe.clip
        shape = ClipInput(clip.num_frames, clip.frame_stride, clip.size)
        f = self.recipe.finetune
        self.card = msgspec.structs.replace(self.card, input=shape)
        self.cuts = Cuts(shape, f.views, f.crops, self.recipe.evaluation.batch_size)

    def run(self, seeds: Sequence[int]) -> Evaluated:
        """Train and test every fold with every seed; folds that the folder has results of are not done again."""
        count = len(self.dataset.classes)
        total = np.zeros((count, count), np.int64)
        rows = []
        for seed in seeds:
            for fold in self.dataset.folds:
                row, predicted, labels = self._fold(fold, seed)
                rows.append({"fold": fold.name, "seed": seed, **row})
                total += confusion_matrix(labels, predicted, labels=range(count))
        shares = [{k: v for k, v in row.items() if "_top" in k} for row in rows]
        scratch = self.recipe.finetune.init == "scratch"
        source = "" if scratch else self.card.source
        facts = {"checkpoint": source, "recipe_hash": recipe_hash(self.recipe)}
        return Evaluated(
            protocol="finetune",
            protocol_string=self._words(seeds),
            labels_used=self.card.labels_used and not scratch,
            metrics=scores.spreads(shares),
            headline="video_top1",
            folds=rows,
            classes=self.dataset.classes,
            confusion=total.tolist(),
            provenance={**provenance(self.runtime), **facts},
        )

    def trained(self, fold: Fold, *, seed: int) -> Classifier:
        """Train on all of a fold's train part, from the start; nothing is tested."""
        model = self._model(seed)
        self._train(model, fold.train, f"{fold.name}-seed{seed}", seed)
        return model

    def _fold(self, fold: Fold, seed: int) -> tuple[dict[str, Any], Ints, Ints]:
        """A fold's row, and the classes that its test videos were taken for and are of."""
        name = f"{fold.name}-seed{seed}"
        done = None if self.folder is None else self.folder / "folds" / f"{name}.json"
        if done is not None and done.exists():
            kept = json.loads(done.read_text(encoding="utf-8"))
            return kept["row"], np.array(kept["predicted"]), np.array(kept["labels"])
        train, held = self._held_out(fold, seed)
        model = self._model(seed)
        loss = self._train(model, train, name, seed)
        accuracies, predicted, labels = self._test(model, fold.test)
        videos = len(np.unique(self.dataset.video[train]))
        row = {"train": videos, "test": len(labels), **accuracies, "train_loss": loss}
        if len(held):
            validation, _, _ = self._test(model, held)
            row |= {f"validation_{key}": value for key, value in validation.items()}
        if done is not None:
            done.parent.mkdir(exist_ok=True)
            kept = {"row": row, "predicted": predicted.tolist(), "labels": labels.tolist()}
            write_text_atomic(done, json.dumps(kept) + "\n")
        self.say(f"{name}: {100 * accuracies['video_top1']:.1f} % of {len(labels)} videos")
        return row, predicted, labels

    def _held_out(self, fold: Fold, seed: int) -> tuple[Ints, Ints]:
        """Clips to train on and to validate on: whole groups, so that no video is in both."""
        share = self.recipe.finetune.validation
        if not share:
            return fold.train, fold.train[:0]
        label, group = self.dataset.label[fold.train], self.dataset.group[fold.train]
        part = deal_groups(group, label, parts=max(2, round(1 / share)), seed=seed)
        if not part.any():
            raise ValueError(
                f"finetune.validation: {fold.name} has no second group to train on beside the one that is held out;"
                " set it to 0"
            )
        return fold.train[part != 0], fold.train[part == 0]

    def _model(self, seed: int) -> Classifier:
        f, n = self.recipe.finetune, self.network
        set_seed(seed)
        network = copy.deepcopy(n)
        if f.init == "scratch":
            network = video_network(self.card, n.in_channels)
        model = Classifier(network, len(self.dataset.classes), dropout=f.dropout)
        model.to(device=self.runtime.device, memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
        return model

    def _train(self, model: Classifier, clips: Ints, name: str, seed: int) -> float:
        """Train to the last step, from the last checkpoint if there is one; gives the last steps' mean loss."""
        optim = self.recipe.optim
        parts = [(model.network, 1.0), (model.fc, self.recipe.finetune.head_lr)]
        optimizer = make_optimizer(parts, optim, fused=False)
        facts = {"recipe_hash": recipe_hash(self.recipe), "fold": name, "source": self.card.source}
        last = None if self.folder is None else self.folder / "checkpoints" / f"{name}.safetensors"
        first, mean = 0, math.nan
        if last is not None and last.exists():
            saved = load_state(last, model, optimizer, expected=facts)
            first, mean = saved["step"], saved["loss"]
            self.say(f"{name}: going on from step {first}")
        board = None
        if self.folder is not None:
            board = SummaryWriter(str(self.folder / "tensorboard" / name), purge_step=first)
        mode = compile_mode(optim, self.runtime.device, whole=False)
        forward = model if mode == "off" else torch.compile(model, mode=mode)
        model.train()
        index = self.dataset.index.subset(clips)
        with closing(self._batches(index, self.dataset.label[clips], seed, first)) as batches:
            for step, (frames, labels) in enumerate(batches, start=first):
                torch.manual_seed(seed * 1_000_003 + step)  # dropout's
                backward = self._backward(forward, frames, labels)
                value = descend(optimizer, optim, step=step, backward=backward)
                final = step + 1 == optim.steps
                if step % LOG_EVERY == 0 or final:
                    mean = _checked(value, mean, name, step)
                    if board is not None:
                        board.add_scalar("train/loss", mean, step)
                        board.add_scalar("train/lr", learning_rate(optim, step), step)
                if last is not None and ((step + 1) % self.checkpoint_every == 0 or final):
                    now = {**facts, "step": step + 1, "loss": mean}
                    save_state(last, model, optimizer, facts=now)
                if self.on_progress is not None:
                    self.on_progress(f"fine-tuning {name}", step + 1, optim.steps)
        check_undamaged(index)
        if board is not None:
            board.close()
        return mean

    def _backward(
        self, forward: Callable[[Tensor], Tensor], frames: Tensor, labels: Tensor
    ) -> Callable[[], Tensor]:
        """A function that runs a batch forward and back, and gives the cross-entropy, still on the device."""

        def backward() -> Tensor:
            clips = extract.normalised(frames, self.card, self.runtime.device)
            with torch.autocast(self.runtime.device.type, torch.bfloat16, self.runtime.amp):
                logits = forward(clips)
            smoothing = self.recipe.finetune.label_smoothing
            loss = nn.functional.cross_entropy(logits.float(), labels, label_smoothing=smoothing)
            loss.backward()
            return loss.detach()

        return backward

    def _batches(
        self, index: ClipIndex, label: Ints, seed: int, first: int
    ) -> Generator[tuple[Tensor, Tensor], None, None]:
        """Frames and labels of the steps from ``first`` on, of clips with these labels, decoded in advance."""
        r, size = self.recipe, self.recipe.optim.batch_size
        clip = extract.without_future(r.clip)
        plans = (
            plan_batch(index, clip, r.audio, seed=seed, step=step, batch_size=size)
            for step in range(first, r.optim.steps)
        )
        for batch in extract.decoded(
            index, plans, clip=clip, batch_size=size, runtime=self.runtime
        ):
            yield batch.rgb, upload(torch.from_numpy(label[batch.clip]), self.runtime.device)

    def _test(self, model: Classifier, clips: Ints) -> tuple[dict[str, float], Ints, Ints]:
        """Accuracies, and the classes that videos were taken for and are of; softmax is averaged over a video."""
        d = self.dataset
        extractor = Extractor(d.index, clips, cuts=self.cuts, runtime=self.runtime, bank=d.decoded)
        (logits,) = extractor.outputs([model], [self.card], on_progress=self.on_progress)
        check_undamaged(d.index)
        shares = logits.cpu().double().softmax(-1)
        of_video, first = scores.video_means(shares, d.video[clips])
        each = np.repeat(d.label[clips], shares.shape[1])
        labels = d.label[clips][first]
        accuracies = scores.accuracies(shares.flatten(0, 1), of_video, each, labels)
        return accuracies, of_video.argmax(1).numpy(), labels

    def _words(self, seeds: Sequence[int]) -> str:
        f, o = self.recipe.finetune, self.recipe.optim
        held = f", {f.validation:g} of train held out by group" if f.validation else ""
        return words(
            "finetune",
            f"whole network and a new layer{' from scratch' * (f.init == 'scratch')}, {o.name} lr {o.lr:g}"
            f" (layer x {f.head_lr:g}), {o.steps} steps of {o.batch_size} clips{held}, dropout {f.dropout:g},"
            " softmax mean a video",
            dataset=self.dataset,
            cuts=self.cuts,
            batch_norm="running",
            seeds=seeds,
        )


def from_scratch(recipe: Recipe, runtime: Runtime) -> tuple[ResNet3D, Card]:
    """A network with initial weights, by the recipe's model, and its card."""
    set_seed(recipe.seed)
    network = video_network(recipe.model)
    return network.to(runtime.device), card_of(recipe)


def check_recipe(recipe: Recipe, dataset: Dataset) -> None:
    """Raise RecipeError where a recipe is for another data set, or for another number of classes."""
    f = recipe.finetune
    if f.dataset and f.dataset != dataset.name:
        raise RecipeError(
            f"recipe {recipe.name!r} is for {f.dataset}, not for {dataset.name}: give another recipe, or"
            f" --set finetune.dataset={dataset.name}"
        )
    count = len(dataset.classes)
    if f.num_classes and f.num_classes != count and not dataset.incomplete:
        raise RecipeError(
            f"recipe {recipe.name!r} is for {f.num_classes} classes, and {dataset.name} has {count}: give another"
            f" recipe, or --set finetune.num_classes={count}"
        )


def _checked(value: Tensor, mean: float, name: str, step: int) -> float:
    """The running mean of the loss; raises NonFiniteLoss."""
    loss = float(value)
    if not math.isfinite(loss):
        raise NonFiniteLoss(
            f"fine-tuning {name}: the loss is {loss} at step {step}; lower the rate with --set optim.lr=..."
        )
    return loss if math.isnan(mean) else 0.8 * mean + 0.2 * loss
