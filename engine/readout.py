"""Read-outs: how features are scaled before they are clustered, the same for fitness and for evaluation.

Shape letters: N clips, D features.
"""

from __future__ import annotations

from typing import Any, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.recipe import Readout

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
    if how == "raw":
        return features
    on_torch = isinstance(features, Tensor)
    x = torch.as_tensor(features).double()
    x = x - x.mean(0)
    if how == "unit":
        scaled = x / _nonzero(torch.linalg.vector_norm(x, dim=1, keepdim=True))
    elif how == "zscore":
        scaled = x / _nonzero(x.square().mean(0).sqrt())
    else:
        u, s, _ = torch.linalg.svd(x, full_matrices=False)
        scaled = u[:, s > SMALLEST * s[0]] * (len(x) - 1) ** 0.5
        if scaled.shape[1] == 0:  # all clips are alike
            scaled = x
    return scaled if on_torch else scaled.numpy()


def _nonzero(scale: Tensor) -> Tensor:
    return torch.where(scale > 0, scale, 1.0)
