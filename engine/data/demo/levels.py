"""What training with labels reaches on the built-in videos: measured once, to stand beside a search's outcome.

``benchmarks/with_labels.py`` measures it: the recipe's RGB network, from scratch, is trained with labels on 400 other
clips of the same classes, drawn with another seed, and judged as a member is, by k-means on the 400 labelled ones.
"""

from __future__ import annotations

import hashlib

import msgspec

from engine.core.recipe import Recipe
from engine.data.demo.demo import VERSION

WITH_LABELS = "training with labels (held-out clips)"
STEPS = 640
FITNESS = (0.918, 0.806, 0.846)
"""K-means accuracy with three seeds, as ``python benchmarks/with_labels.py`` printed it."""
MEASURED_WITH = "555f44d23e39"
"""``setting`` of the recipe ``demo`` then."""


def levels(recipe: Recipe) -> dict[str, tuple[float, ...]]:
    """Known levels of fitness on the built-in videos, by name; none for other networks, clips or judges."""
    return {WITH_LABELS: FITNESS} if setting(recipe) == MEASURED_WITH else {}


def setting(recipe: Recipe) -> str:
    """Twelve hex digits of what these levels depend on: the videos, and all that is not default of three sections."""
    whole, default = msgspec.to_builtins(recipe), msgspec.to_builtins(Recipe())
    chosen = {
        section: {k: v for k, v in whole[section].items() if v != default[section][k]}
        for section in ("clip", "model", "fitness")
    }
    content = msgspec.json.encode([VERSION, chosen], order="sorted")
    return hashlib.sha256(content).hexdigest()[:12]
