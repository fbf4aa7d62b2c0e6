"""What became of a step, told by the device and read by the host a step later, so that the host never waits for it.

Whether a step's loss and gradient are finite is known on the device alone. The optimizer's kernels ask it there
(`found_inf`). The host, which counts, warns and gives up, reads it after it has put the next step's work in the queue:
by then it has long been known, and the device has work to do meanwhile.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from flowmo.files import atomic_write


class Told(NamedTuple):
    """Of one step: what all processes agree on, and this process's own numbers."""

    skipped: bool
    stop: bool  # some process was asked to stop
    seconds: float  # the longest clock
    numbers: list[float]


class Verdict:
    """The outcome of one step on its way to the host.

    All processes make one in every step, at the same place: their findings are put together on the device.

    Args:
        step: its index. batches: what it was computed from.
        finite: [] on the device, whose being finite stands for the step's.
        stop, seconds: this process's wish to stop, and its clock.
        numbers: [] each, read along.

    Attributes:
        found_inf: fp32 [] on the device, not zero where any process found a number that is not finite.
    """

    def __init__(
        self, step: int, batches: list[Any], finite: Tensor, stop: bool, seconds: float, numbers: list[Tensor]
    ) -> None:
        self.step, self.batches = step, batches
        # filled in by kernels: a copy from the host's pageable memory would wait for the device
        own = [torch.full((), float(value), device=finite.device) for value in (stop, seconds)]
        agreed = torch.stack([(~torch.isfinite(finite)).float(), *own])
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(agreed, dist.ReduceOp.MAX)
        self.found_inf = agreed[0]
        told = torch.cat([agreed, torch.stack([n.float() for n in numbers])])
        self._arrived: torch.cuda.Event | None = None
        if told.device.type == "cuda":
            self._told = torch.empty(told.shape, pin_memory=True)
            self._told.copy_(told, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()
        else:
            self._told = told

    def read(self) -> Told:
        """What the device said; waits for it if it has not come so far."""
        if self._arrived is not None:
            self._arrived.synchronize()
        skipped, stop, seconds, *numbers = self._told.tolist()
        return Told(skipped > 0, stop > 0, seconds, numbers)

    def save_batches(self, path: Path, losses: dict[str, float]) -> None:
        """Write what the step was computed from, for inspection: step, batches on the CPU, losses."""
        path.parent.mkdir(exist_ok=True)
        saved = {"step": self.step, "batches": [_on_cpu(b) for b in self.batches], "losses": losses}
        atomic_write(path, lambda name: torch.save(saved, name))


def _on_cpu(batch: Any) -> Any:
    return batch.cpu() if isinstance(batch, Tensor) else tuple(part.cpu() for part in batch)
