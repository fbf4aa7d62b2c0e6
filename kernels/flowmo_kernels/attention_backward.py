"""Gradient of attention in Triton, for `attention_triton`.

    p = 2^(s - lse),  s = c q k^T,  c = scale log2(e),  delta = sum(o do),  ds = p (do v^T - delta)
    dv = p^T do,  dk = scale ds^T q,  dq = scale ds k

Key and query gradients come from two kernels that each own their output, so the result does not depend on the order
in which programs run.

Legend: B images, L keys, Lq queries, H heads, d channels of a head; a tile has M query rows and N key rows.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ._heads import head_parts, load_part, store_part
from ._library import register, rows_contiguous
from ._rows import Signature, signature
from ._triton import cast, cdiv, dot, jit, next_power_of_2, tl


class _Blocks(NamedTuple):
    d1: int  # channels of the first part, a power of two
    d2: int  # channels of the second part, a power of two, or 0
    dkdv: tuple[int, int, int, int]  # M, N, warps, stages
    dq: tuple[int, int, int, int]


def blocks(d: int, length: int, itemsize: int) -> _Blocks:
    """Tile sizes for heads of d channels and elements of `itemsize` bytes."""
    most = max(16, next_power_of_2(length))
    if itemsize > 2:
        sizes = (32, 32, 4, 2), (32, 32, 4, 2)
    else:
        # Tiles that spill on none of sm_80, sm_90 and sm_100; for more than 64 channels the key and value gradients
        # of 128 keys leave room for 32 queries.
        sizes = (32 if d > 64 else 64, 128, 8, 2), (128, 64, 8, 2)
    dkdv, dq = ((min(m, most), min(n, most), warps, stages) for m, n, warps, stages in sizes)
    return _Blocks(*head_parts(d, 16), dkdv, dq)


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


backward_op = register(
    "attention_triton_backward(Tensor do, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, float scale)"
    " -> (Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)


def aot_signatures() -> list[Signature]:
    """Every kernel of this file at the real shapes, for compilation ahead of time."""
    kinds = {"p_lse": "*fp32", "p_delta": "*fp32", "c": "fp32", "scale": "fp32"}
    found: list[Signature] = []
    for d in (64, 96):
        size = blocks(d, 4352, 2)
        head = {"D": d, "D1": size.d1, "D2": size.d2}
        m, n, warps, stages = size.dq
        found.append(signature(attention_delta_kernel, kinds, {**head, "M": m}, 4, 3, f"attention delta d={d}"))
        sizes = {**head, "M": m, "N": n, "EVEN_N": True}
        found.append(signature(attention_dq_kernel, kinds, sizes, warps, stages, f"attention dq d={d}"))
        m, n, warps, stages = size.dkdv
        sizes = {**head, "M": m, "N": n, "EVEN_M": True}
        found.append(signature(attention_dkdv_kernel, kinds, sizes, warps, stages, f"attention dkdv d={d}"))
    return found
