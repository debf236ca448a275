"""What the pages take from the code and the measurements: tables; and which pages there are, in which order."""

from __future__ import annotations

import json
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
        "Does fitness rank losses?": "signal.md",
        "Search landscape": "search-landscape.md",
        "Cheaper members": "cheaper-members.md",
        "A search on real videos": "real-videos.md",
        "Three searches on real videos": "real-searches.md",
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
        "Performance": "performance.md",
        "Extending": "extending.md",
        "Troubleshooting": "troubleshooting.md",
        "Limits": "limits.md",
    },
}
"""Section to title to file; files that are not there are left out."""

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
    """Put the pages that there are into the navigation."""
    docs = Path(config["docs_dir"])
    config["nav"] = [
        {section: [{title: file} for title, file in pages.items() if (docs / file).is_file()]}
        for section, pages in PAGES.items()
    ]
    return config


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put tables where a page asks for them."""
    tables = {"terms": term_table, "decoders": decoder_table, "embedding": embedding_table}
    for name, table in tables.items():
        mark = f"<!-- the table of {name} -->"
        if mark in markdown:
            markdown = markdown.replace(mark, table())
    return markdown


def term_table() -> str:
    """The 39 terms as Markdown, from the table that the engine itself uses."""
    rows = ["| term | Fig. 7 | trains | reads | loss |", "| --- | --- | --- | --- | --- |"]
    return "\n".join([*rows, *map(_row, TERMS)])


def _row(term: Term) -> str:
    # the teacher of a distillation is the network that the term is named after; the student is RGB
    trained = "rgb" if term.task == "distill" else ", ".join(term.networks)
    loss = LOSSES[term.task].format(layer=term.layer)
    return f"| `{term.name}` | {term.code} | {trained} | {', '.join(term.modalities)} | {loss} |"


def _rows(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (RESULTS / name).read_text().splitlines()]


def decoder_table() -> str:
    """Clips a second, decoders by files."""
    rates: dict[str, dict[str, float]] = {}
    for row in _rows("input_peers-cpu.jsonl"):
        rates.setdefault(row["decoder"], {})[row["files"]] = row["clips_per_second"]
    files = list(dict.fromkeys(name for cells in rates.values() for name in cells))
    lines = [f"| clips/s | {' | '.join(files)} |", "| --- |" + " --- |" * len(files)]
    for decoder, cells in rates.items():
        told = [f"{cells[name]:.0f}" if name in cells else "" for name in files]
        lines.append(f"| {decoder} | {' | '.join(told)} |")
    return "\n".join(lines)


def embedding_table() -> str:
    """Clips a second of input, network and both, and shares of what they could be."""
    lines = [
        "| clips/s | input alone | network alone | both | of the lower | of what shared cores allow |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in _rows("embed-cpu.jsonl"):
        parts = [f"{row[key]:.1f}" for key in ("input", "network", "both")]
        shares = [f"{row[key]:.2f}" for key in ("of_the_lower", "of_shared_cores")]
        lines.append(f"| {row['network']} | {' | '.join([*parts, *shares])} |")
    return "\n".join(lines)
