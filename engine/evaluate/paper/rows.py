"""What a table or figure holds: its rows with the paper's numbers, the networks that they judge, and its columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from engine.evaluate.paper.scale import Scale

TABLES = ("table1", "table2", "fig4", "fig5")
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
SUPERVISED, UNSUPERVISED, OURS = (
    "Supervised",
    "Single tasks, no labels",
    "Evolved search space, no labels",
)


@dataclass(frozen=True)
class Network:
    """A representation to judge; one a seed where it is trained."""

    name: str
    loss: str | None = None
    """As ``load_loss`` takes it, ``{seed}`` to be filled in; None: no training."""
    file: Path | None = None
    """Weights that were trained elsewhere."""
    share: float = 1.0
    """Of the unlabelled clips that it is trained on."""
    epochs: bool = False
    """Whether steps are in proportion to ``share``."""


@dataclass(frozen=True)
class Row:
    """A line of a table, or a point of a figure."""

    name: str
    title: str
    group: str
    network: Network | None
    paper: Mapping[str, float] = field(default_factory=dict)
    """By data set and protocol's name, ``hmdb51/kmeans``, %."""
    missing: str = ""
    """Why there is no network."""
    labelled: float = 1.0
    """Share of the labelled train clips."""
    series: str = ""
    """A figure's curve, and the place on it:"""
    x: float = 1.0


@dataclass(frozen=True)
class Column:
    """A protocol on a data set, or on its part that no training saw."""

    name: str
    """Of its cells' files."""
    title: str
    protocol: str
    dataset: int = 0
    """Place among the data sets given."""
    unseen: bool = False
    """Train on groups that pretraining saw (without labels), test on those that it did not."""
    paper: str = ""
    """Which of the paper's numbers stands beside it."""


@dataclass(frozen=True)
class Given:
    """What the user gave for rows that need more than unlabelled videos."""

    losses: Mapping[str, str] = field(default_factory=dict)
    """By the row's name: "evolved", and any other."""
    imagenet: Path | None = None
    kinetics: Path | None = None


def rows_of(table: str, scale: Scale, given: Given) -> list[Row]:
    """All rows of a table or figure, in order; those that lack something say so."""
    return {"table1": _table1, "table2": _table2, "fig4": _fig4, "fig5": _fig5}[table](scale, given)


def _table1(scale: Scale, given: Given) -> list[Row]:
    def row(name: str, group: str, network: Network | None, missing: str = "") -> Row:
        keys = ("hmdb51/kmeans", "hmdb51/linear", "hmdb51/finetune")
        paper = dict(zip(keys, TABLE1.get(name, ()), strict=False))
        title = NAMES.get(name, f"Loss {name}")
        return Row(name, title, group, network, paper, missing)

    single = list(TABLE1)[3:9]
    more = [n for n in given.losses if n != "evolved"]
    evolved = _evolved(given)
    return [
        row("scratch", SUPERVISED, Network("scratch")),
        row("imagenet", SUPERVISED, *_file("imagenet", given.imagenet)),
        row("kinetics", SUPERVISED, *_file("kinetics", given.kinetics)),
        *(row(name, UNSUPERVISED, Network(name, loss=name)) for name in single),
        row("random", OURS, Network("random", loss="random:{seed}")),
        row("equal", OURS, Network("equal", loss="equal")),
        row("no_distillation", OURS, Network("no_distillation", loss="no_distillation")),
        *(row(n, OURS, Network(n, loss=given.losses[n])) for n in more),
        row("evolved", OURS, *evolved),
    ]


