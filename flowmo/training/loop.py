"""The training loop that all stages share: any device, one process or many, and the same command again resumes."""

from __future__ import annotations

import contextlib
import logging
import math
import resource
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import flowmo_kernels
from flowmo.autoencoder import FlowMo
from flowmo.config import Config, ConfigError, from_yaml, to_yaml
from flowmo.data import make_grid, save_png
from flowmo.files import atomic_write
from flowmo.training import checkpoint, distributed
from flowmo.training.flops import peak_flops, step_flops
from flowmo.training.heldout import Heldout, heldout_images
from flowmo.training.log import RunLog
from flowmo.training.optim import learning_rate
from flowmo.training.posttrain import Posttrain
from flowmo.training.precision import fast_math, resolve_device, resolve_precision
from flowmo.training.pretrain import Pretrain
from flowmo.training.sharding import exchange_gradients, fill_, flatten, full, load_shards_
from flowmo.training.stage import Stage

__all__ = ["FREE_KEYS", "STAGES", "Trainer", "fast_math", "resolve_device", "resolve_precision"]

logger = logging.getLogger("flowmo")

STAGES: dict[str, type[Stage]] = {stage.name: stage for stage in (Pretrain, Posttrain)}

# What may differ between a run's saved configuration and the command that resumes it.
FREE_KEYS = (
    *(f"trainer.{k}" for k in ("steps", "minutes", "log_every", "sample_every", "sample_images", "save_every")),
    *(f"trainer.{k}" for k in ("keep", "keep_every", "device", "threads", "compile", "gradient_checkpointing")),
    *(f"trainer.{k}" for k in ("accumulate", "parallel", "max_skipped", "profile", "wandb")),
    *(f"sampler.{k}" for k in ("steps", "rho", "guidance", "guidance_interval")),
    *("data.workers", "data.max_failed", "data.index", "checkpoint", "heldout.patience", "run"),
)

IMAGENET = 1_281_167  # training pictures of ImageNet-1K, in which the published lengths are counted


