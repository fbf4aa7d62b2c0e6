"""Without a CUDA card the Triton kernels run interpreted, and tests marked `gpu` are skipped with the reason."""

from __future__ import annotations

import os

import pytest
import torch

# Triton reads the variable when kernels are decorated, so it must be there before flowmo_kernels is imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA card, and torch finds none"))
