"""Searches side by side: groups, bands and tables against the runs' own numbers; the page in a browser."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import tomli_w

from engine.report.compare import groups_of, write_comparison
from engine.report.run import read_run
from engine.search.effects import as_json, effects_of
from tests.chromium import PROGRAM, Browser
from tests.made_run import Page, make_run, trial_of


@pytest.fixture(scope="module")
def searches(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Three seeds of evolution, of which one has a failed first member, two of random, one of its own."""
    root, made = tmp_path_factory.mktemp("searches"), {}
    plans: list[tuple[str, dict[str, Any]]] = [
        ("evolution-1", {"seed": 1}),
        ("evolution-2", {"seed": 2, "failed": {0: "boom"}}),
        ("evolution-3", {"seed": 3, "pruned": (30,)}),
        ("random-1", {"seed": 1, "method": "random"}),
        ("random-2", {"seed": 2, "method": "random"}),
        ("other", {"seed": 1, "population": 20, "summary": False}),
    ]
    for name, plan in plans:
        made[name] = make_run(root / name, members=40, **plan) | {"folder": root / name}
    return made


def folders(searches: dict[str, dict[str, Any]]) -> list[Path]:
    return [run["folder"] for run in searches.values()]


def best_so_far(rows: list[dict[str, Any]]) -> list[float | None]:
    found: list[float | None] = []
    for k in range(len(rows)):
        done = [r["fitness"] for r in rows[: k + 1] if r["state"] == "complete"]
        found.append(max(done, default=None))
    return found


def test_groups_and_bands(searches: dict[str, dict[str, Any]]) -> None:
    groups = groups_of([read_run(f) for f in folders(searches)])
    assert [len(g.runs) for g in groups] == [3, 2, 1]
    assert [g.label for g in groups] == [
        "evolution, population 12, rounds 28",
        "random",
        "evolution, population 20, rounds 20",
    ]
    curves = [best_so_far(searches[f"evolution-{k}"]["members"]) for k in (1, 2, 3)]
    mean, sd = groups[0].band
    assert np.isnan(mean[0])  # the second run has no fitness yet
    for k in range(1, 40):
        here = [c[k] for c in curves]
        assert mean[k] == pytest.approx(statistics.mean(here))  # type: ignore[type-var]
        assert sd[k] == pytest.approx(statistics.stdev(here))  # type: ignore[type-var]
    assert not groups[2].band[1].any()
    best = [searches[f"evolution-{k}"]["summary"]["best"]["mean"] for k in (1, 2, 3)]
    side = groups[0].side("best")
    assert side is not None and side.n == 3
    assert (side.mean, side.sd) == pytest.approx((statistics.mean(best), statistics.stdev(best)))
    assert groups[2].side("best") is None


def test_unequal_lengths_end_with_the_shortest(tmp_path: Path) -> None:
    for seed, members in ((1, 30), (2, 22)):
        make_run(tmp_path / str(seed), members=members, seed=seed, population=12)
        recipe = {"name": "same", "seed": seed, "search": {"method": "evolution"}}
        (tmp_path / str(seed) / "recipe.toml").write_text(tomli_w.dumps(recipe))
    (group,) = groups_of([read_run(tmp_path / "1"), read_run(tmp_path / "2")])
    assert [len(c) for c in group.curves] == [30, 22]
    assert len(group.band[0]) == len(group.band[1]) == 22


