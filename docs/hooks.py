"""Hooks of mkdocs: the list of pages, and Mermaid diagrams as tables; and the tables that pages take from the code.

mkdocs-material would fetch Mermaid from the network, and the site fetches nothing: there a diagram's arrows become the
rows of a table. GitHub draws the same source as a diagram.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from engine.objective.terms import TERMS, Term

PAGES = {
    "Start": {
        "Overview": "index.md",
        "Install": "install.md",
        "Quick start": "quick-start.md",
        "Your own videos": "your-videos.md",
    },
    "Method": {
        "The evolved loss": "method.md",
        "How a search works": "search.md",
        "Does fitness rank losses?": "signal.md",
        "Results": "results.md",
    },
    "Use": {
        "Pretraining": "pretraining.md",
        "Evaluation protocols": "evaluation.md",
        "The paper's tables": "reproducing.md",
        "Features and export": "use.md",
        "Many GPUs": "many-gpus.md",
        "Python API": "api.md",
    },
    "More": {
        "Architecture": "architecture.md",
        "Performance": "performance.md",
        "Extending": "extending.md",
        "Troubleshooting": "troubleshooting.md",
        "Limits": "limits.md",
    },
}
"""Section to title to file."""

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results"

LOSSES = {
    "shuffle": "cross-entropy: are the frames in order, or permuted?",
    "backward": "cross-entropy: does time run forward, or back?",
    "align_audio": "margin: is the sound this clip's, and in time? over clips with sound",
    "predict": "L2 to what comes next, decoded from stage 4",
    "reconstruct": "L2 to the clip itself, decoded at low resolution",
    "colorize": "L2 to RGB, decoded from grey",
    "cross": "L2 to the other modality, decoded from stage 4",
    "embed": "margin: is the other modality's clip the same clip?",
    "distill": "L2 of the RGB network's activation at layer {layer} to the other network's",
}


def on_config(config: Any) -> Any:
    """Put the pages into the navigation."""
    config["nav"] = [
        {section: [{title: file} for title, file in pages.items()]}
        for section, pages in PAGES.items()
    ]
    return config


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put tables in place of diagrams."""
    return DIAGRAM.sub(lambda match: arrow_table(match[1]), markdown)


DIAGRAM = re.compile(r"^```mermaid\n(.*?)^```$", re.MULTILINE | re.DOTALL)

ARROW = re.compile(r'(\w+)(?:\["([^"]*)"\])? -->\|"([^"]*)"\| (\w+)(?:\["([^"]*)"\])?')


def arrow_table(diagram: str) -> str:
    """A Mermaid flowchart as Markdown: a row an arrow.

    Raises ValueError for a line that is no arrow with its text in quotes.
    """
    labels: dict[str, list[str]] = {}
    rows = ["| from | by | to |", "| --- | --- | --- |"]
    for line in diagram.splitlines()[1:]:
        arrow = ARROW.fullmatch(line.strip())
        if arrow is None:
            raise ValueError(f"not an arrow with its text in quotes: {line.strip()}")
        start, start_label, text, end, end_label = arrow.groups()
        for name, label in ((start, start_label), (end, end_label)):
            if label is not None:
                first, *rest = label.split("<br>")
                labels[name] = [f"**{first}**", *rest]
        rows.append(f"| {labels[start][0]} | {text} | {'<br>'.join(labels[end])} |")
    return "\n".join(rows)


def term_table() -> str:
    """The 39 terms as Markdown, from the table that the engine itself uses."""
    rows = ["| term | Fig. 7 | trains | reads | loss |", "| --- | --- | --- | --- | --- |"]
    return "\n".join([*rows, *map(_row, TERMS)])


def _row(term: Term) -> str:
    # the teacher of a distillation is the network that the term is named after; the student is RGB
    trained = "rgb" if term.task == "distill" else ", ".join(term.networks)
    loss = LOSSES[term.task].format(layer=term.layer)
    return f"| `{term.name}` | {term.code} | {trained} | {', '.join(term.modalities)} | {loss} |"


def decoder_table() -> str:
    """Clips a second, decoders by files."""
    rates: dict[str, dict[str, float]] = {}
    for line in (RESULTS / "input_peers-cpu.jsonl").read_text().splitlines():
        row = json.loads(line)
        rates.setdefault(row["decoder"], {})[row["files"]] = row["clips_per_second"]
    files = list(dict.fromkeys(name for cells in rates.values() for name in cells))
    lines = [f"| clips/s | {' | '.join(files)} |", "| --- |" + " --- |" * len(files)]
    for decoder, cells in rates.items():
        rounded = [f"{cells[name]:.0f}" if name in cells else "" for name in files]
        lines.append(f"| {decoder} | {' | '.join(rounded)} |")
    return "\n".join(lines)
