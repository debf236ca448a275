"""What a run shows, in sentences: the report's verdict and the text alternative of every figure.

Every sentence is computed from the run; where the numbers don't support a claim, it says so.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from engine.objective.terms import BY_NAME, NUM_LAYERS, TERM_NAMES, TERMS
from engine.reporting.facts import (
    Run,
    ancestor,
    compare,
    fitness_of,
    fittest_means,
    initial_stat,
    lineage,
    number,
    stat,
)

TASK_LABELS = {
    "shuffle": "Frame shuffle",
    "backward": "Backward",
    "align_audio": "Audio align",
    "predict": "Predict future",
    "reconstruct": "Reconstruct",
    "colorize": "Colorize",
    "cross": "Cross-modal",
    "embed": "Joint embedding",
}
MODALITY_LABELS = {"rgb": "RGB", "grey": "Grey", "flow": "Flow", "audio": "Audio"}
TIME_LABELS = {
    "input": "Decoding",
    "views": "Views and flow",
    "train": "Training",
    "fitness": "Fitness",
    "search": "Search",
    "logging": "Logging",
    "report": "Report",
    "other": "Everything else",
}
METRIC_LABELS = {
    "hungarian": "k-means accuracy, clusters matched to classes",
    "nmi": "k-means, normalised mutual information",
    "ari": "k-means, adjusted Rand index",
}
DISTILLED = ("grey", "flow", "audio")


def duration(seconds: float) -> str:
    """Seconds as people say them: ``41.3 s``, ``12 min 5 s``, ``3 h 12 min``."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min"


def plural(count: int, noun: str) -> str:
    """A count with its noun: ``1 member``, ``12 members``."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def spoken(items: Sequence[str]) -> str:
    """A list as a sentence has it: ``a, b and c``."""
    return items[0] if len(items) == 1 else ", ".join(items[:-1]) + " and " + items[-1]


def fitness_metric(run: Run) -> str:
    """What a member's fitness is in this run."""
    section = run.recipe.get("fitness")
    metric = section.get("metric", "hungarian") if isinstance(section, dict) else "hungarian"
    return METRIC_LABELS.get(str(metric), str(metric))


def verdict(run: Run) -> str:
    """Whether the best loss beats random ones with fresh seeds, and by how many pooled sd."""
    if (c := compare(run)) is None:
        if not run.complete:
            return "No member is complete yet, so there is nothing to compare."
        return "The best loss has not been compared with random losses on fresh seeds yet."
    pair = f"{_pm(c.best.mean, c.best.sd)} against {_pm(c.random.mean, c.random.sd)}"
    if c.gain <= 0:
        lead = f"The evolved loss does not beat random losses: {pair}"
        if c.pooled_sds is None:
            return lead + "."
        return f"{lead}, {-c.gain:.3f} lower ({-c.pooled_sds:.1f} pooled standard deviations)."
    if c.pooled_sds is None:
        return (
            f"The evolved loss scores higher than random losses, {pair}, "
            "but without a spread to judge the difference by."
        )
    by = f"{c.gain:.3f} higher, {c.pooled_sds:.1f} pooled standard deviations"
    if c.pooled_sds < 2:
        return (
            f"The evolved loss scores higher than random losses, {pair}, but not clearly: {by}, "
            "which is within the noise of so few trainings."
        )
    return f"The evolved loss beats random losses: {pair} ({by})."


def caution(run: Run) -> str:
    """Why the search's own best value is not the result."""
    best, seen = stat(run.summary.get("best")), number(run.summary.get("best_search_fitness"))
    if best is None or seen is None:
        return (
            "The best fitness of a noisy search flatters itself: it is a maximum, part luck. "
            "Only trainings with fresh seeds tell how good the loss is, and this run has none yet."
        )
    how = (
        f"{plural(len(run.complete), 'noisy measurement')}"
        if run.complete
        else "noisy measurements"
    )
    return (
        f"The search itself saw {seen:.3f} for this loss. That is the maximum of {how} and so flatters "
        f"itself: part of it is luck. Trained again with {plural(best.n, 'fresh seed')}, the loss "
        f"scores {best.mean:.3f}; that is the number to quote."
    )


def _pm(mean: float, sd: float | None) -> str:
    return f"{mean:.3f}" if sd is None else f"{mean:.3f} ± {sd:.3f}"


