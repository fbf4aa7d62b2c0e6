"""Triton kernels of LayerNorm with modulation and of the gated residual before it, and their launches.

One forward and one backward kernel serve `norm_modulate`, `gate_residual` and their fusion; the forward kernel also
their fp8 forms.  What an op leaves out is left out when the kernel is compiled.

Legend: B images, L tokens (latent rows first), D channels, S streams of modulation vectors (1 or 2).
"""

from __future__ import annotations

import torch
from torch import Tensor

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


@jit
def norm_residual_kernel(
    p_x,  # [B, L, D]
    p_branch,  # [B, L, D]
    p_gate,  # [B, S, D]
    p_shift,  # [B, S, D]
    p_scale,  # [B, S, D]
    p_sum,  # [B, L, D] contiguous: x', where RESIDUAL
    p_y,  # [B, L, D] contiguous; fp8 where ROW_SCALED
    p_row_scale,  # [B, L] fp32, where ROW_SCALED
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
    RESIDUAL: tl.constexpr,
    GATED: tl.constexpr,
    NORM: tl.constexpr,
    MODULATED: tl.constexpr,
    ROW_SCALED: tl.constexpr,
):
    """x' = x + gate * branch where RESIDUAL, else x; where NORM its modulated LayerNorm, where ROW_SCALED in fp8."""
    i = tl.program_id(0).to(tl.int64)
    i_b = tl.program_id(1).to(tl.int64)
    start, end, stream = tile_rows(i, length, split, ROWS * ITERS)
    if GATED:
        b_gate_hi, b_gate_lo = load_vector(p_gate + i_b * stride_gb + stream * stride_gs, D, HI, LO)
    if MODULATED:
        b_shift_hi, b_shift_lo = load_vector(p_shift + i_b * stride_hb + stream * stride_hs, D, HI, LO)
        b_scale_hi, b_scale_lo = load_vector(p_scale + i_b * stride_cb + stream * stride_cs, D, HI, LO)
    for j in range(ITERS):
        o_row = start + j * ROWS + tl.arange(0, ROWS)
        m_row = o_row < end
        b_hi, b_lo = load_rows(p_x + i_b * stride_xb, stride_xl, o_row, m_row, D, HI, LO)
        if RESIDUAL:
            b_branch_hi, b_branch_lo = load_rows(p_branch + i_b * stride_rb, stride_rl, o_row, m_row, D, HI, LO)
            if GATED:
                b_branch_hi *= b_gate_hi
                b_branch_lo *= b_gate_lo
            b_sum_hi = cast(b_hi + b_branch_hi, p_sum.dtype.element_ty)
            b_sum_lo = cast(b_lo + b_branch_lo, p_sum.dtype.element_ty)
            store_rows(p_sum + i_b * length * D, D, o_row, m_row, b_sum_hi, b_sum_lo, D, HI, LO)
            b_hi, b_lo = b_sum_hi.to(tl.float32), b_sum_lo.to(tl.float32)
        if NORM:
            b_hi, b_lo, _ = normalise(b_hi, b_lo, eps, D, HI, LO)
            if MODULATED:
                b_hi = b_hi * (1.0 + b_scale_hi) + b_shift_hi
                b_lo = b_lo * (1.0 + b_scale_lo) + b_shift_lo
            if ROW_SCALED:
                # Masked columns are zero: normalise leaves zeros there, and the vectors are loaded as zeros.
                b_most = tl.maximum(tl.max(tl.abs(b_hi), 1), tl.max(tl.abs(b_lo), 1))
                b_most = tl.maximum(b_most, 1e-12)
                tl.store(p_row_scale + i_b * length + o_row, b_most / 448.0, mask=m_row)
                b_factor = (448.0 / b_most)[:, None]  # one division a row
                b_hi *= b_factor
                b_lo *= b_factor
            dtype: tl.constexpr = p_y.dtype.element_ty
            store_rows(p_y + i_b * length * D, D, o_row, m_row, cast(b_hi, dtype), cast(b_lo, dtype), D, HI, LO)


