"""A report's names and sentences: labels, times, the verdict, cautions, and what each figure shows.

Every sentence is computed from the run; where the numbers don't support a claim, it says so. What a figure shows is
its text alternative, too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from engine.objective.terms import BY_NAME, NUM_LAYERS, TERM_NAMES, TERMS
from engine.report.importance import Importance
from engine.report.measures import (
    Agreement,
    ancestor,
    compare,
    fittest_means,
    initial_stat,
    lineage,
    stat,
    throughput,
)
from engine.report.run import Run, fitness_of, number

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


def verdict(run: Run) -> str:
    """Whether the best loss beats random ones with fresh seeds, and by how many pooled sd."""
    if (c := compare(run)) is None:
        if not run.complete:
            return "No member is complete yet, so there is nothing to compare."
        return "The best loss has not been compared with random losses on fresh seeds yet."
    pair = f"{pm(c.best.mean, c.best.sd)} against {pm(c.random.mean, c.random.sd)}"
    sds = "" if c.pooled_sds is None else f", {abs(c.pooled_sds):.1f} pooled standard deviations"
    if c.gain <= 0:
        return f"The evolved loss does not beat random losses: {pair} ({-c.gain:.3f} lower{sds})."
    by = f"{pair} ({c.gain:.3f} higher{sds})"
    if c.pooled_sds is None:
        return f"The evolved loss scores higher than random losses, {by}, but there is no spread to judge by."
    if c.pooled_sds < 2:
        return f"The evolved loss scores higher than random losses, but not clearly: {by}."
    return f"The evolved loss beats random losses: {by}."


def caution(run: Run) -> str:
    """Why the search's own best value is not the result."""
    best, seen = stat(run.summary.get("best")), number(run.summary.get("best_search_fitness"))
    if best is None or seen is None:
        return "The best fitness of a noisy search flatters itself, and no fresh seed has confirmed this loss yet."
    return (
        f"The search saw {seen:.3f} for this loss, which flatters itself as the highest of many noisy measurements; "
        f"quote {best.mean:.3f}, from {plural(best.n, 'fresh seed')}."
    )


def noise(run: Run) -> str:
    """What a step of the lineage is to be judged by."""
    best = stat(run.summary.get("best"))
    if best is None or best.sd is None:
        return "Each fitness is one noisy measurement, so small gains may be luck."
    return (
        f"With fresh seeds the best loss alone varies by {best.sd:.3f} (sd), so a difference of two members below "
        f"{2 * 2**0.5 * best.sd:.3f} may be luck."
    )


def evolved_share(run: Run) -> str:
    """How many weights were drawn anew on the way to the best loss."""
    changed = len({s.term for s in lineage(run) if s.term})
    if not changed and run.method not in ("evolution", "random"):
        return f"All its weights were proposed together, by {run.method}."
    if not changed:
        return "No weight of this loss was changed by evolution: it is a random draw, so single weights say little."
    return (
        f"Evolution drew {changed} of the 39 weights anew, which a corner mark shows; the others are still the random "
        f"draw of trial {ancestor(run)}, so each alone says little."
    )


def _extremes(weights: Mapping[str, float], count: int) -> str:
    """The highest and the lowest weights, by the terms' codes."""
    ranked = sorted(TERM_NAMES, key=lambda n: (-weights[n], TERM_NAMES.index(n)))
    say = [f"{BY_NAME[n].code} {weights[n]:.2f}" for n in ranked]
    return f"{spoken(say[:count])} weigh most, {spoken(say[::-1][:count])} least"


def fitness_finding(run: Run) -> str:
    """What the fitness curve shows."""
    first, last = run.improvements[0], run.improvements[-1]
    text = f"Fitness of {plural(len(run.complete), 'member')} over the search. "
    if first is last:
        text += f"The best is trial {first.number} with {fitness_of(first):.3f}."
    else:
        steps = plural(len(run.improvements) - 1, "step")
        text += (
            f"Best so far goes from {fitness_of(first):.3f} at trial {first.number} to "
            f"{fitness_of(last):.3f} at trial {last.number}, in {steps}."
        )
    known = [
        f"{label} {pm(s.mean, s.sd)}"
        for label, s in (
            ("untrained network", stat(run.summary.get("untrained"))),
            ("initial population", initial_stat(run)),
            ("random losses, fresh seeds", stat(run.summary.get("random"))),
            ("best loss, fresh seeds", stat(run.summary.get("best"))),
        )
        if s is not None
    ]
    text += f" Levels: {spoken(known)}." if known else ""
    text += f" {plural(len(run.failed), 'member')} failed." if run.failed else ""
    return text + (f" {plural(len(run.pruned), 'member')} pruned." if run.pruned else "")


def loss_finding(run: Run) -> str:
    """What the heat map of the final loss shows."""
    assert run.weights is not None
    return f"Heat map of the best loss: {_extremes(run.weights, 5)}."


