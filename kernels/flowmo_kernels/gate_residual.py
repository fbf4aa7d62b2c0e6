"""Gated residual, alone and with the modulated LayerNorm that follows it.

x' = x + gate * branch,    y = (1 + scale) * LN(x') + shift

The seam between two sublayers of a block (paper, supplement; formula as in the released implementation).  y is
computed from x' as stored, so the fused op equals `norm_modulate(gate_residual(x, branch, gate), shift, scale)`.

Legend: B images, L tokens (latent rows first), D channels.
"""

from __future__ import annotations

from torch import Tensor

from .norm_modulate import apply_by_stream, check_modulation, check_norm_modulate, compute_dtype, norm_modulate_ref


def check_gate_residual(x: Tensor, branch: Tensor, gate: Tensor | None, split: int) -> None:
    if x.dim() != 3 or branch.shape != x.shape:
        raise ValueError(f"x {tuple(x.shape)} and branch {tuple(branch.shape)} must have one shape [B, L, D]")
    check_modulation("gate", gate, x, split)


def gate_residual_ref(
    x: Tensor,  # [B, L, D]
    branch: Tensor,  # [B, L, D]
    gate: Tensor | None = None,  # [B, D] or [B, 2, D]
    *,
    split: int = 0,
) -> Tensor:  # [B, L, D], dtype of x
    """`gate_residual` in plain PyTorch."""
    check_gate_residual(x, branch, gate, split)
    dtype = compute_dtype(x)
    b = branch.to(dtype)
    if gate is not None:
        b = apply_by_stream(lambda r, g: r * g, b, (gate.to(dtype),), split)
    return (x.to(dtype) + b).to(x.dtype)


def gate_residual_norm_modulate_ref(
    x: Tensor,  # [B, L, D]
    branch: Tensor,  # [B, L, D]
    gate: Tensor | None = None,  # [B, D] or [B, 2, D]
    shift: Tensor | None = None,  # [B, D] or [B, 2, D]
    scale: Tensor | None = None,  # as shift
    *,
    split: int = 0,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:  # two of [B, L, D], dtype of x
    """`gate_residual_norm_modulate` in plain PyTorch."""
    check_norm_modulate(x, shift, scale, split)
    x = gate_residual_ref(x, branch, gate, split=split)
    return x, norm_modulate_ref(x, shift, scale, split=split, eps=eps)


def gate_residual(
    x: Tensor,  # [B, L, D]
    branch: Tensor,  # [B, L, D]
    gate: Tensor | None = None,  # [B, D] or [B, 2, D]
    *,
    split: int = 0,
) -> Tensor:  # [B, L, D], dtype of x
    """x + gate * branch.

    Args:
        x, branch: [B, L, D] of any float dtypes and strides with contiguous channels.
        gate: None (= 1), [B, D], or [B, 2, D]: rows below `split` use [:, 0], the others [:, 1].
        split: number of leading latent rows; used with [B, 2, D] only.

    Returns:
        [B, L, D] in the dtype of x; fp32 arithmetic, one rounding.

    Raises:
        ValueError: a shape does not fit.
    """
    return gate_residual_ref(x, branch, gate, split=split)


def gate_residual_norm_modulate(
    x: Tensor,  # [B, L, D]
    branch: Tensor,  # [B, L, D]
    gate: Tensor | None = None,  # [B, D] or [B, 2, D]
    shift: Tensor | None = None,  # [B, D] or [B, 2, D]
    scale: Tensor | None = None,  # as shift
    *,
    split: int = 0,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:  # two of [B, L, D], dtype of x
    """The residual sum x' = x + gate * branch and its modulated LayerNorm, in one pass.

    Args:
        x, branch: [B, L, D] of any float dtypes and strides with contiguous channels.
        gate: None (= 1), [B, D], or [B, 2, D] by stream.
        shift, scale: both None (plain LayerNorm), [B, D], or [B, 2, D] by stream.
        split: number of leading latent rows; used with [B, 2, D] only.
        eps: added to the variance.

    Returns:
        (x', y), both [B, L, D] in the dtype of x.

    Raises:
        ValueError: a shape does not fit, or only one of shift and scale is given.
    """
    return gate_residual_norm_modulate_ref(x, branch, gate, shift, scale, split=split, eps=eps)
