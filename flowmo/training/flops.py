"""Floating-point operations of a training step, and what a card could do: model FLOP utilisation.

Only the transformers count (two operations to a multiply-add, backward twice the forward); perceptual networks, norms
and recomputation do not, so that the utilisation is a lower bound.
"""

from __future__ import annotations

from flowmo.config import Config
from flowmo.engine import Schedule

# Dense bf16 operations per second by the makers' data sheets, by a part of the device's name; the first that fits.
PEAKS = {
    "B200": 2.25e15,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "4090": 165e12,
}


def transformer_flops(
    hidden: int, depth: int, image_tokens: int, latent_tokens: int, patch_dim: int, channels: int, decoder: bool
) -> float:
    """Of one forward pass for one picture. The last block's dead stream is not computed."""
    tokens = image_tokens + latent_tokens
    live = image_tokens if decoder else latent_tokens
    block = 24.0 * tokens * hidden**2 + 4.0 * tokens**2 * hidden
    last = 6.0 * tokens * hidden**2 + 18.0 * live * hidden**2 + 4.0 * live * tokens * hidden
    ends = 2.0 * hidden * (image_tokens * patch_dim + latent_tokens * channels)
    ends += 2.0 * hidden * (image_tokens * patch_dim if decoder else latent_tokens * channels)
    modulation = depth * 24.0 * hidden**2 + 6.0 * hidden**2 + 512.0 * hidden if decoder else 0.0
    return (depth - 1) * block + last + ends + modulation


def step_flops(config: Config, frozen_encoder: bool) -> float:
    """Of one optimizer step, over the whole batch."""
    m = config.model
    patch_dim, image_tokens = 3 * m.patch**2, m.grid**2
    encoder = transformer_flops(
        m.encoder_hidden, m.encoder_depth, image_tokens, m.latent_tokens, patch_dim, m.latent_channels, False
    )
    decoder = transformer_flops(
        m.decoder_hidden, m.decoder_depth, image_tokens, m.latent_tokens, patch_dim, m.latent_channels + 1, True
    )
    calls, watched = 1, 0
    if config.stage == "distill":
        frozen_encoder = True
        calls += sum(config.distill.steps) - len(config.distill.steps)
        s = config.sampler
        watched = Schedule(s.steps, s.rho, s.guidance, s.guidance_interval).forwards  # the teacher's
    if config.stage == "posttrain":
        frozen_encoder = True
        calls += config.posttrain.steps if config.posttrain.resnet != "none" else 0
    return config.data.batch * ((1 if frozen_encoder else 3) * encoder + (3 * calls + watched) * decoder)


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 peak of a card; None for one that is not in the table."""
    return next((peak for part, peak in PEAKS.items() if part in device_name), None)
