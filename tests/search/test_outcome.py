"""What a surrogate's search ends with: its outcome's own network, and what stands beside it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from engine.core.tensors import load_tensors
from engine.data.demo.levels import WITH_LABELS
from engine.features.trivial import TRIVIAL
from engine.objective.lossfile import load_loss
from engine.search.samplers import thompson
from engine.search.samplers.thompson import SurrogateSampler
from tests.runs import TINY, begin, command, members, one_line, read, resume

SETTINGS = (
    "search.method=surrogate search.population=5 search.rounds=0 search.generation=5 search.sparsity=0.8"
    " optim.steps=2 objective.units=gradient search.compare=['rgb_to_flow']"
)
OPTIONS = [arg for each in SETTINGS.split() for arg in ("--set", each)]


pytestmark = pytest.mark.usefixtures("undrawn")


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_the_outcome_has_its_own_network_and_company(
    tiny_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a model that speaks for the least fit member, whose network no worker keeps."""
    monkeypatch.setattr(
        SurrogateSampler,
        "fittest",
        lambda self, done: min(done, key=lambda m: (m.fitness, m.number)),
    )
    folders = tuple([tiny_shards / name] for name in ("unlabelled", "labelled"))
    monkeypatch.setattr("engine.data.library.demo_folders", lambda report: folders)
    monkeypatch.setattr("engine.data.demo.levels.levels", lambda recipe: {WITH_LABELS: (0.7, 0.8)})
    run = tmp_path / "run"
    code, out, err = command("evolve", "--recipe", TINY, "--run", run, "--device", "cpu", *OPTIONS)
    assert (code, err) == (0, "")
    done = members(run)
    best = min(done, key=lambda m: (m.fitness, m.number))
    assert best.fitness < max(m.fitness for m in done)
    _, facts = load_tensors(run / "checkpoints" / "best.safetensors")
    # trained again with its own seed: to the last bit of its fitness
    assert (facts["trial"], facts["fitness"]) == (best.number, best.fitness)
    assert load_loss(run / "best.toml") == best.weights
    assert not [p for p in (run / "checkpoints").iterdir() if p.name != "best.safetensors"]
    summary = read(run / "summary.json")
    assert summary["best_trial"] == best.number and len(done) == 5
    assert list(summary["compared"]) == [*TRIVIAL, "rgb_to_flow", WITH_LABELS]
    known = summary["compared"].pop(WITH_LABELS)
    assert (known["mean"], known["values"]) == (0.75, [0.7, 0.8])
    assert all(len(each["values"]) == 1 for each in summary["compared"].values())
    for name in ("mean frame", "frame differences", "flow directions", "rgb_to_flow", WITH_LABELS):
        assert name in out
        assert name.replace("_", " ").capitalize() in (run / "report.html").read_text()

    # killed before the network was trained again: that alone is done again, to the same bits
    path = run / "checkpoints" / "best.safetensors"
    whole, study = load_tensors(path), (run / "study.jsonl").read_bytes()
    path.unlink()
    assert resume(run)[0] == 0
    again = load_tensors(path)
    assert again[1] == whole[1]
    assert all(torch.equal(again[0][name], tensor) for name, tensor in whole[0].items())
    assert (run / "study.jsonl").read_bytes() == study
    assert read(run / "summary.json")["best"] == summary["best"]


def test_networks_of_a_race_are_kept_until_it_is_decided(
    tiny_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The least fit of the last two wins, whose network no earlier member's was worse than: it isn't trained again."""
    monkeypatch.setattr(thompson, "RACE", 2)
    monkeypatch.setattr(
        SurrogateSampler,
        "fittest",
        lambda self, done: min(done[self.race :] or done, key=lambda m: (m.fitness, m.number)),
    )
    race = ("population=2", "rounds=6", "generation=2", "seeds=generation", "method=surrogate")
    settings = [arg for each in (*race, "sparsity=0.8") for arg in ("--set", f"search.{each}")]
    run = tmp_path / "run"
    code, out, _ = begin(tiny_shards, run, *settings, "--set", "optim.steps=2")
    assert code == 0 and "training the best loss's network" not in out
    done = members(run)
    best = min(done[6:], key=lambda m: (m.fitness, m.number))
    assert best.fitness < max(m.fitness for m in done)
    _, facts = load_tensors(run / "checkpoints" / "best.safetensors")
    assert (facts["trial"], facts["fitness"]) == (best.number, best.fitness)
    assert [p.name for p in (run / "checkpoints").iterdir()] == ["best.safetensors"]


def test_the_fittest_loss_to_compare_with_goes_on_after_the_first_seed(
    tiny_shards: Path, tmp_path: Path
) -> None:
    names = ["rgb_to_flow", "frame_shuffle", "predict_frames"]
    settings = (f"compare={names}", "confirm_seeds=2", "population=2", "rounds=0")
    settings += ("confirm_random=2",)
    more = [arg for each in settings for arg in ("--set", f"search.{each}")]
    run = tmp_path / "run"
    code, _, _ = begin(tiny_shards, run, *more, "--set", "optim.steps=2")
    assert code == 0
    records = list(read(run / "confirmations.json").values())
    first = {name: records[0]["compared"][name]["fitness"] for name in names}
    leading = sorted(names, key=lambda name: (-first[name], names.index(name)))[:1]
    for record in records[1:]:
        assert {*record["compared"]} == {*TRIVIAL, *leading}
    compared = read(run / "summary.json")["compared"]
    assert {name: compared[name]["n"] for name in names} == {
        name: 2 if name in leading else 1 for name in names
    }
    # random losses: two others under each seed, which counts their mean
    drawn = [[one["fitness"] for one in record["random"]] for record in records]
    losses = {json.dumps(one["weights"]) for record in records for one in record["random"]}
    assert len(losses) == 4
    summary = read(run / "summary.json")
    assert summary["random"]["values"] == pytest.approx([sum(pair) / 2 for pair in drawn])
    assert summary["random"]["each"] == 2
    luckiest = summary["luckiest_random"]
    assert (luckiest["mean"], luckiest["of"]) == (max(map(max, drawn)), 4)
    # killed between the first seed and the others: the same one goes on
    whole, path = read(run / "confirmations.json"), run / "confirmations.json"
    path.write_text(json.dumps(dict(list(whole.items())[:1])))
    assert resume(run)[0] == 0
    again = read(path)
    assert {s: {n: c["fitness"] for n, c in r["compared"].items()} for s, r in again.items()} == {
        s: {n: c["fitness"] for n, c in r["compared"].items()} for s, r in whole.items()
    }


def test_a_loss_to_compare_with_is_looked_for_before_anything_is_trained(
    tiny_shards: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    wrong = ("--set", "search.compare=['rgb_to_flw']")
    assert "rgb_to_flw" in one_line(begin(tiny_shards, run, *wrong), code=2)
    assert not members(run)
