"""The report's heat maps as sketches for a width in CSS pixels: the paper's Figs. 3 and 7.

Fig. 3 comes twice: as the paper has it, squares at a few moments of the search, and whole, a row a term over all
trials. Both show the weights of the best loss so far.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from engine.objective.terms import MODALITIES, MODALITY_LETTERS, NUM_LAYERS, TERMS, Term
from engine.reporting.axes import mark_initial, trial_axis, trial_range
from engine.reporting.facts import Run
from engine.reporting.measures import lineage
from engine.reporting.sketch import RAMP, Box, Frame, Line, Marks, Sketch, Text, is_wide, shade
from engine.reporting.words import DISTILLED, MODALITY_LABELS, TASK_LABELS
from engine.samplers import Trial

TASK_SHORT = ("Shuffle", "Backw.", "Align", "Predict", "Recon.", "Color", "Cross", "Embed")
MOMENTS = 6
"""Heat maps of Fig. 3."""
ROW, GAP = 15.0, 7.0
"""Fig. 3 by term: height of a row, and space between groups of rows."""
Group = tuple[str, tuple[Term, ...]]
TASK_GROUPS: tuple[Group, ...] = tuple(
    (label, tuple(t for t in TERMS if t.task == task)) for task, label in TASK_LABELS.items()
)
DISTILL_GROUPS: tuple[Group, ...] = tuple(
    (f"Distil {m}", tuple(t for t in TERMS if t.task == "distill" and t.modality == m))
    for m in DISTILLED
)


def _key(sketch: Sketch, x: float, y: float) -> None:
    """The ramp from 0 to 1."""
    sketch.add(Text(x, y, "weight", "muted", 11), Text(x + 46, y, "0", "muted", 11))
    for i in range(len(RAMP)):
        sketch.add(Box(x + 57 + 6 * i, y - 6, 6.3, 12, f"q{i}"))
    sketch.add(Text(x + 189, y, "1", "muted", 11))


def _tall(groups: Sequence[Group]) -> float:
    return sum(len(terms) for _, terms in groups) * ROW + GAP * (len(groups) - 1)


def moments(run: Run) -> list[tuple[int, Trial]]:
    """Trials spread evenly from the first with a fitness to the last, each with the best so far."""
    first, last = run.improvements[0].number, run.trials[-1].number
    at = {round(first + k * (last - first) / (MOMENTS - 1)) for k in range(MOMENTS)}
    return [(k, [t for t in run.improvements if t.number <= k][-1]) for k in sorted(at)]


def rounds(run: Run, width: float) -> Sketch:
    """Fig. 3: the squares of Fig. 7, of the best loss so far at a few moments of the search."""
    columns = MOMENTS if is_wide(width) else 2
    shown = moments(run)
    each = (width - 12 * (columns - 1)) / columns
    cell = (each - 12) / len(TASK_LABELS)
    tall = 46 + 7 * cell + 16
    lines = -(-len(shown) // columns)
    sketch = Sketch(width, lines * (tall + 14) + 22)
    for i, (number, best) in enumerate(shown):
        x, y = (i % columns) * (each + 12), (i // columns) * (tall + 14)
        sketch.add(Text(x + 12, y + 9, f"trial {number:,}", bold=True))
        sketch.add(Text(x + each, y + 9, f"{best.fitness:.3f}", "muted", 11, "end"))
        _small(sketch, best.weights, x=x + 12, y=y + 34, cell=cell)
    _key(sketch, 0, sketch.height - 10)
    return sketch


def _small(
    sketch: Sketch, weights: Mapping[str, float], *, x: float, y: float, cell: float
) -> None:
    """One moment: tasks by modality above, distilled layers by modality below."""
    order = tuple(TASK_LABELS)
    below = y + len(MODALITIES) * cell + 16
    letters = {t.task: t.letter for t in TERMS}
    for i, task in enumerate(order):
        sketch.add(Text(x + (i + 0.5) * cell, y - 7, letters[task], "muted", 9, "middle"))
    for k in range(NUM_LAYERS):
        sketch.add(Text(x + (k + 0.5) * cell, below - 7, str(k), "muted", 9, "middle"))
    for names, top in ((MODALITIES, y), (DISTILLED, below)):
        for j, m in enumerate(names):
            letter = MODALITY_LETTERS[m]
            sketch.add(Text(x - 3, top + (j + 0.5) * cell, letter, "muted", 9, "end"))
    for term in TERMS:
        weight = weights[term.name]
        if term.layer is None:
            column, row, top = order.index(term.task), MODALITIES.index(term.modality), y
        else:
            column, row, top = term.layer, DISTILLED.index(term.modality), below
        at = (x + column * cell + 0.5, top + row * cell + 0.5)
        say = f"{term.name} {weight:.2f}"
        sketch.add(Box(*at, cell - 1, cell - 1, shade(weight)[0], 2, title=say))


def search(run: Run, width: float) -> Sketch:
    """Fig. 3 whole: the weights of the best loss so far at every trial, one row a term."""
    wide = is_wide(width)
    first, second = _tall(TASK_GROUPS), _tall(DISTILL_GROUPS)
    panel = (width - 44) / 2 if wide else width
    left, top = (panel + 44, 14.0) if wide else (0.0, 14 + first + 58)
    below = top + second + (78 if wide else 62)
    sketch = Sketch(width, 14 + first + 40 if wide else below + 62)
    _panel(sketch, run, TASK_GROUPS, left=0, top=14, width=panel)
    _panel(sketch, run, DISTILL_GROUPS, left=left, top=top, width=panel)
    _key(sketch, left + 124, below)
    sketch.add(Marks(((left + 130, below + 25),), "ink", 7, "down"))
    sketch.add(Text(left + 144, below + 24, "a new best is found", "muted", 11))
    if run.turn is not None:
        dash = ((left + 130, below + 40), (left + 130, below + 56))
        sketch.add(Line(dash, "muted", dash=True))
        sketch.add(Text(left + 144, below + 48, "the initial population ends", "muted", 11))
    return sketch


def _panel(
    sketch: Sketch, run: Run, groups: Sequence[Group], *, left: float, top: float, width: float
) -> None:
    frame = Frame(sketch, left + 124, top, width - 156, _tall(groups), trial_range(run))
    y = top
    for label, terms in groups:
        sketch.add(Text(left, y + ROW / 2, label))
        for term in terms:
            _row(frame, run, term, y)
            y += ROW
        y += GAP
    changes = tuple((frame.x(t.number - 0.5), top - 5) for t in run.improvements)
    sketch.add(Marks(changes, "ink", 7, "down"))
    trial_axis(frame, count=5)
    mark_initial(frame, run, label=False)


def _row(frame: Frame, run: Run, term: Term, y: float) -> None:
    """One term: a box for every stretch of trials over which its weight stays."""
    best = run.improvements
    edges = [*(frame.x(t.number - 0.5) for t in best), frame.right]
    weights = [t.weights[term.name] for t in best]
    middle = y + ROW / 2
    frame.sketch.add(Text(frame.left - 7, middle, term.code, "muted", 11, "end"))
    start = 0
    for i, weight in enumerate(weights):
        last = i + 1 == len(weights)
        if not last and weights[i + 1] == weight:
            continue
        span = edges[i + 1] - edges[start] + (0.0 if last else 0.5)  # no seam between neighbours
        say = f"{term.name} {weight:.2f} from trial {best[start].number}"
        frame.sketch.add(Box(edges[start], y, span, ROW - 1, shade(weight)[0], title=say))
        start = i + 1
    frame.sketch.add(Text(frame.right + 6, middle, f"{weights[-1]:.2f}", "muted", 11))


@dataclass(frozen=True)
class _Grid:
    """Where Fig. 7's squares lie: its top left corner, the side of a cell, and the sizes of its letters."""

    sketch: Sketch
    x: float
    y: float
    cell: float
    heading: float
    code: float
    value: float

    def headings(self, title: str, *, rows: Sequence[str], columns: Sequence[str]) -> None:
        """Names of rows and columns, and a faint dot where a square may be."""
        self.sketch.add(Text(self.x, self.y - 30, title, bold=True))
        for i, name in enumerate(columns):
            middle = self.x + (i + 0.5) * self.cell
            self.sketch.add(Text(middle, self.y - 9, name, "muted", self.heading, "middle"))
        for j, m in enumerate(rows):
            middle = self.y + (j + 0.5) * self.cell
            label = MODALITY_LABELS[m]
            self.sketch.add(Text(self.x - 9, middle, label, "muted", self.heading + 1, "end"))
            dots = tuple((self.x + (i + 0.5) * self.cell, middle) for i in range(len(columns)))
            self.sketch.add(Marks(dots, "rule", 5))

    def square(self, term: Term, weight: float, *, row: int, column: int, marked: bool) -> None:
        """A term's code and weight on its shade."""
        x, y = self.x + column * self.cell, self.y + row * self.cell
        color, letters = shade(weight)
        side, middle = self.cell - 3, x + self.cell / 2
        say = f"{term.name} {weight:.3f}"
        code, value = y + 0.4 * self.cell, y + 0.71 * self.cell
        self.sketch.add(
            Box(x + 1.5, y + 1.5, side, side, color, 5, title=say, key=f"b:{term.name}"),
            Text(middle, code, term.code, letters, self.code, "middle", True, f"c:{term.name}"),
            Text(
                middle, value, f"{weight:.2f}", letters, self.value, "middle", key=f"v:{term.name}"
            ),
        )
        if marked:
            self.sketch.add(Marks(((x + self.cell - 8, y + 8),), letters, 5, key="corner"))


