"""How much of a GPU a training step uses: its floating point operations, and the most that the GPU can do."""

from __future__ import annotations

import copy

import torch
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from engine.core.runtime import Runtime
from engine.data.views import Views
from engine.train.member import Member

PEAK_TFLOPS = {
    "B200": 2250,
    "H200": 989,
    "H100 PCIE": 756,
    "H100 NVL": 835,
    "GH200": 989,
    "H100": 989,
    "A100": 312,
    "L40S": 362,
    "L4": 121,
    "A10": 125,
    "RTX 4090": 165,
    "RTX 3090": 71,
}
"""Dense bf16 products with float32 sums, in TFLOP/s, by the makers' data sheets; the first name that fits counts."""


def peak_flops(runtime: Runtime) -> float | None:
    """Operations a second that a GPU can do at most in bf16; None for a CPU, in float32, and for an unknown GPU."""
    if runtime.device.type != "cuda" or not runtime.amp:
        return None
    name = torch.cuda.get_device_name(runtime.device).upper()
    return next((peak * 1e12 for known, peak in PEAK_TFLOPS.items() if known in name), None)


def step_flops(member: Member, views: Views) -> int:
    """Operations of convolutions and matrix products in forward and backward of a batch, by torch's counter.

    Counted on tensors without memory: nothing is computed, and the member is left as it is.
    """
    unreal = FakeTensorMode(allow_non_fake_inputs=True)
    with FakeCopyMode(unreal):
        loss, fake, weights = copy.deepcopy((member.loss, views, member.weights))
    with unreal, FlopCounterMode(display=False) as counter:
        loss(fake, weights, member.computed).total.backward()
    return int(counter.get_total_flops())
