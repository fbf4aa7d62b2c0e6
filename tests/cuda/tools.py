"""Inputs where kernels break, and the tolerance by which they are judged."""

from __future__ import annotations

import math

import torch
from torch import Tensor

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
HALF = [torch.bfloat16, torch.float16]


def randn(*shape: int, seed: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    """Normal numbers, the same for every dtype up to rounding."""
    return (scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).to(dtype)


def inside(t: Tensor, before: int = 1, after: int = 3, rows: int = 2) -> Tensor:
    """The same numbers as a slice of a larger buffer: NaN all round, rows that start at odd places."""
    *lead, length, width = t.shape
    big = torch.full((*lead, length + rows, width + before + after), math.nan, dtype=t.dtype)
    view = big[..., rows // 2 : rows // 2 + length, before : before + width]
    view.copy_(t)
    return view


def check(got: Tensor, reference: Tensor, oracle: Tensor, *, factor: float, name: str, floor: float = 1e-6) -> None:
    """`got` is at most `factor` times as far from the float64 oracle as the same-dtype reference is.

    `floor` times the largest number of the oracle is added: a few units in the last place of float32, for references
    that happen to hit the oracle.
    """
    assert got.dtype == reference.dtype and got.shape == reference.shape, name
    assert torch.isfinite(got).all(), f"{name}: not finite"
    if not got.numel():
        return
    error = (got.double() - oracle).abs().max().item()
    allowed = factor * (reference.double() - oracle).abs().max().item() + floor * oracle.abs().max().item()
    assert error <= allowed, f"{name}: off by {error:.3e}, allowed {allowed:.3e}"
