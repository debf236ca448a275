"""What training with labels reaches on the built-in videos: measured once, to stand beside a search's outcome.

``benchmarks/with_labels.py`` measures it: the recipe's RGB network, from scratch, is trained with labels on 400 other
clips of the same classes, drawn with another seed, and judged as a member is, by k-means on the 400 labelled ones.
"""

from __future__ import annotations

from engine.core.recipe import Recipe, load_recipe

WITH_LABELS = "training with labels (held-out clips)"
STEPS = 160
FITNESS = (0.0, 0.0, 0.0)
"""K-means accuracy with three seeds: ``python benchmarks/with_labels.py --seeds 3``."""


def levels(recipe: Recipe) -> dict[str, tuple[float, ...]]:
    """Known levels of fitness on the built-in videos, by name; none for other networks, clips or judges."""
    shipped = load_recipe("demo")
    same = all(getattr(recipe, s) == getattr(shipped, s) for s in ("clip", "model", "fitness"))
    return {WITH_LABELS: FITNESS} if same else {}
