"""What fitness depends on and agrees with, as sketches: importance of each term, and the label-free fitness."""

from __future__ import annotations

from engine.objective.terms import BY_NAME, TERM_NAMES
from engine.reporting.facts import Run
from engine.reporting.importance import Importance
from engine.reporting.measures import Agreement
from engine.reporting.sketch import Box, Frame, Line, Marks, Sketch, Text, is_wide, ticks

BAR = 17.0
"""Height of a term's row."""


def important(run: Run, found: Importance, width: float) -> Sketch:
    """Every term's share of the variance of fitness beside its weight in the best loss."""
    assert run.weights is not None
    wide = is_wide(width)
    order = sorted(TERM_NAMES, key=lambda n: (-found.share[n], TERM_NAMES.index(n)))
    left, middle = (150.0, 70.0) if wide else (98.0, 40.0)
    each = (width - left - middle - (44 if wide else 30)) / 2
    sketch = Sketch(width, 34 + BAR * len(order) + 6)
    second = left + each + middle
    sketch.add(Text(left, 9, "share of variance (fANOVA)" if wide else "fANOVA share", bold=True))
    sketch.add(Text(second, 9, "weight in the best loss" if wide else "final weight", bold=True))
    top = max(max(found.share.values()), found.chance, 1e-9)
    for i, name in enumerate(order):
        y = 34 + (i + 0.5) * BAR
        share, weight = found.share[name], run.weights[name]
        if wide:
            sketch.add(Text(0, y, BY_NAME[name].code, bold=True), Text(36, y, name, "muted", 11))
        else:
            sketch.add(Text(0, y, name, "muted", 10))
        real = share > found.chance
        color = "accent" if real else "muted"
        say = f"{name}: share {share:.3f}, weight {weight:.2f}"
        span = max(share / top * each, 0.8)
        sketch.add(Box(left, y - 5, span, 10, color, 2, 1 if real else 0.55, title=say))
        sign = "+" if found.direction[name] >= 0 else "\N{MINUS SIGN}"
        label = f"{100 * share:.1f} % {sign}" if wide else f"{100 * share:.0f} {sign}"
        sketch.add(Text(left + span + 5, y, label, color if real else "muted", 10))
        sketch.add(Box(second, y - 5, max(weight * each, 0.8), 10, "task4", 2, title=say))
        sketch.add(Text(second + weight * each + 5, y, f"{weight:.2f}", "muted", 10))
    x = left + found.chance / top * each
    sketch.add(Line(((x, 26), (x, sketch.height - 4)), "random", 1.4, dash=True))
    sketch.add(Text(x, 20, "chance", "random", 10, "middle"))
    return sketch


def scatter(found: Agreement, width: float, *, x: str, y: str) -> Sketch:
    """One mark a member: its fitness by one measure against another."""
    xs, ys = ([p[i] for p in found.pairs] for i in (0, 1))
    tall = 260.0
    sketch = Sketch(width, tall + 72)
    limits = []
    for values in (xs, ys):
        pad = max(0.06 * (max(values) - min(values)), 0.004)
        limits.append((min(values) - pad, max(values) + pad))
    frame = Frame(sketch, 48, 26, min(width - 60, 460.0), tall, *limits)
    marked = ticks(*limits[1], count=5)
    frame.rules(marked, digits=2 if len(marked) < 2 or marked[1] - marked[0] > 0.0099 else 3)
    for value in ticks(*limits[0], count=5):
        at = frame.x(value)
        sketch.add(Line(((at, frame.bottom + 1), (at, frame.bottom + 5)), "muted"))
        sketch.add(Text(at, frame.bottom + 14, f"{value:g}", "muted", 11, "middle"))
    sketch.add(Text(frame.left, 9, y, "muted", 11))
    sketch.add(Text(frame.left + frame.width / 2, frame.bottom + 31, x, "muted", 11, "middle"))
    many = len(xs) > 300
    points = tuple((frame.x(a), frame.y(b)) for a, b in found.pairs)
    sketch.add(Marks(points, "accent", 3.0 if many else 6.5, alpha=0.55 if many else 1.0))
    return sketch
