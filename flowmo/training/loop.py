"""The training loop that all stages share: any device, one process or many, and the same command again resumes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flowmo import cli
from flowmo.config import Config
from flowmo.data import save_png
from flowmo.generator.stage import MaskGIT
from flowmo.training import distributed, session
from flowmo.training.distill import Distill
from flowmo.training.flops import peak_flops
from flowmo.training.log import RunLog
from flowmo.training.posttrain import Posttrain
from flowmo.training.precision import fast_math, resolve_device, resolve_precision
from flowmo.training.pretrain import Pretrain
from flowmo.training.sharding import full
from flowmo.training.stage import Stage
from flowmo.training.state import TrainState, noise_seed

__all__ = ["STAGES", "Trainer", "fast_math", "noise_seed", "resolve_device", "resolve_precision"]

STAGES: dict[str, type[Stage]] = {stage.name: stage for stage in (Pretrain, Posttrain, Distill, MaskGIT)}

IMAGENET = 1_281_167  # training pictures of ImageNet-1K, in which the published lengths are counted


class Trainer(TrainState):
    """Trains one configuration in its run folder.

    RUN/config.yaml is the resolved configuration, RUN/checkpoints the full state, RUN/model the averaged weights
    as a model folder, RUN/samples the grids, RUN/metrics.jsonl and RUN/tensorboard the numbers, RUN/best and
    RUN/heldout.jsonl the best measured model and the curve of measurements, where held-out data are measured.

    Args:
        config: a checked configuration.
        samples: what the stage's sample grids show, for pictures [N, 3, H, W] in [-1, 1] with sides multiples of the
            image size; None lets the stage choose.

    Raises:
        ConfigError: as TrainState raises it.
    """

    def __init__(self, config: Config, samples: Any = None) -> None:
        super().__init__(config, STAGES[config.stage])
        self.samples = samples

    # The run.

    def fit(self) -> None:
        """Train to the end, resuming where the run folder left off; SIGINT and SIGTERM save and return early."""
        t = self.config.trainer
        if self.resume():
            self._say("resumed %s at step %d", self.run, self.step)
        if self.finished:
            limit = "trainer.steps" if self.step >= t.steps else "trainer.minutes"
            limit = "heldout.patience" if self._exhausted else limit
            self._say("%s is finished at step %d; raise %s or name another run=", self.run, self.step, limit)
            self.save_model()  # it died perhaps after its last checkpoint, and before this
            distributed.barrier()
            return
        if self.samples is None:
            self.samples = self.stage.samples(self.data)
        log = None
        if self.processes.first:
            log = RunLog(self.run, t.steps, self.step, self.config, self.stage.shown)
        if log:
            log.note(self.describe())
        if self.step == 0 and self.heldout_due:
            self._measure(log)  # what training starts from, which it has to beat
        window: list[dict[str, Tensor]] = []
        step_seconds: list[float] | None = [] if self.device.type == "cuda" else None  # nothing is guessed on a CPU
        started = time.perf_counter()
        saved_at = self.step
        profile = self.run / "profile" if t.profile and self.processes.first else None
        with session.signals(self._ask_to_stop), session.profiler(profile) as profiled:
            while not self.finished and not self.stopping:
                before = self._clock
                window.append(self.train_step())
                profiled()
                if log:
                    log.bar.update()
                if step_seconds is not None:
                    step_seconds.append(self._clock - before)
                if self.step % t.log_every == 0 or self.finished:
                    self._report(log, window, started)
                    if log and step_seconds:
                        left = None if t.minutes is None else 60 * t.minutes - self.seconds
                        log.note(session.length_note(step_seconds, t.steps - self.step, left))
                    step_seconds = None
                    window, started = [], time.perf_counter()
                if self.step % t.sample_every == 0:
                    self._sample(log)
                if self.heldout_due:
                    self._measure(log)
                if self.step % t.save_every == 0 or self._exhausted:
                    self.save()
                    saved_at = self.step
            if self.step != saved_at:
                self.save()  # whoever has asked it to stop may ask again meanwhile
        if self.finished and self.step % t.sample_every:
            self._sample(log)
        if log:
            if not self.finished:
                log.note(f"stopped at step {self.step}; the same command goes on from there")
            log.close()
        distributed.barrier()  # none leaves while the first still writes

    def describe(self) -> str:
        """What runs, on what, with which kernels, and how long."""
        c = self.config
        parameters = sum(p.numel() for p in self.model.parameters())
        learning = sum(p.numel() for p in self.stage.trained.values())
        images = c.trainer.steps * c.data.batch
        length = f"{c.trainer.steps:,} steps of {c.data.batch} images, {images:,} images seen, "
        length += f"{images / IMAGENET:.2f} epochs of ImageNet-1K"
        if c.trainer.minutes:
            length += f", or {c.trainer.minutes:g} minutes if they end first"
        micro = c.data.batch // (c.trainer.accumulate * self.processes.world)
        return "\n".join(
            [
                f"run {self.run}: preset {c.preset}, stage {c.stage}, {parameters:,} parameters ({learning:,} learn), "
                f"{self.stage.describe_model()}",
                f"length: {length}",
                f"data: {self.data.describe()}",
                f"device {self.device}, {self.processes.world} processes x {c.trainer.accumulate} micro-batches of "
                f"{micro}, precision {self.precision}, {cli.kernels()}, {self.stage.describe()}",
            ]
        )

    def _ask_to_stop(self) -> None:
        self._stop = True

    # Held-out data.

    @property
    def heldout_due(self) -> bool:
        every = self.config.heldout.every
        return every > 0 and self.step % every == 0

    def _measure(self, log: RunLog | None) -> None:
        """Measure the averaged model in the first process, and have all agree on whether to stop."""
        model = self.averaged() if log or self.sharded else None
        if self.heldout and log and model is not None:
            h = self.heldout
            values = h.update(self.step, model)
            text = ", ".join(f"{k} {v:.4f}" for k, v in values.items())
            best = "the best so far" if h.worse == 0 else f"the best was at step {h.best_step}, {h.worse} ago"
            log.note(f"step {self.step}: held out: {text}; {best}")
            log.scalars(self.step, {f"heldout/{k}": v for k, v in values.items()})
            if h.exhausted:
                log.note(f"no better for {h.worse} measurements: training stops; {self.run / 'best'} is the best model")
        self._exhausted = distributed.from_first(bool(self.heldout and self.heldout.exhausted))

    # The log.

    def _report(self, log: RunLog | None, window: list[dict[str, Tensor]], started: float) -> None:
        self.settle()
        values = {k: _mean([w[k] for w in window]) for k in window[0]}
        elapsed = time.perf_counter() - started  # the device has done all of it by now
        values = distributed.mean(values)
        values["loss"] = values.pop("total")
        c = self.config
        values["lr"] = self.stage.learning_rate(self.step, self.progress)
        weights = [p.detach() for p in self.stage.trained.values()]
        values["parameter_norm"] = float(full(torch.nn.utils.get_total_norm(weights)))
        values |= self.stage.statistics()
        values["skipped_steps"] = float(self.skipped)
        values["images_per_second"] = len(window) * c.data.batch / elapsed
        values["seconds_per_step"] = elapsed / len(window)
        values["peak_memory_gib"] = session.peak_memory(self.device)
        if self.device.type == "cuda":
            flops, peak = self.stage.step_flops(), peak_flops(torch.cuda.get_device_name(self.device))
            if flops is not None and peak is not None:
                values["mfu"] = flops * len(window) / elapsed / (peak * self.processes.world)
            values["days_left"] = (c.trainer.steps - self.step) * elapsed / len(window) / 86_400
        if log:
            log.metrics(self.step, values)

    def _sample(self, log: RunLog | None) -> None:
        """The stage's picture of what the averaged model does, into RUN/samples."""
        model = self.averaged() if log or self.sharded else None
        if log is None or model is None:
            return
        grid = self.stage.grid(model, self.samples)
        if grid is None:
            return
        save_png(grid, self.run / "samples" / f"step_{self.step:08d}.png")
        log.picture(self.step, "samples", grid)


def _mean(numbers: Sequence[Tensor]) -> float:
    """Mean of the finite ones: those of a step that was skipped need not be."""
    found = torch.stack(list(numbers))
    return float(found[found.isfinite()].mean())
