"""For every Python process of a check on a machine without DALI: ``engine.data.dali`` is ``gpu_checks.without_dali``.

Python imports this file at its start where this folder is on its path.
"""

import sys
from importlib.abc import MetaPathFinder
from importlib.util import find_spec, spec_from_file_location
from pathlib import Path

STAND_IN = Path(__file__).resolve().parents[1] / "without_dali.py"


class Finder(MetaPathFinder):
    """Finds the stand-in by the name of the engine's module."""

    def find_spec(self, name, path=None, target=None):  # type: ignore[no-untyped-def]
        """The stand-in's specification, for that one name."""
        return spec_from_file_location(name, STAND_IN) if name == "engine.data.dali" else None


def absent() -> bool:
    """Whether DALI can't be imported."""
    try:
        return find_spec("nvidia.dali") is None
    except ModuleNotFoundError:
        return True


if absent():
    sys.meta_path.insert(0, Finder())
