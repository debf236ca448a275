"""Rows and columns of a table or figure, with the paper's numbers and the networks that rows judge."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from engine.evaluate.paper.scale import Scale

TITLES = {
    "table1": "Table 1: self-supervised methods, without labels before the protocol",
    "table2": "Table 2: fine-tuned on labelled data sets",
    "fig4": "Fig. 4: how much labelled data fine-tuning needs",
    "fig5": "Fig. 5: how much unlabelled data pretraining needs",
}
COLUMNS = {"kmeans": "k-means", "linear": "1-layer", "finetune": "fine-tune"}
TABLE1 = {
    "scratch": (15.7, 17.8, 35.2),
    "imagenet": (32.5, 37.8, 49.8),
    "kinetics": (68.8, 71.5, 74.3),
    "frame_shuffle": (22.3, 24.3, 28.4),
    "reverse_detection": (21.3, 24.3, 27.5),
    "audio_align": (32.4, 36.8, 40.2),
    "rgb_to_flow": (31.5, 36.4, 39.9),
    "predict_frames": (31.8, 35.8, 39.2),
    "joint_embedding": (29.4, 32.5, 38.4),
    "random": (25.4, 27.6, 30.4),
    "evolved": (44.2, 62.8, 66.2),
}
"""HMDB51, %: k-means, 1-layer, fine-tune."""
TABLE2 = {
    "scratch": (35.2, 63.1),
    "imagenet": (49.8, 84.5),
    "kinetics": (74.3, 95.1),
    "shuffle": (18.1, 50.2),
    "opn": (37.5, 37.5),
    "avts": (61.6, 89.0),
    "evolved": (66.2, 92.4),
}
"""HMDB51 and UCF101, fine-tuned, %."""
FIG4_TENTH = 58.1
"""Kinetics, fine-tuned with a tenth of its labels: the one accuracy of Fig. 4 that the paper's text gives."""
NAMES = {
    "scratch": "Scratch (untrained)",
    "imagenet": "ImageNet pretrained",
    "kinetics": "Kinetics pretrained",
    "frame_shuffle": "Frame shuffle",
    "reverse_detection": "Reverse detection",
    "audio_align": "Audio/RGB align",
    "rgb_to_flow": "RGB to flow",
    "predict_frames": "Predicting 4 future frames",
    "joint_embedding": "Joint embedding",
    "shuffle": "Shuffle [6]",
    "opn": "OPN [5]",
    "avts": "AVTS [4]",
    "random": "Random loss",
    "equal": "Equal weights",
    "no_distillation": "Equal weights, no distillation",
    "evolved": "Evolved loss",
}
FURTHER = "*"
"""Stands for the losses that the user names beside the evolved one, a row each."""
GROUPS = {
    "table1": {
        "Supervised": ("scratch", "imagenet", "kinetics"),
        "Single tasks, no labels": tuple(TABLE1)[3:9],
        "Evolved search space, no labels": (
            "random",
            "equal",
            "no_distillation",
            FURTHER,
            "evolved",
        ),
    },
    "table2": {
        "Supervised": ("scratch", "imagenet", "kinetics"),
        "Unsupervised": ("shuffle", "opn", "avts", FURTHER, "evolved"),
    },
}
"""Rows of the tables by group, in order."""
PAPER: dict[str, tuple[Sequence[str], Mapping[str, Sequence[float]]]] = {
    "table1": (("hmdb51/kmeans", "hmdb51/linear", "hmdb51/finetune"), TABLE1),
    "table2": (("hmdb51/finetune", "ucf101/finetune"), TABLE2),
}
"""Data sets and protocols of the paper's numbers in a table, and the numbers by row."""


@dataclass(frozen=True)
class Network:
    """A representation to judge; one a seed where it is trained."""

    name: str
    loss: str | None = None
    """As ``load_loss`` takes it, ``{seed}`` to be filled in; None: no training."""
    file: Path | None = None
    """Weights that were trained elsewhere."""
    share: float = 1.0
    """Share of the unlabelled clips that it is trained on."""
    epochs: bool = False
    """Whether steps are in proportion to ``share``."""


@dataclass(frozen=True)
class Row:
    """A line of a table, or a point of a figure."""

    name: str
    title: str
    group: str
    network: Network | None
    missing: str = ""
    """The reason why there is no network."""
    paper: Mapping[str, float] = field(default_factory=dict)
    """By data set and protocol's name, ``hmdb51/kmeans``, %."""
    labelled: float = 1.0
    """Share of the labelled train clips."""
    series: str = ""
    """A figure's curve, and the place on it:"""
    x: float = 1.0


