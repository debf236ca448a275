"""What a wheel holds: the code and the recipes, and nothing else."""

import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import engine
from engine.objective.terms import TERM_NAMES

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("engine", "kernels", "recipes", "benchmarks", "tests")
FILES = ("pyproject.toml", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.Path:
    """The wheel of a copy of the tree, built without reaching an index; leaves nothing in the tree itself."""
    root = tmp_path_factory.mktemp("tree")
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, root / name, ignore=ignore)
    for name in FILES:
        shutil.copy(ROOT / name, root / name)
    out = root / "wheels"
    command = "-m pip wheel --quiet --no-index --no-deps --no-build-isolation --wheel-dir".split()
    done = subprocess.run(
        [sys.executable, *command, str(out), "."], cwd=root, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    (path,) = out.glob("*.whl")
    return zipfile.Path(path)


def names(wheel: zipfile.Path) -> set[str]:
    return {name for name in wheel.root.namelist() if not name.endswith("/")}


def test_top_level_is_the_code_and_the_recipes(wheel: zipfile.Path) -> None:
    info = f"evolved_losses-{engine.__version__}.dist-info"
    assert {name.split("/")[0] for name in names(wheel)} == {"engine", "kernels", "recipes", info}


def test_every_source_and_data_file_is_inside(wheel: zipfile.Path) -> None:
    suffixes = {".py", ".toml", ".j2"}
    expected = {
        path.relative_to(ROOT).as_posix()
        for folder in ("engine", "kernels", "recipes")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in suffixes
    }
    assert "recipes/losses/equal.toml" in expected
    assert {name for name in names(wheel) if ".dist-info/" not in name} == expected


def test_metadata_names_the_command_and_the_licence(wheel: zipfile.Path) -> None:
    info = wheel / f"evolved_losses-{engine.__version__}.dist-info"
    assert "engine = engine.cli.main:main" in (info / "entry_points.txt").read_text()
    metadata = (info / "METADATA").read_text()
    assert "License-Expression: Apache-2.0" in metadata
    assert "Requires-Python: >=3.11" in metadata
    assert (info / "licenses" / "LICENSE").is_file()


def test_installed_recipes_load_by_name(wheel: zipfile.Path, tmp_path: Path) -> None:
    """From the wheel alone, in a process that does not see the source tree."""
    wheel.root.extractall(tmp_path / "site")
    program = (
        "import engine.objective.lossfile as f, engine.core.presets as p, engine.core.recipe as r\n"
        "print(r.__file__)\n"
        "print(sorted(n for n, w in f.load_loss('rgb_to_flow').items() if w))\n"
        "print(len(p.preset_names('losses')))\n"
        "print(r.load_recipe('paper/pretrain_r3d50').model.arch)\n"
        "print([n for n in p.preset_names() if p.preset_text(n) == ''])\n"
        "print(' '.join(p.preset_names()))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    where, terms, count, arch, empty, recipes = done.stdout.splitlines()
    assert Path(where).is_relative_to(tmp_path)
    assert terms == "['rgb/to_flow']"
    assert (arch, empty) == ("r3d_50", "[]")
    folder = ROOT / "recipes"
    own = [p.relative_to(folder).with_suffix("").as_posix() for p in folder.rglob("*.toml")]
    assert recipes.split() == sorted(n for n in own if not n.startswith(("losses/", "reproduce/")))
    assert int(count) == len(list((ROOT / "recipes" / "losses").glob("*.toml")))


@pytest.mark.parametrize("path", sorted((ROOT / "recipes" / "losses").glob("*.toml")), ids=str)
def test_losses_are_presets_of_known_terms(path: Path) -> None:
    values = tomllib.loads(path.read_text(encoding="utf-8"))
    assert set(values) == {"name", "about", "weights"}
    assert values["name"] == path.stem
    assert values["about"].endswith(".")
    assert values["weights"]
    assert set(values["weights"]) <= set(TERM_NAMES)
    assert all(0.0 < weight <= 1.0 for weight in values["weights"].values())


def test_whole_search_space_presets() -> None:
    def terms(name: str) -> set[str]:
        text = (ROOT / "recipes" / "losses" / f"{name}.toml").read_text(encoding="utf-8")
        return set(tomllib.loads(text)["weights"])

    assert terms("equal") == set(TERM_NAMES)
    assert terms("equal") - terms("no_distillation") == {
        f"distill/{m}@{k}" for m in ("grey", "flow", "audio") for k in range(5)
    }
