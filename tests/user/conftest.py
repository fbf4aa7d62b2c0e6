"""Tiny models whose seeded weights make pictures, and one thread: tiny matrices gain nothing from a second one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from flowmo import FlowMo, model_config
from tests.model import golden


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tiny() -> FlowMo:
    torch.manual_seed(0)
    model = FlowMo(model_config("tiny", decoder_depth=1)).eval()
    golden.fill(model.named_parameters())
    return model
