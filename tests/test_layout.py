"""House rules: packages import downward, a heavy library has one home, functions are short."""

import ast
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

PACKAGES = (
    "kernels",
    "engine.core",
    "engine.data",
    "engine.model",
    "engine.objective",
    "engine.features",
    "engine.train",
    "engine.search",
    "engine.evaluate",
    "engine.report",
    "engine.bench",
    "engine.api",
    "engine.cli",
    "engine.__main__",
)
"""From the bottom up: a module imports from its own package and from those before it."""

INSIDE = {
    "engine.data": ("media", "shards", "ingest", "demo"),
    "engine.report": ("figures",),
    "engine.evaluate": ("paper",),
    "engine.search": ("samplers",),
}
"""The packages inside a package; those of ``engine.data`` from the bottom up."""

HEAVY: dict[str, str | tuple[str, ...]] = {
    "PIL": "engine/data/media/webp.py",
    "av": "engine/data/media/",
    "click": "engine/cli/",
    "cmaes": "engine/search/samplers/cma.py",
    "cuml": ("engine/features/kmeans.py", "engine/evaluate/linear.py"),
    "cv2": "engine/data/flow.py",
    "jinja2": "engine/report/page.py",
    "matplotlib": "engine/report/figures/",
    "nvidia": "engine/data/dali.py",
    "onnx": "engine/features/export.py",
    "onnxruntime": "engine/features/export.py",
    "optuna": "engine/search/storage.py",
    "pyarrow": "engine/features/parquet.py",
    "ray": "engine/core/ray_pool.py",
    "safetensors": "engine/core/tensors.py",
    "torchaudio": "engine/data/audio.py",
    "triton": "kernels/",
}
"""Heavy library -> the one file or folder that imports it; cuML does two things."""

MAX_FUNCTION_LINES = {"engine": 50, "kernels": 120}


