"""FlowMo: a diffusion autoencoder that turns pictures into discrete tokens and back, with fused kernels."""

from flowmo.autoencoder import FlowMo
from flowmo.config import ModelConfig, model_config

__all__ = ["FlowMo", "ModelConfig", "model_config"]
__version__ = "0.1.0"
