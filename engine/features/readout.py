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
    if how == "unit":
        return lambda rows: _of_unit_length(rows.double() - mean)
    centred = features.double() - mean
    if how == "zscore":
        scale = _nonzero(centred.square().mean(0).sqrt())
        return lambda rows: (rows.double() - mean) / scale
    _, s, v = torch.linalg.svd(centred, full_matrices=False)
    kept = s > max(SMALLEST * float(s[0]), torch.finfo(s.dtype).tiny)
    if not kept.any():  # all clips are alike
        return lambda rows: rows.double() - mean
    weight = v[kept].T / s[kept] * (len(features) - 1) ** 0.5
    return lambda rows: (rows.double() - mean) @ weight


def _of_unit_length(rows: Tensor) -> Tensor:
    return rows / _nonzero(torch.linalg.vector_norm(rows, dim=1, keepdim=True))


def _nonzero(scale: Tensor) -> Tensor:
    return torch.where(scale > 0, scale, 1.0)
