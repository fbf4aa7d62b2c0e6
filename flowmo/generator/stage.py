"""Stage 2 training: masks, loss, optimizer groups, schedule, and a plain loop (paper, section 4.3).

The paper gives learning rate 1e-4, batch 128 and 300 epochs; the rest is TiTok's published recipe.

Shapes: B pictures, N tokens of a picture, V codes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowmo.config import ConfigError
from flowmo.data.tokens import TokenCache, TokenCacheError
from flowmo.generator.network import Generator, NetworkConfig
from flowmo.generator.sampler import TokenSamplerConfig
from flowmo_kernels import ema_

NO_DECAY = ("norm", "embedding", "bias", "scale", "shift")  # parts of parameter names


@dataclass
class MaskLossConfig:
    """Cross-entropy over masked and, with less weight, known tokens."""

    label_smoothing: float = 0.1
    unmasked_weight: float = 0.1  # of the loss at tokens that are not masked; 0 leaves them out
    class_dropout: float = 0.1  # part of the labels replaced by the null class


@dataclass
class GeneratorOptimConfig:
    """AdamW. The average's horizon is that of TiTok's 0.999 at its sixteen times larger batch."""

    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.96)
    eps: float = 1e-8
    weight_decay: float = 0.03  # not of norms, biases, embeddings and positions
    clip: float = 1.0  # of the gradient's norm
    schedule: str = "cosine"  # cosine (to lr_end over the run) | constant
    warmup: int = 10_000  # steps
    lr_end: float = 1e-5
    ema_decay: float = 0.9999


@dataclass
class GeneratorConfig:
    """Everything that Stage 2 is told; the defaults are for FlowMo-Lo on ImageNet at 256 x 256."""

    network: NetworkConfig = field(default_factory=NetworkConfig)
    loss: MaskLossConfig = field(default_factory=MaskLossConfig)
    optim: GeneratorOptimConfig = field(default_factory=GeneratorOptimConfig)
    sampler: TokenSamplerConfig = field(default_factory=TokenSamplerConfig)
    batch: int = 128
    steps: int = 3_002_735  # 300 epochs of 1,281,167 pictures
    seed: int = 0

    def check(self) -> None:
        """Raises ConfigError where a value is outside what the code knows."""
        self.network.check()
        self.sampler.check()
        if self.optim.schedule not in ("cosine", "constant"):
            raise ConfigError(f"optim.schedule={self.optim.schedule!r}: expected cosine or constant")
        for name, value in (
            ("loss.label_smoothing", self.loss.label_smoothing),
            ("loss.unmasked_weight", self.loss.unmasked_weight),
            ("loss.class_dropout", self.loss.class_dropout),
        ):
            if not 0.0 <= value <= 1.0:
                raise ConfigError(f"{name}={value}: expected a number from 0 to 1")
        if self.batch < 1 or self.steps < 1:
            raise ConfigError(f"batch={self.batch}, steps={self.steps}: expected at least 1")


def build_generator(cache: TokenCache, network: NetworkConfig) -> Generator:
    """A fresh generator for the tokens of a cache; it remembers their layout and the names of the classes.

    Raises:
        TokenCacheError: the sizes are not those of the cache.
    """
    with torch.device("meta"):
        check_tokens(Generator(network), cache)
    return Generator(network, cache.header.layout, cache.header.classes)


def check_tokens(model: Generator, cache: TokenCache) -> None:
    """Raises TokenCacheError where a cache holds other tokens than a generator has learned or was made for."""
    n, layout = model.config, cache.header.layout
    wrong = model.layout.differences(layout) if model.layout else []
    if (n.tokens, n.bits) != (layout.tokens, layout.bits):
        wrong.append(f"size: {n.tokens} tokens of {n.bits} bits and {layout.tokens} of {layout.bits}")
    classes = max(len(cache.header.classes), int(cache.labels.max()) + 1)
    if classes > n.classes:
        wrong.append(f"classes: {n.classes} and {classes}")
    if model.class_names and model.class_names != cache.header.classes:
        wrong.append("class names")
    if wrong:
        raise TokenCacheError(
            f"{cache.folder}: not the tokens of this generator (generator and cache: {'; '.join(wrong)}); give its "
            "sizes to the network, or tokenize the data with the tokenizer that it was trained with"
        )


def random_masks(
    batch: int,
    tokens: int,
    generator: torch.Generator | None = None,
    device: torch.device | str = "cpu",
) -> Tensor:  # [batch, tokens] bool, True where masked
    """Masks of exactly round(N g) tokens and at least one, g = (2 / pi) arccos(u) with u uniform, drawn per picture."""
    u = torch.rand(batch, generator=generator, device=device)
    ratio = 2 / math.pi * torch.arccos(u)
    count = (ratio * tokens).round().clamp_(min=1)
    permutation = torch.rand(batch, tokens, generator=generator, device=device).argsort(dim=1)
    return permutation < count[:, None]


def generator_loss(
    model: Generator,
    tokens: Tensor,  # [B, N] int64
    labels: Tensor,  # [B] int64
    config: MaskLossConfig | GeneratorConfig,
    generator: torch.Generator | None = None,
) -> dict[str, Tensor]:
    """Loss of one batch: smoothed cross-entropy, weighted sum over sum of weights.

    Returns:
        "total", the loss; and without gradient "masked", the unsmoothed cross-entropy at masked tokens in nats,
        "accuracy" there, and "ratio", the part that is masked.
    """
    c = config.loss if isinstance(config, GeneratorConfig) else config
    network = model.config
    batch, length = tokens.shape
    masked = random_masks(batch, length, generator, tokens.device)
    dropped = torch.rand(labels.shape, generator=generator, device=labels.device) < c.class_dropout
    logits = model(tokens.masked_fill(masked, network.mask_id), labels.masked_fill(dropped, network.null_class))
    flat = logits.flatten(0, 1), tokens.flatten()
    losses = F.cross_entropy(*flat, label_smoothing=c.label_smoothing, reduction="none").view_as(tokens)
    weights = torch.where(masked, 1.0, c.unmasked_weight)
    total = (weights * losses).sum() / weights.sum()
    with torch.no_grad():
        count = masked.sum()
        plain = F.cross_entropy(*flat, reduction="none").view_as(tokens)
        right = (logits.argmax(-1) == tokens) & masked
        return {
            "total": total,
            "masked": (plain * masked).sum() / count,
            "accuracy": right.sum() / count,
            "ratio": count / masked.numel(),
        }


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Parameter groups for AdamW: matrices decay; norms, biases, embeddings and positions do not."""
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        exempt = parameter.ndim < 2 or any(part in name for part in NO_DECAY)
        (plain if exempt else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]


