"""What plots over the search share: the axis of trials, the initial population's end, a weight followed along it."""

from __future__ import annotations

import numpy as np

from engine.reporting.facts import Array, Run
from engine.reporting.sketch import Frame, Line, Text, ticks


def trial_range(run: Run) -> tuple[float, float]:
    """The x axis of the search: from half before the first trial to half after the last."""
    return run.trials[0].number - 0.5, run.trials[-1].number + 0.5


def trial_axis(frame: Frame, *, count: int, name: str = "trial") -> None:
    """About ``count`` trial numbers under a plot."""
    frame.ticks(ticks(*frame.xlim, count=count, whole=True), name=name)


def mark_initial(frame: Frame, run: Run, *, label: bool = True) -> None:
    """A line where the initial population ends, if children follow it."""
    if run.turn is None:
        return
    x = frame.x(run.turn + 0.5)
    frame.sketch.add(Line(((x, frame.top - 12), (x, frame.bottom)), "muted", dash=True, alpha=0.7))
    if label and x - frame.left > 112:
        frame.sketch.add(Text(x - 6, frame.top - 9, "initial population", "muted", 11, "end"))
    if label and frame.right - x > 62:
        frame.sketch.add(
            Text(x + 6, frame.top - 9, "evolution" if run.evolved else "search", "muted", 11)
        )


def follow(
    frame: Frame,
    run: Run,
    at: Array,
    values: Array,
    *,
    color: str,
    width: float,
    alpha: float = 1.0,
) -> None:
    """A weight over the search, faint while the population is still being drawn at random."""
    at, values = np.append(at, frame.xlim[1]), np.append(values, values[-1])
    turn = -1 if run.turn is None else run.turn
    early = int(np.searchsorted(at, turn, side="right"))
    if early:
        edge, held = turn + 0.5, values[early - 1]
        frame.steps(
            np.append(at[:early], edge),
            np.append(values[:early], held),
            color=color,
            width=max(1.0, width - 0.7),
            alpha=round(0.4 * alpha, 2),
        )
        at, values = np.insert(at[early:], 0, edge), np.insert(values[early:], 0, held)
    frame.steps(at, values, color=color, width=width, alpha=alpha)
