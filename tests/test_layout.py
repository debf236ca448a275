"""The house rules that a reader relies on: which way imports point, how long things get, what README names."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

LAYERS: tuple[tuple[str, ...], ...] = (
    ("kernels", "engine"),
    ("engine.objective.terms",),
    ("engine.events", "engine.jobs", "engine.runlog"),
    ("engine.presets",),
    ("engine.recipe", "engine.runtime", "engine.display", "engine.distributed"),
    ("engine.lossfile", "engine.runfolder"),
    ("engine.data",),
    ("engine.model",),
    ("engine.objective",),
    ("engine.agreement", "engine.kmeans", "engine.readout", "engine.reliability", "engine.zipf"),
    ("engine.samplers",),
    ("engine.study_storage",),
    ("engine.features", "engine.fitness", "engine.search"),
    ("engine.datasets", "engine.linear", "engine.scores"),
    ("engine.train",),
    ("engine.checkpoint", "engine.board"),
    ("engine.network_file", "engine.feature_file"),
    ("engine.embed_pieces", "engine.extract"),
    ("engine.protocols",),
    ("engine.results",),
    ("engine.finetune", "engine.baselines"),
    ("engine.cohort", "engine.evaluate"),
    ("engine.workers", "engine.finetune_run"),
    ("engine.evolve", "engine.pretrain", "engine.doctor", "engine.bench", "engine.contact_sheet"),
    ("engine.embed", "engine.export"),
    ("engine.reporting",),
    ("engine.report", "engine.reproduce"),
    ("engine.api",),
    ("engine.cli",),
    ("engine.__main__",),
)
"""From the bottom up: a module imports from lower rows only. A name stands for the module, for what is inside
it and for its companions (``engine.train`` for ``engine.train_step``); the longest name that fits counts.
``engine`` stands for the package's own ``__init__`` alone, so every module has its place here."""

PEERS: set[tuple[str, str]] = set()
"""(importer, imported) pairs of one row that are allowed."""

HEAVY: dict[str, str | tuple[str, ...]] = {
    "av": (
        "engine/data/container.py",
        "engine/data/film.py",
        "engine/data/sound.py",
        "engine/data/media.py",
        "engine/data/encode.py",
    ),
    "click": (
        "engine/cli.py",
        "engine/cli_bench.py",
        "engine/cli_common.py",
        "engine/cli_evaluate.py",
        "engine/cli_evolve.py",
        "engine/cli_ingest.py",
        "engine/cli_pretrain.py",
        "engine/cli_recipes.py",
        "engine/cli_report.py",
        "engine/cli_reproduce.py",
        "engine/cli_use.py",
    ),
    "cmaes": "engine/samplers.py",
    "cuml": "engine/fitness.py",
    "cv2": "engine/data/flow.py",
    "jinja2": "engine/reporting/html.py",
    "matplotlib": ("engine/reporting/paint.py", "engine/bench/plot.py", "engine/contact_sheet.py"),
    "nvidia": "engine/data/graphs.py",
    "optuna": (
        "engine/samplers_optuna.py",
        "engine/study_storage.py",
        "engine/study_storage_outage.py",
        "engine/reporting/importance.py",
    ),
    "onnx": "engine/export.py",
    "onnxruntime": "engine/export.py",
    "pyarrow": "engine/feature_file.py",
    "ray": ("engine/workers.py", "engine/data/ray_ingest.py"),
    "safetensors": "engine/checkpoint.py",
    "sklearn": ("engine/agreement.py", "engine/fitness.py"),
    "sqlalchemy": ("engine/study_storage.py", "engine/study_storage_outage.py"),
    "torchaudio": "engine/data/audio.py",
    "triton": "kernels/",
}
"""Heavy library -> the one file (or folder, or few files) that imports it."""

MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = {"engine": 50, "kernels": 120}
EXCEPTIONS: dict[str, int] = {}
"""``path`` or ``path:function`` -> the length it may have. Keep it short."""


