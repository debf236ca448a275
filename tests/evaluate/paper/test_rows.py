"""Rows of tables and figures: the paper's numbers, what is missing, and which networks are trained."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.core.recipe import RecipeError
from engine.core.run import RunError
from engine.evaluate.paper.cells import Cell, Store, digest_of
from engine.evaluate.paper.rows import (
    FIG4_TENTH,
    TABLE1,
    TABLE2,
    TITLES,
    Inputs,
    columns_of,
    rows_of,
)
from engine.evaluate.paper.scale import load_scale
from engine.objective.lossfile import load_loss
from tests.conftest import ROOT

PRINTED = {
    "ImageNet Pretrained": "imagenet",
    "Kinetics Pretrained": "kinetics",
    "Frame Shuffle [6]": "frame_shuffle",
    "Reverse Detection": "reverse_detection",
    "Audio/RGB Align [4]": "audio_align",
    "RGB to Flow": "rgb_to_flow",
    "Predicting 4 future frames": "predict_frames",
    "Joint Embedding": "joint_embedding",
    "Random Loss": "random",
    "Evolved Loss": "evolved",
}
PRINTED2 = {
    "3D ResNet-50 Scratch": "scratch",
    "3D ResNet-50 ImageNet": "imagenet",
    "3D ResNet-50 Kinetics": "kinetics",
    "Shuffle [6]": "shuffle",
    "OPN [5]": "opn",
    "AVTS [4]": "avts",
    "Our Evolved Loss": "evolved",
}
"""How the paper's text names the rows."""


@pytest.fixture(scope="module")
def paper() -> list[str]:
    for folder in (ROOT.parent, ROOT.parents[1]):
        path = folder / "shared" / "PAPER.txt"
        if path.is_file():
            return path.read_text(encoding="utf-8").splitlines()
    pytest.skip("the paper's text is not present")


def test_the_paper_s_numbers_are_the_paper_s(paper: list[str]) -> None:
    for printed, table in ((PRINTED, TABLE1), (PRINTED2, TABLE2)):
        for text, name in printed.items():
            wanted = f"{text} {' '.join(f'{number:.1f}' for number in table[name])}"
            assert wanted in paper, wanted
    assert any(f"({FIG4_TENTH:.1f}% accuracy)" in line for line in paper)


def test_a_wrong_number_would_be_seen(paper: list[str]) -> None:
    assert "Evolved Loss 44.2 62.8 66.2" in paper and "Evolved Loss 44.2 62.8 66.3" not in paper


@pytest.mark.parametrize("table", TITLES)
@pytest.mark.parametrize("scale", ["cpu", "small", "paper"])
def test_every_row_has_a_network_or_says_why_not(table: str, scale: str) -> None:
    rows = rows_of(table, load_scale(scale), Inputs())
    assert len({row.name for row in rows}) == len(rows)
    assert all((row.network is None) == bool(row.missing) for row in rows)
    for row in rows:
        if row.network is not None and row.network.loss is not None:
            load_loss(row.network.loss.format(seed=3))


def test_table1_has_all_methods_of_the_paper_and_further_losses() -> None:
    given = Inputs({"evolved": "sec4", "mine": "equal"}, Path("a.pt"), Path("b.pt"))
    rows = {row.name: row for row in rows_of("table1", load_scale("cpu"), given)}
    assert set(TABLE1) | {"equal", "no_distillation", "mine"} == set(rows)
    assert all(row.network is not None for row in rows.values())
    assert rows["evolved"].paper["hmdb51/linear"] == 62.8
    assert list(rows)[-1] == "evolved"


def test_cells_of_another_loss_are_refused(tmp_path: Path) -> None:
    """Also where the network is gone, and where a network fills several rows."""
    scale = load_scale("cpu")
    rows = rows_of("fig4", scale, Inputs({"evolved": "sec4"}))
    rows = [row for row in rows if row.network is not None and row.network.loss is not None]
    column, *_ = columns_of("fig4", scale, datasets=["folders"], by_group=[True])
    cells = [Cell(row, 0, column) for row in rows]
    store = Store(tmp_path)
    store.write(cells[0], {"loss": load_loss("sec4")})
    store.check_networks(cells)
    store.write(cells[1], {"loss": load_loss("equal")})
    with pytest.raises(RunError, match="was trained with another loss than sec4") as caught:
        store.check_networks(cells)
    assert len(rows) > 1 and all(
        str(tmp_path / "cells" / row.name) in str(caught.value) for row in rows
    )


def test_a_file_that_changed_fills_no_further_cells(tmp_path: Path) -> None:
    """A table must not mix two networks under one name."""
    file = tmp_path / "imagenet.pth"
    file.write_bytes(b"one")
    scale, inputs = load_scale("cpu"), Inputs({}, imagenet=file)
    (row,) = [row for row in rows_of("table1", scale, inputs) if row.name == "imagenet"]
    (column, *_) = columns_of("table1", scale, datasets=["folders"], by_group=[True])
    cells, store = [Cell(row, 0, column)], Store(tmp_path / "run")
    store.check_networks(cells)
    store.write(cells[0], {"file": digest_of(file)})
    store.check_networks(cells)
    file.write_bytes(b"two")
    with pytest.raises(RunError, match="is not the file that was judged before") as caught:
        store.check_networks(cells)
    assert str(tmp_path / "run" / "cells" / "imagenet") in str(caught.value)


def test_a_share_of_the_labels_is_for_fine_tuning_alone() -> None:
    with pytest.raises(RecipeError, match="only finetune trains with a share of the labels"):
        load_scale("cpu", ['fig4=["linear"]'])


def test_fig5_trains_once_with_all_clips() -> None:
    scale = load_scale("cpu")
    rows = rows_of("fig5", scale, Inputs({"evolved": "sec4"}))
    networks = {row.network for row in rows}
    assert len(networks) == 2 * len(scale.unlabelled) - 1
    assert {n.epochs for n in networks if n is not None and n.share < 1} == {True, False}


def test_columns_name_what_no_training_saw() -> None:
    scale = load_scale("cpu")
    grouped = columns_of("table1", scale, datasets=["folders"], by_group=[True])
    assert [(c.name, c.unseen) for c in grouped] == [
        ("kmeans", False),
        ("linear", False),
        ("linear-unseen", True),
        ("finetune", True),
    ]
    official = columns_of("table1", scale, datasets=["hmdb51"], by_group=[False])
    assert [c.name for c in official] == ["kmeans", "linear", "finetune"]
    both = columns_of("table2", scale, datasets=["hmdb51", "ucf101"], by_group=[False, False])
    assert [c.paper for c in both] == ["hmdb51/finetune", "ucf101/finetune"]
