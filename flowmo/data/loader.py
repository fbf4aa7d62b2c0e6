"""Endless training batches in an order that depends on the seed alone, and can be continued exactly."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from flowmo.data.archive import ArchiveImages, find_archives
from flowmo.data.folder import Fetched, ImageFolder, Pictures, Skipped
from flowmo.data.samples import CropSampler, train_photographs
from flowmo.data.transforms import PathLike, deliver, normalize

_FEW = 10  # failures before their share says anything


class TooManyFailures(ValueError):
    """So many pictures cannot be decoded that the data, not single files, must be broken."""


class CropSource(Protocol):
    """What TrainingBatches needs of a data set; ImageFolder is one."""

    def __len__(self) -> int: ...

    def fetch(self, epoch: int, index: int) -> Fetched: ...

    def record(self, failed: Sequence[Skipped]) -> None: ...

    def describe(self) -> str: ...


class BatchSource(Protocol):
    """Endless batches, float32 [B, 3, S, S] in [-1, 1], with a position: TrainingBatches and CropSampler."""

    def __iter__(self) -> Iterator[Tensor]: ...

    def __next__(self) -> Tensor: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...

    def describe(self) -> str: ...


def epoch_order(n: int, seed: int, epoch: int) -> np.ndarray:
    """The order, int64 [n], in which epoch `epoch` visits n pictures."""
    # the crops use (seed, epoch, index), which numpy fills up with a zero: the 1 keeps the two apart
    return np.random.default_rng((seed, epoch, 0, 1)).permutation(n)


class _Batches(Dataset[tuple[Tensor, tuple[Skipped, ...]]]):
    """Batch starting at stream position p: the pictures p, p + 1, ... of all epochs laid end to end."""

    def __init__(self, source: CropSource, batch: int, seed: int) -> None:
        self.source, self.batch, self.seed = source, batch, seed
        self._orders: dict[int, np.ndarray] = {}

    def __getitem__(self, position: int) -> tuple[Tensor, tuple[Skipped, ...]]:
        fetched = [self._fetch(position + i) for i in range(self.batch)]
        return torch.stack([item.pixels for item in fetched]), tuple(f for item in fetched for f in item.failed)

    def _fetch(self, position: int) -> Fetched:
        epoch, place = divmod(position, len(self.source))
        if epoch not in self._orders:  # a batch seldom touches more than the current epoch and the next
            self._orders = {e: order for e, order in self._orders.items() if e == epoch - 1}
            self._orders[epoch] = epoch_order(len(self.source), self.seed, epoch)
        return self.source.fetch(epoch, int(self._orders[epoch][place]))


class TrainingBatches:
    """Endless batches of a data set, shuffled anew every epoch.

    The order follows from (seed, epoch), the crops from (the data set's seed, epoch, index): the number of
    worker processes changes nothing. Epochs are laid end to end, so every batch is full, also with fewer pictures
    than a batch holds. The global random state is never touched.

    Args:
        source: ImageFolder, or anything with its `fetch`.
        batch: pictures a batch.
        seed: of the order.
        start_position: pictures of the stream to pass over without reading them.
        workers: processes that decode ahead; 0 decodes in this one.
        device: where batches are delivered (pinned on the way to a GPU); the bytes travel as uint8.
        rank, world: this process and the number of processes, which take the batches of one stream in turn.
        max_failed: share of the pictures read that may fail to decode; above it the data are taken to be broken.

    Yields float32 [batch, 3, S, S] in [-1, 1]. `position` counts the pictures delivered, over all epochs and
    processes.
    """

    def __init__(
        self,
        source: CropSource,
        batch: int,
        seed: int = 0,
        *,
        start_position: int = 0,
        workers: int = 0,
        device: torch.device | str | None = None,
        rank: int = 0,
        world: int = 1,
        max_failed: float = 1.0,
    ) -> None:
        if batch < 1 or seed < 0 or start_position < 0 or workers < 0:
            raise ValueError(
                "TrainingBatches expects batch >= 1 and seed, start_position, workers >= 0; "
                f"got batch={batch}, seed={seed}, start_position={start_position}, workers={workers}"
            )
        self.source, self.batch, self.seed, self.workers = source, batch, seed, workers
        self.device = torch.device(device) if device is not None else torch.device("cpu")
        self.position = start_position
        self.rank, self.world, self.max_failed = rank, world, max_failed
        self._read_count = self._failed_count = 0  # of this process, in this session
        self._batches = _Batches(source, batch, seed)
        self._reading: Iterator[tuple[Tensor, tuple[Skipped, ...]]] | None = None

    def __iter__(self) -> Iterator[Tensor]:
        return self

    def __next__(self) -> Tensor:
        """The batch at the current position, float32 [batch, 3, S, S] in [-1, 1] on `device`."""
        if self._reading is None:
            self._reading = self._read()
        pixels, failed = next(self._reading)
        self.source.record(failed)
        self.position += self.batch * self.world
        self._read_count += self.batch
        self._failed_count += len(failed)
        if failed and self._failed_count >= _FEW and self._failed_count > self.max_failed * self._read_count:
            raise TooManyFailures(
                f"{self._failed_count} of {self._read_count} pictures could not be decoded, more than the share "
                f"data.max_failed={self.max_failed:g} (last: {failed[-1].path}: {failed[-1].reason}); "
                "repair the data, or raise data.max_failed"
            )
        return normalize(deliver(pixels, self.device))

    def _read(self) -> Iterator[tuple[Tensor, tuple[Skipped, ...]]]:
        positions = _Positions(self.position + self.rank * self.batch, self.batch * self.world)
        if self.workers == 0:
            return (self._batches[position] for position in positions)
        loader = DataLoader(
            self._batches,
            batch_size=None,  # one item is one batch: made whole in a worker
            sampler=positions,
            num_workers=self.workers,
            pin_memory=self.device.type == "cuda",
            worker_init_fn=_leave_signals_to_parent,
            generator=torch.Generator(),  # its own, or it would draw from the global one
        )
        return iter(loader)

    @property
    def epoch(self) -> float:
        """Epochs delivered so far, with fraction."""
        return self.position / len(self.source)

    def state_dict(self) -> dict[str, Any]:
        """What an exact continuation needs: the position, and what must agree for it to mean the same."""
        return {"position": self.position, "seed": self.seed, "pictures": len(self.source)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue after `state["position"]` pictures; another batch size is fine.

        Raises ValueError when the seed or the number of pictures differs.
        """
        for key, mine in (("seed", self.seed), ("pictures", len(self.source))):
            if state[key] != mine:
                raise ValueError(f"the saved data position was made with {key}={state[key]!r}, this run has {mine!r}")
        self.position = int(state["position"])
        self._reading = None  # workers have read ahead from the old position

    def describe(self) -> str:
        """One line for the log."""
        return f"{self.source.describe()}; batches of {self.batch}, {self.workers} worker processes"


def _leave_signals_to_parent(worker: int) -> None:
    """In a worker: a job's end is signalled to all its processes, and the last step still wants its batch.

    Workers end when the process that reads them says so, or is gone.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


class _Positions:
    """Start positions of the batches: first, first + step, ... without end."""

    def __init__(self, first: int, step: int) -> None:
        self.first, self.step = first, step

    def __iter__(self) -> Iterator[int]:
        position = self.first
        while True:
            yield position
            position += self.step


def build_data(
    source: PathLike,
    image_size: int,
    batch: int,
    *,
    seed: int = 0,
    start_position: int = 0,
    workers: int = 0,
    flip: bool = False,
    scales: Sequence[int] | None = None,
    columns: tuple[float, float] = (0.0, 1.0),
    device: torch.device | str | None = None,
    index: PathLike | None = None,
    max_failed: float = 1.0,
    rank: int = 0,
    world: int = 1,
) -> TrainingBatches | CropSampler:
    """The training batches that a config asks for.

    `source` is a folder or file of pictures, tar archives (see ArchiveImages; `index` is theirs), or the word
    "samples" for the built-in training photographs, which are cropped in memory (`scales` and `columns` are theirs,
    see CropSampler; `workers` is not needed there). A folder of that name is "./samples".
    `start_position` counts what the result's `position` counts: pictures for files, batches for the samples.

    Raises FileNotFoundError or SamplePhotographsMissing, saying what was looked for.
    """
    if source == "samples":
        sampler = CropSampler(
            train_photographs(),
            image_size,
            batch,
            seed,
            scales=scales,
            flip=flip,
            columns=columns,
            device=device,
            rank=rank,
            world=world,
        )
        sampler.position = start_position
        return sampler
    archives = find_archives(source)
    if index is not None and not archives:
        raise ValueError(f"data.index={index} is of tar archives, and data.path={source} names none")
    pictures: Pictures
    if archives:
        pictures = ArchiveImages(source, image_size, index=index, flip=flip, seed=seed)
    else:
        pictures = ImageFolder(source, image_size, flip=flip, seed=seed)
    return TrainingBatches(
        pictures, batch, seed, start_position=start_position, workers=workers, device=device,
        rank=rank, world=world, max_failed=max_failed,
    )  # fmt: skip
