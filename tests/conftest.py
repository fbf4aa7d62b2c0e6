"""Without a CUDA card the Triton kernels run interpreted, and tests marked `gpu` are skipped with the reason."""

from __future__ import annotations

import os

import pytest
import torch

# Triton reads the variable when kernels are decorated, so it must be there before flowmo_kernels is imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# Several test processes with as many threads each wait for one another most of the time.
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA card, and torch finds none"))