@dataclass(frozen=True)
class Column:
    """A protocol on a data set, or on its part that no training saw."""

    name: str
    """The name of its cells' files."""
    title: str
    protocol: str
    dataset: int = 0
    """Place among the run's data sets."""
    unseen: bool = False
    """Train on groups that pretraining saw (without labels), test on those that it did not."""
    paper: str = ""
    """The paper's numbers that stand beside it, by data set and protocol."""


@dataclass(frozen=True)
class Inputs:
    """Losses and weights that the user names, for rows that need more than unlabelled videos."""

    losses: Mapping[str, str] = field(default_factory=dict)
    """By the row's name: "evolved", and any other."""
    imagenet: Path | None = None
    kinetics: Path | None = None


def rows_of(table: str, scale: Scale, inputs: Inputs) -> list[Row]:
    """All rows of a table or figure, in order; those that lack something say so."""
    if table == "fig4":
        return _fig4(scale, inputs)
    if table == "fig5":
        return _fig5(scale, inputs)
    further = [name for name in inputs.losses if name != "evolved"]
    keys, numbers = PAPER[table]
    rows = []
    for group, names in GROUPS[table].items():
        for name in [n for each in names for n in (further if each == FURTHER else [each])]:
            paper = dict(zip(keys, numbers.get(name, ()), strict=False))
            rows.append(Row(name, _title(name), group, *_network(name, inputs), paper))
    return rows


def _network(name: str, inputs: Inputs) -> tuple[Network | None, str]:
    """A row's network by the row's name, or why there is none."""
    if name in inputs.losses:
        return Network(name, loss=inputs.losses[name]), ""
    if name in ("shuffle", "opn", "avts"):
        return None, "the paper's number, no run of ours"
    if name in ("imagenet", "kinetics"):
        file: Path | None = getattr(inputs, name)
        if file is None:
            return None, f"not given: --{name} STATE_DICT"
        return Network(name, file=file), ""
    if name == "evolved":
        return None, "not given: --loss RUN/best.toml"
    presets = {"scratch": None, "random": "random:{seed}"}
    return Network(name, loss=presets.get(name, name)), ""


def _fig4(scale: Scale, inputs: Inputs) -> list[Row]:
    """Points of fine-tuning with a share of the labels, from scratch and from each loss."""
    rows = []
    for name in dict.fromkeys(["scratch", "evolved", *inputs.losses]):
        network, missing = _network(name, inputs)
        series = _title(name)
        for share in scale.labelled:
            title = f"{series}, {_percent(share)} of the labels"
            known = name == "evolved" and share == 0.1
            paper = {"kinetics/finetune": FIG4_TENTH} if known else {}
            point = f"{name}-{100 * share:g}"
            rows.append(Row(point, title, series, network, missing, paper, share, series, share))
    return rows


def _fig5(scale: Scale, inputs: Inputs) -> list[Row]:
    """Points of the evolved loss trained on a share of the clips, for equal steps and for equal epochs."""
    rows = []
    evolved, missing = _network("evolved", inputs)
    for mode, series in (("iterations", "Fixed iterations"), ("epochs", "Fixed epochs")):
        for share in scale.unlabelled:
            point, network = f"{mode}-{100 * share:g}", evolved
            if evolved is not None and share < 1.0:  # with all clips both are one training
                network = replace(evolved, name=point, share=share, epochs=mode == "epochs")
            title = f"{series}, {_percent(share)} of the clips"
            rows.append(Row(point, title, series, network, missing, series=series, x=share))
    return rows


def _title(name: str) -> str:
    return NAMES.get(name, f"Loss {name}")


def _percent(share: float) -> str:
    return f"{100 * share:g} %"


def columns_of(
    table: str, scale: Scale, *, datasets: Sequence[str], by_group: Sequence[bool]
) -> list[Column]:
    """A table's columns on data sets, of which some are held out by group."""
    columns = []
    for number, (name, grouped) in enumerate(zip(datasets, by_group, strict=True)):
        split = grouped and scale.seen_groups > 0
        suffix, where = (f"-{name}", f", {name}") if len(datasets) > 1 else ("", "")
        reference = "kinetics" if table == "fig4" else name if name == "ucf101" else "hmdb51"
        for protocol in scale.protocols(table):
            # a network that is fine-tuned is tested on unseen groups alone, a linear layer there too
            tests = {"finetune": (split,), "linear": (False, True)[: 1 + split]}
            for unseen in tests.get(protocol, (False,)):
                title = COLUMNS.get(protocol, protocol) + " (unseen groups)" * unseen + where
                second = unseen and protocol == "linear"
                file = f"{protocol}{'-unseen' * second}{suffix}"
                paper = "" if second else f"{reference}/{protocol}"
                columns.append(Column(file, title, protocol, number, unseen, paper))
    return columns