@cache
def sources() -> dict[str, Path]:
    """Dotted module name -> file, for all of engine and kernels."""
    modules = {}
    for folder in ("engine", "kernels"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return modules


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imports_of(module: str, *, tree: ast.Module, is_package: bool) -> list[tuple[int, str, str]]:
    """(line, module, name) of every import, also inside functions; the name is empty for whole modules."""
    rows = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            rows += [(node.lineno, alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = module.split(".")
                kept = parts[: len(parts) - node.level + is_package]
                base = ".".join([*kept, base] if base else kept)
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                whole = inner in sources()
                rows.append((node.lineno, inner if whole else base, "" if whole else alias.name))
    return rows


@cache
def imports() -> dict[str, list[tuple[int, str, str]]]:
    return {
        module: imports_of(module, tree=tree_of(path), is_package=path.name == "__init__.py")
        for module, path in sources().items()
    }


def package_of(module: str) -> str:
    """The entry of PACKAGES that a module belongs to; ``engine`` for the package's own __init__."""
    if module == "engine":
        return module
    fits = [p for p in PACKAGES if module == p or module.startswith(f"{p}.")]
    assert fits, f"{module} is in none of the packages of {relative(Path(__file__))}"
    return fits[0]


def points_down(importer: str, imported: str) -> bool:
    ours, theirs = package_of(importer), package_of(imported)
    if theirs == "engine":  # its version
        return True
    if ours != theirs:
        return ours != "engine" and PACKAGES.index(theirs) < PACKAGES.index(ours)
    order = INSIDE.get(ours, ())
    places = [m.removeprefix(f"{ours}.").split(".")[0] for m in (importer, imported)]
    if ours == "engine.data" and all(place in order for place in places):
        return order.index(places[1]) <= order.index(places[0])
    return True


def test_packages_import_downward() -> None:
    wrong = [
        f"{relative(sources()[module])}:{line} imports {name}"
        for module, rows in imports().items()
        for line, name, _ in rows
        if name.split(".")[0] in ("engine", "kernels") and not points_down(module, name)
    ]
    assert not wrong, "\n".join(["not below it in PACKAGES:", *wrong])


def test_modules_import_one_another_in_no_circle() -> None:
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module in done:
            return
        for _, name, _ in imports()[module]:
            if name in sources() and name != module:
                visit(name, (*path, module))
        done.add(module)

    for module in sources():
        visit(module, ())


def test_no_module_imports_anothers_private_name() -> None:
    wrong = [
        f"{relative(sources()[module])}:{line} imports {name} of {other}"
        for module, rows in imports().items()
        for line, other, name in rows
        if other.split(".")[0] in ("engine", "kernels") and name.startswith("_")
        if not name.startswith("__")
    ]
    assert not wrong, "\n".join(wrong)


def test_heavy_libraries_have_one_home() -> None:
    wrong = []
    for module, rows in imports().items():
        where = relative(sources()[module])
        for line, name, _ in rows:
            home = HEAVY.get(name.split(".")[0], ())
            homes = (home,) if isinstance(home, str) else home
            if homes and not any(
                where == h or (h.endswith("/") and where.startswith(h)) for h in homes
            ):
                wrong.append(f"{where}:{line} imports {name}, which only {' and '.join(homes)} may")
    assert not wrong, "\n".join(wrong)


def test_functions_are_short() -> None:
    wrong = []
    for path in sources().values():
        limit = MAX_FUNCTION_LINES[relative(path).split("/")[0]]
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno:
                long = node.end_lineno - node.lineno + 1
                if long > limit:
                    wrong.append(f"{relative(path)}:{node.name}: {long} lines, at most {limit}")
    assert not wrong, "\n".join(wrong)


def test_the_top_is_a_dozen_rooms() -> None:
    entries = {p.name for p in (ROOT / "engine").iterdir() if p.name != "__pycache__"}
    rooms = {name.split(".")[1] for name in PACKAGES if name.startswith("engine.")}
    expected = {r if (ROOT / "engine" / r).is_dir() else f"{r}.py" for r in rooms}
    assert entries == expected | {"__init__.py"}


@pytest.mark.parametrize("package", sorted(INSIDE))
def test_packages_inside_are_those_that_are_named(package: str) -> None:
    folder = ROOT / package.replace(".", "/")
    inside = {p.parent.name for p in folder.glob("*/__init__.py")}
    assert inside == set(INSIDE[package])


def test_tests_mirror_the_tree() -> None:
    """A folder of tests stands for a package of the same place; a test file for a module, or for what it is about."""
    folders = {relative(p.parent) for p in (ROOT / "tests").rglob("test_*.py")}
    strange = []
    for folder in folders - {"tests"}:
        place = folder.removeprefix("tests/")
        if not any((ROOT / base / place).is_dir() for base in (".", "engine")):
            strange.append(folder)
    assert not strange, f"no package for {strange}"


def test_the_map_has_a_paragraph_for_each_package() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    names = [p.replace(".", "/") for p in PACKAGES if (ROOT / p.replace(".", "/")).is_dir()]
    assert not [name for name in names if f"`{name}/`" not in text]


def test_the_rules_see_what_they_forbid() -> None:
    """The checks above on small made-up sources, so that none passes because it sees nothing."""
    tree = ast.parse("def f():\n    from ..data import media\nimport av.video\nfrom . import _loss")
    rows = imports_of("engine.objective.align", tree=tree, is_package=False)
    assert {name for _, name, _ in rows} == {"engine.data.media", "av.video", "engine.objective"}
    assert any(name == "_loss" for _, _, name in rows)
    assert points_down("engine.train.trainer", "engine.objective.terms")
    assert points_down("engine.data.ingest.run", "engine.data.media.decode")
    assert not points_down("engine.data.media.decode", "engine.data.ingest.run")
    assert not points_down("engine.core.recipe", "engine.objective.loss")
    assert not points_down("kernels.reference", "engine.core.runtime")
    assert not points_down("engine.search.study", "engine.evaluate.protocols")
    with pytest.raises(AssertionError, match="none of the packages"):
        package_of("engine.nowhere")
