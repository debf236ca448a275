"""The table of what each task learnt, and which networks are called collapsed."""

from engine.objective.terms import TERM_NAMES
from engine.report.learnt import collapsed, what_each_learnt


def test_rows_are_in_the_tables_order_and_name_what_stayed_at_chance() -> None:
    start = {"distill/flow@2": 1.9, "rgb/shuffle": 1.0, "rgb/predict": 1.0, "grey/predict": 1.0}
    end = {"distill/flow@2": 0.97, "rgb/shuffle": 0.4, "rgb/predict": 0.9}
    rows = what_each_learnt(start, end)
    assert [r.term for r in rows] == sorted(end, key=TERM_NAMES.index)
    assert [r.term for r in rows if r.near_chance] == ["distill/flow@2"]
    assert (rows[0].start, rows[0].end) == (1.0, 0.4)


def test_a_term_that_is_no_number_has_learnt_nothing() -> None:
    (row,) = what_each_learnt({"rgb/predict": 1.0}, {"rgb/predict": float("nan")})
    assert row.near_chance


def test_collapse_is_a_loss_of_directions() -> None:
    ranks = {"rgb": (6.5, 2.0), "grey": (3.0, 2.9), "flow": (3.0, 9.0)}
    assert collapsed(ranks) == ["rgb"]