class Trainer:
    """Trains one configuration in its run folder.

    RUN/config.yaml is the resolved configuration, RUN/checkpoints the full state, RUN/model the averaged weights
    as a model folder, RUN/samples the grids, RUN/metrics.jsonl and RUN/tensorboard the numbers, RUN/best and
    RUN/heldout.jsonl the best measured model and the curve of measurements, where held-out pictures are measured.

    Under torchrun every process makes one; they train as one on batches that together have `data.batch` pictures,
    and the first writes. Micro-batch j of process r draws its noise from (seed, step, j world + r) and takes the
    pictures at that place of the batch, so two processes do what one does with twice the micro-batches.

    Args:
        config: a checked configuration.
        samples: pictures [N, 3, H, W] in [-1, 1] for the sample grids, sides multiples of the image size; None
            takes them from a batch of the training data that training itself does not see again.

    Raises:
        ConfigError: no data named, a batch that does not divide among the processes, or the run folder holds a run of
            another configuration.
    """

    def __init__(self, config: Config, samples: Tensor | None = None) -> None:
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
        self.device = resolve_device(t.device)
        if self.device.type == "cuda" and self.device.index is None and world > 1:
            self.device = torch.device("cuda", self.processes.local_rank)
            torch.cuda.set_device(self.device)
        if t.threads:
            torch.set_num_threads(t.threads)
        self.precision = distributed.from_first(resolve_precision(t.precision, self.device))
        if config.data.path is None:
            raise ConfigError(
                "data.path is not set: name a folder of images, a tar archive, or data.path=samples for built-in ones"
            )
        if self.processes.first:
            self._claim_run()
        distributed.barrier()

        torch.manual_seed(t.seed)
        self.stage = STAGES[config.stage](config, self.device)
        if config.init is not None and not checkpoint.list_checkpoints(self.run):
            self.stage.start_from(config.init)
        self.sharded = t.parallel == "fsdp" and world > 1
        if self.sharded:
            self.stage.shard()
        self.optimizer = self.stage.optimizer()
        self.generator = torch.Generator(self.device)
        self.data = self.stage.batches(self.processes)
        self.heldout = self._heldout()
        self.samples = samples
        self.step = 0
        self.seconds = 0.0  # of training, over all sessions of the run
        self.first_flow: float | None = None  # mean of the first 20 steps
        self.skipped = 0  # steps whose loss or gradient was not finite
        self._skipped_in_row = 0
        self._clock = 0.0  # this process's own seconds
        self._stop = False
        self._exhausted = False
        self._wrap()

    @property
    def model(self) -> FlowMo:
        return self.stage.model

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

        A step whose loss or gradient is not finite changes no weight; too many in a row end the run.

        Raises:
            FloatingPointError: `trainer.max_skipped` such steps in a row; their last batch is in RUN/nonfinite.
        """
        c = self.config
        accumulate, (rank, world, _) = c.trainer.accumulate, self.processes
        began = time.perf_counter()
        if self.stage.update(self.step):
            self._wrap()
        parts: list[dict[str, Tensor]] = []
        batches: list[Tensor] = []
        for micro in range(accumulate):
            images = next(self.data)
            self.generator.manual_seed(noise_seed(c.trainer.seed, self.step, micro * world + rank))
            exchange = world == 1 or micro == accumulate - 1
            with self._exchange(exchange):
                with fast_math(self.precision, self.device, c.model.grid**2 + c.model.latent_tokens):
                    losses = self._parallel(images, self.generator)
                    (losses["total"] / accumulate).backward()
            parts.append({k: v.detach() for k, v in losses.items()})
            batches.append(images)
        means = {k: torch.stack([p[k].float() for p in parts]).mean() for k in parts[0]}
        gradients = [p.grad for p in self.stage.trained.values() if p.grad is not None]
        means["gradient_norm"] = full(torch.nn.utils.get_total_norm(gradients))
        # The one wait for the device in a step: whether to take it must be known before the weights change.
        bad = not math.isfinite(float(means["total"] + means["gradient_norm"]))
        if world > 1:
            any_bad, stop, self.seconds = distributed.largest([bad, self._stop, self._clock])
            bad, self._stop = bool(any_bad), bool(stop)
        if bad:
            self._skip(batches, means)
        else:
            self._skipped_in_row = 0
            self.optimizer.step(learning_rate(c.optim, self.step, self.progress))
        self.step += 1
        self._clock += time.perf_counter() - began
        if world == 1:
            self.seconds = self._clock
        return means

    def _skip(self, batches: list[Tensor], means: dict[str, Tensor]) -> None:
        for parameter in self.stage.trained.values():
            parameter.grad = None
        self.skipped += 1
        self._skipped_in_row += 1
        if self.processes.first:
            logger.warning(
                "step %d skipped: the loss is %g and the gradient's norm %g (%d in a row)",
                self.step + 1, float(means["total"]), float(means["gradient_norm"]), self._skipped_in_row,
            )  # fmt: skip
        if self._skipped_in_row >= self.config.trainer.max_skipped:
            folder = self.run / "nonfinite"
            folder.mkdir(exist_ok=True)
            path = folder / f"step_{self.step + 1:08d}_rank_{self.processes.rank}.pt"
            losses = {k: float(v) for k, v in means.items()}
            saved = {"step": self.step, "images": [b.cpu() for b in batches], "losses": losses}
            atomic_write(path, lambda name: torch.save(saved, name))
            raise FloatingPointError(
                f"{self._skipped_in_row} steps in a row, up to step {self.step + 1}, had a loss or gradient that is "
                f"not finite; the last batch is in {path}. The checkpoints are whole: look at the batch, or lower "
                "optim.lr in another run="
            )

    # The run.

    def fit(self) -> None:
        """Train to the end, resuming where the run folder left off; SIGINT and SIGTERM save and return early."""
        t = self.config.trainer
        if self.resume():
            self._say("resumed %s at step %d", self.run, self.step)
        if self.finished:
            self._say("%s is finished at step %d; raise trainer.steps or name another run=", self.run, self.step)
            return
        if self.samples is None:
            self.samples = self._pick_samples()
        log = RunLog(self.run, t.steps, self.step, self.config) if self.processes.first else None
        if log:
            log.note(self.describe())
        if self.step == 0 and self.heldout_due:
            self._measure(log)  # what training starts from, which it has to beat
        window: list[dict[str, Tensor]] = []
        started = time.perf_counter()
        saved_at = self.step
        with self._signals(), self._profiler() as profiled:
            while not self.finished and not self._stop:
                window.append(self.train_step())
                profiled()
                if log:
                    log.bar.update()
                if self.first_flow is None and self.step == 20:
                    self.first_flow = float(torch.stack([w["flow"] for w in window]).mean())
                if self.step % t.log_every == 0 or self.finished:
                    self._report(log, window, time.perf_counter() - started)
                    window, started = [], time.perf_counter()
                if self.step % t.sample_every == 0:
                    self._sample(log)
                if self.heldout_due:
                    self._measure(log)
                if self.step % t.save_every == 0 or self._exhausted:
                    self.save()
                    saved_at = self.step
        if self.step != saved_at:
            self.save()
        if self.finished:
            self._sample(log)
        if log:
            if not self.finished:
                log.note(f"stopped at step {self.step}; the same command goes on from there")
            log.close()
        distributed.barrier()  # none leaves while the first still writes

    @property
    def finished(self) -> bool:
        return self.progress >= 1.0 or self._exhausted

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
                f"{c.model.tokens} tokens of {c.model.entropy_bits} bits, {c.model.bits_per_pixel:.4f} bits per pixel",
                f"length: {length}",
                f"data: {self.data.describe()}",
                f"device {self.device}, {self.processes.world} processes x {c.trainer.accumulate} micro-batches of "
                f"{micro}, precision {self.precision}, {flowmo_kernels.describe()}, {self.stage.describe()}",
            ]
        )

    def averaged(self) -> FlowMo:
        """The model with the averaged weights, in evaluation mode; under FSDP all processes call this."""
        return self.stage.averaged(self.optimizer.average)

    def state_dict(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "seconds": self.seconds,
            "first_flow": self.first_flow,
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
        t, first = self.config.trainer, self.processes.first
        path = checkpoint.path_of(self.run, self.step)
        if self.sharded:
            path = checkpoint.save_sharded(self.run, self.step, self.state_dict(), t.keep, t.keep_every, first)
        elif first:
            checkpoint.save(self.run, self.step, self.state_dict(), t.keep, t.keep_every)
        if first or self.sharded:
            model = self.averaged()
            if first:
                model.save_pretrained(self.run / "model")
        return path

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
        self.step, self.seconds, self.first_flow = state["step"], state["seconds"], state["first_flow"]
        self._clock = self.seconds
        self.skipped, self._skipped_in_row = state.get("skipped", (0, 0))
        if self.heldout and state.get("heldout"):
            self.heldout.load_state_dict(state["heldout"])
            patience = self.config.heldout.patience
            self._exhausted = bool(state["exhausted"]) and 0 < patience <= state["heldout"]["worse"]
        self._wrap()
        return True

    def _say(self, text: str, *values: object) -> None:
        if self.processes.first:
            logger.info(text, *values)

    def _claim_run(self) -> None:
        """Write config.yaml, or check that the one there is this run's."""
        path = self.run / "config.yaml"
        if path.exists():
            mine, saved = _flat(self.config), _flat(from_yaml(path.read_text()))
            changed = [k for k in mine if k not in FREE_KEYS and mine[k] != saved.get(k)]
            if changed and checkpoint.list_checkpoints(self.run):
                pairs = ", ".join(f"{k}={saved.get(k)} there and {mine[k]} here" for k in changed[:4])
                raise ConfigError(
                    f"run={self.run} holds another run ({pairs}); name another run= or repeat its settings"
                )
        self.run.mkdir(parents=True, exist_ok=True)
        atomic_write(path, lambda name: Path(name).write_text(to_yaml(self.config)))

    def _pick_samples(self) -> Tensor:
        """The first pictures of the data, without moving its position."""
        position = self.data.state_dict()
        images = next(self.data)[: self.config.trainer.sample_images].clone()
        self.data.load_state_dict(position)
        return images

    # Held-out pictures.

    def _heldout(self) -> Heldout | None:
        h, c = self.config.heldout, self.config
        path = h.path or ("samples" if c.data.path == "samples" else None)
        if not h.every:
            return None
        if path is None:
            self._say("heldout.path is not set: nothing is measured, and training does not stop early")
            return None
        images = heldout_images(path, c.model.image_size, h.images) if self.processes.first else torch.empty(0)
        return Heldout(h, self.stage, images, self.run) if self.processes.first else None

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

    def _report(self, log: RunLog | None, window: list[dict[str, Tensor]], elapsed: float) -> None:
        values = {k: float(torch.stack([w[k] for w in window]).mean()) for k in window[0]}
        values = distributed.mean(values)
        values["loss"] = values.pop("total")
        c = self.config
        values["lr"] = learning_rate(c.optim, self.step, self.progress)
        weights = [p.detach() for p in self.stage.trained.values()]
        values["parameter_norm"] = float(full(torch.nn.utils.get_total_norm(weights)))
        counts = self.stage.code_counts
        if counts is not None:
            values |= code_statistics(distributed.sum_(counts))
            counts.zero_()
        values["skipped_steps"] = float(self.skipped)
        values["images_per_second"] = len(window) * c.data.batch / elapsed
        values["seconds_per_step"] = elapsed / len(window)
        values["peak_memory_gib"] = peak_memory(self.device)
        if self.device.type == "cuda":
            peak = peak_flops(torch.cuda.get_device_name(self.device))
            if peak is not None:
                flops = step_flops(c, bool(getattr(self.stage, "frozen", False)))
                values["mfu"] = flops * len(window) / elapsed / (peak * self.processes.world)
                left = (1 - self.progress) * c.trainer.steps * elapsed / len(window)
                values["days_left"] = left / 86_400
        if log:
            log.metrics(self.step, values)

    def _sample(self, log: RunLog | None) -> None:
        """A grid, original above reconstruction, of the averaged model."""
        model = self.averaged() if log or self.sharded else None
        if log is None or model is None:
            return
        assert self.samples is not None
        pictures = self.stage.pictures(model, self.samples)
        grid = make_grid([self.samples.cpu(), pictures.cpu()], ["original", "reconstruction"])
        save_png(grid, self.run / "samples" / f"step_{self.step:08d}.png")
        log.picture(self.step, "samples", grid)

    @contextlib.contextmanager
    def _profiler(self) -> Iterator[Callable[[], object]]:
        """With trainer.profile=1, RUN/profile/trace.json and operators.txt of three steps after three of warm-up."""
        if not self.config.trainer.profile or not self.processes.first:
            yield lambda: None
            return
        folder = self.run / "profile"

        def write(profile: torch.profiler.profile) -> None:
            folder.mkdir(exist_ok=True)
            profile.export_chrome_trace(str(folder / "trace.json"))
            sort = "cuda_time_total" if self.device.type == "cuda" else "cpu_time_total"
            (folder / "operators.txt").write_text(profile.key_averages().table(sort_by=sort, row_limit=40) + "\n")

        schedule = torch.profiler.schedule(wait=2, warmup=1, active=3, repeat=1)
        with torch.profiler.profile(schedule=schedule, on_trace_ready=write) as profile:
            yield profile.step

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGINT and SIGTERM ask the loop to finish its step and save."""

        def ask(number: int, frame: object) -> None:
            self._stop = True

        before: dict[int, Callable[..., Any] | int | None] = {}
        try:
            for number in (signal.SIGINT, signal.SIGTERM):
                before[number] = signal.signal(number, ask)
        except ValueError:  # not the main thread: whoever runs us handles the signals
            pass
        try:
            yield
        finally:
            for restored, handler in before.items():
                signal.signal(restored, handler)


def noise_seed(seed: int, step: int, place: int) -> int:
    """Seed of the noise of one micro-batch, a function of where it is in the run and of nothing else."""
    return int(np.random.SeedSequence((seed, step, place)).generate_state(1, np.uint64)[0] >> 1)


def code_statistics(counts: Tensor) -> dict[str, float]:
    """Of token counts [2^bits]: the share of codes seen at all, and the perplexity as a share of all codes."""
    p = counts.double() / counts.sum().clamp_min(1)
    entropy = -(p * p.clamp_min(1e-300).log()).sum()
    return {"code_usage": float((counts > 0).double().mean()), "code_perplexity": float(entropy.exp()) / len(counts)}


def peak_memory(device: torch.device) -> float:
    """Most memory in use so far, in GiB: allocated on the card, or resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _flat(config: Config) -> dict[str, Any]:
    """Dotted keys to values, as YAML reads them back."""
    from omegaconf import OmegaConf

    def walk(node: Any, prefix: str) -> Iterator[tuple[str, Any]]:
        for key, value in node.items():
            if isinstance(value, dict):
                yield from walk(value, f"{prefix}{key}.")
            else:
                yield f"{prefix}{key}", value

    return dict(walk(OmegaConf.to_container(OmegaConf.create(to_yaml(config))), ""))
