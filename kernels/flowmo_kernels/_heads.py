"""What the attention kernels share: heads held in two parts of channels, results in q's order, and their reach.

A head of d channels is held in two parts of power-of-two lengths, so that 96 channels take 64 + 32 lanes instead of
128.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._triton import cast, jit, next_power_of_2, tl


def head_parts(d: int, least: int) -> tuple[int, int]:
    """Channels of the first part and of the second, powers of two of at least `least`; the second may be 0."""
    whole = next_power_of_2(d)
    first = max(least, whole if whole == d else whole // 2)
    return first, max(least, next_power_of_2(d - first)) if d > first else 0


def result_of(q: Tensor) -> Tensor:
    """Memory for o [B, Lq, H, d] in q's order: image-major, or sequence-major where images lie closer than tokens."""
    if q.stride(0) < q.stride(1):
        return torch.empty(q.transpose(0, 1).shape, device=q.device, dtype=q.dtype).transpose(0, 1)
    return torch.empty(q.shape, device=q.device, dtype=q.dtype)


def check_reach(*rows: Tensor) -> None:
    """Refuse [B, L, H, d] tensors whose tokens span more elements than the kernels' 32-bit row offsets count."""
    for x in rows:
        n = x.shape[1]
        if n * x.stride(1) >= 2**31:
            raise ValueError(f"{n} tokens span over 2^31 elements, the reach of this kernel; use backend='auto'")


@jit
def load_part(p_x, stride, o_row, length, FIRST: tl.constexpr, N: tl.constexpr, D: tl.constexpr, EVEN: tl.constexpr):
    """Rows o_row of one part of the channels, in their own dtype; zero outside."""
    o = FIRST + tl.arange(0, N)
    p = p_x + o_row[:, None] * stride + o[None, :]
    if EVEN and FIRST + N <= D:
        return tl.load(p)
    else:
        return tl.load(p, mask=(o_row < length)[:, None] & (o < D)[None, :], other=0.0)


@jit
def store_part(p_x, stride, o_row, length, b, FIRST: tl.constexpr, N: tl.constexpr, D: tl.constexpr):
    o = FIRST + tl.arange(0, N)
    m = (o_row < length)[:, None] & (o < D)[None, :]
    tl.store(p_x + o_row[:, None] * stride + o[None, :], cast(b, p_x.dtype.element_ty), mask=m)
