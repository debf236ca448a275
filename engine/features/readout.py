"""Read-outs: how features are scaled before they are clustered, the same for fitness and for evaluation.

Shape letters: N clips, D features.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.core.recipe import Readout
from engine.model.network_file import Card

READOUTS: tuple[Readout, ...] = get_args(Readout)
Features = NDArray[np.floating[Any]] | Tensor

NAMES: dict[Readout, str] = {
    "raw": "raw features",
    "unit": "centred features of unit length",
    "zscore": "z-scored features",
    "white": "PCA-whitened features",
}
"""What a protocol's description calls them."""
SMALLEST = 1e-6
"""Directions weaker than this share of the strongest one are rounding, and are not whitened."""


def read_out(features: Features, how: Readout) -> Features:
    """Scale features (N, D), an array or a tensor, which stays on its device; nothing is fitted to labels.

    ``raw`` leaves them as they are. The others subtract the mean over clips, then give each clip unit length,
    each feature unit variance, or each principal component unit variance. They compute, and return, float64.
    """
    if isinstance(features, Tensor):
        return fitted(features, how)(features)
    if how == "raw":
        return features
    x = torch.from_numpy(np.array(features, order="C"))  # a copy: the array may be read-only
    return fitted(x, how)(x).numpy()


def fitted(features: Tensor, how: Readout) -> Callable[[Tensor], Tensor]:
    """The scaling that ``read_out`` gives features (N, D), for others (M, D) as well."""
    if how == "raw":
        return lambda rows: rows
    mean = features.double().mean(0)
    centred = features.double() - mean
    if how != "white":
        return scaling(how, mean, centred.square().mean(0).sqrt())
    _, s, v = torch.linalg.svd(centred, full_matrices=False)
    kept = s > max(SMALLEST * float(s[0]), torch.finfo(s.dtype).tiny)
    if not kept.any():  # all clips are alike
        return lambda rows: rows.double() - mean
    weight = v[kept].T / s[kept] * (len(features) - 1) ** 0.5
    return lambda rows: (rows.double() - mean) @ weight


def scaling(how: Readout, mean: Tensor, scale: Tensor) -> Callable[[Tensor], Tensor]:
    """A read-out by a known mean and scale (D,): of one clip as of many, in their dtype.

    Raises ValueError for ``white``, which needs more than these.
    """
    if how == "raw":
        return lambda rows: rows
    if how == "unit":
        return lambda rows: _of_unit_length(rows.to(mean.dtype) - mean)
    if how == "zscore":
        divisor = _nonzero(scale)
        return lambda rows: (rows.to(mean.dtype) - mean) / divisor
    raise ValueError(f"read-out {how!r} needs the features of many clips: use raw, unit or zscore")


def statistics_of(card: Card, how: Readout) -> tuple[Tensor, Tensor]:
    """The mean and scale, float64 (D,), of a network's features over its training clips; empty for ``raw``.

    Raises ValueError where its card does not know them.
    """
    if how != "raw" and not card.feature_mean:
        raise ValueError(
            f"{card.source or 'the network'} does not say the mean and scale of its features over training clips"
            f" (it is of another project, or older than they are): use read-out raw instead of {how}"
        )
    mean, scale = card.feature_mean, card.feature_scale
    return torch.tensor(mean, dtype=torch.float64), torch.tensor(scale, dtype=torch.float64)


def read_out_by(card: Card, how: Readout) -> Callable[[NDArray[np.float32]], NDArray[np.float32]]:
    """The read-out of features (N, D) by what a network's card says of them; float32, each row by itself.

    Raises ValueError as ``statistics_of`` and ``scaling`` do.
    """
    scaled = scaling(how, *statistics_of(card, how))
    return lambda rows: scaled(torch.from_numpy(np.array(rows))).float().numpy()


def _of_unit_length(rows: Tensor) -> Tensor:
    return rows / _nonzero(torch.linalg.vector_norm(rows, dim=1, keepdim=True))


def _nonzero(scale: Tensor) -> Tensor:
    return torch.where(scale > 0, scale, 1.0)
