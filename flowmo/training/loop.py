"""The training loop: one process, any device, and the same command again resumes."""

from __future__ import annotations

import contextlib
import logging
import math
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import flowmo_kernels
from flowmo.autoencoder import FlowMo
from flowmo.config import Config, ConfigError, from_yaml, to_yaml
from flowmo.data import build_data, make_grid, save_png
from flowmo.files import atomic_write
from flowmo.perceptual import load_perceptual
from flowmo.tiles import reconstruct_tiled
from flowmo.training import checkpoint
from flowmo.training.log import RunLog
from flowmo.training.optim import AdamHoldEMA, learning_rate
from flowmo.training.pretrain import pretrain_loss

logger = logging.getLogger("flowmo")

# What may differ between a run's saved configuration and the command that resumes it.
FREE_KEYS = (
    *(f"trainer.{k}" for k in ("steps", "minutes", "log_every", "sample_every", "sample_images", "save_every")),
    *(f"trainer.{k}" for k in ("keep", "keep_every", "device", "threads", "compile", "gradient_checkpointing")),
    *(f"sampler.{k}" for k in ("steps", "rho", "guidance", "guidance_interval")),
    "data.workers",
    "run",
)


class Trainer:
    """Stage 1A training of one configuration in its run folder.

    RUN/config.yaml is the resolved configuration, RUN/checkpoints the full state, RUN/model the averaged weights
    as a model folder, RUN/samples the grids, RUN/metrics.jsonl and RUN/tensorboard the numbers.

    Args:
        config: a checked configuration.
        samples: pictures [N, 3, H, W] in [-1, 1] for the sample grids, sides multiples of the image size; None
            takes them from a batch of the training data that training itself does not see again.

    Raises:
        ConfigError: no data named, or the run folder holds a run of another configuration.
    """

    def __init__(self, config: Config, samples: Tensor | None = None) -> None:
        self.config = config
        t = config.trainer
        if config.data.path is None:
            raise ConfigError("data.path is not set: name a folder of images, or data.path=samples for built-in ones")
        self.run = Path(config.run)
        self.device = resolve_device(t.device)
        if t.threads:
            torch.set_num_threads(t.threads)
        self.precision = resolve_precision(t.precision, self.device)
        self._claim_run()

        torch.manual_seed(t.seed)
        self.model = FlowMo(config.model).to(self.device)
        for part in (self.model.encoder, self.model.decoder):
            part.gradient_checkpointing = t.gradient_checkpointing
            for parameter in part.unread_parameters():
                parameter.requires_grad_(False)
        named = {k: p for k, p in self.model.named_parameters() if p.requires_grad}
        self.optimizer = AdamHoldEMA(named, config.optim)
        self.perceptual: nn.Module | None = load_perceptual(
            config.loss.perceptual, weights=config.loss.perceptual_weights, heads=config.loss.perceptual_heads
        )
        if self.perceptual is not None:
            self.perceptual.to(self.device)
        self.generator = torch.Generator(self.device).manual_seed(t.seed)
        self.data = build_data(
            config.data.path,
            config.model.image_size,
            config.data.batch // t.accumulate,
            seed=t.seed,
            workers=config.data.workers,
            flip=config.data.flip,
            scales=config.data.scales,
            columns=config.data.columns,
            device=self.device,
        )
        self.samples = samples
        self.step = 0
        self.seconds = 0.0  # of training, over all sessions of the run
        self.first_flow: float | None = None  # mean of the first 20 steps
        self.loss = torch.compile(pretrain_loss) if t.compile else pretrain_loss
        self._stop = False

    # One step.

    @property
    def frozen(self) -> bool:
        freeze_at = self.config.optim.freeze_encoder_at
        return freeze_at is not None and self.step >= freeze_at

    @property
    def progress(self) -> float:
        """The part of the run that is done, by steps or by minutes, whichever is further."""
        t = self.config.trainer
        by_time = self.seconds / (60 * t.minutes) if t.minutes else 0.0
        return max(self.step / t.steps, by_time)

    def train_step(self) -> dict[str, Tensor]:
        """All micro-batches of one optimizer step; detached means of the losses."""
        c = self.config
        parts: list[dict[str, Tensor]] = []
        for _ in range(c.trainer.accumulate):
            images = next(self.data)
            with fast_math(self.precision, self.device, c.model.grid**2 + c.model.latent_tokens):
                losses = self.loss(
                    self.model, images, c.loss, c.noise, self.perceptual, self.generator, frozen_encoder=self.frozen
                )
                (losses["total"] / c.trainer.accumulate).backward()
            parts.append({k: v.detach() for k, v in losses.items()})
        self.optimizer.step(learning_rate(c.optim, self.step, self.progress))
        self.step += 1
        return {k: torch.stack([p[k].float() for p in parts]).mean() for k in parts[0]}

    # The run.

    def fit(self) -> None:
        """Train to the end, resuming where the run folder left off; SIGINT and SIGTERM save and return early."""
        t = self.config.trainer
        if self.resume():
            logger.info("resumed %s at step %d", self.run, self.step)
        if self.finished:
            logger.info(
                "%s is finished at step %d; raise trainer.steps or name another run= to go on", self.run, self.step
            )
            return
        if self.samples is None:
            self.samples = self._pick_samples()
        log = RunLog(self.run, t.steps, self.step)
        log.note(self.describe())
        window: list[dict[str, Tensor]] = []
        started = time.perf_counter()
        with self._signals():
            while not self.finished and not self._stop:
                before = time.perf_counter()
                window.append(self.train_step())
                self.seconds += time.perf_counter() - before
                log.bar.update()
                if self.first_flow is None and self.step == 20:
                    self.first_flow = float(torch.stack([w["flow"] for w in window]).mean())
                if self.step % t.log_every == 0 or self.finished:
                    elapsed = time.perf_counter() - started
                    self._report(log, window, elapsed)
                    window, started = [], time.perf_counter()
                if self.step % t.sample_every == 0:
                    self._sample(log)
                if self.step % t.save_every == 0:
                    self.save()
        if self.step % t.save_every:
            self.save()
        if self.finished:
            self._sample(log)
        else:
            log.note(f"stopped at step {self.step}; the same command goes on from there")
        log.close()

    @property
    def finished(self) -> bool:
        return self.progress >= 1.0

    def describe(self) -> str:
        """What runs, on what, with which kernels."""
        c = self.config
        parameters = sum(p.numel() for p in self.model.parameters())
        return "\n".join(
            [
                f"run {self.run}: preset {c.preset}, {parameters:,} parameters, {c.model.tokens} tokens of "
                f"{c.model.entropy_bits} bits, {c.model.bits_per_pixel:.4f} bits per pixel",
                f"data: {self.data.describe()}",
                f"device {self.device}, precision {self.precision}, {flowmo_kernels.describe()}, "
                f"perceptual loss: {c.loss.perceptual}",
            ]
        )

    def averaged(self) -> FlowMo:
        """A copy of the model with the averaged weights, in evaluation mode."""
        model = FlowMo(self.config.model).to(self.device)
        model.load_state_dict({**self.model.state_dict(), **self.optimizer.average})
        return model.eval()

    def state_dict(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "seconds": self.seconds,
            "first_flow": self.first_flow,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "data": self.data.state_dict(),
            "config": to_yaml(self.config),
        }

    def save(self) -> Path:
        """Write the checkpoint of this step and the averaged model."""
        t = self.config.trainer
        path = checkpoint.save(self.run, self.step, self.state_dict(), t.keep, t.keep_every)
        self.averaged().save_pretrained(self.run / "model")
        return path

    def resume(self) -> bool:
        """Load the newest checkpoint of the run folder; False where there is none."""
        state = checkpoint.load_newest(self.run)
        if state is None:
            return False
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"])
        self.data.load_state_dict(state["data"])
        self.step, self.seconds, self.first_flow = state["step"], state["seconds"], state["first_flow"]
        return True

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

    def _report(self, log: RunLog, window: list[dict[str, Tensor]], elapsed: float) -> None:
        values = {k: float(torch.stack([w[k] for w in window]).mean()) for k in window[0]}
        values["loss"] = values.pop("total")
        if not math.isfinite(values["loss"]):
            raise FloatingPointError(
                f"the loss is {values['loss']} at step {self.step}; the last checkpoint is whole: "
                "lower optim.lr in another run="
            )
        values["lr"] = learning_rate(self.config.optim, self.step, self.progress)
        values["images_per_second"] = len(window) * self.config.data.batch / elapsed
        log.metrics(self.step, values)

    def _sample(self, log: RunLog) -> None:
        """A grid, original above reconstruction, of the averaged model."""
        assert self.samples is not None
        s = self.config.sampler
        pictures = reconstruct_tiled(
            self.averaged(),
            self.samples.to(self.device),
            steps=s.steps,
            rho=s.rho,
            guidance=s.guidance,
            guidance_interval=s.guidance_interval,
            generator=torch.Generator().manual_seed(self.config.trainer.seed),
        )
        grid = make_grid([self.samples.cpu(), pictures.cpu()], ["original", "reconstruction"])
        save_png(grid, self.run / "samples" / f"step_{self.step:08d}.png")
        log.picture(self.step, "samples", grid)

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