def _table2(scale: Scale, given: Given) -> list[Row]:
    def row(name: str, group: str, network: Network | None, missing: str) -> Row:
        paper = dict(
            zip(("hmdb51/finetune", "ucf101/finetune"), TABLE2.get(name, ()), strict=False)
        )
        return Row(name, NAMES.get(name, f"Loss {name}"), group, network, paper, missing)

    peer, unsupervised = "the paper's number, no run of ours", "Unsupervised"
    more = [n for n in given.losses if n != "evolved"]
    return [
        row("scratch", SUPERVISED, Network("scratch"), ""),
        row("imagenet", SUPERVISED, *_file("imagenet", given.imagenet)),
        row("kinetics", SUPERVISED, *_file("kinetics", given.kinetics)),
        *(row(name, unsupervised, None, peer) for name in ("shuffle", "opn", "avts")),
        *(row(n, unsupervised, Network(n, loss=given.losses[n]), "") for n in more),
        row("evolved", unsupervised, *_evolved(given)),
    ]


def _fig4(scale: Scale, given: Given) -> list[Row]:
    rows = []
    starts = {"scratch": (Network("scratch"), ""), "evolved": _evolved(given)}
    starts |= {n: (Network(n, loss=loss), "") for n, loss in given.losses.items() if n != "evolved"}
    for name, (network, missing) in starts.items():
        series = NAMES.get(name, f"Loss {name}")
        for share in scale.labelled:
            paper = {}
            if name == "evolved" and share == 0.1:
                paper = {"kinetics/finetune": FIG4_TENTH}
            title = f"{series}, {_percent(share)} of the labels"
            point = f"{name}-{_percent(share, sign='')}"
            row = Row(point, title, series, network, paper, missing, share, series, share)
            rows.append(row)
    return rows


def _fig5(scale: Scale, given: Given) -> list[Row]:
    rows = []
    _, missing = _evolved(given)
    loss = given.losses.get("evolved")
    for mode, series in (("iterations", "Fixed iterations"), ("epochs", "Fixed epochs")):
        for share in scale.unlabelled:
            network = None
            if loss is not None:
                # with all clips both are one training
                name = "evolved" if share == 1.0 else f"{mode}-{_percent(share, sign='')}"
                network = Network(
                    name, loss=loss, share=share, epochs=mode == "epochs" and share < 1.0
                )
            title = f"{series}, {_percent(share)} of the clips"
            point = f"{mode}-{_percent(share, sign='')}"
            rows.append(Row(point, title, series, network, {}, missing, 1.0, series, share))
    return rows


def _evolved(given: Given) -> tuple[Network | None, str]:
    loss = given.losses.get("evolved")
    if loss is None:
        return None, "not given: --loss RUN/best.toml"
    return Network("evolved", loss=loss), ""


def _file(name: str, path: Path | None) -> tuple[Network | None, str]:
    if path is None:
        return None, f"not given: --{name} STATE_DICT"
    return Network(name, file=path), ""


def _percent(share: float, *, sign: str = " %") -> str:
    return f"{100 * share:g}{sign}"


def columns_of(
    table: str, scale: Scale, *, datasets: Sequence[str], by_group: Sequence[bool]
) -> list[Column]:
    """A table's columns on the data sets given, of which some are held out by group."""
    columns = []
    for number, (name, grouped) in enumerate(zip(datasets, by_group, strict=True)):
        split = grouped and scale.seen_groups > 0
        suffix = f"-{name}" if len(datasets) > 1 else ""
        where = f", {name}" if len(datasets) > 1 else ""
        for protocol in scale.protocols(table):
            said = COLUMNS.get(protocol, protocol)
            paper = f"{'kinetics' if table == 'fig4' else name if name == 'ucf101' else 'hmdb51'}/{protocol}"
            tuned = protocol == "finetune"
            columns.append(
                Column(
                    f"{protocol}{suffix}",
                    said + (" (unseen groups)" if split and tuned else "") + where,
                    protocol,
                    number,
                    split and tuned,
                    paper,
                )
            )
            if protocol == "linear" and split:
                title = f"{said} (unseen groups){where}"
                columns.append(Column(f"linear-unseen{suffix}", title, protocol, number, True))
    return columns
