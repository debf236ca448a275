"""The pages: examples run, quoted messages and options exist, tables are the code's, and nothing is fetched."""

from __future__ import annotations

import ast
import doctest
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
import torch

from engine.api import __all__ as API
from engine.cli.main import main
from engine.data.demo.demo import default_cache
from engine.model.network_file import Card, ClipInput, save_network
from engine.model.resnet3d import ResNet3D
from engine.objective.terms import TERMS
from tests.made_run import make_run

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
FENCE = re.compile(r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```', re.MULTILINE | re.DOTALL)


def blocks(page: str, language: str) -> list[tuple[str, str]]:
    """(title, text) of a page's blocks in a language."""
    text = (DOCS / page).read_text(encoding="utf-8")
    return [(title, body) for kind, title, body in FENCE.findall(text) if kind == language]


def hooks() -> Any:
    spec = importlib.util.spec_from_file_location("hooks", DOCS / "hooks.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_examples_of_the_python_api(
    tmp_path: Path, tiny_demo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert str(default_cache()).startswith(str(tmp_path))
    torch.manual_seed(0)
    network = ResNet3D("r3d_18", 3, width=0.125, pool=True).train()
    with torch.no_grad():
        network(torch.randn(4, 3, 8, 64, 64))
    card = Card(arch="r3d_18", width=0.125, pool=True, input=ClipInput(8, 2, 64))
    save_network(tmp_path / "rgb.safetensors", network.state_dict(), card)
    run = tmp_path / "run"
    make_run(run, members=4, population=2)
    (tmp_path / "out").mkdir()
    known = {
        "checkpoint": tmp_path / "rgb.safetensors",
        "clip": tiny_demo / "unlabelled" / "000.mp4",
        "videos": tiny_demo / "unlabelled",
        "labelled": tiny_demo / "labelled",
        "out": tmp_path / "out",
        "run": run,
    }
    examples = [body for _, body in blocks("api.md", "python")]
    text = "\n".join(examples)
    parser, runner = doctest.DocTestParser(), doctest.DocTestRunner()
    deterministic = torch.are_deterministic_algorithms_enabled()
    try:
        test = parser.get_doctest(text, known, "docs/api.md", "docs/api.md", 0)
        failed, tried = runner.run(test)
    finally:
        torch.use_deterministic_algorithms(deterministic)
    assert failed == 0 and tried > 30
    imported = set(re.findall(r"\w+", " ".join(re.findall(r"import (.+)", text))))
    assert imported >= set(API), "without an example"


def test_neighbours_are_found_as_the_page_does_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from engine.features.parquet import FeatureRows, merge_parts, write_part

    monkeypatch.chdir(tmp_path)
    vectors = np.random.default_rng(0).normal(size=(20, 8)).astype(np.float32)
    vectors[13] = vectors[0] + 0.01
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)  # as --readout unit gives them
    names, zeros = [f"{i}.mp4" for i in range(20)], np.zeros(20)
    write_part(tmp_path / "part", FeatureRows(names, zeros, zeros, [None] * 20, vectors))
    merge_parts([tmp_path / "part"], tmp_path / "features.parquet", videos=False, about={})
    (code,) = [body for title, body in blocks("use.md", "python") if title == "neighbours.py"]
    exec(compile(code, "neighbours.py", "exec"), {})
    shown = capsys.readouterr().out.splitlines()
    assert len(shown) == 6 and shown[0].startswith("0.mp4") and shown[1].startswith("13.mp4")
    for _, body in blocks("use.md", "python"):
        ast.parse(body)


def applied(source: str, diff: str) -> str:
    """A unified diff's hunks, found by their own lines alone, each of which must be there exactly once."""
    for hunk in re.split(r"^@@.*\n", diff, flags=re.MULTILINE)[1:]:
        lines = [line or " " for line in hunk.rstrip("\n").split("\n")]
        old = "\n".join(line[1:] for line in lines if line[0] in " -")
        new = "\n".join(line[1:] for line in lines if line[0] in " +")
        assert source.count(old) == 1, f"docs/extending.md is out of date: not there once:\n{old}"
        source = source.replace(old, new)
    return source


def test_the_task_of_the_walk_through_works(tmp_path: Path) -> None:
    """Its class, edits and tests, on a copy of the code."""
    for folder in ("engine", "kernels", "recipes"):
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=ignore)
    python = dict(blocks("extending.md", "python"))
    diffs = dict(blocks("extending.md", "diff"))
    assert len(python) == 2 and len(diffs) == 2
    for name, body in python.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(body)
    for name, diff in diffs.items():
        (tmp_path / name).write_text(applied((tmp_path / name).read_text(), diff))
    (
        tmp_path / "conftest.py"
    ).touch()  # pytest's root, so that nothing of this checkout is imported
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "2 passed" in done.stdout, done.stdout + done.stderr


def messages() -> str:
    """All text of the source, with ``\\0`` for what is filled in."""
    found = []
    for path in [*(ROOT / "engine").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.JoinedStr):
                parts = [v.value if isinstance(v, ast.Constant) else "\0" for v in node.values]
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(found)


def test_messages_that_are_explained_exist() -> None:
    text = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    quoted = re.findall(r"^\| `([^`]+)` \|", text, flags=re.MULTILINE)
    assert len(quoted) > 35
    source = messages()
    wrong = []
    for message in quoted:
        pieces = [re.escape(piece) for piece in message.split("...")]
        if not re.search("[^\n]*?".join(pieces), source):
            wrong.append(message)
    assert not wrong
    assert not re.search(re.escape("a message that nobody wrote"), source)


def commands() -> list[tuple[str, list[str]]]:
    """(page, words) of the commands on the pages that begin with ``engine``."""
    found = []
    for page in [*PAGES, ROOT / "README.md"]:
        text = page.read_text(encoding="utf-8").replace("\\\n", " ")
        for line in re.findall(r"^    (engine .+)$", text, flags=re.MULTILINE):
            found.append((page.name, shlex.split(line, comments=True)))
    return found


def test_commands_and_options_on_the_pages_exist() -> None:
    assert len(commands()) > 25
    wrong = []
    for page, (_, name, *words) in commands():
        command = main.commands.get(name)
        if command is None:
            wrong.append(f"{page}: engine {name}")
            continue
        known = {o for p in command.params if isinstance(p, click.Option) for o in p.opts}
        asked = {word for word in words if word.startswith("--")}
        wrong += [f"{page}: engine {name} {option}" for option in asked - known]
    assert not wrong


def test_the_table_of_terms_is_the_codes() -> None:
    table = hooks().term_table()
    assert len(table.splitlines()) == 2 + len(TERMS)
    assert all(f"| `{term.name}` | {term.code} |" in table for term in TERMS)
    assert (
        "| `distill/flow@3` | FD3 | rgb | rgb, flow | L2 of the RGB network's activation at layer 3"
        in table
    )


@pytest.mark.parametrize(
    ("page", "table"), [("method.md", "term_table"), ("performance.md", "decoder_table")]
)
def test_tables_on_the_pages_are_those_of_the_code(page: str, table: str) -> None:
    """Pages are read in the repository too, where nothing fills a placeholder; hooks.py makes the tables."""
    assert getattr(hooks(), table)() in (DOCS / page).read_text(encoding="utf-8")
    assert not any("<!--" in each.read_text(encoding="utf-8") for each in PAGES)


def test_files_on_the_pages_exist() -> None:
    """Paths in backticks; names in capitals stand for what a reader chooses."""
    missing = []
    for page in [*PAGES, ROOT / "README.md", ROOT / "CONTRIBUTING.md"]:
        text = page.read_text(encoding="utf-8")
        for path in re.findall(
            r"`((?:engine|kernels|benchmarks|recipes|tests|docs)/[^\s`*]+)", text
        ):
            if "NAME" not in path and not (ROOT / path).exists():
                missing.append(f"{page.name}: {path}")
    assert not missing


def test_the_map_names_modules_of_their_packages() -> None:
    """Each paragraph of docs/architecture.md opens with a package; the modules and folders it names are in there."""
    text = (DOCS / "architecture.md").read_text(encoding="utf-8")
    paragraphs = re.findall(r"^`([\w/]+/)` (.+?)\n\n", text + "\n", flags=re.MULTILINE | re.DOTALL)
    assert len(paragraphs) > 10
    missing = []
    for package, paragraph in paragraphs:
        for name in re.findall(r"`(\w+(?:\.py|/))`", paragraph):
            if not (ROOT / package / name).exists():
                missing.append(f"{package}{name}")
    assert not missing


def test_a_diagram_becomes_a_table() -> None:
    page = """```mermaid
flowchart TD
    file["video file<br>mp4"] -->|"decode"| clip["clip"]
    clip -->|"train"| file
```"""
    table = ["| from | by | to |", "| --- | --- | --- |"]
    table += [
        "| **video file** | decode | **clip** |",
        "| **clip** | train | **video file**<br>mp4 |",
    ]
    assert hooks().on_page_markdown(page).splitlines() == table
    with pytest.raises(ValueError, match="not an arrow"):
        hooks().on_page_markdown(page.replace("-->", "---"))


@pytest.mark.slow
def test_the_site_builds_without_warnings_and_fetches_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-q", "-d", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    for page in PAGES:
        html = (tmp_path / page.with_suffix(".html").name).read_text(encoding="utf-8")
        assert not re.findall(r'<(?:script|link|img|iframe)[^>]+(?:src|href)="(?:https?:)?//', html)
        assert "<!-- the table of" not in html and "mermaid" not in html
    method = (tmp_path / "method.html").read_text(encoding="utf-8")
    assert all(f"<code>{term.name}</code>" in method for term in TERMS)
    styles = "".join(p.read_text(encoding="utf-8") for p in tmp_path.rglob("*.css"))
    assert not re.findall(r"url\(\"?(?:https?:)?//", styles)
    api = (tmp_path / "api.html").read_text(encoding="utf-8")
    assert all(f">{name}<" in api for name in API if name != "override")
    index = json.loads((tmp_path / "search" / "search_index.json").read_text(encoding="utf-8"))
    assert len({doc["location"].split("#")[0] for doc in index["docs"]}) >= len(PAGES)
