"""Modulated LayerNorm: y = (1 + scale) * LN(x) + shift, LN without affine parameters (eps 1e-6).

The adaptive LayerNorm of a diffusion transformer (supplement of the paper, as in the released code).
With n = LN(x), r = 1/sqrt(var + eps) and g = (1 + scale) * dy the gradients are

    dx = r (g - mean(g) - n mean(g n)),    dshift = sum over tokens of dy,    dscale = sum over tokens of dy n.

Legend: B images, L tokens (latent rows first), D channels, S streams (1, or 2 = latent and image).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ._dispatch import chosen
from ._library import register, rows_contiguous, wants_grad
from ._rows import Signature, sum_tiles_signatures
from .norm_residual_triton import backward, backward_signatures, forward, forward_signatures


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


def apply_by_stream(fn: Callable[..., Tensor], x: Tensor, mods: tuple[Tensor, ...], split: int) -> Tensor:
    """fn(rows, *vectors [B, 1, D]) over all rows of x [B, L, D], each stream with its own vectors."""
    if mods[0].dim() == 2:
        return fn(x, *(m[:, None] for m in mods))
    latent = fn(x[:, :split], *(m[:, :1] for m in mods))
    image = fn(x[:, split:], *(m[:, 1:] for m in mods))
    return torch.cat([latent, image], 1)


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
        mods = (shift.to(dtype), scale.to(dtype))
        n = apply_by_stream(lambda rows, s, g: torch.addcmul(s, rows, 1 + g), n, mods, split)
    return n.to(x.dtype)


def _forward(x: Tensor, shift: Tensor | None, scale: Tensor | None, split: int, eps: float, impl: str) -> Tensor:
    x = rows_contiguous(x)
    shift = None if shift is None else rows_contiguous(shift)
    scale = None if scale is None else rows_contiguous(scale)
    if impl == "cuda":
        from . import _cuda

        y: Tensor = _cuda.norm_modulate(x, shift, scale, split, eps)
        return y
    y = torch.empty(x.shape, device=x.device, dtype=x.dtype)
    forward(x, None, None, shift, scale, None, y, None, split, eps)
    return y


def _forward_fake(
    x: Tensor, shift: Tensor | None, scale: Tensor | None, split: int, eps: float, impl: str
) -> Tensor:
    return torch.empty(x.shape, device=x.device, dtype=x.dtype)


def _backward(
    dy: Tensor, x: Tensor, scale: Tensor | None, split: int, eps: float, impl: str
) -> tuple[Tensor, Tensor, Tensor]:
    dy, x = rows_contiguous(dy), rows_contiguous(x)
    scale = None if scale is None else rows_contiguous(scale)
    if impl == "cuda":
        from . import _cuda

        grads: tuple[Tensor, Tensor, Tensor] = _cuda.norm_modulate_backward(dy, x, scale, split, eps)
        return grads
    dx, dshift, dscale = _backward_fake(dy, x, scale, split, eps, impl)
    backward(None, dy, x, None, None, scale, dx, dx, () if scale is None else (dshift, dscale), split, eps)
    return dx, dshift, dscale


def _backward_fake(
    dy: Tensor, x: Tensor, scale: Tensor | None, split: int, eps: float, impl: str
) -> tuple[Tensor, Tensor, Tensor]:
    dx = torch.empty(x.shape, device=x.device, dtype=x.dtype)
    shape = (0,) if scale is None else scale.shape
    return dx, dx.new_empty(shape, dtype=torch.float32), dx.new_empty(shape, dtype=torch.float32)


_op = register(
    "norm_modulate(Tensor x, Tensor? shift, Tensor? scale, int split, float eps, str impl) -> Tensor",
    _forward,
    _forward_fake,
)
_op_backward = register(
    "norm_modulate_backward(Tensor dy, Tensor x, Tensor? scale, int split, float eps, str impl)"
    " -> (Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)


class _NormModulate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, shift, scale, split, eps, impl):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x, scale)
        ctx.split, ctx.eps, ctx.impl = split, eps, impl
        ctx.shift_dtype = None if shift is None else shift.dtype
        return _op(x, shift, scale, split, eps, impl)

    @staticmethod
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        x, scale = ctx.saved_tensors
        dx, dshift, dscale = _op_backward(dy, x, scale, ctx.split, ctx.eps, ctx.impl)
        if scale is None:
            return dx, None, None, None, None, None
        return dx, dshift.to(ctx.shift_dtype), dscale.to(scale.dtype), None, None, None


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
    impl = chosen("norm_modulate", x)
    if impl == "ref":
        return norm_modulate_ref(x, shift, scale, split=split, eps=eps)
    check_norm_modulate(x, shift, scale, split)
    if wants_grad(x, shift, scale):
        return _NormModulate.apply(x, shift, scale, split, eps, impl)
    return _op(x, shift, scale, split, eps, impl)


def aot_signatures() -> list[Signature]:
    """Every kernel of this file at the real shapes, for compilation ahead of time."""
    found = sum_tiles_signatures()
    for name, modulated in (("norm_modulate", True), ("norm_modulate plain", False)):
        found += forward_signatures(name, MODULATED=modulated)
        found += backward_signatures(f"{name} backward", MODULATED=modulated)
    return found
