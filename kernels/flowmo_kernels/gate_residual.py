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
from ._rows import (
    Signature,
    load_rows,
    load_vector,
    n_tiles,
    normalise,
    normalise_backward,
    row_launch,
    row_signatures,
    store_rows,
    store_vector,
    sum_tiles,
    tile_rows,
    vector_strides,
)
from ._triton import cast, cdiv, jit, tl
from .norm_modulate import (
    apply_by_stream,
    check_modulation,
    check_norm_modulate,
    compute_dtype,
    norm_modulate_ref,
)


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


@jit
def gate_residual_kernel(
    p_x,  # [B, L, D]
    p_branch,  # [B, L, D]
    p_gate,  # [B, S, D]
    p_shift,  # [B, S, D]
    p_scale,  # [B, S, D]
    p_sum,  # [B, L, D] contiguous: x'
    p_y,  # [B, L, D] contiguous
    length,
    split,
    stride_xb,
    stride_xl,
    stride_rb,
    stride_rl,
    stride_gb,
    stride_gs,
    stride_hb,
    stride_hs,
    stride_cb,
    stride_cs,
    eps,
    D: tl.constexpr,
    HI: tl.constexpr,
    LO: tl.constexpr,
    ROWS: tl.constexpr,
    ITERS: tl.constexpr,
    GATED: tl.constexpr,
    NORM: tl.constexpr,
    MODULATED: tl.constexpr,
):
    """x' = x + gate * branch and, where NORM, its modulated LayerNorm."""
    i = tl.program_id(0).to(tl.int64)
    i_b = tl.program_id(1).to(tl.int64)
    start, end, stream = tile_rows(i, length, split, ROWS * ITERS)
    if GATED:
        b_gate_hi, b_gate_lo = load_vector(p_gate + i_b * stride_gb + stream * stride_gs, D, HI, LO)
    if MODULATED:
        b_shift_hi, b_shift_lo = load_vector(p_shift + i_b * stride_hb + stream * stride_hs, D, HI, LO)
        b_scale_hi, b_scale_lo = load_vector(p_scale + i_b * stride_cb + stream * stride_cs, D, HI, LO)
    dtype: tl.constexpr = p_sum.dtype.element_ty
    for j in range(ITERS):
        o_row = start + j * ROWS + tl.arange(0, ROWS)
        m_row = o_row < end
        b_hi, b_lo = load_rows(p_x + i_b * stride_xb, stride_xl, o_row, m_row, D, HI, LO)
        b_branch_hi, b_branch_lo = load_rows(p_branch + i_b * stride_rb, stride_rl, o_row, m_row, D, HI, LO)
        if GATED:
            b_branch_hi *= b_gate_hi
            b_branch_lo *= b_gate_lo
        b_hi = cast(b_hi + b_branch_hi, dtype)
        b_lo = cast(b_lo + b_branch_lo, dtype)
        store_rows(p_sum + i_b * length * D, D, o_row, m_row, b_hi, b_lo, D, HI, LO)
        if NORM:
            b_hi, b_lo, _ = normalise(b_hi.to(tl.float32), b_lo.to(tl.float32), eps, D, HI, LO)
            if MODULATED:
                b_hi = b_hi * (1.0 + b_scale_hi) + b_shift_hi
                b_lo = b_lo * (1.0 + b_scale_lo) + b_shift_lo
            store_rows(p_y + i_b * length * D, D, o_row, m_row, cast(b_hi, dtype), cast(b_lo, dtype), D, HI, LO)


