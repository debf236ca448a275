"""What each figure shows, in a sentence or two: its text alternative, computed from the run.

Where the numbers don't support a claim, it says so.
"""

from __future__ import annotations

import numpy as np

from engine.objective.terms import BY_NAME, NUM_LAYERS, TERM_NAMES, TERMS
from engine.reporting.facts import Run, fitness_of
from engine.reporting.importance import Importance
from engine.reporting.measures import (
    Agreement,
    fittest_means,
    initial_stat,
    lineage,
    stat,
    throughput,
)
from engine.reporting.words import (
    DISTILLED,
    TASK_LABELS,
    TIME_LABELS,
    duration,
    plural,
    pm,
    spoken,
    time_parts,
)


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
        f"{label} {pm(s.mean, s.sd)}"
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
    if run.pruned:
        text += f" {plural(len(run.pruned), 'member')} pruned."
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


def rounds_finding(run: Run) -> str:
    """How the heat map changes from the first moment to the last."""
    assert run.weights is not None
    first, last = run.improvements[0], run.improvements[-1]
    if first is last:
        return f"Heat maps over the search: all alike, since trial {first.number} stayed the best."
    moved = sorted(TERM_NAMES, key=lambda n: -abs(last.weights[n] - first.weights[n]))[:3]
    say = [f"{BY_NAME[n].code} from {first.weights[n]:.2f} to {last.weights[n]:.2f}" for n in moved]
    changed = sum(last.weights[n] != first.weights[n] for n in TERM_NAMES)
    return (
        f"Heat maps of the best loss so far at a few moments of the search. From the first to the last best loss "
        f"{changed} of 39 weights differ, most of all {spoken(say)}."
    )


def loss_finding(run: Run) -> str:
    """What the heat map of the final loss shows."""
    assert run.weights is not None
    high, low = _extremes(run.weights, 5)
    return f"Heat map of the best loss. Highest weights: {spoken(high)}. Lowest: {spoken(low)}."


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


def modality_finding(run: Run) -> str:
    """Which single terms the fittest members end up with."""
    last = fittest_means(run)[1][-1]
    tasks = [i for i, t in enumerate(TERMS) if t.layer is None]
    order = sorted(tasks, key=lambda i: -last[i])
    say = [f"{TERMS[i].name} {last[i]:.2f}" for i in order]
    return (
        f"Task weights among the fittest members by modality. At the end {spoken(say[:3])} are highest, "
        f"{spoken(say[::-1][:3])} lowest."
    )


def lineage_finding(run: Run) -> str:
    """Which change of a weight helped the best member's line most, and how many did not."""
    steps = lineage(run)
    known = [s for s in steps if s.gain is not None]
    text = f"The best member comes of {plural(len(steps), 'mutation')}. "
    if not known:
        return text + "What each gained is not known."
    best = max(known, key=lambda s: s.gain or 0.0)
    worse = sum((s.gain or 0.0) < 0 for s in known)
    what = f"{best.term} " if best.term else ""
    moved = (
        ""
        if best.before is None or best.after is None
        else f"{best.before:.2f} to {best.after:.2f}, "
    )
    text += f"The largest gain is trial {best.trial}'s: {what}{moved}{best.gain:+.3f} in fitness. "
    if worse:
        text += f"{worse} of {len(known)} scored lower than the parent when measured. "
    if known[0].fitness_before is not None and known[-1].fitness_after is not None:
        total = known[-1].fitness_after - known[0].fitness_before
        text += f"Altogether {total:+.3f}."
    return text.strip()


def importance_finding(found: Importance) -> str:
    """Which weights fitness depends on, and whether more than by chance."""
    order = sorted(TERM_NAMES, key=lambda n: -found.share[n])
    above = [n for n in order if found.share[n] > found.chance]
    total = sum(found.share.values())
    if above:
        say = [f"{n} {100 * found.share[n]:.1f} %" for n in above[:3]]
        text = f"fANOVA: fitness depends most on {spoken(say)}. "
    else:
        text = "fANOVA finds no weight that fitness depends on more than chance gives. "
    count = f"{len(above)} of 39 terms lie" if len(above) != 1 else "1 of 39 terms lies"
    text += (
        f"{count} above the {100 * found.chance:.1f} % that the highest term reaches when fitness is dealt out "
        f"at random ({plural(found.shuffles, 'time')}). Single weights make {100 * total:.0f} % of the variance that "
        f"the forest of {found.members:,} members predicts, weights acting together the rest. "
    )
    if found.agreement is None:
        return text.strip()
    return text + f"Rank correlation with the final weights: {found.agreement:+.2f}."


def zipf_finding(found: Agreement) -> str:
    """Whether the label-free fitness ranks members as labels do."""
    if found.rho is None or found.low is None or found.high is None:
        return f"Zipf fitness against k-means accuracy of {plural(found.n, 'member')}: one never changes."
    sure = "" if found.low > 0 or found.high < 0 else " It includes 0: they may be unrelated."
    return (
        f"Zipf fitness, which needs no labels, against k-means accuracy, which does. Spearman's rank correlation "
        f"over {plural(found.n, 'member')} is {found.rho:+.2f} (95 % interval {found.low:+.2f} to "
        f"{found.high:+.2f}).{sure}"
    )


def rate_finding(run: Run) -> str:
    """How fast members were trained."""
    found = throughput(run)
    rates = [t.clips_per_second for t in run.complete if t.clips_per_second]
    text = f"Training clips a second of {plural(len(rates), 'member')}: median {found.clips_per_second:,.0f}, "
    text += f"{min(rates):,.0f} to {max(rates):,.0f}."
    if found.members_per_hour is not None:
        text += f" The whole run did {found.members_per_hour:,.1f} members an hour."
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
        f"Distillation weights by layer. The best loss distils {spoken(parts)}. "
        "The paper found grey early, audio and flow late."
    )


def time_finding(run: Run) -> str:
    """Where the time went, largest part first."""
    parts = time_parts(run)
    total = sum(parts.values())
    say = [
        f"{TIME_LABELS[k].lower()} {100 * parts[k] / total:.0f} %"
        for k in sorted(parts, key=lambda part: -parts[part])
    ]
    return f"Of {duration(total)}: {spoken(say[:4])}."
