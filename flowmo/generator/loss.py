"""What Stage 2 learns from: random masks and a smoothed cross-entropy (paper, section 4.3; TiTok's published recipe).

Shapes: B pictures, N tokens of a picture, V codes.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from flowmo.generator.network import Generator
from flowmo.generator_config import MaskLossConfig
from flowmo.tracing import untraced


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


@untraced
def draw(
    batch: int, tokens: int, config: MaskLossConfig, generator: torch.Generator | None, device: torch.device
) -> tuple[Tensor, Tensor]:  # [B, N] and [B] bool
    """Which tokens are masked, and whose class is dropped."""
    masked = random_masks(batch, tokens, generator, device)
    return masked, torch.rand(batch, generator=generator, device=device) < config.class_dropout


def generator_loss(
    model: Generator,
    tokens: Tensor,  # [B, N] int64
    labels: Tensor,  # [B] int64
    config: MaskLossConfig,
    generator: torch.Generator | None = None,
) -> dict[str, Tensor]:
    """Loss of one batch: smoothed cross-entropy, weighted sum over sum of weights.

    The weights are those of this batch. Of several micro-batches or processes the mean is trained on, as in TiTok's
    released implementation: pictures beside which little is masked count a bit more than over one large batch.

    Returns:
        "total", the loss; and without gradient "masked", the unsmoothed cross-entropy at masked tokens in nats,
        "accuracy" there, and "ratio", the part that is masked.
    """
    network = model.config
    masked, dropped = draw(tokens.shape[0], tokens.shape[1], config, generator, tokens.device)
    logits = model(tokens.masked_fill(masked, network.mask_id), labels.masked_fill(dropped, network.null_class))
    flat = logits.flatten(0, 1), tokens.flatten()
    losses = F.cross_entropy(*flat, label_smoothing=config.label_smoothing, reduction="none").view_as(tokens)
    weights = torch.where(masked, 1.0, config.unmasked_weight)
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
