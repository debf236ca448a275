"""A report's names and sentences: labels, times, the verdict, cautions, and what each figure shows.

Every sentence is computed from the run; where the numbers don't support a claim, it says so. What a figure shows is
its text alternative, too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from engine.objective.terms import BY_NAME, NUM_LAYERS, TERM_NAMES, TERMS
from engine.report.measures import (
    Agreement,
    ancestor,
    fittest_means,
    lineage,
    luckiest,
    pooled_sds,
    stat,
)
from engine.report.run import Run, fitness_of, table_of
from engine.search.effects import INTERVAL, Effects
from engine.search.members import finite

if TYPE_CHECKING:
    from engine.features.reliability import Reliability

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
    "input": "Waiting for clips",
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
NAMED = 8
"""Terms that a sentence names before it counts the others."""


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
    metric = str(table_of(run.recipe, "fitness").get("metric", "hungarian"))
    return METRIC_LABELS.get(metric, metric)


def pm(mean: float, sd: float | None) -> str:
    """A mean with its sd, where there is one."""
    return f"{mean:.3f}" if sd is None else f"{mean:.3f} ± {sd:.3f}"


def time_parts(run: Run) -> dict[str, float]:
    """Seconds of the run by part, in the order in which a run meets them; empty while unknown."""
    parts = {k: s for k in TIME_LABELS if (s := run.seconds.get(k, 0.0)) > 0}
    rest = run.seconds.get("total", 0.0) - sum(parts.values())
    if rest > 0.05:
        parts["other"] = parts.get("other", 0.0) + rest
    return parts


def verdict(run: Run, signal: Reliability | None) -> str:
    """Whether the best loss beats random ones with fresh seeds, by how many pooled sd, and whether fitness can tell."""
    best, random = stat(run, "best"), stat(run, "random")
    if not run.complete and (best is None or random is None):
        return "No member is complete yet, so there is nothing to compare."
    if best is None or random is None:
        return "The best loss has not been compared with random losses on fresh seeds yet."
    gain, apart = best.mean - random.mean, pooled_sds(best, random)
    sds = "" if apart is None else f", {abs(apart):.1f} pooled standard deviations"
    side = "higher" if gain > 0 else "lower"
    by = f"{pm(best.mean, best.sd)} against {pm(random.mean, random.sd)} ({abs(gain):.3f} {side}{sds})"
    lucky, count = luckiest(run)
    if lucky is not None:
        by += f"; the luckiest of {count} random losses reached {lucky.mean:.3f}"
    if signal is not None and math.isfinite(signal.ratio):
        by += f"; the first losses differ {signal.ratio:.1f} times as much as seeds"
    if gain <= 0:
        return f"The evolved loss does not beat random losses: {by}."
    if apart is None:
        return f"The evolved loss scores higher than random losses, but there is no spread to judge by: {by}."
    if apart < 2:
        return f"The evolved loss scores higher than random losses, but not clearly: {by}."
    return f"The evolved loss beats random losses: {by}."


def trust(run: Run, signal: Reliability | None) -> list[tuple[str, str]]:
    """What the verdict is to be judged by, each figure with its name; empty where no loss has two seeds."""
    if signal is None:
        return []
    never = "over 10,000" if signal.ratio else "no number: losses don't differ"
    told = "trainings of each: " + _number(signal.repeats, never)
    gained = "members like the first: " + _number(signal.members(), never)
    best, random = stat(run, "best"), stat(run, "random")
    apart = pooled_sds(best, random) if best and random else None
    return [
        ("spread of losses, of seeds", f"{signal.loss_spread:.3f}, {signal.seed_spread:.3f} (sd)"),
        ("reliability of one training", f"{signal.one():.2f}"),
        ("best ahead of random losses", "?" if apart is None else f"{apart:+.1f} pooled sd"),
        ("to tell two losses apart", told),
        ("to gain one spread", gained),
    ]


def _number(count: float, never: str) -> str:
    return f"{count:,.0f}" if math.isfinite(count) else never


def caution(run: Run) -> str:
    """Why the search's own best value is not the result."""
    best, seen = stat(run, "best"), finite(run.summary.get("best_search_fitness"))
    if best is None or seen is None:
        return "The best fitness of a noisy search flatters itself, and no fresh seed has confirmed this loss yet."
    highest = "the highest" if run.improvements and run.best is run.improvements[-1] else "one"
    return (
        f"The search saw {seen:.3f} for this loss, {highest} of many noisy measurements, which flatters itself: "
        f"quote {best.mean:.3f}, from {plural(best.n, 'fresh seed')}."
    )