def loss(run: Run, width: float) -> Sketch:
    """Fig. 7: the best loss, one square a term: modality by task, and modality by distilled layer."""
    wide = is_wide(width)
    assert run.weights is not None
    cell, left = (52.0, 58.0) if wide else (38.0, 45.0)
    letters = (11, 14, 11) if wide else (9, 11, 9)
    sketch = Sketch(width, 40 + 4 * cell + (8 if wide else 100 + 3 * cell))
    x, y = (left + 8 * cell + 72, 40.0) if wide else (left, 96 + 4 * cell)
    tasks = _Grid(sketch, left, 40, cell, *letters)
    tasks.headings("Tasks", rows=MODALITIES, columns=TASK_SHORT)
    layers = _Grid(sketch, x, y, cell, *letters)
    names = ["stem", *(str(k) for k in range(1, NUM_LAYERS))]
    layers.headings("Distillation into RGB, by layer", rows=DISTILLED, columns=names)
    drawn = {step.term for step in lineage(run)}
    order = tuple(TASK_LABELS)
    for term in TERMS:
        weight, marked = run.weights[term.name], term.name in drawn
        if term.layer is None:
            row, column = MODALITIES.index(term.modality), order.index(term.task)
            tasks.square(term, weight, row=row, column=column, marked=marked)
        else:
            row = DISTILLED.index(term.modality)
            layers.square(term, weight, row=row, column=term.layer, marked=marked)
    _key(sketch, x, y + 3 * cell + 26)
    return sketch
