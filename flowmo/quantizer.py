"""From the encoder's latent to codes, tokens and the losses that shape them (paper, section 3.2).

Shapes: B images, T latent tokens, C latent channels, d of them to a token, F = C / d tokens to a latent token. In every
discrete code, token t F + f takes the channels k F + f, k = 0 .. d - 1, of latent token t.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from flowmo.config import LossConfig, ModelConfig
from flowmo_kernels import codes_to_tokens, lfq, norm_modulate, tokens_to_codes

FSQ_MARGIN = 1e-3  # by which the bounded channel reaches beyond its outer levels, so that these can be reached
LOG_VARIANCE = (-30.0, 20.0)  # range that the encoder's log-variance is clamped to


class Quantized(NamedTuple):
    """A code, and what the loss takes of it; None where the quantizer has no such thing."""

    codes: Tensor  # [B, T, C]: +-1 (lfq), levels in [-1, 1] (fsq), gradients straight through; or real (kl, none)
    tokens: Tensor | None  # [B, T F] int64
    per_sample_entropy: Tensor | None = None  # lfq: nats, mean over tokens; scalar
    codebook_entropy: Tensor | None = None  # lfq: nats, of the batch's mean code distribution; scalar
    commitment: Tensor | None = None  # lfq: mean (x - q)^2; scalar
    kl: Tensor | None = None  # kl: nats, mean over the latent's numbers; scalar

    def losses(self) -> dict[str, Tensor]:
        """The terms by name, as they are logged."""
        terms = {
            "entropy_per_sample": self.per_sample_entropy,
            "entropy_codebook": self.codebook_entropy,
            "commitment": self.commitment,
            "kl": self.kl,
        }
        return {name: term for name, term in terms.items() if term is not None}

    def loss(self, weights: LossConfig) -> Tensor | float:
        """entropy (H_sample - H_codebook) + commitment, or kl, weighted; 0 without terms."""
        total: Tensor | float = 0.0
        if self.per_sample_entropy is not None and self.codebook_entropy is not None and self.commitment is not None:
            entropy = self.per_sample_entropy - self.codebook_entropy
            total = weights.entropy * entropy + weights.commitment * self.commitment
        return total if self.kl is None else total + weights.kl * self.kl


def quantize(
    latent: Tensor,  # [B, T, C], encoder output; [B, T, 2 C] for kl: means, then log-variances
    config: ModelConfig,
    noise: Tensor | None = None,  # [B, T, C], standard normal, of kl
) -> Quantized:
    """The code of a latent, with tokens and losses.

    lfq: the sign of every channel (paper, eq. 2). fsq: every channel bounded by a hyperbolic tangent and rounded to
    one of its levels (Mentzer et al. 2023). kl: the mean of a Gaussian, or with `noise` the number that lies so many
    deviations from it, differentiable in mean and variance. none: each latent token normalized (paper, Table 3).
    """
    if config.quantizer == "lfq":
        return Quantized(*lfq(latent, config.entropy_bits))
    if config.quantizer == "fsq":
        bounded = _bound(latent, config.fsq_levels)
        codes = bounded + (_snap(bounded, config.fsq_levels) - bounded).detach()
        return Quantized(codes.to(latent.dtype), fsq_tokens(codes.detach(), config.fsq_levels))
    if config.quantizer == "kl":
        mean, log_variance = latent.float().chunk(2, dim=-1)
        log_variance = log_variance.clamp(*LOG_VARIANCE)
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
        if noise is not None:
            mean = mean + (0.5 * log_variance).exp() * noise
        return Quantized(mean.to(latent.dtype), None, kl=kl)
    return Quantized(norm_modulate(latent), None)


def codes_of_latent(
    latent: Tensor,  # as for quantize
    config: ModelConfig,
) -> Tensor:  # [B, T, C]
    """The codes of :func:`quantize` without noise, and nothing else."""
    if config.quantizer == "lfq":
        return torch.where(latent > 0, 1.0, -1.0).to(latent.dtype)
    if config.quantizer == "fsq":
        return _snap(_bound(latent, config.fsq_levels), config.fsq_levels).to(latent.dtype)
    return quantize(latent, config).codes


def code_tokens(
    codes: Tensor,  # [B, T, C] of a discrete code
    config: ModelConfig,
) -> Tensor:  # [B, T F] int64
    """Tokens of codes: sum_k 2^k [code > 0] (lfq), or mixed-radix numbers of levels (:func:`fsq_tokens`)."""
    if config.quantizer == "fsq":
        return fsq_tokens(codes, config.fsq_levels)
    return codes_to_tokens(codes, config.entropy_bits)


def token_codes(
    tokens: Tensor,  # [B, T F] int64 in [0, vocabulary)
    config: ModelConfig,
) -> Tensor:  # [B, T, C]
    """Codes of tokens, the inverse of :func:`code_tokens`."""
    if config.quantizer == "fsq":
        return fsq_codes(tokens, config.fsq_levels, config.latent_channels)
    return tokens_to_codes(tokens, config.entropy_bits, config.latent_channels)


def fsq_tokens(
    codes: Tensor,  # [B, T, C] of levels, up to rounding
    levels: Sequence[int],  # L_0 .. L_{d-1}
) -> Tensor:  # [B, T F] int64 in [0, prod L)
    """Mixed-radix numbers: sum_k digit_k L_0 ... L_{k-1}, digit k = code (L_k div 2) + L_k div 2 in [0, L_k)."""
    digits = codes.float().unflatten(-1, (len(levels), -1))
    token = torch.zeros_like(digits[..., 0, :], dtype=torch.int64)
    for k, count in enumerate(levels):
        half = count // 2
        digit = (digits[..., k, :] * half).round().long() + half
        token = token + digit.clamp(0, count - 1) * math.prod(levels[:k])
    return token.flatten(-2)


def fsq_codes(
    tokens: Tensor,  # [B, T F] int64
    levels: Sequence[int],
    channels: int,
) -> Tensor:  # [B, T, C] fp32
    """Codes of mixed-radix tokens, the inverse of :func:`fsq_tokens`.

    Raises:
        ValueError: values outside of the vocabulary.
    """
    size = math.prod(levels)
    if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < size:
        raise ValueError(f"tokens: expected values in [0, {size}), got {int(tokens.min())} to {int(tokens.max())}")
    rest = tokens.unflatten(-1, (-1, channels // len(levels)))
    parts = []
    for count in levels:
        parts.append((rest % count - count // 2).float() / (count // 2))
        rest = rest // count
    return torch.stack(parts, dim=-2).flatten(-2)


def _bound(latent: Tensor, levels: Sequence[int]) -> Tensor:
    """Channels [B, T, C] squashed smoothly to the range of their levels, in fp32.

    Level i of L is (i - L div 2) / (L div 2): an even number has one more below zero than above. The shift inside the
    hyperbolic tangent makes up for that, so that zero stays zero.
    """

    def squash(x: Tensor, count: int) -> Tensor:
        reach = (count - 1) * (1 + FSQ_MARGIN) / 2
        offset = 0.5 if count % 2 == 0 else 0.0
        return (torch.tanh(x + math.atanh(offset / reach)) * reach - offset) / (count // 2)

    return _by_level(squash, latent.float(), levels)


def _snap(bounded: Tensor, levels: Sequence[int]) -> Tensor:
    """The nearest levels."""
    return _by_level(lambda x, count: (x * (count // 2)).round() / (count // 2), bounded, levels)


def _by_level(function: Callable[[Tensor, int], Tensor], x: Tensor, levels: Sequence[int]) -> Tensor:
    """`function(channels [B, T, F], their number of levels)`, channel by channel of a token.

    Numbers of levels are Python's, not a tensor's: that could not be made inside a CUDA graph.
    """
    channels = x.unflatten(-1, (len(levels), -1)).unbind(-2)
    return torch.stack([function(c, n) for c, n in zip(channels, levels)], dim=-2).flatten(-2)
