"""Stage 2: a masked generative transformer over the tokens of pictures (paper, section 4.3)."""

from __future__ import annotations

from flowmo.generator.network import Generator, NetworkConfig
from flowmo.generator.sampler import SamplerPlan, TokenSamplerConfig, sample_tokens
from flowmo.generator.stage import GeneratorConfig, fit, generator_loss

__all__ = [
    "Generator",
    "GeneratorConfig",
    "NetworkConfig",
    "SamplerPlan",
    "TokenSamplerConfig",
    "fit",
    "generator_loss",
    "sample_tokens",
]
