"""A step's FLOPs, counted without computing, beside torch's count of the step itself."""

from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from engine.core.recipe import load_recipe
from engine.core.runtime import Runtime, choose_runtime
from engine.data.shards.index import ClipIndex
from engine.objective.lossfile import load_loss
from engine.train.flops import PEAK_TFLOPS, peak_flops, step_flops
from engine.train.member import FlatState
from engine.train.trainer import Trainer

TINY = Path(__file__).parents[1] / "tiny.toml"


def test_flops_are_those_of_the_step(tiny_shards: Path) -> None:
    trainer = Trainer(
        load_recipe(TINY), ClipIndex([tiny_shards / "unlabelled"]), choose_runtime("cpu")
    )
    member = trainer.member(load_loss("sec4"), seed=0)
    _, views = next(trainer.rounds([member], seed=0))
    before = {name: t.clone() for name, t in member.loss.state_dict().items()}
    counted = step_flops(member, views)
    after = member.loss.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(p.grad is None for p in member.loss.parameters())
    with FlopCounterMode(display=False) as counter:
        trainer.step(member, views)
    assert counted == counter.get_total_flops() > 1e6
    member.state = FlatState(member.loss, member.optimizer)  # as compiled steps have it
    assert step_flops(member, views) == counted


def test_a_peak_is_the_gpus_own(monkeypatch) -> None:
    assert peak_flops(choose_runtime("cpu")) is None
    names = {"NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H100 PCIe": 756e12, "NVIDIA L40S": 362e12}
    for name, peak in names.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert peak_flops(Runtime(torch.device("cuda"), True)) == peak
        assert peak_flops(Runtime(torch.device("cuda"), False)) is None
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    assert peak_flops(Runtime(torch.device("cuda"), True)) is None
    assert min(PEAK_TFLOPS.values()) > 50