def build_optimizer(model: nn.Module, config: GeneratorOptimConfig) -> torch.optim.AdamW:
    groups = parameter_groups(model, config.weight_decay)
    fused = next(model.parameters()).is_cuda
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=fused)


def learning_rate(config: GeneratorOptimConfig, step: int, steps: int) -> float:
    """Rate of the step after `step` of `steps`: linear warm-up, then a cosine to `lr_end`, or constant."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    if config.schedule == "constant":
        return config.lr
    part = min(1.0, (step - config.warmup) / max(1, steps - config.warmup))
    return config.lr_end + (config.lr - config.lr_end) * 0.5 * (1 + math.cos(math.pi * part))


def ema_decay(config: GeneratorOptimConfig, step: int) -> float:
    """Decay of the average after `step` steps: young averages forget the initial weights faster."""
    return min(config.ema_decay, (1 + step) / (10 + step))


def fit(
    model: Generator,
    batches: Iterator[tuple[Tensor, Tensor]],
    config: GeneratorConfig,
    *,
    report: Callable[[int, dict[str, float]], None] | None = None,
    report_every: int = 100,
) -> dict[str, Tensor]:
    """Train in place for `config.steps` steps: one process, in memory, nothing saved.

    Args:
        batches: of (tokens [B, N], labels [B]) on the device of the model.
        report: called every `report_every` steps with the means of the losses since.

    Returns:
        The averaged weights, a state dict.

    Raises:
        FloatingPointError: the loss is not finite.
    """
    config.check()
    optimizer = build_optimizer(model, config.optim)
    source = torch.Generator(model.device).manual_seed(config.seed)
    weights = {k: p.detach() for k, p in model.named_parameters()}
    average = {k: p.clone() for k, p in weights.items()}
    window: list[dict[str, Tensor]] = []
    model.train()
    for step in range(config.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config.optim, step, config.steps)
        losses = generator_loss(model, *next(batches), config, source)
        optimizer.zero_grad()
        losses["total"].backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.optim.clip)
        optimizer.step()
        ema_(list(average.values()), list(weights.values()), ema_decay(config.optim, step))
        window.append({k: v.detach() for k, v in losses.items()})
        if (step + 1) % report_every == 0 or step + 1 == config.steps:
            means = {k: float(torch.stack([w[k] for w in window]).mean()) for k in window[0]}
            if not math.isfinite(means["total"]):
                raise FloatingPointError(f"the loss is {means['total']} at step {step + 1}; lower optim.lr")
            if report is not None:
                report(step + 1, means)
            window = []
    model.eval()
    return average
