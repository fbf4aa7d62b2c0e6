"""Per-head RMSNorm of q and k, then rotary position embedding, in a joint qkv buffer.

n = x / sqrt(mean(x^2) + eps) * g;   (y_2i, y_2i+1) = (n_2i cos_i - n_2i+1 sin_i, n_2i+1 cos_i + n_2i sin_i)

Query-key normalisation and three-axis RoPE of the released implementation (paper, supplement).

Legend: B images, L tokens (latent rows first), H heads, d channels of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .norm_modulate import compute_dtype


def check_qk_norm_rope(
    qkv: Tensor, q_scale: Tensor, k_scale: Tensor, rope: tuple[Tensor, Tensor], split: int
) -> None:
    if qkv.dim() != 5 or qkv.shape[2] != 3 or qkv.shape[4] % 2:
        raise ValueError(f"qkv has shape {tuple(qkv.shape)}; expected [B, L, 3, H, d] with even d")
    length, d = qkv.shape[1], qkv.shape[4]
    for name, g in (("q_scale", q_scale), ("k_scale", k_scale)):
        if tuple(g.shape) not in ((d,), (2, d)):
            raise ValueError(f"{name} has shape {tuple(g.shape)}; expected ({d},), or (2, {d}) for two streams")
    if q_scale.dim() != k_scale.dim():
        raise ValueError(f"q_scale {tuple(q_scale.shape)} and k_scale {tuple(k_scale.shape)} differ in form")
    if q_scale.dim() == 1 and split:
        raise ValueError(f"split = {split} needs scales of shape (2, {d}), one row per stream")
    if not 0 <= split <= length:
        raise ValueError(f"split = {split} must lie in 0..{length}, the number of tokens of qkv")
    for name, table in zip(("cos", "sin"), rope, strict=True):
        if tuple(table.shape) != (length, d // 2):
            raise ValueError(f"rope {name} has shape {tuple(table.shape)}; expected (L, d/2) = {(length, d // 2)}")


def qk_norm_rope_ref(
    qkv: Tensor,  # [B, L, 3, H, d]
    q_scale: Tensor,  # [d] or [2, d]
    k_scale: Tensor,  # as q_scale
    rope: tuple[Tensor, Tensor],  # cos, sin: fp32 [L, d/2]
    *,
    split: int = 0,
    eps: float = 1e-6,
    inplace: bool = False,
) -> Tensor:  # [B, L, 3, H, d], dtype of qkv
    """`qk_norm_rope` in plain PyTorch."""
    check_qk_norm_rope(qkv, q_scale, k_scale, rope, split)
    length = qkv.shape[1]
    dtype = compute_dtype(qkv)
    x = qkv[:, :, :2].to(dtype)
    g = torch.stack([q_scale, k_scale], -2).to(dtype)  # [(2,) 2, d]
    if g.dim() == 3:
        g = torch.cat([g[:1].expand(split, -1, -1), g[1:].expand(length - split, -1, -1)])  # [L, 2, d]
    n = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * g.unsqueeze(-2)
    cos, sin = (table.to(dtype)[:, None, None] for table in rope)
    even, odd = n[..., 0::2], n[..., 1::2]
    y = torch.stack([even * cos - odd * sin, odd * cos + even * sin], -1).flatten(-2).to(qkv.dtype)
    if inplace:
        qkv[:, :, :2] = y
        return qkv
    return torch.cat([y, qkv[:, :, 2:]], 2)


def qk_norm_rope(
    qkv: Tensor,  # [B, L, 3, H, d]
    q_scale: Tensor,  # [d] or [2, d]
    k_scale: Tensor,  # as q_scale
    rope: tuple[Tensor, Tensor],  # cos, sin: fp32 [L, d/2]
    *,
    split: int = 0,
    eps: float = 1e-6,
    inplace: bool = False,
) -> Tensor:  # [B, L, 3, H, d], dtype of qkv
    """RMS-normalise every head of q and k, scale, and rotate adjacent pairs; v stays as it is.

    Args:
        qkv: [B, L, 3, H, d], q, k, v along axis 2, d even.
        q_scale, k_scale: learned gains [d], or [2, d]: tokens below `split` (latent) use row 0, the others row 1.
        rope: (cos, sin), fp32 [L, d/2]: the angle of pair (2i, 2i+1) at each token, shared by images and heads.
        split: number of leading latent tokens.
        eps: added to the mean square.
        inplace: write into qkv and return it; only where no gradient is wanted.

    Returns:
        [B, L, 3, H, d] in the dtype of qkv; fp32 arithmetic, one rounding.

    Raises:
        ValueError: a shape does not fit.
        RuntimeError: inplace where a gradient is wanted.
    """
    if inplace and torch.is_grad_enabled() and any(t.requires_grad for t in (qkv, q_scale, k_scale)):
        raise RuntimeError("qk_norm_rope(inplace=True) overwrites what its gradient needs; "
                           "use inplace=False, or call it under torch.no_grad()")
    return qk_norm_rope_ref(qkv, q_scale, k_scale, rope, split=split, eps=eps, inplace=inplace)
