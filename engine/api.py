"""The engine from Python: the names that are meant for scripts and notebooks, and stay.

Networks and their files (``load_network``, ``save_network``), features (``embed_clips``, ``embed_video``, ``embed``,
``read_features``), training (``open_videos``, ``load_recipe``, ``load_loss``, ``train``), judging and searching
(``kmeans_fitness``, ``SearchStudy``), and what is left behind (``export``, ``write_report``). ``docs/api.md`` has an
example of each.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import kernels
from engine.core.recipe import Readout, Recipe, load_recipe, override, recipe_hash
from engine.core.runtime import choose_runtime, make_deterministic
from engine.data.library import Library, default_shard_cache, open_library
from engine.features.embed import embed, embed_video
from engine.features.export import export
from engine.features.extract import with_statistics
from engine.features.fitness import kmeans_fitness
from engine.features.parquet import read_features
from engine.features.readout import read_out_by
from engine.features.segments import EmbedSettings
from engine.model.network_file import Card, card_of, load_network, save_network
from engine.model.resnet3d import ResNet3D
from engine.objective.lossfile import load_loss
from engine.objective.terms import LossWeights
from engine.report import write_report
from engine.search.study import SearchStudy
from engine.train.trainer import Trainer

__all__ = [
    "EmbedSettings",
    "SearchStudy",
    "embed",
    "embed_clips",
    "embed_video",
    "export",
    "kmeans_fitness",
    "load_loss",
    "load_network",
    "load_recipe",
    "open_videos",
    "override",
    "read_features",
    "save_network",
    "train",
    "write_report",
]


@torch.inference_mode()
def embed_clips(
    network: ResNet3D,
    card: Card,
    frames: Tensor | NDArray[np.uint8],
    *,
    readout: Readout = "raw",
) -> NDArray[np.float32]:
    """Features float32 (N, D) of clips that are in memory: uint8 (N, T, H, W, 3), RGB, cut and resized.

    Frames are normalised as the card says; T, H and W best be the card's ``input``. Runs where the network is.
    ``readout`` scales the features by what the card says of them over training clips: ``unit``, as fitness does by
    default, or ``zscore``. Raises ValueError for frames of another shape or type, and a card that does not say it.
    """
    scaled = read_out_by(card, readout)
    device = next(network.parameters()).device
    clips = torch.as_tensor(frames).to(device)
    mean, std = (torch.tensor(values, device=device) for values in (card.mean, card.std))
    rgb, _ = kernels.clip_views(clips, mean, std)
    return scaled(network.eval()(rgb).float().cpu().numpy())


def open_videos(
    paths: Sequence[Path | str], *, cache: Path | None = None, workers: int = 1
) -> Library:
    """Open shards, or folders of raw videos by way of shards that ``cache`` keeps (None: the user's cache).

    ``workers`` processes cut raw videos; with more than one, a script has to guard its main part by ``if __name__ ==
    "__main__":``. Clips are ``.index``, what could not be read ``.rejects``. Raises ValueError for a path that is
    absent or holds no videos.
    """
    library = open_library(
        [Path(path) for path in paths],
        cache=cache or default_shard_cache(),
        report=lambda what, done, total: None,
        workers=workers,
    )
    for warning in library.warnings:
        warnings.warn(warning, stacklevel=2)
    return library


def train(
    recipe: Recipe,
    videos: Library,
    *,
    loss: LossWeights,
    device: str = "auto",
    progress: Callable[[int, float], Any] | None = None,
) -> tuple[ResNet3D, Card]:
    """Train the four networks with a loss, in this process, and return the RGB network with its card.

    ``progress(step, loss)`` is called after each step; on a GPU the loss is nan but every tenth time. Gives the
    network of ``engine pretrain`` with the same recipe, loss and videos, without its checkpoints, TensorBoard and
    other processes. Raises ValueError for a loss of which nothing can be computed, NonFiniteLoss where training
    diverges.
    """
    runtime = choose_runtime(device, amp=recipe.optim.amp)
    make_deterministic(runtime)
    trainer = Trainer(recipe, videos.index, runtime)
    member = trainer.member(loss, seed=recipe.seed, alone=True)
    for step, views in trainer.rounds([member], seed=recipe.seed):
        total = trainer.step(member, views)
        if progress is not None:
            progress(step, total)
    card = card_of(
        recipe,
        loss=loss,
        recipe_hash=recipe_hash(recipe),
        seed=recipe.seed,
        num_clips=len(videos.index),
    )
    card = with_statistics(card, member.loss.rgb.state_dict(), videos.index, runtime=runtime)
    return member.loss.rgb.eval(), card
