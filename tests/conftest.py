"""What every test shares: real videos where they are present, GPU tests only on a GPU, one thread."""

import atexit
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # networks here are tiny: two threads wait for each other
if "TORCHINDUCTOR_CACHE_DIR" not in os.environ or "PYTEST_XDIST_WORKER" in os.environ:
    # Compiled by this process alone: what a killed one leaves half written in the shared place fails later runs.
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp(prefix="inductor-")
    atexit.register(shutil.rmtree, os.environ["TORCHINDUCTOR_CACHE_DIR"], ignore_errors=True)

import pytest
import torch

from tests.postgres import Server, why_not

ROOT = Path(__file__).resolve().parents[1]
REAL_DATA = ROOT.parent / "shared" / "data"


def pytest_configure() -> None:
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # Files with slow tests first: one begun last would leave the other workers idle.
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA GPU"))


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder of real videos beside the repository; skips the test where it is absent."""
    if not REAL_DATA.is_dir():
        pytest.skip("real videos not present")
    return REAL_DATA


@pytest.fixture(scope="session")
def postgres() -> Iterator[Server]:
    """A PostgreSQL server of this session's own; skips the test where none is installed."""
    if reason := why_not():
        pytest.skip(reason)
    server = Server()
    yield server
    server.close()


@pytest.fixture(scope="session")
def tiny_demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small share of the demo: 8 classes x 3 labelled clips, 8 unlabelled; folders labelled and unlabelled."""
    from engine.data.demo.demo import make_demo

    folder = tmp_path_factory.mktemp("demo") / "set"
    make_demo(folder, clips_per_class=3, unlabelled_clips=8)
    return folder


@pytest.fixture(scope="session")
def tiny_shards(tiny_demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of ``tiny_demo``, in folders labelled and unlabelled."""
    from engine.data.ingest.run import ingest

    root = tmp_path_factory.mktemp("shards")
    for name in ("labelled", "unlabelled"):
        ingest([tiny_demo / name], root / name, short_side=48, workers=1)
    return root


@pytest.fixture(scope="module")
def undrawn() -> Iterator[None]:
    """Reports with empty figures: drawing takes as long as the smallest search, and ``tests/report`` looks at it."""
    from tests.made_run import draw_only

    with pytest.MonkeyPatch.context() as patched:
        draw_only(patched)
        yield


@pytest.fixture(scope="session")
def colours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty labelled videos whose classes are colours, laid out as UCF101 unpacks: UCF-101 and ucfTrainTestlist."""
    from tests.labelled import make_ucf101

    root = tmp_path_factory.mktemp("colours")
    make_ucf101(root)
    return root


@pytest.fixture(scope="session")
def colour_set(colours: Path, tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    """The same, opened: an ``engine.evaluate.datasets.Dataset`` of three official splits."""
    from engine.evaluate.datasets import open_dataset

    return open_dataset(
        colours,
        name="ucf101",
        cache=tmp_path_factory.mktemp("cache"),
        report=lambda *_: None,
        short_side=32,
        workers=1,
    )
