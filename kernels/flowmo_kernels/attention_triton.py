"""Attention in Triton: a head of 96 channels as 64 + 32, and no running maximum where the logits are bounded.

    s = c q k^T,  p = 2^(s - m),  l = sum p,  o = (p v) / l,  lse = m + log2 l          c = scale log2(e)
    p = 2^(s - lse),  delta = sum(o do),  ds = p (do v^T - delta)
    dv = p^T do,  dk = scale ds^T q,  dq = scale ds k

m is the running row maximum, or 0 where |s| is known to stay far below the range of fp32: query-key normalisation
bounds the logits by 8 max|g_q| max|g_k|.  Then p keeps its full relative precision and nothing is ever rescaled.
Key and query gradients come from two kernels that each own their output, so the result does not depend on the order
in which programs run.

Legend: B images, L keys, Lq queries, H heads, d channels of a head; a tile has M query rows and N key rows.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ._library import register, rows_contiguous, wants_grad
from ._rows import Signature, signature
from ._triton import cast, cdiv, dot, jit, next_power_of_2, tl

MAX_HEAD_DIM = 128
SAFE_LOGIT = 60.0  # natural units; e^60 times a million keys is far inside fp32 and bf16


class _Blocks(NamedTuple):
    d1: int  # channels of the first part, a power of two
    d2: int  # channels of the second part, a power of two, or 0
    forward: tuple[int, int, int, int]  # M, N, warps, stages
    dkdv: tuple[int, int, int, int]
    dq: tuple[int, int, int, int]


def blocks(d: int, length: int, itemsize: int) -> _Blocks:
    """Tile sizes for heads of d channels and elements of `itemsize` bytes."""
    d1 = max(16, next_power_of_2(d) if d == next_power_of_2(d) else next_power_of_2(d) // 2)
    d2 = max(16, next_power_of_2(d - d1)) if d > d1 else 0
    most = max(16, next_power_of_2(length))
    if itemsize > 2:
        sizes = (64, 32, 4, 2), (32, 32, 4, 2), (32, 32, 4, 2)
    else:
        # Tiles that spill on none of sm_80, sm_90 and sm_100; for more than 64 channels the key and value gradients
        # of 128 keys leave room for 32 queries.
        sizes = (128, 64, 8 if d > 64 else 4, 3), (32 if d > 64 else 64, 128, 8, 2), (128, 64, 8, 2)
    forward, dkdv, dq = ((min(m, most), min(n, most), warps, stages) for m, n, warps, stages in sizes)
    return _Blocks(d1, d2, forward, dkdv, dq)


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


@jit
def attention_kernel(
    p_q,  # [B, Lq, H, d]
    p_k,  # [B, L, H, d]
    p_v,
    p_o,  # [B, Lq, H, d], heads contiguous
    p_lse,  # [B, H, Lq] fp32, log base 2
    n_queries,
    length,
    H,
    stride_qb,
    stride_ql,
    stride_qh,
    stride_kb,
    stride_kl,
    stride_kh,
    stride_vb,
    stride_vl,
    stride_vh,
    n_beside,  # images whose rows lie side by side in o: 1, or all of them
    c,
    D: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    EVEN_N: tl.constexpr,
    BOUNDED: tl.constexpr,
):
    i_bh = tl.program_id(1).to(tl.int64)
    i_b = i_bh // H
    i_h = i_bh % H
    p_q += i_b * stride_qb + i_h * stride_qh
    p_k += i_b * stride_kb + i_h * stride_kh
    p_v += i_b * stride_vb + i_h * stride_vh
    o_m = tl.program_id(0) * M + tl.arange(0, M)
    b_q1 = load_part(p_q, stride_ql, o_m, n_queries, 0, D1, D, False)
    b_o1 = tl.zeros([M, D1], tl.float32)
    if D2 > 0:
        b_q2 = load_part(p_q, stride_ql, o_m, n_queries, D1, D2, D, False)
        b_o2 = tl.zeros([M, D2], tl.float32)
    b_l = tl.zeros([M], tl.float32)
    b_max = tl.full([M], float("-inf"), tl.float32)
    for i_n in range(0, length, N):
        o_n = i_n + tl.arange(0, N)
        b_k = load_part(p_k, stride_kl, o_n, length, 0, D1, D, EVEN_N)
        b_s = dot(b_q1, tl.trans(b_k), tl.zeros([M, N], tl.float32))
        if D2 > 0:
            b_k = load_part(p_k, stride_kl, o_n, length, D1, D2, D, EVEN_N)
            b_s = dot(b_q2, tl.trans(b_k), b_s)
        if not EVEN_N:
            b_s = tl.where((o_n < length)[None, :], b_s, float("-inf"))
        if BOUNDED:
            b_p = tl.exp2(b_s * c)
        else:
            b_new = tl.maximum(b_max, tl.max(b_s, 1) * c)
            b_p = tl.exp2(b_s * c - b_new[:, None])
            b_shrink = tl.exp2(b_max - b_new)
            b_max = b_new
            b_l *= b_shrink
            b_o1 *= b_shrink[:, None]
            if D2 > 0:
                b_o2 *= b_shrink[:, None]
        b_l += tl.sum(b_p, 1)
        b_p = cast(b_p, p_v.dtype.element_ty)
        b_o1 = dot(b_p, load_part(p_v, stride_vl, o_n, length, 0, D1, D, EVEN_N), b_o1)
        if D2 > 0:
            b_o2 = dot(b_p, load_part(p_v, stride_vl, o_n, length, D1, D2, D, EVEN_N), b_o2)
    b_lse = tl.log2(b_l)
    if not BOUNDED:
        b_lse += b_max
    tl.store(p_lse + i_bh * n_queries + o_m, b_lse, mask=o_m < n_queries)
    p_o += (i_b * tl.where(n_beside == 1, n_queries, 1) * H + i_h) * D
    store_part(p_o, n_beside * H * D, o_m, n_queries, b_o1 / b_l[:, None], 0, D1, D)
    if D2 > 0:
        store_part(p_o, n_beside * H * D, o_m, n_queries, b_o2 / b_l[:, None], D1, D2, D)


@jit
def attention_delta_kernel(
    p_o,  # [B, Lq, H, d] contiguous
    p_do,  # [B, Lq, H, d]
    p_delta,  # [B, H, Lq] fp32
    n_queries,
    H,
    stride_dob,
    stride_dol,
    stride_doh,
    D: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    M: tl.constexpr,
):
    """delta = sum over channels of o do."""
    i_bh = tl.program_id(1).to(tl.int64)
    i_b = i_bh // H
    i_h = i_bh % H
    o_m = tl.program_id(0) * M + tl.arange(0, M)
    p_o += (i_b * n_queries * H + i_h) * D
    p_do += i_b * stride_dob + i_h * stride_doh
    b_o = load_part(p_o, H * D, o_m, n_queries, 0, D1, D, False).to(tl.float32)
    b_delta = tl.sum(b_o * load_part(p_do, stride_dol, o_m, n_queries, 0, D1, D, False).to(tl.float32), 1)
    if D2 > 0:
        b_o = load_part(p_o, H * D, o_m, n_queries, D1, D2, D, False).to(tl.float32)
        b_delta += tl.sum(b_o * load_part(p_do, stride_dol, o_m, n_queries, D1, D2, D, False).to(tl.float32), 1)
    tl.store(p_delta + i_bh * n_queries + o_m, b_delta, mask=o_m < n_queries)


@jit
def attention_dkdv_kernel(
    p_q,  # [B, Lq, H, d]
    p_k,  # [B, L, H, d]
    p_v,
    p_do,  # [B, Lq, H, d]
    p_lse,  # [B, H, Lq] fp32
    p_delta,  # [B, H, Lq] fp32
    p_dk,  # [B, L, H, d] contiguous
    p_dv,
    n_queries,
    length,
    H,
    stride_qb,
    stride_ql,
    stride_qh,
    stride_kb,
    stride_kl,
    stride_kh,
    stride_vb,
    stride_vl,
    stride_vh,
    stride_dob,
    stride_dol,
    stride_doh,
    c,
    scale,
    D: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    EVEN_M: tl.constexpr,
):
    """Key and value gradients of N keys; the scores are held transposed, [N, M]."""
    i_bh = tl.program_id(1).to(tl.int64)
    i_b = i_bh // H
    i_h = i_bh % H
    p_q += i_b * stride_qb + i_h * stride_qh
    p_k += i_b * stride_kb + i_h * stride_kh
    p_v += i_b * stride_vb + i_h * stride_vh
    p_do += i_b * stride_dob + i_h * stride_doh
    p_lse += i_bh * n_queries
    p_delta += i_bh * n_queries
    o_n = tl.program_id(0) * N + tl.arange(0, N)
    b_k1 = load_part(p_k, stride_kl, o_n, length, 0, D1, D, False)
    b_v1 = load_part(p_v, stride_vl, o_n, length, 0, D1, D, False)
    b_dk1 = tl.zeros([N, D1], tl.float32)
    b_dv1 = tl.zeros([N, D1], tl.float32)
    if D2 > 0:
        b_k2 = load_part(p_k, stride_kl, o_n, length, D1, D2, D, False)
        b_v2 = load_part(p_v, stride_vl, o_n, length, D1, D2, D, False)
        b_dk2 = tl.zeros([N, D2], tl.float32)
        b_dv2 = tl.zeros([N, D2], tl.float32)
    for i_m in range(0, n_queries, M):
        o_m = i_m + tl.arange(0, M)
        b_q1 = load_part(p_q, stride_ql, o_m, n_queries, 0, D1, D, EVEN_M)
        b_s = dot(b_k1, tl.trans(b_q1), tl.zeros([N, M], tl.float32))
        if D2 > 0:
            b_q2 = load_part(p_q, stride_ql, o_m, n_queries, D1, D2, D, EVEN_M)
            b_s = dot(b_k2, tl.trans(b_q2), b_s)
        # Query rows past the end have lse = inf, so their p is 0.
        b_lse = tl.load(p_lse + o_m, mask=o_m < n_queries, other=float("inf"))
        b_delta = tl.load(p_delta + o_m, mask=o_m < n_queries, other=0.0)
        b_p = tl.exp2(b_s * c - b_lse[None, :])
        b_do1 = load_part(p_do, stride_dol, o_m, n_queries, 0, D1, D, EVEN_M)
        b_dp = dot(b_v1, tl.trans(b_do1), tl.zeros([N, M], tl.float32))
        b_p_low = cast(b_p, p_q.dtype.element_ty)
        b_dv1 = dot(b_p_low, b_do1, b_dv1)
        if D2 > 0:
            b_do2 = load_part(p_do, stride_dol, o_m, n_queries, D1, D2, D, EVEN_M)
            b_dp = dot(b_v2, tl.trans(b_do2), b_dp)
            b_dv2 = dot(b_p_low, b_do2, b_dv2)
        b_ds = cast(b_p * (b_dp - b_delta[None, :]), p_q.dtype.element_ty)
        b_dk1 = dot(b_ds, b_q1, b_dk1)
        if D2 > 0:
            b_dk2 = dot(b_ds, b_q2, b_dk2)
    o_out = (i_b * length * H + i_h) * D
    store_part(p_dk + o_out, H * D, o_n, length, b_dk1 * scale, 0, D1, D)
    store_part(p_dv + o_out, H * D, o_n, length, b_dv1, 0, D1, D)
    if D2 > 0:
        store_part(p_dk + o_out, H * D, o_n, length, b_dk2 * scale, D1, D2, D)
        store_part(p_dv + o_out, H * D, o_n, length, b_dv2, D1, D2, D)


@jit
def attention_dq_kernel(
    p_q,  # [B, Lq, H, d]
    p_k,  # [B, L, H, d]
    p_v,
    p_do,  # [B, Lq, H, d]
    p_lse,  # [B, H, Lq] fp32
    p_delta,  # [B, H, Lq] fp32
    p_dq,  # [B, Lq, H, d] contiguous
    n_queries,
    length,
    H,
    stride_qb,
    stride_ql,
    stride_qh,
    stride_kb,
    stride_kl,
    stride_kh,
    stride_vb,
    stride_vl,
    stride_vh,
    stride_dob,
    stride_dol,
    stride_doh,
    c,
    scale,
    D: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    EVEN_N: tl.constexpr,
):
    """Query gradients of M queries."""
    i_bh = tl.program_id(1).to(tl.int64)
    i_b = i_bh // H
    i_h = i_bh % H
    p_q += i_b * stride_qb + i_h * stride_qh
    p_k += i_b * stride_kb + i_h * stride_kh
    p_v += i_b * stride_vb + i_h * stride_vh
    p_do += i_b * stride_dob + i_h * stride_doh
    o_m = tl.program_id(0) * M + tl.arange(0, M)
    b_lse = tl.load(p_lse + i_bh * n_queries + o_m, mask=o_m < n_queries, other=float("inf"))[:, None]
    b_delta = tl.load(p_delta + i_bh * n_queries + o_m, mask=o_m < n_queries, other=0.0)[:, None]
    b_q1 = load_part(p_q, stride_ql, o_m, n_queries, 0, D1, D, False)
    b_do1 = load_part(p_do, stride_dol, o_m, n_queries, 0, D1, D, False)
    b_dq1 = tl.zeros([M, D1], tl.float32)
    if D2 > 0:
        b_q2 = load_part(p_q, stride_ql, o_m, n_queries, D1, D2, D, False)
        b_do2 = load_part(p_do, stride_dol, o_m, n_queries, D1, D2, D, False)
        b_dq2 = tl.zeros([M, D2], tl.float32)
    for i_n in range(0, length, N):
        o_n = i_n + tl.arange(0, N)
        b_k1 = load_part(p_k, stride_kl, o_n, length, 0, D1, D, EVEN_N)
        b_s = dot(b_q1, tl.trans(b_k1), tl.zeros([M, N], tl.float32))
        b_v = load_part(p_v, stride_vl, o_n, length, 0, D1, D, EVEN_N)
        b_dp = dot(b_do1, tl.trans(b_v), tl.zeros([M, N], tl.float32))
        if D2 > 0:
            b_k2 = load_part(p_k, stride_kl, o_n, length, D1, D2, D, EVEN_N)
            b_s = dot(b_q2, tl.trans(b_k2), b_s)
            b_v = load_part(p_v, stride_vl, o_n, length, D1, D2, D, EVEN_N)
            b_dp = dot(b_do2, tl.trans(b_v), b_dp)
        if not EVEN_N:
            b_s = tl.where((o_n < length)[None, :], b_s, float("-inf"))
        b_p = tl.exp2(b_s * c - b_lse)
        b_ds = cast(b_p * (b_dp - b_delta), p_q.dtype.element_ty)
        b_dq1 = dot(b_ds, b_k1, b_dq1)
        if D2 > 0:
            b_dq2 = dot(b_ds, b_k2, b_dq2)
    p_dq += (i_b * n_queries * H + i_h) * D
    store_part(p_dq, H * D, o_m, n_queries, b_dq1 * scale, 0, D1, D)
    if D2 > 0:
        store_part(p_dq, H * D, o_m, n_queries, b_dq2 * scale, D1, D2, D)


def result_of(q: Tensor) -> Tensor:
    """Memory for o [B, Lq, H, d] in q's order: image-major, or sequence-major where images lie closer than tokens."""
    if q.stride(0) < q.stride(1):
        return torch.empty(q.transpose(0, 1).shape, device=q.device, dtype=q.dtype).transpose(0, 1)
    return torch.empty(q.shape, device=q.device, dtype=q.dtype)


