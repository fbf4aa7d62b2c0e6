"""Per-head RMSNorm of q and k, then rotary position embedding, in a joint qkv buffer.

    r = 1/sqrt(mean(x^2) + eps),  n = r x,  u = g n
    (y_2i, y_2i+1) = (u_2i cos_i - u_2i+1 sin_i, u_2i+1 cos_i + u_2i sin_i)

Query-key normalisation and rotary embedding of the transformer blocks (supplement of the paper, as in the released
code).  The gradient turns dy back by the same angles into du; then dg = sum of du n over images, tokens and heads,
and dx = r (g du - n mean(g du n)).

Legend: B images, L tokens (latent rows first), H heads, d channels of a head.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ._dispatch import chosen
from ._library import register, rows_contiguous, wants_grad
from ._rows import Signature, n_tiles, signature, sum_tiles, tile_rows
from ._triton import cast, cdiv, jit, next_power_of_2, tl
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


class _Launch(NamedTuple):
    hi: int  # pairs of the first part of a head, a power of two, all inside the head
    lo: int  # pairs of the second part, a power of two
    rows: int  # tokens held at once
    iters: int  # times `rows` tokens to a program
    num_warps: int


def _launch(d: int, n_rows: int, reduces: bool) -> _Launch:
    """Launch sizes: a head of 96 channels is held as 32 + 16 pairs, so no lane is idle."""
    half = d // 2
    hi = next_power_of_2(half) // 2 if half > 1 else 1
    lo = next_power_of_2(half - hi) if half > hi else 1
    return _Launch(hi, lo, 16, 4 if reduces and n_rows >= 32768 else 1, 4 if d > 64 else 2)


@jit
def load_pairs(p_x, stride, o_row, m_row, FIRST: tl.constexpr, N: tl.constexpr, HALF: tl.constexpr):
    """Pairs FIRST .. FIRST + N of rows o_row in fp32, as even and odd channels [ROWS, N]."""
    o = 2 * FIRST + tl.arange(0, 2 * N)
    m = m_row[:, None] & (o < 2 * HALF)[None, :]
    b = tl.load(p_x + (o_row * stride)[:, None] + o[None, :], mask=m, other=0.0).to(tl.float32)
    return tl.split(tl.reshape(b, [o_row.shape[0], N, 2]))


@jit
def store_pairs(p_y, stride, o_row, m_row, b_even, b_odd, FIRST: tl.constexpr, N: tl.constexpr, HALF: tl.constexpr):
    o = 2 * FIRST + tl.arange(0, 2 * N)
    m = m_row[:, None] & (o < 2 * HALF)[None, :]
    b = tl.reshape(tl.join(b_even, b_odd), [o_row.shape[0], 2 * N])
    tl.store(p_y + (o_row * stride)[:, None] + o[None, :], cast(b, p_y.dtype.element_ty), mask=m)


@jit
def load_gain(p_g, FIRST: tl.constexpr, N: tl.constexpr, HALF: tl.constexpr):
    """Gains of pairs FIRST .. FIRST + N, even and odd [1, N]."""
    o = 2 * (FIRST + tl.arange(0, N))
    b_even = tl.load(p_g + o, mask=o < 2 * HALF, other=0.0).to(tl.float32)
    b_odd = tl.load(p_g + o + 1, mask=o < 2 * HALF, other=0.0).to(tl.float32)
    return b_even[None, :], b_odd[None, :]


@jit
def load_angles(p_cos, p_sin, o_row, m_row, FIRST: tl.constexpr, N: tl.constexpr, HALF: tl.constexpr):
    o = FIRST + tl.arange(0, N)
    m = m_row[:, None] & (o < HALF)[None, :]
    o = (o_row * HALF)[:, None] + o[None, :]
    return tl.load(p_cos + o, mask=m, other=0.0), tl.load(p_sin + o, mask=m, other=0.0)


@jit
def sum_pairs(b_hi_even, b_hi_odd, b_lo_even, b_lo_odd):
    """Sum over the channels of a head, [ROWS, 1]."""
    return (tl.sum(b_hi_even + b_hi_odd, 1) + tl.sum(b_lo_even + b_lo_odd, 1))[:, None]


@jit
def copy_heads(p_x, stride_xl, stride_xh, p_y, stride_yl, stride_yh, o_row, m_row, H,
               HALF: tl.constexpr, HI: tl.constexpr, LO: tl.constexpr):  # fmt: skip
    """Rows o_row of every head, unchanged."""
    for h in range(H):
        p_in, p_out = p_x + h * stride_xh, p_y + h * stride_yh
        b_even, b_odd = load_pairs(p_in, stride_xl, o_row, m_row, 0, HI, HALF)
        store_pairs(p_out, stride_yl, o_row, m_row, b_even, b_odd, 0, HI, HALF)
        b_even, b_odd = load_pairs(p_in, stride_xl, o_row, m_row, HI, LO, HALF)
        store_pairs(p_out, stride_yl, o_row, m_row, b_even, b_odd, HI, LO, HALF)


@jit
def qk_norm_rope_kernel(
    p_x,  # [B, L, 3, H, d]
    p_q_scale,  # [S, d]
    p_k_scale,  # [S, d]
    p_cos,  # [L, d/2] fp32
    p_sin,  # [L, d/2] fp32
    p_y,  # [B, L, 3, H, d]; may be p_x
    length,
    split,
    H,
    stride_xb,
    stride_xl,
    stride_xc,
    stride_xh,
    stride_yb,
    stride_yl,
    stride_yc,
    stride_yh,
    stride_g,
    eps,
    HALF: tl.constexpr,
    HI: tl.constexpr,
    LO: tl.constexpr,
    ROWS: tl.constexpr,
    ITERS: tl.constexpr,
    COPY_V: tl.constexpr,
):
    """Grid (tiles of tokens, images, q and k, and v where it is copied)."""
    i = tl.program_id(0).to(tl.int64)
    i_b = tl.program_id(1).to(tl.int64)
    i_c = tl.program_id(2).to(tl.int64)
    start, end, stream = tile_rows(i, length, split, ROWS * ITERS)
    p_x += i_b * stride_xb + i_c * stride_xc
    p_y += i_b * stride_yb + i_c * stride_yc
    if COPY_V:
        if i_c == 2:
            for j in range(ITERS):
                o_row = start + j * ROWS + tl.arange(0, ROWS)
                copy_heads(p_x, stride_xl, stride_xh, p_y, stride_yl, stride_yh, o_row, o_row < end, H, HALF, HI, LO)
            return
    p_g = tl.where(i_c == 0, p_q_scale, p_k_scale) + stream * stride_g
    b_g_he, b_g_ho = load_gain(p_g, 0, HI, HALF)
    b_g_le, b_g_lo = load_gain(p_g, HI, LO, HALF)
    for j in range(ITERS):
        o_row = start + j * ROWS + tl.arange(0, ROWS)
        m_row = o_row < end
        b_cos_h, b_sin_h = load_angles(p_cos, p_sin, o_row, m_row, 0, HI, HALF)
        b_cos_l, b_sin_l = load_angles(p_cos, p_sin, o_row, m_row, HI, LO, HALF)
        for h in range(H):
            p_head = p_x + h * stride_xh
            b_he, b_ho = load_pairs(p_head, stride_xl, o_row, m_row, 0, HI, HALF)
            b_le, b_lo = load_pairs(p_head, stride_xl, o_row, m_row, HI, LO, HALF)
            b_square = sum_pairs(b_he * b_he, b_ho * b_ho, b_le * b_le, b_lo * b_lo)
            b_r = 1.0 / tl.sqrt_rn(b_square / (2 * HALF) + eps)
            b_he *= b_r * b_g_he
            b_ho *= b_r * b_g_ho
            b_le *= b_r * b_g_le
            b_lo *= b_r * b_g_lo
            p_out = p_y + h * stride_yh
            b_even, b_odd = b_he * b_cos_h - b_ho * b_sin_h, b_ho * b_cos_h + b_he * b_sin_h
            store_pairs(p_out, stride_yl, o_row, m_row, b_even, b_odd, 0, HI, HALF)
            b_even, b_odd = b_le * b_cos_l - b_lo * b_sin_l, b_lo * b_cos_l + b_le * b_sin_l
            store_pairs(p_out, stride_yl, o_row, m_row, b_even, b_odd, HI, LO, HALF)


@jit
def qk_norm_rope_backward_kernel(
    p_dy,  # [B, L, 3, H, d]
    p_x,  # [B, L, 3, H, d]
    p_q_scale,  # [S, d]
    p_k_scale,  # [S, d]
    p_cos,  # [L, d/2] fp32
    p_sin,  # [L, d/2] fp32
    p_dx,  # [B, L, 3, H, d] contiguous
    p_part,  # [tiles, B, 2, d] fp32: partial gradients of q_scale, k_scale
    length,
    split,
    H,
    stride_dyb,
    stride_dyl,
    stride_dyc,
    stride_dyh,
    stride_xb,
    stride_xl,
    stride_xc,
    stride_xh,
    stride_dxb,
    stride_dxl,
    stride_dxc,
    stride_dxh,
    stride_g,
    eps,
    HALF: tl.constexpr,
    HI: tl.constexpr,
    LO: tl.constexpr,
    ROWS: tl.constexpr,
    ITERS: tl.constexpr,
):
    """Grid (tiles of tokens, images, q, k and v, whose gradient is copied)."""
    i = tl.program_id(0).to(tl.int64)
    i_b = tl.program_id(1).to(tl.int64)
    i_c = tl.program_id(2).to(tl.int64)
    start, end, stream = tile_rows(i, length, split, ROWS * ITERS)
    p_dy += i_b * stride_dyb + i_c * stride_dyc
    p_x += i_b * stride_xb + i_c * stride_xc
    p_dx += i_b * stride_dxb + i_c * stride_dxc
    if i_c == 2:
        for j in range(ITERS):
            o_row = start + j * ROWS + tl.arange(0, ROWS)
            m_row = o_row < end
            copy_heads(p_dy, stride_dyl, stride_dyh, p_dx, stride_dxl, stride_dxh, o_row, m_row, H, HALF, HI, LO)
        return
    p_g = tl.where(i_c == 0, p_q_scale, p_k_scale) + stream * stride_g
    b_g_he, b_g_ho = load_gain(p_g, 0, HI, HALF)
    b_g_le, b_g_lo = load_gain(p_g, HI, LO, HALF)
    b_dg_he = tl.zeros([ROWS, HI], tl.float32)
    b_dg_ho = tl.zeros([ROWS, HI], tl.float32)
    b_dg_le = tl.zeros([ROWS, LO], tl.float32)
    b_dg_lo = tl.zeros([ROWS, LO], tl.float32)
    for j in range(ITERS):
        o_row = start + j * ROWS + tl.arange(0, ROWS)
        m_row = o_row < end
        b_cos_h, b_sin_h = load_angles(p_cos, p_sin, o_row, m_row, 0, HI, HALF)
        b_cos_l, b_sin_l = load_angles(p_cos, p_sin, o_row, m_row, HI, LO, HALF)
        for h in range(H):
            p_head = p_x + h * stride_xh
            b_he, b_ho = load_pairs(p_head, stride_xl, o_row, m_row, 0, HI, HALF)
            b_le, b_lo = load_pairs(p_head, stride_xl, o_row, m_row, HI, LO, HALF)
            b_square = sum_pairs(b_he * b_he, b_ho * b_ho, b_le * b_le, b_lo * b_lo)
            b_r = 1.0 / tl.sqrt_rn(b_square / (2 * HALF) + eps)
            b_he *= b_r
            b_ho *= b_r
            b_le *= b_r
            b_lo *= b_r
            p_head = p_dy + h * stride_dyh
            b_even, b_odd = load_pairs(p_head, stride_dyl, o_row, m_row, 0, HI, HALF)
            b_du_he, b_du_ho = b_even * b_cos_h + b_odd * b_sin_h, b_odd * b_cos_h - b_even * b_sin_h
            b_even, b_odd = load_pairs(p_head, stride_dyl, o_row, m_row, HI, LO, HALF)
            b_du_le, b_du_lo = b_even * b_cos_l + b_odd * b_sin_l, b_odd * b_cos_l - b_even * b_sin_l
            b_dg_he += b_du_he * b_he
            b_dg_ho += b_du_ho * b_ho
            b_dg_le += b_du_le * b_le
            b_dg_lo += b_du_lo * b_lo
            b_du_he *= b_g_he
            b_du_ho *= b_g_ho
            b_du_le *= b_g_le
            b_du_lo *= b_g_lo
            b_dot = sum_pairs(b_du_he * b_he, b_du_ho * b_ho, b_du_le * b_le, b_du_lo * b_lo) / (2 * HALF)
            p_out = p_dx + h * stride_dxh
            b_even, b_odd = b_r * (b_du_he - b_he * b_dot), b_r * (b_du_ho - b_ho * b_dot)
            store_pairs(p_out, stride_dxl, o_row, m_row, b_even, b_odd, 0, HI, HALF)
            b_even, b_odd = b_r * (b_du_le - b_le * b_dot), b_r * (b_du_lo - b_lo * b_dot)
            store_pairs(p_out, stride_dxl, o_row, m_row, b_even, b_odd, HI, LO, HALF)
    p_sum = p_part + ((i * tl.num_programs(1) + i_b) * 2 + i_c) * 2 * HALF
    o = 2 * tl.arange(0, HI)
    tl.store(p_sum + o, tl.sum(b_dg_he, 0))
    tl.store(p_sum + o + 1, tl.sum(b_dg_ho, 0))
    o = 2 * (HI + tl.arange(0, LO))
    tl.store(p_sum + o, tl.sum(b_dg_le, 0), mask=o < 2 * HALF)
    tl.store(p_sum + o + 1, tl.sum(b_dg_lo, 0), mask=o < 2 * HALF)


def _launch_forward(
    x: Tensor, q_scale: Tensor, k_scale: Tensor, cos: Tensor, sin: Tensor, y: Tensor, split: int, eps: float
) -> None:
    b, length, _, h, d = x.shape
    if x.numel() == 0:
        return
    launch = _launch(d, b * length, reduces=False)
    grid = (n_tiles(length, split, launch.rows * launch.iters), b, 2 if y is x else 3)
    qk_norm_rope_kernel[grid](
        x, q_scale, k_scale, cos, sin, y, length, split, h, *x.stride()[:4], *y.stride()[:4],
        d if q_scale.dim() == 2 else 0, eps,
        HALF=d // 2, HI=launch.hi, LO=launch.lo, ROWS=launch.rows, ITERS=launch.iters, COPY_V=y is not x,
        num_warps=launch.num_warps,
    )  # fmt: skip


def _tables(q_scale: Tensor, k_scale: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As the kernels read them: contiguous, and both gains in one dtype, as one pointer is chosen among them."""
    return q_scale.contiguous(), k_scale.to(q_scale.dtype).contiguous(), cos.contiguous(), sin.contiguous()


