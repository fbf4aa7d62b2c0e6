"""From the encoder's latent to codes, tokens and the losses that shape them (paper, section 3.2)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from flowmo.config import LossConfig, ModelConfig
from flowmo_kernels import lfq, norm_modulate


class Quantized(NamedTuple):
    codes: Tensor  # [B, T, C]: +-1 (lfq) or real (none), gradients straight through
    tokens: Tensor | None  # [B, T C / E] int64
    per_sample_entropy: Tensor  # nats, mean over tokens; scalar
    codebook_entropy: Tensor  # nats, of the batch's mean code distribution; scalar
    commitment: Tensor  # mean (x - q)^2; scalar

    def loss(self, weights: LossConfig) -> Tensor:
        """entropy (H_sample - H_codebook) + commitment, weighted."""
        entropy = self.per_sample_entropy - self.codebook_entropy
        return weights.entropy * entropy + weights.commitment * self.commitment


def quantize(
    latent: Tensor,  # [B, T, C], encoder output
    config: ModelConfig,
) -> Quantized:
    """Binarize by lookup-free quantization, or, for continuous models, normalize each latent token."""
    if config.quantizer == "lfq":
        return Quantized(*lfq(latent, config.entropy_bits))
    zero = torch.zeros((), device=latent.device)
    return Quantized(norm_modulate(latent), None, zero, zero, zero)
