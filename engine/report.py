"""A run as one self-contained HTML page, with the paper's figures and tables, and as image files.

Numbers come from ``reporting.facts`` and ``reporting.measures``, sentences from ``reporting.words`` and
``reporting.findings``, drawings from one module a kind; here they are put together.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from engine.reporting import (
    costs,
    curves,
    facts,
    findings,
    html,
    maps,
    measures,
    page,
    progress,
    relations,
    words,
)
from engine.reporting.facts import Run
from engine.reporting.importance import FEWEST, Importance, importance
from engine.reporting.measures import Agreement
from engine.reporting.sketch import NARROW, WIDE, Sketch


@dataclass(frozen=True)
class Scene:
    """A run, and what takes long to compute and several parts of the page want."""

    run: Run

    @cached_property
    def importance(self) -> Importance | None:
        """How much each weight matters."""
        return importance(self.run)

    @cached_property
    def zipf(self) -> Agreement | None:
        """How far the label-free fitness ranks members as their classes do."""
        return measures.agreement(self.run, "zipf", "hungarian")


@dataclass(frozen=True)
class FigureKind:
    """A figure of the report: how it is drawn, and the sentence that is its text alternative."""

    key: str
    draw: Callable[[Scene, float], Sketch]
    finding: Callable[[Scene], str]
    present: Callable[[Scene], bool]
    missing: str
    """What the page says where the run has nothing to draw."""


def _plain(
    key: str, draw: Callable[[Run, float], Sketch], finding: Callable[[Run], str]
) -> FigureKind:
    """A figure that needs the run alone, and at least one member with a fitness."""
    return FigureKind(
        key,
        lambda scene, width: draw(scene.run, width),
        lambda scene: finding(scene.run),
        lambda scene: bool(scene.run.complete),
        "no member is complete yet.",
    )


def _important(scene: Scene, width: float) -> Sketch:
    assert scene.importance is not None
    return relations.important(scene.run, scene.importance, width)


def _important_finding(scene: Scene) -> str:
    assert scene.importance is not None
    return findings.importance_finding(scene.importance)


def _zipf(scene: Scene, width: float) -> Sketch:
    assert scene.zipf is not None
    return relations.scatter(scene.zipf, width, x="zipf", y="k-means accuracy")


def _zipf_finding(scene: Scene) -> str:
    assert scene.zipf is not None
    return findings.zipf_finding(scene.zipf)


def _has_steps(scene: Scene) -> bool:
    return any(s.fitness_after is not None for s in measures.lineage(scene.run))


FIGURES = (
    _plain("fitness", progress.fitness, findings.fitness_finding),
    _plain("loss", maps.loss, findings.loss_finding),
    FigureKind(
        "importance",
        _important,
        _important_finding,
        lambda scene: scene.importance is not None,
        f"it takes {FEWEST} members that are complete and differ in fitness.",
    ),
    _plain("rounds", maps.rounds, findings.rounds_finding),
    _plain("search", maps.search, findings.search_finding),
    _plain("tasks", curves.tasks, findings.task_finding),
    _plain("modalities", curves.modalities, findings.modality_finding),
    FigureKind(
        "lineage",
        lambda scene, width: progress.ancestry(scene.run, width),
        lambda scene: findings.lineage_finding(scene.run),
        _has_steps,
        "the best member has no parent.",
    ),
    _plain("layers", curves.layers, findings.layer_finding),
    FigureKind(
        "zipf",
        _zipf,
        _zipf_finding,
        lambda scene: scene.zipf is not None,
        "members' metrics do not hold both zipf and hungarian.",
    ),
    FigureKind(
        "time",
        lambda scene, width: costs.time(scene.run, width),
        lambda scene: findings.time_finding(scene.run),
        lambda scene: bool(words.time_parts(scene.run)),
        "the run has not noted its time yet.",
    ),
    FigureKind(
        "rates",
        lambda scene, width: costs.rates(scene.run, width),
        lambda scene: findings.rate_finding(scene.run),
        lambda scene: any(t.clips_per_second for t in scene.run.complete),
        "members do not say how fast they were trained.",
    ),
)


def write_report(run: Path) -> Path:
    """Write ``report.html`` and ``figures/*.svg``, ``figures/*.png`` into a run folder, finished or not.

    The page needs no other file and no network. What the run does not hold yet is left out with a sentence that
    says so. Equal run folders give equal bytes. Figures are the paper's 3, 6, 7 and 8, fitness and lineage of the
    best member, each term's importance, the label-free fitness beside the labels', time and throughput.

    Returns the page's path. Raises ValueError where the folder is not a run.
    """
    scene = Scene(facts.read_run(run))
    folder = run / "figures"
    folder.mkdir(exist_ok=True)
    drawn: dict[str, dict[str, Any]] = {}
    for kind in FIGURES:
        if not kind.present(scene):
            drawn[kind.key] = {"missing": kind.missing}
            for suffix in (".svg", ".png"):
                (folder / f"{kind.key}{suffix}").unlink(missing_ok=True)
            continue
        wide, narrow = (kind.draw(scene, width) for width in (WIDE, NARROW))
        label = kind.finding(scene)
        drawn[kind.key] = html.figure(wide, narrow, label=label, path=folder / kind.key)
    values = page.values(scene.run)
    drawn["loss"]["controls"] = values["frames"] is not None
    text = html.render("report.html.j2", figures=drawn, importance=scene.importance, **values)
    path = run / "report.html"
    html.replace(path, text.encode())
    return path
