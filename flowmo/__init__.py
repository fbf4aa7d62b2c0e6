"""FlowMo: a diffusion autoencoder that turns pictures into discrete tokens and back, with fused kernels.

    model = FlowMo.from_pretrained("quickstart")      # the small weights that come along, or "flowmo_lo.pth"
    tokens = model.tokenize(images)                   # images [B, 3, S, S] in [-1, 1], S = model.config.image_size
    pictures = model.detokenize(tokens)

Modules: `flowmo.data` pictures in and out, `flowmo.tiles` pictures of any size, `flowmo.format` token files,
`flowmo.metrics` measures. `python -m flowmo` lists the commands.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import TYPE_CHECKING

from flowmo.autoencoder import FlowMo
from flowmo.config import ModelConfig, model_config

__all__ = ["FlowMo", "ModelConfig", "model_config"]
__version__ = "0.1.0"

_MODULES = ("data", "tiles", "format", "metrics", "pretrained", "evaluation", "generator", "likelihood")


if not TYPE_CHECKING:  # a type checker would take every misspelt name for one of these modules

    def __getattr__(name: str) -> ModuleType:
        """Modules that messages and documentation name, `flowmo.data` for one, without an import of their own."""
        if name in _MODULES:
            return importlib.import_module(f"flowmo.{name}")
        raise AttributeError(f"module 'flowmo' has no attribute {name!r}")