@jit
def norm_residual_backward_kernel(
    p_dsum,  # [B, L, D]: gradient that reaches x' directly, where RESIDUAL
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
    RESIDUAL: tl.constexpr,
    GATED: tl.constexpr,
    NORM: tl.constexpr,
    MODULATED: tl.constexpr,
):
    """Gradients of x' and of the branch, and sums over tokens to a tile for those of the vectors."""
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
        if RESIDUAL:
            b_hi, b_lo = load_rows(p_dsum + i_b * stride_dsb, stride_dsl, o_row, m_row, D, HI, LO)
        else:
            b_hi, b_lo = 0.0, 0.0
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
            b_hi = b_hi + b_g_hi
            b_lo = b_lo + b_g_lo
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


def forward(
    x: Tensor, branch: Tensor | None, gate: Tensor | None, shift: Tensor | None, scale: Tensor | None,
    x_new: Tensor | None, y: Tensor | None, row_scale: Tensor | None, split: int, eps: float,
) -> None:  # fmt: skip
    """Write x', y and the row scales of an fp8 y, whichever are wanted; inputs with contiguous channels."""
    b, length, d = x.shape
    if x.numel() == 0:
        return
    launch = row_launch(d, b * length, reduces=False)
    r = x if branch is None else branch
    norm_residual_kernel[(n_tiles(length, split, launch.rows * launch.iters), b)](
        x, r, x if gate is None else gate, x if shift is None else shift, x if scale is None else scale,
        x if x_new is None else x_new, x if y is None else y, x if row_scale is None else row_scale, length, split,
        x.stride(0), x.stride(1), r.stride(0), r.stride(1),
        *vector_strides(gate), *vector_strides(shift), *vector_strides(scale), eps,
        D=d, HI=launch.hi, LO=launch.lo, ROWS=launch.rows, ITERS=launch.iters,
        RESIDUAL=branch is not None, GATED=gate is not None, NORM=y is not None, MODULATED=scale is not None,
        ROW_SCALED=row_scale is not None, num_warps=launch.num_warps,
    )  # fmt: skip


def backward(
    dx_new: Tensor | None, dy: Tensor | None, x_new: Tensor, branch: Tensor | None, gate: Tensor | None,
    scale: Tensor | None, dx: Tensor, dbranch: Tensor, sums: tuple[Tensor, ...], split: int, eps: float,
) -> None:  # fmt: skip
    """Write dx (where there is a norm), dbranch (where there is a gate) and the sums over tokens.

    Args:
        dx_new: gradient that reaches x' directly; None where x' is the input, of `norm_modulate`.
        x_new: x', or anything of its shape where there is no norm.
    """
    b, length, d = x_new.shape
    launch = row_launch(d, b * length, reduces=True)
    tiles = n_tiles(length, split, launch.rows * launch.iters)
    partial = torch.empty(b, tiles, len(sums), d, device=x_new.device, dtype=torch.float32)
    s, r = x_new, x_new if branch is None else branch
    direct, g = s if dx_new is None else dx_new, s if dy is None else dy
    if s.numel():
        norm_residual_backward_kernel[(tiles, b)](
            direct, g, s, r, s if gate is None else gate, s if scale is None else scale,
            dx, dbranch, partial, length, split,
            direct.stride(0), direct.stride(1), g.stride(0), g.stride(1), s.stride(0), s.stride(1),
            r.stride(0), r.stride(1), *vector_strides(gate), *vector_strides(scale), eps,
            D=d, HI=launch.hi, LO=launch.lo, ROWS=launch.rows, ITERS=launch.iters, RESIDUAL=dx_new is not None,
            GATED=gate is not None, NORM=dy is not None, MODULATED=scale is not None, num_warps=launch.num_warps,
        )  # fmt: skip
    if sums:
        sum_tiles(partial, sums, cdiv(split, launch.rows * launch.iters))


def forward_signatures(name: str, **flags: bool) -> list[Signature]:
    """The forward kernel for compilation ahead of time; flags that are not named are off, but for the norm."""
    off = {"RESIDUAL": False, "GATED": False, "NORM": True, "MODULATED": False, "ROW_SCALED": False}
    return row_signatures(name, norm_residual_kernel, False, **(off | flags))


def backward_signatures(name: str, **flags: bool) -> list[Signature]:
    off = {"RESIDUAL": False, "GATED": False, "NORM": True, "MODULATED": False}
    return row_signatures(name, norm_residual_backward_kernel, True, **(off | flags))
