"""Fixtures of the kernel tests: device, implementation, and memory that is NaN until somebody writes it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from flowmo_kernels._dispatch import why_no_cuda, why_no_triton
from flowmo_kernels._triton import INTERPRETED

from .bounds import guard


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Fill every fresh tensor with NaN (integers with their maximum), so that an unwritten output is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session", autouse=True)
def guarded_memory() -> Iterator[None]:
    """Interpreted kernels that reach beyond their tensors are seen, whatever lies there."""
    with pytest.MonkeyPatch.context() as patch:
        if INTERPRETED:
            guard(patch)
        yield


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(params=["triton", pytest.param("cuda", marks=pytest.mark.gpu)])
def implementation(request: pytest.FixtureRequest) -> str:
    """Each implementation that an op can have; interpreted Triton on CPU tensors where there is no card."""
    return there(request.param)


def there(name: str) -> str:
    """`name`, an implementation that can run here; the test is skipped where it cannot."""
    reason = {"ref": lambda: None, "triton": why_no_triton, "cuda": why_no_cuda}[name]()
    if reason is not None:
        pytest.skip(f"{name}: {reason}")
    return name