def noise(run: Run) -> str:
    """What a step of the lineage is to be judged by."""
    best = stat(run, "best")
    if best is None or best.sd is None:
        return "Each fitness is one noisy measurement, so small gains may be luck."
    return (
        f"The best loss alone varies by {best.sd:.3f} (sd) over fresh seeds, so a gain below "
        f"{2 * 2**0.5 * best.sd:.3f} may be luck."
    )


def evolved_share(run: Run) -> str:
    """How many weights were drawn anew on the way to the best loss."""
    changed = len({s.term for s in lineage(run) if s.term})
    if changed:
        return (
            f"Evolution drew {changed} of the 39 weights anew (corner marks); the others are the random draw of trial "
            f"{ancestor(run)}, so each alone says little."
        )
    if run.method not in ("evolution", "random"):
        return f"All its weights were proposed together, by {run.method}."
    return "No weight of this loss was changed by evolution: it is a random draw, so single weights say little."


def _extremes(values: Mapping[str, float], count: int = 3) -> str:
    """The highest and the lowest values."""
    named = [f"{name} {values[name]:.2f}" for name in sorted(values, key=lambda n: -values[n])]
    return f"{spoken(named[:count])} are highest, {spoken(named[::-1][:count])} lowest"


def _by_code(weights: Mapping[str, float]) -> dict[str, float]:
    return {BY_NAME[name].code: weights[name] for name in TERM_NAMES}


def fitness_finding(run: Run) -> str:
    """How many members there are, and the best of them."""
    best = run.improvements[-1]
    word = "best" if best is run.best else "highest"
    others = {"failed": len(run.failed), "pruned": len(run.pruned)}
    without = ", ".join(f"{count:,} {state}" for state, count in others.items() if count)
    return (
        f"Fitness of {plural(len(run.complete), 'member')} over the search{f' ({without})' if without else ''}: "
        f"the {word} is trial {best.number} with {fitness_of(best):.3f}."
    )


def loss_finding(run: Run) -> str:
    """What the heat map of the final loss shows."""
    assert run.weights is not None
    return f"Weights of the best loss: {_extremes(_by_code(run.weights), 5)}."


def search_finding(run: Run) -> str:
    """What the heat map over the search shows."""
    count = plural(len(run.improvements) - 1, "change")
    last = _extremes(_by_code(run.improvements[-1].weights))
    return (
        f"Weights of the best loss so far, with {count} over the search; at the last trial {last}."
    )


def rounds_finding(run: Run) -> str:
    """How the heat map changes from the first moment to the last."""
    first, last = run.improvements[0].weights, run.improvements[-1].weights
    moved = [n for n in TERM_NAMES if last[n] != first[n]]
    moved.sort(key=lambda n: -abs(last[n] - first[n]))
    most = [f"{BY_NAME[n].code} from {first[n]:.2f} to {last[n]:.2f}" for n in moved[:3]]
    text = f"From the first to the last best loss {len(moved)} of 39 weights differ"
    return f"{text}, most of all {spoken(most)}." if most else f"{text}."


def task_finding(run: Run) -> str:
    """Which tasks the fittest members weigh most."""
    last = fittest_means(run)[1][-1]
    means = {
        label.lower(): float(np.mean([last[i] for i, t in enumerate(TERMS) if t.task == task]))
        for task, label in TASK_LABELS.items()
    }
    return f"Task weights of the {run.num_fittest} fittest members: {_extremes(means)}."