def _forward(
    qkv: Tensor, q_scale: Tensor, k_scale: Tensor, cos: Tensor, sin: Tensor, split: int, eps: float, impl: str
) -> Tensor:
    qkv = rows_contiguous(qkv)
    q_scale, k_scale, cos, sin = _tables(q_scale, k_scale, cos, sin)
    if impl == "cuda":
        from . import _cuda

        out: Tensor = _cuda.qk_norm_rope(qkv, q_scale, k_scale, cos, sin, split, eps)
        return out
    y = torch.empty(qkv.shape, device=qkv.device, dtype=qkv.dtype)
    _launch_forward(qkv, q_scale, k_scale, cos, sin, y, split, eps)
    return y


def _forward_fake(
    qkv: Tensor, q_scale: Tensor, k_scale: Tensor, cos: Tensor, sin: Tensor, split: int, eps: float, impl: str
) -> Tensor:
    return torch.empty(qkv.shape, device=qkv.device, dtype=qkv.dtype)


def _inplace(
    qkv: Tensor, q_scale: Tensor, k_scale: Tensor, cos: Tensor, sin: Tensor, split: int, eps: float, impl: str
) -> None:
    q_scale, k_scale, cos, sin = _tables(q_scale, k_scale, cos, sin)
    if impl == "cuda":
        from . import _cuda

        _cuda.qk_norm_rope_(qkv, q_scale, k_scale, cos, sin, split, eps)
    else:
        _launch_forward(qkv, q_scale, k_scale, cos, sin, qkv, split, eps)


