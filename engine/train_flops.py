"""How much of a GPU a training step uses: its floating point operations, and the most that the GPU can do."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from engine.data.views import Views
from engine.runtime import Runtime
from engine.train_state import Member

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

    def empty(x: Tensor) -> Tensor:
        return unreal.from_tensor(x.detach())

    without_memory = replace(
        views,
        clip={m: empty(x) for m, x in views.clip.items()},
        future={m: empty(x) for m, x in views.future.items()},
        shifted_audio=None if views.shifted_audio is None else empty(views.shifted_audio),
        has_audio=empty(views.has_audio),
        has_shift=empty(views.has_shift),
        order=empty(views.order),
    )
    state = {name: empty(p).requires_grad_() for name, p in member.loss.named_parameters()}
    state |= {name: empty(b) for name, b in member.loss.named_buffers()}
    with unreal, FlopCounterMode(display=False) as counter:
        arguments = (without_memory, empty(member.weights), member.computed)
        output = functional_call(member.loss, state, arguments)
        output.total.backward()
    return int(counter.get_total_flops())
