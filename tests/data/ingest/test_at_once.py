"""Several processes that begin with the same raw videos at the same moment, as an array of jobs does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.data.ingest.run import ingest
from engine.data.media.encode import write_video
from engine.data.shards.inspect import verify
from tests.data.films import texture, write_film

ROOT = Path(__file__).resolve().parents[3]
PROCESSES = 8

PROGRAM = """
import json, sys, time
from pathlib import Path
from engine.data.demo import demo
from engine.data.ingest import jobs
from engine.data.library import demo_folders, open_library

if __name__ == "__main__":
    what, folder, go = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    said, work = [], []
    report = lambda what, done, total: said.append(what) if total == 0 else None
    do, write = jobs.do_work, demo.write_video
    import engine.data.ingest.run as ingest
    ingest.do_work = lambda each: (work.append(type(each).__name__), do(each))[1]
    demo.write_video = lambda path, *more, **options: (work.append(path.name), write(path, *more, **options))
    print("ready", flush=True)
    while not go.exists():
        time.sleep(0.001)
    if what == "demo":
        found = demo.make_demo(folder / "demo", clips_per_class=1, unlabelled_clips=1,
                               on_wait=lambda: said.append("waiting"))
        clips = len(list(found.labelled.rglob("*.mp4")))
    else:
        library = open_library([folder / "videos"], cache=folder / "cache", report=report, workers=1)
        clips = len(library.index)
    print(json.dumps({"clips": clips, "work": len(work), "waited": sum("waiting" in text for text in said)}))
"""


def at_once(what: str, folder: Path) -> list[dict[str, Any]]:
    """What each of the processes says, all of which begin together once they have imported what they need."""
    (folder / "program.py").write_text(PROGRAM)
    go = folder / f"go-{len(list(folder.glob('go-*')))}"
    command = [sys.executable, str(folder / "program.py"), what, str(folder), str(go)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE)
        for _ in range(PROCESSES)
    ]
    try:
        for process in processes:
            assert process.stdout is not None and process.stdout.readline() == "ready\n"
        go.touch()
        said = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * PROCESSES
    return [json.loads(text) for text in said]


@pytest.mark.slow
def test_eight_processes_make_the_shards_of_one_folder_once(tmp_path: Path) -> None:
    for i in range(6):
        path = tmp_path / "videos" / f"{i}.mp4"
        path.parent.mkdir(exist_ok=True)
        write_video(path, [np.full((32, 48, 3), 30 * i, np.uint8)] * 30, fps=25)
    fresh = at_once("videos", tmp_path)
    assert [each["clips"] for each in fresh] == [6] * PROCESSES
    # six cuts and a shard, by one process, for which others waited
    assert sorted(each["work"] for each in fresh) == [0] * (PROCESSES - 1) + [7]
    assert 1 <= sum(each["waited"] for each in fresh) <= PROCESSES - 1
    assert {each["waited"] for each in fresh} <= {0, 1}
    cached = at_once("videos", tmp_path)
    assert cached == [{"clips": 6, "work": 0, "waited": 0}] * PROCESSES
    (shards,) = (tmp_path / "cache").iterdir()
    assert verify(shards) == [] and not (shards / ".ingest").exists()
    alone = tmp_path / "alone"
    ingest([tmp_path / "videos"], alone, workers=1)
    assert {p.name: p.read_bytes() for p in shards.iterdir()} == {
        p.name: p.read_bytes() for p in alone.iterdir()
    }


@pytest.mark.slow
def test_eight_processes_draw_the_demo_once(tmp_path: Path) -> None:
    fresh = at_once("demo", tmp_path)
    clips = fresh[0]["clips"]
    assert clips > 1 and all(each["clips"] == clips for each in fresh)
    assert sorted(each["work"] for each in fresh) == [0] * (PROCESSES - 1) + [clips + 1]
    assert {each["waited"] for each in fresh} <= {0, 1}
    assert all(each["work"] == each["waited"] == 0 for each in at_once("demo", tmp_path))


def test_a_script_without_a_guard_is_told_of_one(tmp_path: Path) -> None:
    """Its workers import it anew, and would wait for the lock that it holds."""
    (tmp_path / "videos").mkdir()
    for name in ("a.mp4", "b.mp4"):
        write_film(tmp_path / "videos" / name, (texture(i) for i in range(30)))
    script = tmp_path / "script.py"
    script.write_text(
        "from pathlib import Path\n"
        "from engine.data.ingest.run import ingest\n"
        f"ingest([Path({str(tmp_path / 'videos')!r})], Path({str(tmp_path / 'out')!r}), workers=2)\n"
    )
    done = subprocess.run(
        [sys.executable, script],
        capture_output=True,
        text=True,
        timeout=100,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("ValueError: worker processes can't start")
