"""One process or several (torchrun): who this is, and bringing results together."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")


class Processes:
    """The processes of this evaluation.

    Under torchrun it joins the group by gloo, which carries results of any kind through the CPU; the pictures
    themselves never travel. Otherwise it is one process, and nothing is set up.
    """

    def __init__(self) -> None:
        self.world = int(os.environ.get("WORLD_SIZE", "1"))
        self.rank = int(os.environ.get("RANK", "0"))
        self.local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        self._group: Any = None
        self._started = False
        if self.world > 1:
            if not dist.is_initialized():
                dist.init_process_group("gloo")
                self._started = True
            self._group = dist.new_group(backend="gloo")

    @property
    def main(self) -> bool:
        return self.rank == 0

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """This process's part of a sequence: successive items, so that the parts in order of rank are the whole."""
        n = len(items)
        return items[n * self.rank // self.world : n * (self.rank + 1) // self.world]

    def gather(self, item: T) -> list[T]:
        """The items of all processes in order of rank, on the first; an empty list on the others."""
        if self.world == 1:
            return [item]
        items: list[Any] | None = [None] * self.world if self.main else None
        dist.gather_object(item, items, dst=0, group=self._group)
        return items or []

    def from_main(self, item: T) -> T:
        """The first process's item, on all."""
        if self.world == 1:
            return item
        box = [item]
        dist.broadcast_object_list(box, src=0, group=self._group)
        return box[0]

    def close(self) -> None:
        """Leave the group where it was joined here."""
        if self._started:
            dist.destroy_process_group()
            self._started = False