def _forward(q: Tensor, k: Tensor, v: Tensor, scale: float, bounded: bool) -> tuple[Tensor, Tensor]:
    q, k, v = rows_contiguous(q), rows_contiguous(k), rows_contiguous(v)
    if max(x.shape[1] * x.stride(1) for x in (q, k, v)) >= 2**31:
        raise ValueError(f"{k.shape[1]} tokens span over 2^31 elements, the reach of this kernel; use backend='auto'")
    o, lse = _forward_fake(q, k, v, scale, bounded)
    b, n_queries, h, d = q.shape
    length = k.shape[1]
    if q.numel():
        size = blocks(d, length, q.element_size())
        m, n, num_warps, num_stages = size.forward
        attention_kernel[(cdiv(n_queries, m), b * h)](
            q, k, v, o, lse, n_queries, length, h,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], o.stride(1) // (h * d), scale * math.log2(math.e),
            D=d, D1=size.d1, D2=size.d2, M=m, N=n, EVEN_N=length % n == 0, BOUNDED=bounded,
            num_warps=num_warps, num_stages=num_stages,
        )  # fmt: skip
    return o, lse


def _forward_fake(q: Tensor, k: Tensor, v: Tensor, scale: float, bounded: bool) -> tuple[Tensor, Tensor]:
    b, n_queries, h, _ = q.shape
    return result_of(q), torch.empty((b, h, n_queries), device=q.device, dtype=torch.float32)


