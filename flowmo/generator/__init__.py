"""Stage 2: a masked generative transformer over the tokens of pictures (paper, section 4.3)."""

from __future__ import annotations

from flowmo.generator.loss import generator_loss
from flowmo.generator.network import Generator
from flowmo.generator.sampler import SamplerPlan, sample_tokens
from flowmo.generator_config import GeneratorConfig, NetworkConfig, TokenSamplerConfig

__all__ = [
    "Generator",
    "GeneratorConfig",
    "NetworkConfig",
    "SamplerPlan",
    "TokenSamplerConfig",
    "generator_loss",
    "sample_tokens",
]