@jit
def gate_residual_backward_kernel(
    p_dsum,  # [B, L, D]: gradient that reaches x' directly
    p_dy,  # [B, L, D]
    p_sum,  # [B, L, D]: x'
    p_branch,  # [B, L, D]
    p_gate,  # [B, S, D]
    p_scale,  # [B, S, D]
    p_dx,  # [B, L, D] contiguous; where NORM
    p_dbranch,  # [B, L, D] contiguous; where GATED
    p_part,  # [B, tiles, V, D] fp32: partial dgate where GATED, then dshift, dscale where MODULATED
    length,
    split,
    stride_dsb,
    stride_dsl,
    stride_dyb,
    stride_dyl,
    stride_sb,
    stride_sl,
    stride_rb,
    stride_rl,
    stride_gb,
    stride_gs,
    stride_cb,
    stride_cs,
    eps,
    D: tl.constexpr,
    HI: tl.constexpr,
    LO: tl.constexpr,
    ROWS: tl.constexpr,
    ITERS: tl.constexpr,
    GATED: tl.constexpr,
    NORM: tl.constexpr,
    MODULATED: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64)
    i_b = tl.program_id(1).to(tl.int64)
    start, end, stream = tile_rows(i, length, split, ROWS * ITERS)
    if GATED:
        b_gate_hi, b_gate_lo = load_vector(p_gate + i_b * stride_gb + stream * stride_gs, D, HI, LO)
        b_dgate_hi = tl.zeros([HI], tl.float32)
        b_dgate_lo = tl.zeros([LO], tl.float32)
    if MODULATED:
        b_scale_hi, b_scale_lo = load_vector(p_scale + i_b * stride_cb + stream * stride_cs, D, HI, LO)
        b_dshift_hi = tl.zeros([HI], tl.float32)
        b_dshift_lo = tl.zeros([LO], tl.float32)
        b_dscale_hi = tl.zeros([HI], tl.float32)
        b_dscale_lo = tl.zeros([LO], tl.float32)
    for j in range(ITERS):
        o_row = start + j * ROWS + tl.arange(0, ROWS)
        m_row = o_row < end
        b_hi, b_lo = load_rows(p_dsum + i_b * stride_dsb, stride_dsl, o_row, m_row, D, HI, LO)
        if NORM:
            b_n_hi, b_n_lo = load_rows(p_sum + i_b * stride_sb, stride_sl, o_row, m_row, D, HI, LO)
            b_g_hi, b_g_lo = load_rows(p_dy + i_b * stride_dyb, stride_dyl, o_row, m_row, D, HI, LO)
            b_n_hi, b_n_lo, b_rstd = normalise(b_n_hi, b_n_lo, eps, D, HI, LO)
            if MODULATED:
                b_dshift_hi += tl.sum(b_g_hi, 0)
                b_dshift_lo += tl.sum(b_g_lo, 0)
                b_dscale_hi += tl.sum(b_g_hi * b_n_hi, 0)
                b_dscale_lo += tl.sum(b_g_lo * b_n_lo, 0)
                b_g_hi *= 1.0 + b_scale_hi
                b_g_lo *= 1.0 + b_scale_lo
            b_g_hi, b_g_lo = normalise_backward(b_g_hi, b_g_lo, b_n_hi, b_n_lo, b_rstd, D)
            b_hi += b_g_hi
            b_lo += b_g_lo
            dtype: tl.constexpr = p_dx.dtype.element_ty
            p_out = p_dx + i_b * length * D
            store_rows(p_out, D, o_row, m_row, cast(b_hi, dtype), cast(b_lo, dtype), D, HI, LO)
        if GATED:
            b_r_hi, b_r_lo = load_rows(p_branch + i_b * stride_rb, stride_rl, o_row, m_row, D, HI, LO)
            b_dgate_hi += tl.sum(b_hi * b_r_hi, 0)
            b_dgate_lo += tl.sum(b_lo * b_r_lo, 0)
            dtype_branch: tl.constexpr = p_dbranch.dtype.element_ty
            b_hi = cast(b_hi * b_gate_hi, dtype_branch)
            b_lo = cast(b_lo * b_gate_lo, dtype_branch)
            store_rows(p_dbranch + i_b * length * D, D, o_row, m_row, b_hi, b_lo, D, HI, LO)
    n_vectors: tl.constexpr = (1 if GATED else 0) + (2 if MODULATED else 0)
    p_vectors = p_part + (i_b * tl.num_programs(0) + i) * n_vectors * D
    if GATED:
        store_vector(p_vectors, b_dgate_hi, b_dgate_lo, D, HI, LO)
        p_vectors += D
    if MODULATED:
        store_vector(p_vectors, b_dshift_hi, b_dshift_lo, D, HI, LO)
        store_vector(p_vectors + D, b_dscale_hi, b_dscale_lo, D, HI, LO)