def modality_finding(run: Run) -> str:
    """Which single terms the fittest members weigh most."""
    last = fittest_means(run)[1][-1]
    terms = {t.name: float(last[i]) for i, t in enumerate(TERMS) if t.layer is None}
    return f"Task weights of the {run.num_fittest} fittest members by modality: {_extremes(terms)}."


def lineage_finding(run: Run) -> str:
    """Which change of a weight helped the best member's line most, and how many did not."""
    steps = lineage(run)
    gains = [(s.gain, s) for s in steps if s.gain is not None]
    text = f"The best member comes of {plural(len(steps), 'mutation')}"
    if not gains:
        return f"{text}; what each gained is not known."
    gain, best = max(gains, key=lambda pair: pair[0])
    worse = sum(gain < 0 for gain, _ in gains)
    return (
        f"{text}; the largest gain is trial {best.trial}'s, {gain:+.3f}, by {best.term or 'a weight'}, "
        f"and {worse} of {len(gains)} scored lower than the parent."
    )


def effects_finding(found: Effects) -> str:
    """Which terms fitness depends on for sure."""
    sure = sorted(
        (n for n, e in found.terms.items() if e.sign), key=lambda n: -abs(found.terms[n].mean)
    )
    said = f"{100 * INTERVAL:.0f} % intervals from {plural(found.members, 'member')}"
    if found.members < len(TERM_NAMES):
        said += ", fewer than there are terms: they lean on the model, and some are too narrow"
    if not sure:
        return f"No term's effect is told apart from 0 ({said})."
    sides = []
    for sign, verb in ((1, "help"), (-1, "harm")):
        names = [f"{n} {found.terms[n].mean:+.3f}" for n in sure if found.terms[n].sign == sign]
        if rest := names[NAMED:]:
            names[NAMED:] = [plural(len(rest), "other")]
        if names:
            sides.append(f"{spoken(names)} {verb}{'s' if len(names) == 1 else ''}")
    return f"{'; '.join(sides)} ({said})."


def zipf_finding(result: Agreement) -> str:
    """Whether the label-free fitness ranks members as labels do."""
    members = plural(result.n, "member")
    if result.rho is None or result.low is None or result.high is None:
        return f"Zipf fitness against k-means accuracy of {members}: one never changes."
    sure = "" if result.low > 0 or result.high < 0 else " It includes 0: they may be unrelated."
    return (
        f"Spearman's rank correlation of Zipf fitness and k-means accuracy over {members} is {result.rho:+.2f} "
        f"(95 % interval {result.low:+.2f} to {result.high:+.2f}).{sure}"
    )


def rate_finding(run: Run) -> str:
    """How fast members were trained."""
    rates = [t.clips_per_second for t in run.complete if t.clips_per_second]
    return (
        f"Training clips a second of {plural(len(rates), 'member')}: median {np.median(rates):,.0f}, "
        f"from {min(rates):,.0f} to {max(rates):,.0f}."
    )


def layer_finding(run: Run) -> str:
    """Where in the network each modality is distilled."""
    assert run.weights is not None
    parts = []
    for m in DISTILLED:
        values = [run.weights[f"distill/{m}@{k}"] for k in range(NUM_LAYERS)]
        total = sum(values)
        depth = sum(k * v for k, v in enumerate(values)) / total if total else 0.0
        lean = "early" if depth < 1.8 else "late" if depth > 2.2 else "evenly"
        parts.append(f"{m} {lean if total else 'not at all'}")
    return (
        f"The best loss distils {spoken(parts)}. The paper found grey early, audio and flow late."
    )


def time_finding(run: Run) -> str:
    """Where the time went, largest part first."""
    parts = time_parts(run)
    total = sum(parts.values())
    order = sorted(parts, key=lambda part: -parts[part])
    say = [f"{TIME_LABELS[k].lower()} {100 * parts[k] / total:.0f} %" for k in order]
    return f"Of {duration(total)}: {spoken(say[:4])}."
