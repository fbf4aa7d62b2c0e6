"""Tiny models with weights that make pictures: no gate is zero, values mostly stay inside [-1, 1]."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from flowmo import FlowMo, ModelConfig, model_config
from tests.model import golden

LO = model_config("tiny")
HI = model_config("tiny", latent_channels=56, entropy_bits=14)
ONE_BLOCK = model_config("tiny", decoder_depth=1, image_size=16)


def make(config: ModelConfig | str, seed: int = 0) -> FlowMo:
    torch.manual_seed(seed)
    model = FlowMo(config).eval()
    golden.fill(model.named_parameters())
    return model


def inputs(model: FlowMo, batch: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random codes and noise."""
    c, g = model.config, torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2, (batch, c.latent_tokens, c.latent_channels), generator=g) * 2.0 - 1
    return codes, torch.randn(batch, 3, c.image_size, c.image_size, generator=g)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny matrices gain nothing from a second thread, and lose everything where other work has the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def lo() -> FlowMo:
    return make(LO)