def resolve_device(name: str) -> torch.device:
    """auto: the first CUDA device, or the CPU.

    Raises:
        ConfigError: a CUDA device is asked for and there is none.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"trainer.device={name}: this PyTorch sees no CUDA device; use trainer.device=cpu")
    return device


def resolve_precision(name: str, device: torch.device) -> str:
    """auto: bf16 autocast on CUDA; on the CPU bf16 matrix products where they measure faster, else fp32."""
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16"
    a, w = torch.randn(1024, 256), torch.randn(1024, 256)

    def seconds(precision: str) -> float:
        with matmul_precision(precision):
            times = []
            for _ in range(7):
                start = time.perf_counter()
                torch.nn.functional.linear(a, w)
                times.append(time.perf_counter() - start)
        return min(times)

    return "bf16_matmul" if 1.3 * seconds("medium") < seconds("highest") else "fp32"


@contextlib.contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextlib.contextmanager
def fast_math(precision: str, device: torch.device, length: int) -> Iterator[None]:
    """The arithmetic of a training step: bf16 autocast, bf16 matrix products under fp32 tensors, or plain fp32."""
    if precision == "bf16":
        with torch.autocast(device.type, torch.bfloat16):
            yield
    elif precision == "bf16_matmul":
        # PyTorch's fused CPU attention is slower with bf16 products than plain matrix products are (4x at the
        # quickstart's sizes); for long sequences it is still taken, for its memory.
        attention = sdpa_kernel(SDPBackend.MATH) if length <= 1024 else contextlib.nullcontext()
        with matmul_precision("medium"), attention:
            yield
    else:
        yield


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