def _inplace_fake(
    qkv: Tensor, q_scale: Tensor, k_scale: Tensor, cos: Tensor, sin: Tensor, split: int, eps: float, impl: str
) -> None:
    return None


def _backward(
    dy: Tensor, qkv: Tensor, q_scale: Tensor, k_scale: Tensor, cos: Tensor, sin: Tensor,
    split: int, eps: float, impl: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dy, qkv = rows_contiguous(dy), rows_contiguous(qkv)
    q_scale, k_scale, cos, sin = _tables(q_scale, k_scale, cos, sin)
    if impl == "cuda":
        from . import _cuda

        dx, dq, dk = _cuda.qk_norm_rope_backward(dy, qkv, q_scale, k_scale, cos, sin, split, eps)
        return dx, dq, dk
    dx, dq, dk = _backward_fake(dy, qkv, q_scale, k_scale, cos, sin, split, eps, impl)
    b, length, _, h, d = qkv.shape
    launch = _launch(d, b * length, reduces=True)
    tiles = n_tiles(length, split, launch.rows * launch.iters)
    partial = torch.empty(1, tiles * b, 2, d, device=qkv.device, dtype=torch.float32)
    if qkv.numel():
        qk_norm_rope_backward_kernel[(tiles, b, 3)](
            dy, qkv, q_scale, k_scale, cos, sin, dx, partial, length, split, h,
            *dy.stride()[:4], *qkv.stride()[:4], *dx.stride()[:4],
            d if q_scale.dim() == 2 else 0, eps,
            HALF=d // 2, HI=launch.hi, LO=launch.lo, ROWS=launch.rows, ITERS=launch.iters,
            num_warps=launch.num_warps,
        )  # fmt: skip
    sum_tiles(partial, (dq[None], dk[None]), cdiv(split, launch.rows * launch.iters) * b)
    return dx, dq, dk


def _backward_fake(
    dy: Tensor, qkv: Tensor, q_scale: Tensor, k_scale: Tensor, cos: Tensor, sin: Tensor,
    split: int, eps: float, impl: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dx = torch.empty(qkv.shape, device=qkv.device, dtype=qkv.dtype)
    dq = torch.empty(q_scale.shape, device=qkv.device, dtype=torch.float32)
    return dx, dq, torch.empty_like(dq)


_ARGUMENTS = "Tensor q_scale, Tensor k_scale, Tensor cos, Tensor sin, int split, float eps, str impl"
_op = register(f"qk_norm_rope(Tensor qkv, {_ARGUMENTS}) -> Tensor", _forward, _forward_fake)
_op_inplace = register(f"qk_norm_rope_(Tensor(a!) qkv, {_ARGUMENTS}) -> ()", _inplace, _inplace_fake)
_op_backward = register(
    f"qk_norm_rope_backward(Tensor dy, Tensor qkv, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)


class _QKNormRope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv, q_scale, k_scale, cos, sin, split, eps, impl):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(qkv, q_scale, k_scale, cos, sin)
        ctx.constants = split, eps, impl
        return _op(qkv, q_scale, k_scale, cos, sin, split, eps, impl)

    @staticmethod
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        qkv, q_scale, k_scale, cos, sin = ctx.saved_tensors
        dx, dq, dk = _op_backward(dy, qkv, q_scale, k_scale, cos, sin, *ctx.constants)
        return dx, dq.to(q_scale.dtype), dk.to(k_scale.dtype), None, None, None, None, None


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
    impl = chosen("qk_norm_rope", qkv)
    if impl == "ref":
        return qk_norm_rope_ref(qkv, q_scale, k_scale, rope, split=split, eps=eps, inplace=inplace)
    check_qk_norm_rope(qkv, q_scale, k_scale, rope, split)
    cos, sin = rope
    if inplace:
        if qkv.stride(-1) != 1:
            raise ValueError(f"qkv has strides {qkv.stride()}; inplace=True needs contiguous channels (last stride 1)")
        _op_inplace(qkv, q_scale, k_scale, cos, sin, split, eps, impl)
        return qkv
    if wants_grad(qkv, q_scale, k_scale):
        return _QKNormRope.apply(qkv, q_scale, k_scale, cos, sin, split, eps, impl)
    return _op(qkv, q_scale, k_scale, cos, sin, split, eps, impl)


def aot_signatures() -> list[Signature]:
    """Every kernel of this file at the real shapes, for compilation ahead of time."""
    kinds = dict.fromkeys(("p_q_scale", "p_k_scale", "p_cos", "p_sin", "p_part"), "*fp32") | {"eps": "fp32"}
    found: list[Signature] = []
    for d in (64, 96):
        for name, kernel, flags in (
            ("qk_norm_rope", qk_norm_rope_kernel, {"COPY_V": True}),
            ("qk_norm_rope in place", qk_norm_rope_kernel, {"COPY_V": False}),
            ("qk_norm_rope backward", qk_norm_rope_backward_kernel, {}),
        ):
            n = _launch(d, 8 * 4352, reduces="backward" in name)
            sizes = {"HALF": d // 2, "HI": n.hi, "LO": n.lo, "ROWS": n.rows, "ITERS": n.iters}
            found.append(signature(kernel, kinds, {**sizes, **flags}, n.num_warps, 3, f"{name} d={d}"))
    return found
