"""The report in a real browser: no complaints, the slider moves, alternatives, phones, print and both themes."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from engine.objective.terms import TERM_NAMES
from engine.report import write_report
from engine.report.figures.theme import PALETTE, RAMP
from tests.chromium import PROGRAM, Browser
from tests.made_run import make_run

pytestmark = pytest.mark.skipif(PROGRAM is None, reason="Chromium is not installed")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser() as opened:
        yield opened


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The page of a run that has everything, names of a length that can break a layout among it."""
    folder = tmp_path_factory.mktemp("runs") / "full"
    run = make_run(folder, members=60, failed={7: "x" * 200, 9: "killed"}, pruned=(13, 15))
    event = {"time": 1.0, "kind": "retry", "trials": list(range(30)), "detail": "/very/long" * 30}
    (folder / "events.jsonl").write_text(json.dumps(event))
    return write_report(folder), run


def best_so_far(run: dict[str, Any], trial: int) -> dict[str, Any]:
    done = [r for r in run["members"] if r["state"] == "complete" and r["trial"] <= trial]
    return max(done, key=lambda r: r["fitness"])


def squares(browser: Browser, name: str) -> dict[str, list[str]]:
    """What the heat map shows: each term's colour, and its number."""
    script = f"""Object.fromEntries([...document.querySelectorAll(
        "#figure-loss svg.{name} [data-k^='b:']")].map((box) => {{
            const term = box.dataset.k.slice(2), svg = box.closest("svg");
            const value = svg.querySelector('[data-k="v:' + term + '"] text');
            return [term, [getComputedStyle(box.querySelector('path')).fill, value.textContent]]; }}))"""
    found: dict[str, list[str]] = browser.value(script)
    return found


def expected(row: dict[str, Any]) -> dict[str, list[str]]:
    shown = {}
    for term, weight in row["weights"].items():
        color = RAMP[round(weight * (len(RAMP) - 1))][0]
        parts = ", ".join(str(int(color[i : i + 2], 16)) for i in (1, 3, 5))
        shown[term] = [f"rgb({parts})", f"{weight:.2f}"]
    return shown


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [390, 1280])
def test_no_complaints_no_requests_no_sideways_scrolling(
    browser: Browser, made: tuple[Path, dict[str, Any]], width: int, dark: bool
) -> None:
    browser.look(width, dark=dark)
    browser.open(made[0])
    assert browser.complaints() == []
    assert browser.requests() == []
    assert browser.value("document.documentElement.scrollWidth") <= width
    shown = browser.value("getComputedStyle(document.body).backgroundColor")
    parts = [int(PALETTE["surface"][dark][i : i + 2], 16) for i in (1, 3, 5)]
    assert shown == f"rgb({parts[0]}, {parts[1]}, {parts[2]})"
    edge = browser.value(
        "Math.max(...[...document.querySelectorAll('main *')].filter((e) => e.checkVisibility())"
        ".map((e) => e.getBoundingClientRect().right))"
    )
    assert edge <= width + 1


def test_every_figure_that_is_seen_has_an_alternative(
    browser: Browser, made: tuple[Path, dict[str, Any]]
) -> None:
    """As a screen reader gets it: the browser's own accessibility tree."""
    for width in (390, 1280):
        browser.look(width)
        browser.open(made[0])
        browser.call("Accessibility.enable")
        nodes = browser.call("Accessibility.getFullAXTree")["nodes"]
        images = [n for n in nodes if n.get("role", {}).get("value") in ("image", "img")]
        names = [n["name"]["value"] for n in images]
        assert len(names) == 12 == browser.value("document.querySelectorAll('figure').length")
        assert len(set(names)) == 12
        assert all(len(name.split()) >= 8 for name in names)


@pytest.mark.parametrize("name", ["wide", "narrow"])
def test_the_slider_moves_the_heat_map(
    browser: Browser, made: tuple[Path, dict[str, Any]], name: str
) -> None:
    page, run = made
    browser.look(1280 if name == "wide" else 390)
    browser.open(page)
    last = run["members"][-1]["trial"]
    assert squares(browser, name) == expected(best_so_far(run, last))
    at_end = browser.value("document.querySelector('#figure-loss svg').getAttribute('aria-label')")
    browser.value("document.getElementById('rounds-at').focus()")
    browser.press("Home")
    first = int(browser.value("document.getElementById('rounds-at').value"))
    for step in range(last - first + 1):
        trial = first + step
        row = best_so_far(run, trial)
        if row["trial"] == trial or step == last - first:  # it changed, or this is the end
            assert squares(browser, name) == expected(row), trial
            said = browser.value("document.getElementById('rounds-say').textContent")
            assert f"the best loss is trial {row['trial']}\N{RIGHT SINGLE QUOTATION MARK}s" in said
            assert f"{row['fitness']:.3f}" in said
        browser.press("ArrowRight")
    assert set(squares(browser, name)) == set(TERM_NAMES)
    label = "document.querySelector('#figure-loss svg').getAttribute('aria-label')"
    assert browser.value(label) == at_end
    browser.press("Home")
    assert browser.value(label) != at_end
    assert browser.complaints() == []


def test_buttons_go_from_best_to_best(browser: Browser, made: tuple[Path, dict[str, Any]]) -> None:
    page, run = made
    browser.look(1280)
    browser.open(page)
    changes = [r["trial"] for r in run["members"] if best_so_far_is(run, r)]
    assert len(changes) > 3
    seen = []
    for _ in changes[1:]:
        browser.value("document.getElementById('rounds-back').click()")
        seen.append(int(browser.value("document.getElementById('rounds-at').value")))
    assert seen == changes[-2::-1]
    assert browser.value("document.getElementById('rounds-back').disabled")
    for _ in changes[1:]:
        browser.value("document.getElementById('rounds-on').click()")
    assert browser.value("document.getElementById('rounds-on').disabled")
    assert squares(browser, "wide") == expected(best_so_far(run, 10**6))


def best_so_far_is(run: dict[str, Any], row: dict[str, Any]) -> bool:
    return row["state"] == "complete" and best_so_far(run, row["trial"]) is row


def test_without_scripts_the_last_best_loss_is_there(
    browser: Browser, made: tuple[Path, dict[str, Any]]
) -> None:
    page, run = made
    browser.look(1280, script=False)
    browser.open(page)
    text = browser.call(
        "DOM.getOuterHTML", nodeId=browser.call("DOM.getDocument")["root"]["nodeId"]
    )
    controls = re.search(r'<div class="controls"[^>]*>', text["outerHTML"])
    assert controls is not None and "hidden" in controls.group()
    found = squares(browser, "wide")
    assert found == expected(best_so_far(run, 10**6))


def test_print(browser: Browser, made: tuple[Path, dict[str, Any]]) -> None:
    browser.look(1280)
    browser.open(made[0])
    pages = len(re.findall(rb"/Type\s*/Page\b", browser.pdf()))
    assert 5 <= pages <= 20
    browser.call("Emulation.setEmulatedMedia", media="print")
    assert not browser.value("document.getElementById('rounds').checkVisibility()")
    browser.call("Emulation.setEmulatedMedia", media="")
