"""What a run is between two steps, and the one thing that happens to it: a step forward. Saved whole, and restored."""

from __future__ import annotations

import contextlib
import logging
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from flowmo.config import Config, ConfigError, to_yaml
from flowmo.training import checkpoint, distributed, runfolder
from flowmo.training.heldout import Heldout
from flowmo.training.precision import fast_math, resolve_precision, take_device
from flowmo.training.sharding import exchange_gradients, fill_, flatten, full, load_shards_
from flowmo.training.stage import Stage
from flowmo.training.verdict import Verdict

logger = logging.getLogger("flowmo")

FIRST_STEPS = 20  # whose mean loss is kept


class TrainState:
    """Model, optimizer, data, random numbers and counters of one run, in each of its processes.

    Under torchrun every process makes one; they train as one on batches that together have `data.batch` pictures,
    and the first writes. Micro-batch j of process r draws its noise from (seed, step, j world + r) and takes the
    pictures at that place of the batch, so two processes do what one does with twice the micro-batches.

    Args:
        config: a checked configuration.
        stage: what is trained.

    Raises:
        ConfigError: no data named, a batch that does not divide among the processes, or the run folder holds a run of
            another configuration.
    """

    def __init__(self, config: Config, stage: type[Stage]) -> None:
        self.config = config
        t = config.trainer
        self.processes = distributed.join()
        world = self.processes.world
        if config.data.batch % (t.accumulate * world):
            raise ConfigError(
                f"data.batch={config.data.batch} does not divide among {world} processes with "
                f"trainer.accumulate={t.accumulate} micro-batches each"
            )
        self.run = Path(config.run)
        self.device = take_device(t.device, self.processes)
        if t.threads:
            torch.set_num_threads(t.threads)
        self.precision = distributed.from_first(resolve_precision(t.precision, self.device))
        stage.check(config)
        if self.processes.first:
            runfolder.check(self.run, config)
        torch.manual_seed(t.seed)
        self.stage = stage(config, self.device)
        if config.init is not None and not checkpoint.list_checkpoints(self.run):
            self.stage.start_from(config.init)
        self.sharded = t.parallel == "fsdp" and world > 1
        if self.sharded:
            self.stage.shard()
        self.optimizer = self.stage.optimizer()
        self.generator = torch.Generator(self.device)
        self.data = self.stage.batches(self.processes)
        self.heldout = self._heldout()
        self.step = 0
        self.seconds = 0.0  # of training, over all sessions of the run
        self._first_losses: list[float] = []
        self.skipped = 0  # steps whose loss or gradient was not finite
        self._skipped_in_row = 0
        self._clock = 0.0  # this process's own seconds
        self._stop = False  # this process was asked to
        self._all_stop = False
        self._exhausted = False
        self._verdict: Verdict | None = None  # of the last step, not read so far
        self._wrap()
        if self.processes.first:
            runfolder.claim(self.run, config)  # last of all: what cannot start leaves nothing behind
        distributed.barrier()

    @property
    def model(self) -> nn.Module:
        return self.stage.model

    @property
    def first_loss(self) -> float | None:
        """Mean over the first 20 steps of the number that the stage follows; None before."""
        losses = self._first_losses
        return sum(losses) / len(losses) if len(losses) == FIRST_STEPS else None

    @property
    def finished(self) -> bool:
        return self.progress >= 1.0 or self._exhausted

    @property
    def stopping(self) -> bool:
        """Whether training is to stop after this step, in all processes alike."""
        return self._stop if self.processes.world == 1 else self._all_stop

    # One step.

    @property
    def progress(self) -> float:
        """The part of the run that is done, by steps or by minutes, whichever is further."""
        t = self.config.trainer
        by_time = self.seconds / (60 * t.minutes) if t.minutes else 0.0
        return max(self.step / t.steps, by_time)

    def _wrap(self) -> None:
        """Have gradients averaged over the processes; again whenever what learns has changed."""
        self.stage.update(self.step)
        self._parallel: nn.Module = self.stage
        if self.processes.world > 1 and not self.sharded:
            ids = [self.device.index] if self.device.type == "cuda" else None
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated")  # its successor is not in 2.11
                self._parallel = DistributedDataParallel(
                    self.stage, device_ids=ids, broadcast_buffers=False, gradient_as_bucket_view=True
                )

    @contextlib.contextmanager
    def _exchange(self, on: bool) -> Iterator[None]:
        """Whether gradients are exchanged at the end of the backward pass inside."""
        if self.sharded:
            exchange_gradients(self.model, on)
        with self._parallel.no_sync() if not on and not self.sharded else contextlib.nullcontext():  # type: ignore[operator]
            yield

    def train_step(self) -> dict[str, Tensor]:
        """All micro-batches of one optimizer step; detached means of the losses and the gradient's norm.

        A step whose loss or gradient is not finite changes no weight. The device decides that; this process reads it
        in the next step or in :meth:`settle`, and until then counts as if the step were taken.

        Raises:
            FloatingPointError: as :meth:`settle`, about the step before.
        """
        c = self.config
        accumulate, (rank, world, _) = c.trainer.accumulate, self.processes
        began = time.perf_counter()
        if self.stage.update(self.step):
            self._wrap()
        parts: list[dict[str, Tensor]] = []
        batches: list[Any] = []
        # One region for all micro-batches: autocast keeps the bf16 weights that it makes in the first.
        with fast_math(self.precision, self.device, self.stage.sequence):
            for micro in range(accumulate):
                if world > 1:
                    # Weights cast for an earlier micro-batch get their gradients at the very end of the backward pass:
                    # FSDP has exchanged without them by then, and DDP could not exchange while it goes on.
                    torch.clear_autocast_cache()
                batch = next(self.data)
                self.generator.manual_seed(noise_seed(c.trainer.seed, self.step, micro * world + rank))
                with self._exchange(world == 1 or micro == accumulate - 1):
                    losses = self._parallel(batch, self.generator)
                    (losses["total"] / accumulate).backward()
                parts.append({k: v.detach() for k, v in losses.items()})
                batches.append(batch)
        means = {k: torch.stack([p[k].float() for p in parts]).mean() for k in parts[0]}
        gradients = [p.grad for p in self.stage.trained.values() if p.grad is not None]
        norm = means["gradient_norm"] = full(torch.nn.utils.get_total_norm(gradients))
        followed = means[self.stage.shown[0] if self.stage.shown else "total"]
        numbers = [followed, means["total"], norm]
        verdict = Verdict(self.step, batches, means["total"] + norm, self._stop, self._clock, numbers)
        self.settle()
        self.stage.clip_(norm)
        self.optimizer.step(self.stage.learning_rate(self.step, self.progress), verdict.found_inf)
        self._verdict = verdict
        self.step += 1
        self._clock += time.perf_counter() - began
        if world == 1:
            self.seconds = self._clock
        return means

    def settle(self) -> None:
        """Take in what became of the last step, once; all processes do it at the same places.

        Raises:
            FloatingPointError: `trainer.max_skipped` steps in a row were not finite; the last one's batch is in
                RUN/nonfinite.
        """
        verdict, self._verdict = self._verdict, None
        if verdict is None:
            return
        told = verdict.read()
        followed, total, norm = told.numbers
        if self.processes.world > 1:
            self._all_stop, self.seconds = told.stop, told.seconds
        if verdict.step == len(self._first_losses) < FIRST_STEPS:
            self._first_losses.append(followed)
        if not told.skipped:
            self._skipped_in_row = 0
            return
        self.optimizer.step_count -= 1
        self.skipped += 1
        self._skipped_in_row += 1
        if self.processes.first:
            logger.warning(
                "step %d skipped: the loss is %g and the gradient's norm %g (%d in a row)",
                verdict.step + 1, total, norm, self._skipped_in_row,
            )  # fmt: skip
        if self._skipped_in_row >= self.config.trainer.max_skipped:
            path = self.run / "nonfinite" / f"step_{verdict.step + 1:08d}_rank_{self.processes.rank}.pt"
            verdict.save_batches(path, {"total": total, "gradient_norm": norm})
            raise FloatingPointError(
                f"{self._skipped_in_row} steps in a row, up to step {verdict.step + 1}, had a loss or gradient that "
                f"is not finite; the last batch is in {path}. The checkpoints are whole: look at the batch, or lower "
                "optim.lr in another run="
            )

    # Saved and restored.

    def averaged(self) -> Any:
        """The model with the averaged weights, in evaluation mode; under FSDP all processes call this."""
        return self.stage.averaged(self.optimizer.average)

    def state_dict(self) -> dict[str, Any]:
        self.settle()
        return {
            "step": self.step,
            "seconds": self.seconds,
            "first_losses": self._first_losses,
            "skipped": [self.skipped, self._skipped_in_row],
            "stage": self.config.stage,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "random": checkpoint.random_states(),
            "data": self.data.state_dict(),
            "heldout": self.heldout.state_dict() if self.heldout else None,
            "exhausted": self._exhausted,
            "processes": self.processes.world,
            "config": to_yaml(self.config),
            "git_commit": checkpoint.git_commit(),
        }

    def save(self) -> Path:
        """Write the checkpoint of this step and the averaged model; the first process does, under FSDP all."""
        self.settle()  # in all processes: it may end the run
        t, first = self.config.trainer, self.processes.first
        path = checkpoint.path_of(self.run, self.step)
        if self.sharded:
            path = checkpoint.save_sharded(self.run, self.step, self.state_dict(), t.keep, t.keep_every, first)
        elif first:
            checkpoint.save(self.run, self.step, self.state_dict(), t.keep, t.keep_every)
        self.save_model()
        return path

    def save_model(self) -> None:
        """Write the averaged model into RUN/model; the first process does, under FSDP all call it."""
        if self.processes.first or self.sharded:
            model = self.averaged()
            if self.processes.first:
                model.save_pretrained(self.run / "model")

    def resume(self) -> bool:
        """Load the newest whole checkpoint of the run folder; False where there is none.

        Any number of processes may go on with it: all of them read the file, which must be in reach of all.
        """
        found = checkpoint.newest(self.run) if self.processes.first else None
        path = distributed.from_first(found[0] if found else None)
        if path is None:
            return False
        in_place = path.is_dir() and self.sharded
        if in_place:
            state = checkpoint.read_rest(path)
            load_shards_(flatten(self.state_dict())[0], path)
            self.optimizer.step_count = int(state["optimizer"]["step"])
        else:
            state = found[1] if found and path.is_file() else checkpoint.read(path)
            for key, weight in self.model.state_dict().items():
                fill_(weight, state["model"][key])
            self.optimizer.load_state_dict(state["optimizer"])
        if "random" in state:
            checkpoint.set_random_states(state["random"])
        self.data.load_state_dict(state["data"])
        self.step, self.seconds = state["step"], state["seconds"]
        self._first_losses = list(state.get("first_losses", ()))
        self._clock = self.seconds
        self.skipped, self._skipped_in_row = state.get("skipped", (0, 0))
        if measured := state.get("heldout"):  # by the first process, and all agree on what follows from it
            if self.heldout:
                self.heldout.load_state_dict(measured)
            self._exhausted = bool(state["exhausted"]) and 0 < self.config.heldout.patience <= measured["worse"]
        self._wrap()
        return True

    def _say(self, text: str, *values: object) -> None:
        if self.processes.first:
            logger.info(text, *values)

    def _heldout(self) -> Heldout | None:
        h = self.config.heldout
        measure = self.stage.measure() if h.every and self.processes.first else None
        return None if measure is None else Heldout(h, measure, self.run)


def noise_seed(seed: int, step: int, place: int) -> int:
    """Seed of the noise of one micro-batch, a function of where it is in the run and of nothing else."""
    return int(np.random.SeedSequence((seed, step, place)).generate_state(1, np.uint64)[0]) >> 1  # NumPy 1 cannot
