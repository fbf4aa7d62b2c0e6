"""Processes of one training run: torchrun starts them, each takes its share of every batch, the first one writes.

Everything here also works in a plain single process, where nothing is exchanged.
"""

from __future__ import annotations

import atexit
import gc
import os
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

# How long the others wait for the first process, which measures held-out data for hours where rFID wants thousands.
PATIENCE = timedelta(days=2)
_patient: dist.ProcessGroup | None = None  # over gloo; None: the default group, with its half hour


class Processes(NamedTuple):
    """Who we are among the processes of the run."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0  # on this machine

    @property
    def first(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0


def join() -> Processes:
    """Join the process group that torchrun's environment variables describe; alone where there are none.

    Tensors on the CPU travel by gloo, those on cards by NCCL.
    """
    if "WORLD_SIZE" not in os.environ or "RANK" not in os.environ:
        return Processes()
    global _patient
    if not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
        _patient = dist.new_group(backend="gloo", timeout=PATIENCE)
        atexit.register(_leave)
    return Processes(dist.get_rank(), dist.get_world_size(), int(os.environ.get("LOCAL_RANK", 0)))


def _leave() -> None:
    """Leave the process group when Python is about to end, and end the threads that served it.

    A thread of gloo's lets go of an exchange's tensors after everyone else has gone on, and asks Python's lock for it.
    Where Python has begun to end by then, that takes the process along (SIGABRT), though all its work is done. The
    threads end with the last reference to their group: ours, and those that models of DDP hold in cycles.
    """
    global _patient
    _patient = None
    if dist.is_initialized():
        gc.collect()
        dist.destroy_process_group()


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def mean(values: dict[str, float]) -> dict[str, float]:
    """The mean of each value over all processes."""
    if world_size() == 1:
        return values
    exchanged = torch.tensor(list(values.values()), dtype=torch.float64)
    dist.all_reduce(exchanged)
    return dict(zip(values, (exchanged / world_size()).tolist()))


def sum_(values: Tensor) -> Tensor:
    """The sum over all processes, in place."""
    if world_size() > 1:
        dist.all_reduce(values)
    return values


def from_first(value: Any) -> Any:
    """The first process's value (anything that can be pickled) in every process."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, group=_patient, device=torch.device("cpu"))
    return box[0]


def barrier() -> None:
    """Wait for all processes (over gloo: no card is involved)."""
    if world_size() > 1:
        dist.all_reduce(torch.zeros(1), group=_patient)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        mine = gradient.chunk(dist.get_world_size())[dist.get_rank()]
        return mine * dist.get_world_size()


def gather_rows(
    rows: Tensor,  # [B, ...], of one shape in all processes
) -> Tensor:  # [world B, ...]
    """The rows of all processes, for a loss that every process computes alike from them.

    The gradient is that of our own rows times the number of processes: the loss is counted once in each, and
    data-parallel training takes the mean of the gradients.
    """
    if world_size() == 1:
        return rows
    gathered: Tensor = _GatherRows.apply(rows)  # type: ignore[no-untyped-call]
    return gathered
