"""The released implementation's numbers, and the rule that fills its weights."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from flowmo import FlowMo, ModelConfig

FILE = Path(__file__).parents[1] / "data" / "golden" / "lo_tiny.npz"


def load() -> dict[str, np.ndarray]:
    with np.load(FILE) as archive:
        return {k: archive[k] for k in archive.files}


def config(golden: dict[str, np.ndarray]) -> ModelConfig:
    c = json.loads(str(golden["config_json"]))
    return ModelConfig(
        image_size=c["image_size"],
        patch=c["patch_size"],
        encoder_width=c["enc_width"],
        decoder_width=c["dec_width"],
        encoder_depth=c["enc_depth"],
        decoder_depth=c["dec_depth"],
        latent_tokens=c["code_length"],
        latent_channels=c["context_dim"],
        entropy_bits=c["entropy_bits"],
    )


def fill(named: Iterable[tuple[str, Tensor]]) -> None:
    """Set every parameter from a generator seeded by its name."""
    for name, parameter in named:
        random = np.random.RandomState(zlib.crc32(name.encode()))
        w = random.standard_normal(tuple(parameter.shape)).astype(np.float32)
        if name.endswith("norm.scale"):
            w = 1 + 0.1 * w
        elif w.ndim == 2:
            w = w / np.float32(np.sqrt(w.shape[1]))
        else:
            w = 0.02 * w
        with torch.no_grad():
            parameter.copy_(torch.from_numpy(w))


def model(golden: dict[str, np.ndarray]) -> FlowMo:
    m = FlowMo(config(golden))
    fill(m.named_parameters())
    return m.eval()