def fitness_finding(run: Run) -> str:
    """What the fitness curve shows."""
    first, last = run.improvements[0], run.improvements[-1]
    text = f"Fitness of {plural(len(run.complete), 'member')} over the search. "
    if first is last:
        text += f"The best is trial {first.number} with {fitness_of(first):.3f}."
    else:
        text += (
            f"Best so far goes from {fitness_of(first):.3f} at trial {first.number} to "
            f"{fitness_of(last):.3f} at trial {last.number}, "
            f"in {plural(len(run.improvements) - 1, 'step')}."
        )
    known = [
        f"{label} {_pm(s.mean, s.sd)}"
        for label, s in (
            ("untrained network", stat(run.summary.get("untrained"))),
            ("initial population", initial_stat(run)),
            ("random losses, fresh seeds", stat(run.summary.get("random"))),
            ("best loss, fresh seeds", stat(run.summary.get("best"))),
        )
        if s is not None
    ]
    if known:
        text += f" Levels: {spoken(known)}."
    if run.failed:
        text += f" {plural(len(run.failed), 'member')} failed."
    return text


def _extremes(weights: dict[str, float], count: int) -> tuple[list[str], list[str]]:
    ranked = sorted(TERM_NAMES, key=lambda n: (-weights[n], TERM_NAMES.index(n)))
    say = [f"{BY_NAME[n].code} {weights[n]:.2f}" for n in ranked]
    return say[:count], say[::-1][:count]


def search_finding(run: Run) -> str:
    """What the heat map over the search shows."""
    assert run.weights is not None
    high, low = _extremes(dict(run.improvements[-1].weights), 3)
    changes = len(run.improvements) - 1
    often = "once" if changes == 1 else f"{changes:,} times"
    changed = f"changes {often}" if changes else "never changes"
    return (
        f"Heat map of the 39 weights of the best loss so far, which {changed}. "
        f"At the last trial {spoken(high)} weigh most, {spoken(low)} least."
    )


def loss_finding(run: Run) -> str:
    """What the heat map of the final loss shows."""
    assert run.weights is not None
    high, low = _extremes(run.weights, 5)
    return f"Heat map of the best loss. Highest weights: {spoken(high)}. Lowest: {spoken(low)}."


def evolved_share(run: Run) -> str:
    """How many weights were drawn anew on the way to the best loss."""
    changed = len({s.term for s in lineage(run) if s.term})
    start = ancestor(run)
    if not changed:
        return (
            "No weight of this loss was changed by evolution: it is a random draw, "
            "so single weights say little."
        )
    return (
        f"Evolution drew {changed} of the 39 weights anew on the way to this loss (a corner mark shows "
        f"which); the others are still the random draw of trial {start}, so each alone says little."
    )


def task_means(run: Run) -> dict[str, float]:
    """Each task's weight at the end: the mean over the fittest members and over modalities."""
    last = fittest_means(run)[1][-1]
    return {
        task: float(np.mean([last[i] for i, t in enumerate(TERMS) if t.task == task]))
        for task in TASK_LABELS
    }


def task_finding(run: Run) -> str:
    """What the tasks' curves show."""
    means = task_means(run)
    say = [
        f"{TASK_LABELS[t].lower()} {means[t]:.2f}"
        for t in sorted(means, key=lambda task: -means[task])
    ]
    return (
        f"Task weights among the fittest members. At the end {spoken(say[:3])} are highest, "
        f"{spoken(say[::-1][:3])} lowest. Draws are uniform, so a task that does not matter "
        "comes to 0.5 on average."
    )


def layer_finding(run: Run) -> str:
    """Where in the network each modality is distilled."""
    assert run.weights is not None
    parts = []
    for m in DISTILLED:
        values = [run.weights[f"distill/{m}@{k}"] for k in range(NUM_LAYERS)]
        if sum(values) == 0:
            parts.append(f"{m} not at all")
            continue
        depth = sum(k * v for k, v in enumerate(values)) / sum(values)
        lean = "early" if depth < 1.8 else "late" if depth > 2.2 else "evenly"
        peak = max(range(NUM_LAYERS), key=lambda k: values[k])
        parts.append(f"{m} {lean} (most at layer {peak}, {values[peak]:.2f})")
    return (
        f"Distillation weights by layer. The best loss distils {spoken(parts)}. "
        "The paper found grey early, audio and flow late."
    )


def time_parts(run: Run) -> dict[str, float]:
    """Seconds of the run by part, in the order in which a run meets them; empty while unknown."""
    given = run.summary.get("seconds")
    if not isinstance(given, dict):
        return {}
    parts = {k: s for k in TIME_LABELS if (s := number(given.get(k))) is not None and s > 0}
    rest = (number(given.get("total")) or 0.0) - sum(parts.values())
    if rest > 0.05:
        parts["other"] = parts.get("other", 0.0) + rest
    return parts


def time_finding(run: Run) -> str:
    """Where the time went, largest part first."""
    parts = time_parts(run)
    total = sum(parts.values())
    say = [
        f"{TIME_LABELS[k].lower()} {100 * parts[k] / total:.0f} %"
        for k in sorted(parts, key=lambda part: -parts[part])
    ]
    return f"Of {duration(total)}: {spoken(say[:4])}."