def _rows_contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else rows_contiguous(t) for t in tensors]


def _launch_forward(
    x: Tensor, branch: Tensor, gate: Tensor | None, shift: Tensor | None, scale: Tensor | None,
    x_new: Tensor, y: Tensor | None, split: int, eps: float,
) -> None:  # fmt: skip
    b, length, d = x.shape
    if x.numel() == 0:
        return
    launch = row_launch(d, b * length, reduces=False)
    gate_residual_kernel[(n_tiles(length, split, launch.rows * launch.iters), b)](
        x, branch, x if gate is None else gate, x if shift is None else shift, x if scale is None else scale,
        x_new, x_new if y is None else y, length, split,
        x.stride(0), x.stride(1), branch.stride(0), branch.stride(1),
        *vector_strides(gate), *vector_strides(shift), *vector_strides(scale), eps,
        D=d, HI=launch.hi, LO=launch.lo, ROWS=launch.rows, ITERS=launch.iters,
        GATED=gate is not None, NORM=y is not None, MODULATED=scale is not None, num_warps=launch.num_warps,
    )  # fmt: skip


def _launch_backward(
    dx_new: Tensor, dy: Tensor | None, x_new: Tensor | None, branch: Tensor, gate: Tensor | None,
    scale: Tensor | None, dx: Tensor, dbranch: Tensor, sums: tuple[Tensor, ...], split: int, eps: float,
) -> None:  # fmt: skip
    b, length, d = branch.shape
    launch = row_launch(d, b * length, reduces=True)
    tiles = n_tiles(length, split, launch.rows * launch.iters)
    partial = torch.empty(b, tiles, len(sums), d, device=branch.device, dtype=torch.float32)
    s, g = branch if x_new is None else x_new, branch if dy is None else dy
    if branch.numel():
        gate_residual_backward_kernel[(tiles, b)](
            dx_new, g, s, branch, branch if gate is None else gate, branch if scale is None else scale,
            dx, dbranch, partial, length, split,
            dx_new.stride(0), dx_new.stride(1), g.stride(0), g.stride(1), s.stride(0), s.stride(1),
            branch.stride(0), branch.stride(1), *vector_strides(gate), *vector_strides(scale), eps,
            D=d, HI=launch.hi, LO=launch.lo, ROWS=launch.rows, ITERS=launch.iters,
            GATED=gate is not None, NORM=dy is not None, MODULATED=scale is not None, num_warps=launch.num_warps,
        )  # fmt: skip
    if sums:
        sum_tiles(partial, sums, cdiv(split, launch.rows * launch.iters))


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
    _launch_forward(x, branch, gate, None, None, x_new, None, split, 0.0)
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
    _launch_backward(dx_new, None, None, branch, gate, None, dbranch, dbranch, (dgate,), split, 0.0)
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
    _launch_forward(x, branch, gate, shift, scale, x_new, y, split, eps)
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
    _launch_backward(dx_new, dy, x_new, branch, gate, scale, dx, dbranch, sums, split, eps)
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
    """Every kernel of this file at the real shapes, for compilation ahead of time."""
    forward, backward = gate_residual_kernel, gate_residual_backward_kernel
    found: list[Signature] = []
    for name, flags in {
        "gate_residual": {"GATED": True, "NORM": False, "MODULATED": False},
        "gate_residual_norm_modulate": {"GATED": True, "NORM": True, "MODULATED": True},
        "gate_residual_norm_modulate plain": {"GATED": False, "NORM": True, "MODULATED": False},
    }.items():
        found += row_signatures(name, forward, False, **flags)
        found += row_signatures(f"{name} backward", backward, True, **flags)
    return found
