"""Kills drivers and workers of real, tiny searches at random moments; every search must end as if nothing had been.

    python tests/soak.py --kills 200 --seed 0

A search is resumed until it is done, and compared with one that nothing interrupted: the study's trials (weights,
fitness, parents, states), what fresh seeds confirmed, the best loss and its network's bytes. Drivers are forked from
this process, which has everything imported, so that a kill costs a second and not ten.
"""

from __future__ import annotations

import argparse
import difflib
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])  # not tests, which has a folder kernels
TINY = Path(__file__).with_name("tiny.toml")
MOST_KILLS = 8
"""Of a driver in one search; then it may end."""
WAIT_SECONDS = 600.0
"""A search that takes longer than this without being killed hangs."""
WORKER_SHARE = 0.15
"""Of all kills, those that are meant for workers."""


@dataclass(frozen=True)
class Search:
    """One search's settings."""

    method: str
    seed: int
    rounds: int
    extra: tuple[str, ...] = ()

    def options(self) -> list[str]:
        settings = ["search.population=3", "search.generation=2", f"search.rounds={self.rounds}"]
        settings += ["optim.steps=2", "fitness.kmeans_init=1"]
        settings += [f"search.method={self.method}", "search.cmaes_population=4", *self.extra]
        pairs = [part for setting in settings for part in ("--set", setting)]
        return ["--recipe", str(TINY), "--seed", str(self.seed), *pairs]


MORE = ("--members-per-gpu", "8")
"""For every driver: spares it counting how many fit."""


