"""Gated residual, alone and with the modulated LayerNorm that follows it.

x' = x + gate * branch,    y = (1 + scale) * LN(x') + shift

The seam between two sublayers of a block (supplement of the paper, as in the released code).  y is computed from
x' as stored, so the fused op equals `norm_modulate(gate_residual(x, branch, gate), shift, scale)`.

With dx' the sum of what reaches x' directly and through the LayerNorm (formula in `norm_modulate`):

    dx = dx',    dbranch = gate * dx',    dgate = sum over tokens of dx' * branch.

Legend: B images, L tokens (latent rows first), D channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._dispatch import chosen
from ._library import register, rows_contiguous, wants_grad
from ._rows import Signature
from .norm_modulate import (
    apply_by_stream,
    check_modulation,
    check_norm_modulate,
    compute_dtype,
    norm_modulate_ref,
)
from .norm_residual_triton import backward, backward_signatures, forward, forward_signatures


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


def _rows_contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else rows_contiguous(t) for t in tensors]


def _empty_like(x: Tensor) -> Tensor:
    return torch.empty(x.shape, device=x.device, dtype=x.dtype)


def _empty_vector(x: Tensor, vector: Tensor | None) -> Tensor:
    return torch.empty((0,) if vector is None else vector.shape, device=x.device, dtype=torch.float32)


def _plain(x: Tensor, branch: Tensor, gate: Tensor | None, split: int, impl: str) -> Tensor:
    x, branch = rows_contiguous(x), rows_contiguous(branch)
    (gate,) = _rows_contiguous(gate)
    if impl == "cuda":
        from . import _cuda

        out: Tensor = _cuda.gate_residual(x, branch, gate, split)
        return out
    x_new = _empty_like(x)
    forward(x, branch, gate, None, None, x_new, None, None, split, 0.0)
    return x_new


def _plain_fake(x: Tensor, branch: Tensor, gate: Tensor | None, split: int, impl: str) -> Tensor:
    return _empty_like(x)


def _plain_backward(
    dx_new: Tensor, branch: Tensor, gate: Tensor, split: int, impl: str
) -> tuple[Tensor, Tensor]:
    dx_new, branch, gate = rows_contiguous(dx_new), rows_contiguous(branch), rows_contiguous(gate)
    if impl == "cuda":
        from . import _cuda

        grads: tuple[Tensor, Tensor] = _cuda.gate_residual_backward(dx_new, branch, gate, split)
        return grads
    dbranch, dgate = _plain_backward_fake(dx_new, branch, gate, split, impl)
    backward(dx_new, None, branch, branch, gate, None, dbranch, dbranch, (dgate,), split, 0.0)
    return dbranch, dgate


def _plain_backward_fake(
    dx_new: Tensor, branch: Tensor, gate: Tensor, split: int, impl: str
) -> tuple[Tensor, Tensor]:
    return _empty_like(branch), _empty_vector(branch, gate)


def _fused(
    x: Tensor, branch: Tensor, gate: Tensor | None, shift: Tensor | None, scale: Tensor | None,
    split: int, eps: float, impl: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    x, branch = rows_contiguous(x), rows_contiguous(branch)
    gate, shift, scale = _rows_contiguous(gate, shift, scale)
    if impl == "cuda":
        from . import _cuda

        out: tuple[Tensor, Tensor] = _cuda.gate_residual_norm_modulate(x, branch, gate, shift, scale, split, eps)
        return out
    x_new, y = _empty_like(x), _empty_like(x)
    forward(x, branch, gate, shift, scale, x_new, y, None, split, eps)
    return x_new, y


def _fused_fake(
    x: Tensor, branch: Tensor, gate: Tensor | None, shift: Tensor | None, scale: Tensor | None,
    split: int, eps: float, impl: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _empty_like(x), _empty_like(x)


def _fused_backward(
    dx_new: Tensor, dy: Tensor, x_new: Tensor, branch: Tensor, gate: Tensor | None, scale: Tensor | None,
    split: int, eps: float, impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dx_new, dy, branch = rows_contiguous(dx_new), rows_contiguous(dy), rows_contiguous(branch)
    gate, scale = _rows_contiguous(gate, scale)
    if impl == "cuda":
        from . import _cuda

        grads: tuple[Tensor, Tensor, Tensor, Tensor, Tensor] = _cuda.gate_residual_norm_modulate_backward(
            dx_new, dy, x_new, branch, gate, scale, split, eps
        )
        return grads
    out = _fused_backward_fake(dx_new, dy, x_new, branch, gate, scale, split, eps, impl)
    dx, dbranch, dgate, dshift, dscale = out
    sums = (() if gate is None else (dgate,)) + (() if scale is None else (dshift, dscale))
    backward(dx_new, dy, x_new, branch, gate, scale, dx, dbranch, sums, split, eps)
    return out


def _fused_backward_fake(
    dx_new: Tensor, dy: Tensor, x_new: Tensor, branch: Tensor, gate: Tensor | None, scale: Tensor | None,
    split: int, eps: float, impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    # Without a gate the branch gets the gradient of x; the autograd function casts it.
    dbranch = branch.new_empty(0) if gate is None else _empty_like(branch)
    dshift, dscale = _empty_vector(x_new, scale), _empty_vector(x_new, scale)
    return _empty_like(x_new), dbranch, _empty_vector(x_new, gate), dshift, dscale


_op_plain = register(
    "gate_residual(Tensor x, Tensor branch, Tensor? gate, int split, str impl) -> Tensor",
    _plain,
    _plain_fake,
)
_op_plain_backward = register(
    "gate_residual_backward(Tensor dx_new, Tensor branch, Tensor gate, int split, str impl) -> (Tensor, Tensor)",
    _plain_backward,
    _plain_backward_fake,
)
_op_fused = register(
    "gate_residual_norm_modulate(Tensor x, Tensor branch, Tensor? gate, Tensor? shift, Tensor? scale, int split,"
    " float eps, str impl) -> (Tensor, Tensor)",
    _fused,
    _fused_fake,
)
_op_fused_backward = register(
    "gate_residual_norm_modulate_backward(Tensor dx_new, Tensor dy, Tensor x_new, Tensor branch, Tensor? gate,"
    " Tensor? scale, int split, float eps, str impl) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fused_backward,
    _fused_backward_fake,
)


class _GateResidual(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, branch, gate, split, impl):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(*(() if gate is None else (branch, gate)))
        ctx.split, ctx.impl, ctx.branch_dtype = split, impl, branch.dtype
        return _op_plain(x, branch, gate, split, impl)

    @staticmethod
    def backward(ctx, dx_new):  # type: ignore[no-untyped-def]
        if not ctx.saved_tensors:
            return dx_new, dx_new.to(ctx.branch_dtype), None, None, None
        branch, gate = ctx.saved_tensors
        dbranch, dgate = _op_plain_backward(dx_new, branch, gate, ctx.split, ctx.impl)
        return dx_new, dbranch, dgate.to(gate.dtype), None, None


class _GateResidualNormModulate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, branch, gate, shift, scale, split, eps, impl):  # type: ignore[no-untyped-def]
        x_new, y = _op_fused(x, branch, gate, shift, scale, split, eps, impl)
        ctx.save_for_backward(x_new, branch, gate, scale)
        ctx.split, ctx.eps, ctx.impl = split, eps, impl
        ctx.shift_dtype = None if shift is None else shift.dtype
        return x_new, y

    @staticmethod
    def backward(ctx, dx_new, dy):  # type: ignore[no-untyped-def]
        x_new, branch, gate, scale = ctx.saved_tensors
        dx, dbranch, dgate, dshift, dscale = _op_fused_backward(
            dx_new, dy, x_new, branch, gate, scale, ctx.split, ctx.eps, ctx.impl
        )
        dbranch, dgate = (dx.to(branch.dtype), None) if gate is None else (dbranch, dgate.to(gate.dtype))
        dshift, dscale = (None, None) if scale is None else (dshift.to(ctx.shift_dtype), dscale.to(scale.dtype))
        return dx, dbranch, dgate, dshift, dscale, None, None, None


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
    impl = chosen("gate_residual", x)
    if impl == "ref":
        return gate_residual_ref(x, branch, gate, split=split)
    check_gate_residual(x, branch, gate, split)
    if wants_grad(x, branch, gate):
        return _GateResidual.apply(x, branch, gate, split, impl)
    return _op_plain(x, branch, gate, split, impl)


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
    impl = chosen("gate_residual_norm_modulate", x)
    if impl == "ref":
        return gate_residual_norm_modulate_ref(x, branch, gate, shift, scale, split=split, eps=eps)
    check_gate_residual(x, branch, gate, split)
    check_norm_modulate(x, shift, scale, split)
    if wants_grad(x, branch, gate, shift, scale):
        return _GateResidualNormModulate.apply(x, branch, gate, shift, scale, split, eps, impl)
    return _op_fused(x, branch, gate, shift, scale, split, eps, impl)


def aot_signatures() -> list[Signature]:
    """Every kernel of this op at the real shapes, for compilation ahead of time."""
    found: list[Signature] = []
    for name, flags in {
        "gate_residual": {"GATED": True, "NORM": False, "MODULATED": False},
        "gate_residual_norm_modulate": {"GATED": True, "NORM": True, "MODULATED": True},
        "gate_residual_norm_modulate plain": {"GATED": False, "NORM": True, "MODULATED": False},
    }.items():
        found += forward_signatures(name, RESIDUAL=True, **flags)
        found += backward_signatures(f"{name} backward", RESIDUAL=True, **flags)
    return found