def _backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    do, q, k, v = rows_contiguous(do), rows_contiguous(q), rows_contiguous(k), rows_contiguous(v)
    o = o.contiguous()
    dq, dk, dv = _backward_fake(do, q, k, v, o, lse, scale)
    b, n_queries, h, d = q.shape
    length = k.shape[1]
    if q.numel() == 0:
        return dq, dk.zero_(), dv.zero_()
    size = blocks(d, length, q.element_size())
    delta = torch.empty_like(lse)
    m, n, num_warps, num_stages = size.dq
    attention_delta_kernel[(cdiv(n_queries, m), b * h)](
        o, do, delta, n_queries, h, *do.stride()[:3], D=d, D1=size.d1, D2=size.d2, M=m, num_warps=4
    )
    strides = *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *do.stride()[:3]
    c = scale * math.log2(math.e)
    attention_dq_kernel[(cdiv(n_queries, m), b * h)](
        q, k, v, do, lse, delta, dq, n_queries, length, h, *strides, c, scale,
        D=d, D1=size.d1, D2=size.d2, M=m, N=n, EVEN_N=length % n == 0, num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip
    m, n, num_warps, num_stages = size.dkdv
    attention_dkdv_kernel[(cdiv(length, n), b * h)](
        q, k, v, do, lse, delta, dk, dv, n_queries, length, h, *strides, c, scale,
        D=d, D1=size.d1, D2=size.d2, M=m, N=n, EVEN_M=n_queries % m == 0, num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip
    return dq, dk, dv


def _backward_fake(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    dq = torch.empty(q.shape, device=q.device, dtype=q.dtype)
    dk = torch.empty(k.shape, device=k.device, dtype=k.dtype)
    return dq, dk, torch.empty_like(dk)


_op = register(
    "attention_triton(Tensor q, Tensor k, Tensor v, float scale, bool bounded) -> (Tensor, Tensor)",
    _forward,
    _forward_fake,
)
_op_backward = register(
    "attention_triton_backward(Tensor do, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, float scale)"
    " -> (Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, scale, bounded):  # type: ignore[no-untyped-def]
        o, lse = _op(q, k, v, scale, bounded)
        ctx.save_for_backward(q, k, v, o, lse)
        ctx.scale = scale
        return o

    @staticmethod
    def backward(ctx, do):  # type: ignore[no-untyped-def]
        dq, dk, dv = _op_backward(do, *ctx.saved_tensors, ctx.scale)
        return dq, dk, dv, None, None


def is_bounded(logit_bound: float | None, dtype: torch.dtype) -> bool:
    """Whether the running maximum may go: e^bound must fit the dtype of p, which fp16 does not."""
    return logit_bound is not None and abs(logit_bound) <= SAFE_LOGIT and dtype != torch.float16


def attention_triton(
    q: Tensor,  # [B, Lq, H, d]
    k: Tensor,  # [B, L, H, d]
    v: Tensor,  # [B, L, H, d]
    scale: float,
    logit_bound: float | None,
) -> Tensor:  # [B, Lq, H, d], in q's order
    """Joint attention by the kernels of this file; arguments as checked by `joint_attention`."""
    bounded = is_bounded(logit_bound, q.dtype)
    if wants_grad(q, k, v):
        return _Attention.apply(q, k, v, scale, bounded)
    o: Tensor = _op(q, k, v, scale, bounded)[0]
    return o


def aot_signatures() -> list[Signature]:
    """Every kernel of this file at the real shapes, for compilation ahead of time."""
    kinds = {"p_lse": "*fp32", "p_delta": "*fp32", "c": "fp32", "scale": "fp32"}
    found: list[Signature] = []
    for d in (64, 96):
        size = blocks(d, 4352, 2)
        head = {"D": d, "D1": size.d1, "D2": size.d2}
        m, n, warps, stages = size.forward
        for bounded, what in ((False, "running maximum"), (True, "bounded logits")):
            sizes = {**head, "M": m, "N": n, "EVEN_N": True, "BOUNDED": bounded}
            found.append(signature(attention_kernel, kinds, sizes, warps, stages, f"attention d={d} {what}"))
        m, n, warps, stages = size.dq
        found.append(signature(attention_delta_kernel, kinds, {**head, "M": m}, 4, 3, f"attention delta d={d}"))
        sizes = {**head, "M": m, "N": n, "EVEN_N": True}
        found.append(signature(attention_dq_kernel, kinds, sizes, warps, stages, f"attention dq d={d}"))
        m, n, warps, stages = size.dkdv
        sizes = {**head, "M": m, "N": n, "EVEN_M": True}
        found.append(signature(attention_dkdv_kernel, kinds, sizes, warps, stages, f"attention dkdv d={d}"))
    return found
