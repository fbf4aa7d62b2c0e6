"""CUDA launches of `qk_norm_rope` and its gradient.

Legend: B images, L tokens (latent rows first), H heads, d channels of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._cuda_rows import chunks, dtype_code, rows_per_chunk
from ._ext import launch
from ._library import rows_contiguous


def _heads(x: Tensor) -> tuple[Tensor, int, int, int, int]:
    """[B, L, 3, H, d] as a launcher takes it: the tensor and its four strides before the channels."""
    return x, x.stride(0), x.stride(1), x.stride(2), x.stride(3)


def _gains(q_scale: Tensor, k_scale: Tensor) -> tuple[Tensor, Tensor, int, int]:
    """The gains [d] or [2, d] as a launcher takes them: both tensors, the stride of streams, their type."""
    k_scale = k_scale.to(q_scale.dtype).contiguous()
    stride = q_scale.shape[-1] if q_scale.dim() == 2 else 0
    return q_scale.contiguous(), k_scale, stride, dtype_code("q_scale", q_scale)


def _table(t: Tensor) -> Tensor:
    return t.to(torch.float32).contiguous()


def _forward(
    y: Tensor, x: Tensor, q_scale: Tensor, k_scale: Tensor, cos: Tensor, sin: Tensor, split: int, eps: float,
    copy_v: bool,
) -> None:  # fmt: skip
    batch, length, _, heads, width = x.shape
    launch(
        "qk_norm_rope", *_heads(y), *_heads(x), *_gains(q_scale, k_scale), _table(cos), _table(sin), batch, length,
        heads, width, split, int(copy_v), eps, dtype_code("qkv", x),
    )  # fmt: skip


def qk_norm_rope(
    qkv: Tensor,  # [B, L, 3, H, d]
    q_scale: Tensor,  # [d] or [2, d]
    k_scale: Tensor,  # as q_scale
    cos: Tensor,  # [L, d/2]
    sin: Tensor,  # [L, d/2]
    split: int = 0,
    eps: float = 1e-6,
) -> Tensor:  # [B, L, 3, H, d], dtype of qkv
    """q and k normalised, scaled and rotated, v copied, as `flowmo_kernels.qk_norm_rope`."""
    qkv = rows_contiguous(qkv)
    y = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    _forward(y, qkv, q_scale, k_scale, cos, sin, split, eps, copy_v=True)
    return y


def qk_norm_rope_(
    qkv: Tensor, q_scale: Tensor, k_scale: Tensor, cos: Tensor, sin: Tensor, split: int = 0, eps: float = 1e-6
) -> None:
    """The same in place; v is not touched.

    Raises:
        ValueError: the channels of qkv are not contiguous.
    """
    if qkv.shape[-1] > 1 and qkv.stride(-1) != 1:
        raise ValueError(f"qkv has strides {qkv.stride()}; in place its channels (last axis) must be contiguous")
    _forward(qkv, qkv, q_scale, k_scale, cos, sin, split, eps, copy_v=False)


def qk_norm_rope_backward(
    dy: Tensor,  # [B, L, 3, H, d]
    qkv: Tensor,  # [B, L, 3, H, d], as the forward pass saw it
    q_scale: Tensor,  # [d] or [2, d]
    k_scale: Tensor,  # as q_scale
    cos: Tensor,  # [L, d/2]
    sin: Tensor,  # [L, d/2]
    split: int = 0,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor, Tensor]:  # dqkv as qkv; dq_scale, dk_scale float32 of q_scale's shape
    """Gradients of `qk_norm_rope`; the mean squares are computed again."""
    dy, qkv = rows_contiguous(dy.to(qkv.dtype)), rows_contiguous(qkv)
    batch, length, _, heads, width = qkv.shape
    dx = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    dq = torch.empty(q_scale.shape, dtype=torch.float32, device=qkv.device)
    dk = torch.empty_like(dq)
    rows = rows_per_chunk(batch, length)
    partial = torch.empty(batch * chunks(length, split, rows), 2, width, dtype=torch.float32, device=qkv.device)
    launch(
        "qk_norm_rope_backward", *_heads(dx), dq, dk, partial, *_heads(dy), *_heads(qkv), *_gains(q_scale, k_scale),
        _table(cos), _table(sin), batch, length, heads, width, split, rows, eps, dtype_code("qkv", qkv),
    )  # fmt: skip
    return dx, dq, dk
