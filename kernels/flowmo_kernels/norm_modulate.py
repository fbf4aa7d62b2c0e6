"""Modulated LayerNorm: y = (1 + scale) * LN(x) + shift, LN without affine parameters (eps 1e-6).

The adaptive LayerNorm of a diffusion transformer (paper, supplement; formula as in the released implementation).

Legend: B images, L tokens (latent rows first), D channels, S streams (1, or 2 = latent and image).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def compute_dtype(x: Tensor) -> torch.dtype:
    """fp32, and fp64 for fp64 inputs, so that the references serve as their own oracle."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def check_modulation(name: str, m: Tensor | None, x: Tensor, split: int) -> None:
    """A modulation vector is [B, D], or [B, 2, D] with 0 <= split <= L."""
    if m is None:
        return
    b, length, d = x.shape
    want = (b, 2, d) if m.dim() == 3 else (b, d)
    if tuple(m.shape) != want:
        raise ValueError(f"{name} has shape {tuple(m.shape)}; for x {tuple(x.shape)} it must be {(b, d)}, "
                         f"or {(b, 2, d)} for two streams divided at `split`")
    if m.dim() == 3 and not 0 <= split <= length:
        raise ValueError(f"split = {split} must lie in 0..{length}, the number of rows of x")
    if m.dim() == 2 and split:
        raise ValueError(f"{name} is {want}, one vector per image, but split = {split}: give [B, 2, D] or split=0")


def check_norm_modulate(x: Tensor, shift: Tensor | None, scale: Tensor | None, split: int) -> None:
    if x.dim() != 3:
        raise ValueError(f"x has shape {tuple(x.shape)}; expected [B, L, D]")
    if (shift is None) != (scale is None):
        raise ValueError("give both shift and scale, or neither (plain LayerNorm)")
    check_modulation("shift", shift, x, split)
    check_modulation("scale", scale, x, split)
    if shift is not None and scale is not None and shift.dim() != scale.dim():
        raise ValueError(f"shift {tuple(shift.shape)} and scale {tuple(scale.shape)} differ in form")


def apply_by_stream(fn, x: Tensor, mods: tuple[Tensor, ...], split: int) -> Tensor:  # type: ignore[no-untyped-def]
    """fn(rows, *vectors [B, 1, D]) over all rows of x [B, L, D], each stream with its own vectors."""
    if mods[0].dim() == 2:
        return fn(x, *(m[:, None] for m in mods))
    return torch.cat([fn(x[:, :split], *(m[:, :1] for m in mods)), fn(x[:, split:], *(m[:, 1:] for m in mods))], 1)


def norm_modulate_ref(
    x: Tensor,  # [B, L, D]
    shift: Tensor | None = None,  # [B, D] or [B, 2, D]
    scale: Tensor | None = None,  # as shift
    *,
    split: int = 0,
    eps: float = 1e-6,
) -> Tensor:  # [B, L, D], dtype of x
    """`norm_modulate` in plain PyTorch."""
    check_norm_modulate(x, shift, scale, split)
    dtype = compute_dtype(x)
    n = F.layer_norm(x.to(dtype), (x.shape[-1],), eps=eps)
    if shift is not None and scale is not None:
        n = apply_by_stream(lambda r, s, g: torch.addcmul(s, r, 1 + g), n, (shift.to(dtype), scale.to(dtype)), split)
    return n.to(x.dtype)


def norm_modulate(
    x: Tensor,  # [B, L, D]
    shift: Tensor | None = None,  # [B, D] or [B, 2, D]
    scale: Tensor | None = None,  # as shift
    *,
    split: int = 0,
    eps: float = 1e-6,
) -> Tensor:  # [B, L, D], dtype of x
    """LayerNorm over the last axis without affine parameters, then (1 + scale) * . + shift.

    Args:
        x: [B, L, D], any strides with contiguous channels.
        shift, scale: both None (plain LayerNorm), or [B, D] for all rows, or [B, 2, D]: rows below `split` (the
            latent stream) use [:, 0], the others [:, 1].  Any float dtype; gradients come back in it.
        split: number of leading latent rows; used with [B, 2, D] only.
        eps: added to the variance.

    Returns:
        y [B, L, D] in the dtype of x; fp32 arithmetic, one rounding.

    Raises:
        ValueError: a shape does not fit, or only one of shift and scale is given.
    """
    return norm_modulate_ref(x, shift, scale, split=split, eps=eps)