def search_finding(run: Run) -> str:
    """What the heat map over the search shows."""
    last = run.improvements[-1]
    changes = len(run.improvements) - 1
    often = "once" if changes == 1 else f"{changes:,} times"
    return (
        f"Heat map of the best loss so far, which {f'changes {often}' if changes else 'never changes'}. "
        f"At the last trial {_extremes(last.weights, 3)}."
    )


def rounds_finding(run: Run) -> str:
    """How the heat map changes from the first moment to the last."""
    first, last = run.improvements[0], run.improvements[-1]
    if first is last:
        return f"Heat maps over the search: all alike, since trial {first.number} stayed the best."
    moved = sorted(TERM_NAMES, key=lambda n: -abs(last.weights[n] - first.weights[n]))[:3]
    say = [f"{BY_NAME[n].code} from {first.weights[n]:.2f} to {last.weights[n]:.2f}" for n in moved]
    changed = sum(last.weights[n] != first.weights[n] for n in TERM_NAMES)
    return f"From the first to the last best loss {changed} of 39 weights differ, most of all {spoken(say)}."


def task_finding(run: Run) -> str:
    """Which tasks the fittest members weigh most."""
    last = fittest_means(run)[1][-1]
    means = {
        label.lower(): float(np.mean([last[i] for i, t in enumerate(TERMS) if t.task == task]))
        for task, label in TASK_LABELS.items()
    }
    return f"Task weights of the {run.num_fittest} fittest members: {_ends(means)}."


def modality_finding(run: Run) -> str:
    """Which single terms the fittest members weigh most."""
    last = fittest_means(run)[1][-1]
    terms = {t.name: float(last[i]) for i, t in enumerate(TERMS) if t.layer is None}
    return f"Task weights of the {run.num_fittest} fittest members by modality: {_ends(terms)}."


def _ends(values: Mapping[str, float]) -> str:
    """The three highest and the three lowest."""
    say = [f"{name} {values[name]:.2f}" for name in sorted(values, key=lambda n: -values[n])]
    return f"{spoken(say[:3])} are highest, {spoken(say[::-1][:3])} lowest"


def lineage_finding(run: Run) -> str:
    """Which change of a weight helped the best member's line most, and how many did not."""
    steps = lineage(run)
    known = [s for s in steps if s.gain is not None]
    text = f"The best member comes of {plural(len(steps), 'mutation')}. "
    if not known:
        return text + "What each gained is not known."
    best = max(known, key=lambda s: s.gain or 0.0)
    worse = sum((s.gain or 0.0) < 0 for s in known)
    moved = (
        f" from {best.before:.2f} to {best.after:.2f}"
        if None not in (best.before, best.after)
        else ""
    )
    text += f"The largest gain is trial {best.trial}'s, {best.gain:+.3f}: {best.term or 'a weight'}{moved}. "
    if worse:
        text += f"{worse} of {len(known)} scored lower than the parent. "
    if known[0].fitness_before is not None and known[-1].fitness_after is not None:
        text += f"Altogether {known[-1].fitness_after - known[0].fitness_before:+.3f}."
    return text.strip()


def importance_finding(result: Importance) -> str:
    """Which weights fitness depends on, and whether more than by chance."""
    order = sorted(TERM_NAMES, key=lambda n: -result.share[n])
    above = [n for n in order if result.share[n] > result.chance]
    say = [f"{n} {100 * result.share[n]:.1f} %" for n in above[:3]]
    lead = (
        f"Fitness depends most on {spoken(say)}"
        if above
        else "No weight matters more than chance gives"
    )
    text = (
        f"{lead}. {len(above)} of 39 terms {'lies' if len(above) == 1 else 'lie'} above the "
        f"{100 * result.chance:.1f} % that the highest term reaches when fitness is dealt out at random "
        f"({plural(result.shuffles, 'time')}). Single weights make "
        f"{100 * sum(result.share.values()):.0f} % of the variance that {result.trees} trees over "
        f"{result.members:,} members predict."
    )
    if result.agreement is None:
        return text
    return text + f" Rank correlation with the final weights: {result.agreement:+.2f}."


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
    result = throughput(run)
    rates = [t.clips_per_second for t in run.complete if t.clips_per_second]
    text = (
        f"Training clips a second of {plural(len(rates), 'member')}: median {result.clips_per_second:,.0f}, "
        f"{min(rates):,.0f} to {max(rates):,.0f}."
    )
    if result.members_per_hour is not None:
        text += f" The whole run did {result.members_per_hour:,.1f} members an hour."
    return text


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
        f"The best loss distils {spoken(parts)}. The paper found grey early, audio and flow late."
    )


def time_finding(run: Run) -> str:
    """Where the time went, largest part first."""
    parts = time_parts(run)
    total = sum(parts.values())
    order = sorted(parts, key=lambda part: -parts[part])
    say = [f"{TIME_LABELS[k].lower()} {100 * parts[k] / total:.0f} %" for k in order]
    return f"Of {duration(total)}: {spoken(say[:4])}."