def test_the_page(searches: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    out = write_comparison(folders(searches), out=tmp_path / "new" / "side.html")
    page = Page(out.read_text())
    assert {p.name for p in out.parent.iterdir()} == {
        "side.html",
        *(f"side-{key}.{kind}" for key in ("curves", "final") for kind in ("svg", "png")),
    }
    for key in ("curves", "final"):
        wide, narrow = page.labels[f"figure-{key}"]
        assert wide == narrow and len(wide.split()) > 8
        root = ElementTree.parse(out.with_name(f"side-{key}.svg")).getroot()
        assert root.attrib["aria-label"] == wide
    rows = {row[0].strip(): [c.strip() for c in row] for row in page.rows["runs"][1:]}
    assert set(rows) == set(searches)
    for name, run in searches.items():
        done = [r["fitness"] for r in run["members"] if r["state"] == "complete"]
        cells = rows[name]
        assert cells[1:5] == [
            str(run["recipe"]["seed"]),
            "40",
            str(40 - len(done)),
            f"{max(done):.3f}",
        ]
        if "summary" in run:
            best = run["summary"]["best"]
            assert cells[5].split() == [f"{best['mean']:.3f}", "±", f"{best['sd']:.3f}"]
            assert cells[6] == "3" and cells[9] == "21 min 24 s"
        else:
            assert cells[5:10] == ["–", "–", "–", "–", "?"]  # noqa: RUF001
    differing = {
        row[0].strip(): [c.strip() for c in row[1:]] for row in page.rows["differences"][1:]
    }
    assert differing == {
        "search.population": ["12", "12", "20"],
        "search.rounds": ["28", "28", "20"],
    }
    # what matters: each group's members together
    for place, names in enumerate(
        (("evolution-1", "evolution-2", "evolution-3"), ("random-1", "random-2"))
    ):
        rows = [row for name in names for row in searches[name]["members"]]
        told = as_json(effects_of([trial_of(row) for row in rows]))
        claims = [[cell.split() for cell in row] for row in page.rows["claims"][1:]]
        assert [" ".join(row[0]) for row in claims] == [c["claim"] for c in told["claims"]]
        for row, c in zip(claims, told["claims"], strict=True):
            number = [f"{c['mean']:+.3f}", f"{c['low']:+.3f}", "to", f"{c['high']:+.3f}"]
            assert row[1 + place] == [*number, *c["verdict"].split()]
        tasks = {row[0].strip(): row[1 + place].split()[0] for row in page.rows["tasks"][1:]}
        assert tasks["cross"] == f"{told['effects']['groups']['cross']['mean']:+.3f}"
    said = " ".join(page.text.values()) + out.read_text()
    assert "1 run of them had not ended: other." in said
    assert "not the same measure" not in said


def test_what_can_not_be_compared_is_said(tmp_path: Path) -> None:
    for k, metric in enumerate(("hungarian", "nmi")):
        run = make_run(tmp_path / metric, members=5, seed=k)
        recipe = run["recipe"] | {"fitness": {"metric": metric}, "name": "<b>&"}
        (tmp_path / metric / "recipe.toml").write_text(tomli_w.dumps(recipe))
        provenance = run["provenance"] | {"data": metric, "git_sha": metric}
        (tmp_path / metric / "provenance.json").write_text(json.dumps(provenance))
    out = write_comparison([tmp_path / "hungarian", tmp_path / "nmi"], out=tmp_path / "c.html")
    text = out.read_text()
    for words in ("not the same measure", "did not see the same videos", "different versions"):
        assert words in text
    assert "<b>&" not in text
    Page(text)


def test_mistakes(searches: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    one = folders(searches)[0]
    for runs, out, words in (
        ([one], "c.html", "two or more"),
        ([one, one], "c.html", "two or more different"),
        (folders(searches), "c.txt", "must end in .html"),
    ):
        with pytest.raises(ValueError, match=words):
            write_comparison(runs, out=tmp_path / out)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "recipe.toml").write_text('name = "x"')
    with pytest.raises(ValueError, match="no members to compare"):
        write_comparison([one, tmp_path / "empty"], out=tmp_path / "c.html")
    assert not (tmp_path / "c.html").exists()


@pytest.mark.skipif(PROGRAM is None, reason="Chromium is not installed")
def test_in_a_browser(searches: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    out = write_comparison(folders(searches), out=tmp_path / "side.html")
    with Browser() as browser:
        for width in (390, 1280):
            browser.look(width, dark=width == 390)
            browser.open(out)
            assert browser.complaints() == [] and browser.requests() == []
            assert browser.value("document.documentElement.scrollWidth") <= width
            browser.call("Accessibility.enable")
            nodes = browser.call("Accessibility.getFullAXTree")["nodes"]
            images = [n for n in nodes if n.get("role", {}).get("value") in ("image", "img")]
            assert len([n for n in images if n["name"]["value"]]) == 2