@dataclass
class Soak:
    """Data, references and counts of one soak."""

    folder: Path
    rng: random.Random
    say: Callable[[str], None] = print
    kills: Counter[str] = field(default_factory=Counter)
    searches: int = 0
    start_seconds: float = 0.0
    """From the start of workers to the first member, once known; killing faster would leave nobody alive."""
    references: dict[Search, tuple[dict[str, Any], float]] = field(default_factory=dict)

    def run(self, *, kills: int, searches: list[Search], workers: list[Search]) -> None:
        """Kill until there were so many kills; raises AssertionError that names the run's folder."""
        for_workers = round(kills * WORKER_SHARE) if workers else 0
        while self.kills["worker"] < for_workers:
            self.kill_workers(self.rng.choice(workers), most=for_workers - self.kills["worker"])
        while sum(self.kills.values()) < kills:
            most = min(MOST_KILLS, kills - sum(self.kills.values()))
            self.kill_drivers(self.rng.choice(searches), most=most)

    def reference(self, search: Search) -> tuple[dict[str, Any], float]:
        """The outcome of a search that nothing interrupts, and the seconds that it takes."""
        if search not in self.references:
            run, began = self.folder / f"reference-{len(self.references)}", time.monotonic()
            shutil.rmtree(run, ignore_errors=True)
            code = self.wait(self.start(run, search), WAIT_SECONDS)
            assert code == 0, f"{run}: the uninterrupted search ended with {code}: {_log(run)}"
            self.references[search] = outcome(run), time.monotonic() - began
        return self.references[search]

    def kill_drivers(self, search: Search, *, most: int) -> None:
        """Kill a search's driver again and again."""
        _, seconds = self.reference(search)
        run, kills = self.folder / "run", 0
        shutil.rmtree(run, ignore_errors=True)
        while True:
            child = self.start(run, search)
            patience = self.rng.uniform(0.0, 0.8 * seconds) if kills < most else WAIT_SECONDS
            code = self.wait(child, patience)
            if code is not None:
                break
            assert kills < most, f"{run}: the search hangs: {_log(run)}"
            kills += 1
            self.kills["driver"] += 1
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        self.compare(run, search, code)

    def kill_workers(self, search: Search, *, most: int) -> None:
        """Kill a search's two workers, and now and then its driver, at random moments."""
        self.reference(search)
        run, kills = self.folder / "run", 0
        shutil.rmtree(run, ignore_errors=True)
        code = None
        while code is None:
            child = self.start(run, search, "--workers", "2", "--max-retries", "1000")
            driver = self.rng.random() < 0.3
            code, began = None, time.monotonic()
            while code is None:
                code = self.wait(child, self.rng.uniform(0.1, 0.2 + self.start_seconds))
                if not self.start_seconds and has_member(run / "study.jsonl"):
                    self.start_seconds = time.monotonic() - began
                assert time.monotonic() - began < WAIT_SECONDS, f"{run}: hangs: {_log(run)}"
                pids = [pid for pid in descendants(child) if is_worker(pid)]
                if code is not None or not pids or kills >= most or not self.start_seconds:
                    continue
                kills += 1
                if driver and kills % 4 == 3:
                    self.kills["driver of workers"] += 1
                    os.kill(child, signal.SIGKILL)
                    os.waitpid(child, 0)
                    await_end(pids)
                    break
                self.kills["worker"] += 1
                os.kill(self.rng.choice(pids), signal.SIGKILL)
        self.compare(run, search, code)

    def compare(self, run: Path, search: Search, code: int) -> None:
        """The killed search against the one that was not."""
        assert code == 0, f"{run}: {search}: ended with {code}: {_log(run)}"
        expected, _ = self.reference(search)
        found = outcome(run)
        for key, value in expected.items():
            if found[key] != value:
                one, other = (
                    json.dumps(each, default=repr, indent=1).splitlines()
                    for each in (value, found[key])
                )
                lines = "\n".join(
                    [*difflib.unified_diff(one, other, "uninterrupted", "killed", n=0)][:20]
                )
                raise AssertionError(f"{run}: {search}: {key} differs:\n{lines[:3000]}")
        left = [path for path in run.rglob(".*") if path.name != ".lock"]
        assert not left, f"{run}: left behind: {left}"
        self.searches += 1
        self.say(f"{self.tally()}; {search.method}, seed {search.seed}: equal")

    def tally(self) -> str:
        """The counts, in words."""
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(self.kills.items()))
        return f"{sum(self.kills.values())} kills ({kinds or 'none'}), {self.searches} searches"

    def start(self, run: Path, search: Search, *more: str) -> int:
        """Fork a driver: a new search, or its continuation; returns its process."""
        going_on = (run / "recipe.toml").exists()
        data = ["--videos", "unlabelled", "--labelled", "labelled"]
        data = [part if part.startswith("-") else str(self.folder / part) for part in data]
        how = ["--resume"] if going_on else [*data, *search.options()]
        where = [] if more else ["--device", "cpu"]
        sys.stdout.flush()
        child = os.fork()
        if child:
            return child
        _drive(["evolve", "--run", str(run), *how, *where, *MORE, *more], self.folder / "log.txt")
        raise AssertionError("never reached")

    @staticmethod
    def wait(child: int, seconds: float) -> int | None:
        """Its exit code if it ends in time."""
        deadline = time.monotonic() + seconds
        while True:
            pid, status = os.waitpid(child, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            if time.monotonic() >= deadline:
                return None
            time.sleep(0.01)


def _drive(arguments: list[str], log: Path) -> None:
    """In a forked process: the command, its output to a file."""
    code = 70
    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        from engine.cli.main import main

        main(arguments, standalone_mode=False)
        code = 0
    except SystemExit as error:
        code = int(error.code or 0)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def outcome(run: Path) -> dict[str, Any]:
    """All that must not depend on kills."""
    confirmed = json.loads((run / "confirmations.json").read_text())
    summary = json.loads((run / "summary.json").read_text())
    del summary["seconds"]
    return {
        "trials": trials(run / "study.jsonl"),
        "confirmed": timeless(confirmed),
        "summary": summary,
        "network": network(run / "checkpoints" / "best.safetensors"),
        "best": (run / "best.toml").read_text().split("[weights]")[-1],
    }


def timeless(value: Any) -> Any:
    """Nested tables without what a clock measured."""
    if isinstance(value, list):
        return [timeless(each) for each in value]
    if not isinstance(value, dict):
        return value
    times = {"seconds", "clips_per_second"}
    return {key: timeless(each) for key, each in value.items() if key not in times}


def network(path: Path) -> dict[str, Any]:
    """What a network's file says of it, whose entries come in any order, and a digest of the tensors' bytes."""
    whole = path.read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    return {**json.loads(whole[8:start]), "digest": hashlib.sha256(whole[start:]).hexdigest()}


def trials(path: Path) -> list[Any]:
    """The members as the study's journal has them, read without the engine; raises where one is there twice."""
    found: dict[int, Any] = {}
    for line in path.read_text().splitlines():
        log = json.loads(line)
        if "params" not in log:
            continue
        number = log["user_attrs"]["number"]
        assert number not in found, f"{path}: member {number} is there twice"
        keys = ("state", "value", "params", "user_attrs", "intermediate_values")
        found[number] = timeless({key: log.get(key) for key in keys})
    return [found[number] for number in sorted(found)]


def has_member(path: Path) -> bool:
    """Whether a search has got anywhere."""
    return path.exists() and '"number"' in path.read_text()


def descendants(process: int) -> list[int]:
    """Processes that a process has started, and theirs."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if fields[0] != "Z":
            children.setdefault(int(fields[1]), []).append(int(path.parent.name))
    found, left = [], [process]
    while left:
        left += (new := children.get(left.pop(), []))
        found += new
    return found


def is_worker(process: int) -> bool:
    """Whether it is one of the engine's workers."""
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes().startswith(b"ray::_Actor")
    except OSError:
        return False


def await_end(processes: list[int]) -> None:
    """Workers end with their driver, by themselves."""
    deadline = time.monotonic() + 60.0
    while alive := [pid for pid in processes if Path(f"/proc/{pid}").exists()]:
        if time.monotonic() > deadline:
            raise AssertionError(f"workers of a killed driver live on: {alive}")
        time.sleep(0.05)


def _log(run: Path) -> str:
    path = run.parent / "log.txt"
    return path.read_text(errors="replace")[-3000:] if path.exists() else ""


def make_data(folder: Path) -> None:
    """Shards of a few of the demo's scenes, in ``labelled`` and ``unlabelled``."""
    from engine.data.demo.demo import make_demo
    from engine.data.ingest.run import ingest

    make_demo(folder / "scenes", clips_per_class=2, unlabelled_clips=8)
    for name in ("labelled", "unlabelled"):
        ingest([folder / "scenes" / name], folder / name, short_side=48, workers=1)


def import_everything() -> None:
    """What drivers need, so that forks begin at once; nothing here starts a thread.

    The report is left out: it only reads, and takes longer than such a search.
    """
    import torch

    import engine.cli.main
    import engine.report
    import engine.search.evolve
    from engine.core.recipe import Search as Settings
    from engine.search.study import SearchStudy

    with (
        tempfile.TemporaryDirectory() as folder
    ):  # what a study needs is imported when it is opened
        path = Path(folder) / "study.jsonl"
        SearchStudy(Settings(), storage=path, name="x", seed=0, recipe_hash="x").ask()
    torch.use_deterministic_algorithms(True)  # imports as much as all the rest
    engine.report.write_report = lambda run: run / "report.html"


SEARCHES = [
    *(Search("evolution", seed, rounds=5) for seed in range(3)),
    Search("random", 3, rounds=5),
    Search("cmaes", 4, rounds=4),
    Search("evolution", 5, rounds=5, extra=("search.replace=worst", "search.repeats=2")),
]
WORKERS = [Search("evolution", 6, rounds=17), Search("random", 7, rounds=17)]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="work in this folder and keep it")
    arguments = parser.parse_args()
    folder = arguments.keep or Path(tempfile.mkdtemp(prefix="soak-"))
    folder.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    began = time.monotonic()
    make_data(folder)
    import_everything()
    soak = Soak(folder, random.Random(arguments.seed), say=lambda text: print(text, flush=True))
    soak.run(kills=arguments.kills, searches=SEARCHES, workers=WORKERS)
    minutes = (time.monotonic() - began) / 60
    print(
        f"seed {arguments.seed}: {soak.tally()}, all equal to uninterrupted ones; {minutes:.1f} min"
    )
    if arguments.keep is None:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
