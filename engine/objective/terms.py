"""The table of loss terms: the search space of the evolved loss (39 weights).

One row a term: its name (what recipes and studies hold), the network or networks that it needs, the letter
that the paper's Fig. 7 gives its task, and the kind of task that computes it. Nothing here computes anything.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from difflib import get_close_matches

VISUAL = ("rgb", "grey", "flow")
MODALITIES = (*VISUAL, "audio")
MODALITY_LETTERS = {"rgb": "R", "grey": "G", "flow": "F", "audio": "A"}
NUM_LAYERS = 5
"""Activations that can be distilled: the stem and four stages."""


@dataclass(frozen=True)
class Term:
    """One weighted term of Eq. 1."""

    name: str
    """Its name in recipes, studies and reports, such as ``rgb/to_flow`` or ``distill/flow@3``."""
    task: str
    """The kind of task: shuffle, backward, align_audio, predict, reconstruct, colorize, cross, embed, distill."""
    letter: str
    """The task's letter in the paper's Fig. 7 (R for reconstruction and X for cross-modal are ours)."""
    modality: str
    """The network that the loss trains; for embed and distill, the network that RGB is compared with."""
    networks: tuple[str, ...]
    """Every network whose activations it reads."""
    target: str | None = None
    """The modality that a decoder aims at; None for a task without a decoder."""
    layer: int | None = None
    """Distillation only: 0 is the stem, 1 to 4 the stages."""

    @property
    def is_l2(self) -> bool:
        """Whether it is a mean squared difference of two tensors; else it is a number already."""
        return self.target is not None or self.layer is not None

    @property
    def modalities(self) -> tuple[str, ...]:
        """Every modality whose clips it sees, as a network's input or as a decoder's target."""
        return tuple(m for m in MODALITIES if m in self.networks or m == self.target)

    @property
    def code(self) -> str:
        """The label in Fig. 7's manner: modality, task and, for distillation, layer, such as ``FD3``."""
        layer = "" if self.layer is None else str(self.layer)
        return MODALITY_LETTERS[self.modality] + self.letter + layer


def _table() -> tuple[Term, ...]:
    rows = []
    for m in VISUAL:
        rows.append(Term(f"{m}/shuffle", "shuffle", "S", m, (m,)))
        rows.append(Term(f"{m}/backward", "backward", "B", m, (m,)))
        rows.append(Term(f"{m}/align_audio", "align_audio", "A", m, (m, "audio")))
    for m in MODALITIES:
        rows.append(Term(f"{m}/predict", "predict", "P", m, (m,), m))
        rows.append(Term(f"{m}/reconstruct", "reconstruct", "R", m, (m,), m))
    rows.append(Term("grey/colorize", "colorize", "C", "grey", ("grey",), "rgb"))
    for m, other in (("rgb", "flow"), ("grey", "flow"), ("flow", "rgb")):
        rows.append(Term(f"{m}/to_{other}", "cross", "X", m, (m,), other))
    for m in ("grey", "flow", "audio"):
        rows.append(Term(f"rgb+{m}/embed", "embed", "E", m, ("rgb", m)))
    for m in ("grey", "flow", "audio"):
        for layer in range(NUM_LAYERS):
            rows.append(Term(f"distill/{m}@{layer}", "distill", "D", m, ("rgb", m), layer=layer))
    return tuple(rows)


TERMS: tuple[Term, ...] = _table()
TERM_NAMES: tuple[str, ...] = tuple(term.name for term in TERMS)
BY_NAME: dict[str, Term] = {term.name: term for term in TERMS}


LossWeights = dict[str, float]
"""Every term's name to its weight in [0, 1]: all that search and training share."""


def present(weights: Mapping[str, float]) -> tuple[str, ...]:
    """Terms with a weight above 0."""
    return tuple(name for name, weight in weights.items() if weight > 0)


def reaching(names: Collection[str]) -> tuple[str, ...]:
    """Those of ``names`` that can change the RGB network: by training it, or a network that others tie to it."""
    tied: set[str] = {"rgb"}
    before: set[str] = set()
    while tied != before:
        before = set(tied)
        tied.update(*(BY_NAME[n].networks for n in names if tied.intersection(BY_NAME[n].networks)))
    return tuple(n for n in names if tied.intersection(BY_NAME[n].networks))


def check_weights(weights: Mapping[str, float], *, where: str = "loss") -> LossWeights:
    """Complete and check weights: names that are absent get 0.

    Raises ValueError that names the key in ``where`` for an unknown term (with the nearest known name), for
    a value that is not a number, and for one outside [0, 1].
    """
    for name, value in weights.items():
        if name not in BY_NAME:
            near = get_close_matches(name, TERM_NAMES, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"{where}: unknown loss term {name!r}{hint}")
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError(f"{where}: {name!r} must be a number in [0, 1], not {value!r}")
        if not 0.0 <= value <= 1.0:  # also catches nan
            raise ValueError(f"{where}: {name!r} is {value}, outside [0, 1]")
    return {name: float(weights.get(name, 0.0)) for name in TERM_NAMES}
