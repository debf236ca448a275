"""A report's names and sentences: labels, times, the verdict and what to be careful of.

Every sentence is computed from the run; where the numbers don't support a claim, it says so.
"""

from __future__ import annotations

from collections.abc import Sequence

from engine.reporting.facts import Run, number
from engine.reporting.measures import (
    ancestor,
    compare,
    lineage,
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
    "zipf": "label-free: how near the clusters' sizes are to Zipf's law",
}
EVENT_LABELS = {
    "worker_died": "a worker died",
    "retry": "evaluated again",
    "time_limit": "past its time limit",
    "out_of_memory": "out of memory",
    "non_finite": "a loss was not finite",
    "storage": "the study's storage was away",
    "resumed": "the run was resumed",
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
    pair = f"{pm(c.best.mean, c.best.sd)} against {pm(c.random.mean, c.random.sd)}"
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


def pm(mean: float, sd: float | None) -> str:
    """A mean with its sd, where there is one."""
    return f"{mean:.3f}" if sd is None else f"{mean:.3f} ± {sd:.3f}"


def noise(run: Run) -> str:
    """What a step of the lineage is to be judged by."""
    best = stat(run.summary.get("best"))
    if best is None or best.sd is None:
        return (
            "Each fitness is one noisy measurement, and the winner of a tournament was lucky on average: "
            "small gains may be luck."
        )
    return (
        f"Each fitness is one noisy measurement: trained again with fresh seeds, the best loss alone varies by "
        f"{best.sd:.3f} (sd), so a difference of two members below {2 * 2**0.5 * best.sd:.3f} may be luck."
    )


def evolved_share(run: Run) -> str:
    """How many weights were drawn anew on the way to the best loss."""
    changed = len({s.term for s in lineage(run) if s.term})
    start = ancestor(run)
    if not changed and run.method not in ("evolution", "random"):
        return f"All its weights were proposed together, by {run.method}: none was changed alone."
    if not changed:
        return (
            "No weight of this loss was changed by evolution: it is a random draw, "
            "so single weights say little."
        )
    return (
        f"Evolution drew {changed} of the 39 weights anew on the way to this loss (a corner mark shows "
        f"which); the others are still the random draw of trial {start}, so each alone says little."
    )


def time_parts(run: Run) -> dict[str, float]:
    """Seconds of the run by part, in the order in which a run meets them; empty while unknown."""
    parts = {k: s for k in TIME_LABELS if (s := run.seconds.get(k, 0.0)) > 0}
    rest = run.seconds.get("total", 0.0) - sum(parts.values())
    if rest > 0.05:
        parts["other"] = parts.get("other", 0.0) + rest
    return parts