@cache
def sources() -> dict[str, Path]:
    """Dotted module name -> file, for all of engine and kernels."""
    found = {}
    for folder in ("engine", "kernels"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imports_of(module: str, *, tree: ast.Module, is_package: bool) -> list[tuple[int, str]]:
    """(line, dotted name) of every import, also inside functions; names from a package are spelled out."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = module.split(".")
                kept = parts[: len(parts) - node.level + is_package]
                base = ".".join([*kept, base] if base else kept)
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                found.append((node.lineno, inner if inner in sources() else base))
    return found


@cache
def imports() -> dict[str, list[tuple[int, str]]]:
    return {
        module: imports_of(module, tree=tree_of(path), is_package=path.name == "__init__.py")
        for module, path in sources().items()
    }


def own_imports(module: str) -> list[tuple[int, str]]:
    """Its imports from engine and kernels, without the top package (its ``__version__``)."""
    roots = ("engine", "kernels")
    return [(line, name) for line, name in imports()[module] if name.split(".")[0] in roots]


def place_of(module: str) -> tuple[int, str]:
    """Row and the name in LAYERS under which a module falls."""

    def fits(name: str) -> bool:
        inside = name != "engine" and module.startswith((f"{name}.", f"{name}_"))
        return module == name or inside

    places = [(rank, name) for rank, row in enumerate(LAYERS) for name in row if fits(name)]
    assert places, f"{module} has no place in LAYERS ({relative(Path(__file__))}): add it"
    return max(places, key=lambda place: len(place[1]))


def points_down(importer: str, imported: str) -> bool:
    (rank, name), (other_rank, other) = place_of(importer), place_of(imported)
    return name == other or other_rank < rank or (name, other) in PEERS


@pytest.mark.parametrize("module", sources())
def test_imports_point_downward(module: str) -> None:
    wrong = [
        f"{relative(sources()[module])}:{line} imports {name}"
        for line, name in own_imports(module)
        if not points_down(module, name)
    ]
    assert not wrong, "\n".join(["not below it in LAYERS:", *wrong])


def test_packages_of_several_rows_import_nothing() -> None:
    """Importing engine.objective.terms runs engine/objective/__init__.py too, which must not pull in more."""
    for package, path in sources().items():
        inside = [m for m in sources() if m.startswith(f"{package}.")]
        rows = {place_of(m) for m in inside}
        if path.name == "__init__.py" and len(rows) > 1:
            assert not own_imports(package), f"{relative(path)} must import nothing of ours"


def test_modules_import_one_another_in_no_circle() -> None:
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module in done:
            return
        for _, name in own_imports(module):
            if name in sources() and name != module:
                visit(name, (*path, module))
        done.add(module)

    for module in sources():
        visit(module, ())


def test_heavy_libraries_have_one_home() -> None:
    wrong = []
    for module, found in imports().items():
        where = relative(sources()[module])
        for line, name in found:
            home = HEAVY.get(name.split(".")[0], ())
            homes = (home,) if isinstance(home, str) else home
            inside = any(where == h or (h.endswith("/") and where.startswith(h)) for h in homes)
            if homes and not inside:
                wrong.append(f"{where}:{line} imports {name}, which only {' and '.join(homes)} may")
    assert not wrong, "\n".join(wrong)


def lengths() -> dict[str, tuple[int, int]]:
    """``path`` and ``path:function`` -> (lines, limit)."""
    found = {}
    for path in sources().values():
        where = relative(path)
        lines = len(path.read_text(encoding="utf-8").splitlines())
        found[where] = (lines, MAX_FILE_LINES)
        limit = MAX_FUNCTION_LINES[where.split("/")[0]]
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno:
                name, long = f"{where}:{node.name}", node.end_lineno - node.lineno + 1
                # Methods of several classes share a name: the longest stands for them.
                found[name] = max(found.get(name, (0, limit)), (long, limit))
    return found


def test_files_and_functions_are_short() -> None:
    wrong = [
        f"{name}: {lines} lines, at most {EXCEPTIONS.get(name, limit)}"
        for name, (lines, limit) in lengths().items()
        if lines > EXCEPTIONS.get(name, limit)
    ]
    assert not wrong, "\n".join(wrong)


def test_exceptions_are_needed() -> None:
    found = lengths()
    stale = [n for n in EXCEPTIONS if n not in found or found[n][0] <= found[n][1]]
    assert not stale, f"no longer needed in EXCEPTIONS: {stale}"


def test_readme_names_every_file() -> None:
    """By its file name; where several files share a name, on as many lines as there are such files."""
    readme = ROOT / "README.md"
    if not readme.is_file():
        pytest.skip("no README.md yet")
    lines = readme.read_text(encoding="utf-8").splitlines()
    code = [p for f in ("engine", "kernels", "benchmarks") for p in (ROOT / f).rglob("*.py")]
    files = [p for p in code if p.name != "__init__.py"] + [*(ROOT / "recipes").rglob("*.toml")]
    missing = []
    for name in sorted({p.name for p in files}):
        stem = re.escape(name.removesuffix(".toml"))
        # A recipe may go by its name, in backticks or in a list of the README's tree.
        pattern = rf"(?<![\w.-]){re.escape(name)}(?!\w)" + (
            rf"|`{stem}`" if name.endswith(".toml") else ""
        )
        same = [relative(p) for p in files if p.name == name]
        if sum(bool(re.search(pattern, line)) for line in lines) < len(same):
            missing += same
    assert not missing, "README.md does not name:\n" + "\n".join(missing)


def test_the_rules_see_what_they_forbid() -> None:
    """The checks above on small made-up sources, so that none passes because it sees nothing."""
    tree = ast.parse("def f():\n    from ..data import media\nimport av.video\nfrom . import loss")
    found = imports_of("engine.objective.align", tree=tree, is_package=False)
    names = {name for _, name in found}
    assert "av.video" in names
    assert any(name.startswith("engine.data") for name in names)
    assert any(name.startswith("engine.objective") for name in names)
    assert points_down("engine.train", "engine.objective.terms")
    assert points_down("engine.recipe", "engine.objective.terms")
    assert not points_down("engine.recipe", "engine.objective.loss")
    assert not points_down("engine.data.media", "engine.train")
    assert not points_down("kernels.reference", "engine.runtime")
    assert not points_down("engine.search", "engine.fitness")
    with pytest.raises(AssertionError, match="no place"):
        place_of("engine.nowhere")
