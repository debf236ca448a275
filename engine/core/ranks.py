"""Exchange among the processes of one training: gathered shares of a batch, sums, batch norm's statistics.

torch's process groups carry it: gloo on CPUs, NCCL on GPUs. W ranks that hold a share of a batch each compute the
gradient of the whole batch: each differentiates its share of the loss, and the shares' gradients are summed.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors
from torch.nn import functional

Result = TypeVar("Result")
BatchNorm = nn.modules.batchnorm._BatchNorm


class RanksDiffer(ValueError):
    """Ranks that do not train the same thing, or one of which can't: the message names it."""


class PeerLost(RuntimeError):
    """Another rank ended, or can't be reached any more."""


@dataclass(frozen=True)
class Ranks:
    """This process's place among all that train together; by default it is alone."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    """Its place among those of its machine."""
    local_world: int = 1

    @property
    def leads(self) -> bool:
        """Whether this process is the one that writes files and prints."""
        return self.rank == 0

    def share_of(self, batch_size: int, *, pieces: int = 1) -> int:
        """Clips of a batch for each rank; raises ValueError where ranks times ``pieces`` do not divide it."""
        if batch_size % (self.world * pieces):
            each = f" in {pieces} pieces each (optim.accumulate)" if pieces > 1 else ""
            raise ValueError(
                f"optim.batch_size is {batch_size}, the whole batch, which {self.world} processes{each} can't share "
                f"equally: make it a multiple of {self.world * pieces}"
            )
        return batch_size // self.world

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors of one dtype by their sums over ranks, in one exchange; every rank gets the same bits."""
        if self.world == 1 or not tensors:
            return
        flat = _flatten_dense_tensors(tensors)
        dist.all_reduce(flat)
        torch._foreach_copy_(list(tensors), list(_unflatten_dense_tensors(flat, tensors)))

    def gather(self, x: Tensor) -> Tensor:
        """(world, ...): every rank's tensor of this shape."""
        return gathered(x, self) if self.world > 1 else x[None]

    def shared(self, make: Callable[[], Result]) -> Result:
        """The result of ``make`` on rank 0, on every rank; where it raises, all do: the others RanksDiffer."""
        if self.world == 1:
            return make()
        box: list[Any] = [None, None]
        error: Exception | None = None
        if self.leads:
            try:
                box[0] = make()
            except Exception as raised:
                error, box[1] = raised, str(raised) or type(raised).__name__
        dist.broadcast_object_list(box, src=0)
        if error is not None:
            raise error
        if box[1] is not None:
            raise RanksDiffer(box[1])
        result: Result = box[0]
        return result

    def agree(self, facts: dict[str, Any]) -> None:
        """Raise RanksDiffer where some rank's facts are not rank 0's; the message names rank, machine and fact."""
        if self.world == 1:
            return
        every: list[Any] = [None] * self.world
        dist.all_gather_object(every, (socket.gethostname(), facts))
        for rank, (host, own) in enumerate(every):
            for key, value in every[0][1].items():
                if own[key] != value:
                    raise RanksDiffer(
                        f"rank {rank} on {host} has another {key} ({own[key]}) than rank 0 ({value}): "
                        "every process must run the same engine on the same shards"
                    )

    def broadcast_(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors by rank 0's."""
        if self.world == 1:
            return
        for tensor in tensors:
            whole = tensor.data.contiguous()
            dist.broadcast(whole, src=0)
            tensor.data.copy_(whole)


ALONE = Ranks()


@contextmanager
def joined(ranks: Ranks, device: torch.device) -> Iterator[None]:
    """Join the group of processes, on this rank's own share of the machine's cores.

    Raises PeerLost where an exchange within the block fails because another rank is gone.
    """
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        each = len(cores) // ranks.local_world
        if each:
            share = cores[ranks.local_rank * each : (ranks.local_rank + 1) * each]
            os.sched_setaffinity(0, share)
            torch.set_num_threads(min(torch.get_num_threads(), each))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo/transport" not in str(error):
            raise
        raise PeerLost(
            f"rank {ranks.rank} on {socket.gethostname()}: the connection to another process of this training was lost"
        ) from error
    finally:
        dist.destroy_process_group()


_without_others = False


@contextmanager
def without_others() -> Iterator[None]:
    """Exchange nothing within the block: other ranks' tensors are assumed to equal this rank's.

    For a trial step that may fail on one rank alone, for want of memory, while others wait for it.
    """
    global _without_others
    before, _without_others = _without_others, True
    try:
        yield
    finally:
        _without_others = before


@torch.library.custom_op("engine::gather_ranks", mutates_args=())
def _gather(x: Tensor, rank: int, world: int, summed: bool) -> Tensor:
    if _without_others:
        return x.expand(world, *x.shape).clone()
    out = x.new_empty(world, *x.shape)
    # torch 2.13 calls it so, and warns of the older name
    exchange = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    exchange(out.view(-1), x.contiguous().view(-1))
    return out


@_gather.register_fake
def _(x: Tensor, rank: int, world: int, summed: bool) -> Tensor:
    return x.new_empty(world, *x.shape)


@torch.library.custom_op("engine::sum_ranks", mutates_args=())
def _sum(x: Tensor) -> Tensor:
    out = x.clone(memory_format=torch.contiguous_format)
    if not _without_others:
        dist.all_reduce(out)
    return out


@_sum.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.rank, ctx.summed = inputs[1], inputs[3]


def _backward(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:
    return (_sum(upstream) if ctx.summed else upstream)[ctx.rank], None, None, None


_gather.register_autograd(_backward, setup_context=_save_for_backward)


def gathered(x: Tensor, ranks: Ranks, *, summed: bool = False) -> Tensor:
    """(world, ...): every rank's ``x``; one op, so that a compiled step keeps it whole.

    Its gradient is that of this rank's loss to its own ``x``: enough where every rank computes the same value from
    all shares, and ranks' gradients are summed. With ``summed`` it is that of all ranks' losses together, for what
    goes into each rank's own value, such as batch norm's statistics.
    """
    out: Tensor = _gather(x, ranks.rank, ranks.world, summed)
    return out


class SyncedBatchNorm(BatchNorm):
    """Batch norm with the statistics of all ranks' shares of the batch, which are of equal size.

    On GPUs and CPUs alike, and within compiled code, which torch's own is not.
    """

    ranks: Ranks = ALONE

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (N, C, ...); without running statistics or in evaluation, by this rank's share alone."""
        if not self.training or self.running_mean is None or self.running_var is None:
            mean, var = self.running_mean, self.running_var
            own = self.training or mean is None
            return functional.batch_norm(x, mean, var, self.weight, self.bias, own, 0.0, self.eps)
        axes = [0, *range(2, x.dim())]
        var, mean = torch.var_mean(x.float(), axes, correction=0)
        means, variances = gathered(torch.stack([mean, var]), self.ranks, summed=True).unbind(1)
        mean = means.mean(0)
        var = (variances + (means - mean).square()).mean(0)
        count = x.numel() // x.shape[1] * self.ranks.world
        with torch.no_grad():
            momentum = self.momentum or 0.0
            self.running_mean.lerp_(mean, momentum)
            self.running_var.lerp_(var * (count / max(count - 1, 1)), momentum)
            if self.num_batches_tracked is not None:
                self.num_batches_tracked.add_(1)
        shape = (1, -1, *[1] * (x.dim() - 2))
        scale = self.weight * (var + self.eps).rsqrt()
        shift = self.bias - mean * scale
        return (x.float() * scale.view(shape) + shift.view(shape)).to(x.dtype)

    def _check_input_dim(self, input: Tensor) -> None:
        """Any shape (N, C, ...)."""


def sync_batch_norm(module: nn.Module, ranks: Ranks) -> None:
    """Make every batch norm inside a SyncedBatchNorm, in place; parameters, buffers and names stay."""
    for child in list(module.modules()):
        if isinstance(child, BatchNorm):
            child.__class__ = SyncedBatchNorm
            child.ranks = ranks  # type: ignore[assignment]
