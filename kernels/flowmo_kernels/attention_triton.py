"""Attention in Triton: a head of 96 channels as 64 + 32, and no running maximum where the logits are bounded.

    s = c q k^T,  p = 2^(s - m),  l = sum p,  o = (p v) / l,  lse = m + log2 l          c = scale log2(e)

m is the running row maximum, or 0 where |s| is known to stay far below the range of fp32: query-key normalisation
bounds the logits by 8 max|g_q| max|g_k|.  Then p keeps its full relative precision and nothing is ever rescaled.
Then parts of the keys also just add up, which fills the device's last wave of programs (`attention_waves`).  The
gradient is in `attention_backward`.

Legend: B images, L keys, Lq queries, H heads, d channels of a head; a tile has M query rows and N key rows.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ._heads import check_reach, head_parts, load_part, result_of, store_part
from ._library import register, rows_contiguous, wants_grad
from ._rows import Signature, signature
from ._triton import cast, cdiv, dot, jit, next_power_of_2, tl
from .attention_backward import backward_op
from .attention_waves import Waves, combine, processors, waves

MAX_HEAD_DIM = 128
SAFE_LOGIT = 60.0  # natural units; e^60 times a million keys is far inside fp32 and bf16


class _Blocks(NamedTuple):
    d1: int  # channels of the first part, a power of two
    d2: int  # channels of the second part, a power of two, or 0
    m: int  # query rows of a tile, a power of two as is n
    n: int  # key rows
    warps: int
    stages: int
    registers: int | None  # most to a thread; None: as many as the compiler wants


def blocks(d: int, length: int, itemsize: int) -> _Blocks:
    """Tile sizes for heads of d channels and elements of `itemsize` bytes."""
    most = max(16, next_power_of_2(length))
    # Tiles that spill on none of sm_80, sm_90 and sm_100.
    m, n, warps, stages = (64, 32, 4, 2) if itemsize > 2 else (128, 64, 8 if d > 64 else 4, 3)
    return _Blocks(*head_parts(d, 16), min(m, most), min(n, most), warps, stages, None)


@jit
def attention_kernel(
    p_q,  # [B, Lq, H, d]
    p_k,  # [B, L, H, d]
    p_v,
    p_o,  # [B, Lq, H, d], heads contiguous
    p_lse,  # [B, H, Lq] fp32, log base 2; where SPLIT [split tiles, parts, M], l of parts of the keys
    p_po,  # where SPLIT [split tiles, parts, M, d] fp32, p v of parts of the keys
    n_queries,
    length,
    H,
    n_tiles,  # row tiles of a head
    whole,  # row tiles of all heads that one program computes, the first ones
    parts,  # programs to each of the other tiles
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
    SPLIT: tl.constexpr,
):
    if SPLIT:
        i_tile = tl.program_id(0)
        in_parts = i_tile >= whole
        i_part = tl.maximum(i_tile - whole, 0)
        i_tile = tl.where(in_parts, whole + i_part // parts, i_tile)
        n_part = tl.where(in_parts, tl.cdiv(tl.cdiv(length, N), parts) * N, length)
        first = i_part % parts * n_part
        end = tl.minimum(first + n_part, length)
        i_m = i_tile % n_tiles
        i_bh = (i_tile // n_tiles).to(tl.int64)
    else:
        first = 0
        end = length
        i_m = tl.program_id(0)
        i_bh = tl.program_id(1).to(tl.int64)
    i_b = i_bh // H
    i_h = i_bh % H
    p_q += i_b * stride_qb + i_h * stride_qh
    p_k += i_b * stride_kb + i_h * stride_kh
    p_v += i_b * stride_vb + i_h * stride_vh
    o_m = i_m * M + tl.arange(0, M)
    b_q1 = load_part(p_q, stride_ql, o_m, n_queries, 0, D1, D, False)
    b_o1 = tl.zeros([M, D1], tl.float32)
    if D2 > 0:
        b_q2 = load_part(p_q, stride_ql, o_m, n_queries, D1, D2, D, False)
        b_o2 = tl.zeros([M, D2], tl.float32)
    b_l = tl.zeros([M], tl.float32)
    b_max = tl.full([M], float("-inf"), tl.float32)
    for i_n in range(first, end, N):
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
    n_stored = n_queries
    if SPLIT:
        if in_parts:
            o_part = i_part.to(tl.int64) * M
            o_row = tl.arange(0, M)
            tl.store(p_lse + o_part + o_row, b_l)
            store_part(p_po + o_part * D, D, o_row, M, b_o1, 0, D1, D)
            if D2 > 0:
                store_part(p_po + o_part * D, D, o_row, M, b_o2, D1, D2, D)
        n_stored = tl.where(in_parts, 0, n_queries)  # `combine` writes the others
    else:
        b_lse = tl.log2(b_l)
        if not BOUNDED:
            b_lse += b_max
        tl.store(p_lse + i_bh * n_queries + o_m, b_lse, mask=o_m < n_queries)
    p_o += (i_b * tl.where(n_beside == 1, n_queries, 1) * H + i_h) * D
    store_part(p_o, n_beside * H * D, o_m, n_stored, b_o1 / b_l[:, None], 0, D1, D)
    if D2 > 0:
        store_part(p_o, n_beside * H * D, o_m, n_stored, b_o2 / b_l[:, None], D1, D2, D)


def _forward(q: Tensor, k: Tensor, v: Tensor, scale: float, bounded: bool) -> tuple[Tensor, Tensor]:
    o, lse = _forward_fake(q, k, v, scale, bounded)
    _attend(q, k, v, o, lse, lse, scale, bounded, None)
    return o, lse


def _forward_fake(q: Tensor, k: Tensor, v: Tensor, scale: float, bounded: bool) -> tuple[Tensor, Tensor]:
    b, n_queries, h, _ = q.shape
    return result_of(q), torch.empty((b, h, n_queries), device=q.device, dtype=torch.float32)


def _inference(q: Tensor, k: Tensor, v: Tensor, scale: float, bounded: bool) -> Tensor:
    """o alone; without a running maximum the last row tiles may be split over the keys."""
    b, n_queries, h, d = q.shape
    size = blocks(d, k.shape[1], q.element_size())
    n_tiles = b * h * cdiv(n_queries, size.m)
    shares = waves(n_tiles, cdiv(k.shape[1], size.n), processors(q)) if bounded else Waves(n_tiles, 1)
    if shares.parts == 1:
        return _forward(q, k, v, scale, bounded)[0]
    o = _inference_fake(q, k, v, scale, bounded)
    po = torch.empty((n_tiles - shares.whole, shares.parts, size.m, d), device=q.device, dtype=torch.float32)
    pl = torch.empty(po.shape[:3], device=q.device, dtype=torch.float32)
    _attend(q, k, v, o, pl, po, scale, bounded, shares)
    combine(po, pl, o, shares.whole)
    return o


def _inference_fake(q: Tensor, k: Tensor, v: Tensor, scale: float, bounded: bool) -> Tensor:
    return result_of(q)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,  # written, and
    lse: Tensor,  # lse, or l of the parts
    po: Tensor,  # p v of the parts; any tensor where nothing is split
    scale: float,
    bounded: bool,
    shares: Waves | None,
) -> None:
    q, k, v = rows_contiguous(q), rows_contiguous(k), rows_contiguous(v)
    check_reach(q, k, v)
    b, n_queries, h, d = q.shape
    length = k.shape[1]
    if q.numel() == 0:
        return
    size = blocks(d, length, q.element_size())
    n_tiles = cdiv(n_queries, size.m)
    whole, parts = shares or (0, 0)
    grid = (whole + (b * h * n_tiles - whole) * parts,) if shares else (n_tiles, b * h)
    attention_kernel[grid](
        q, k, v, o, lse, po, n_queries, length, h, n_tiles, whole, parts,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], o.stride(1) // (h * d), scale * math.log2(math.e),
        D=d, D1=size.d1, D2=size.d2, M=size.m, N=size.n, EVEN_N=length % size.n == 0,
        BOUNDED=bounded, SPLIT=shares is not None,
        num_warps=size.warps, num_stages=size.stages, maxnreg=size.registers,
    )  # fmt: skip


_op = register(
    "attention_triton(Tensor q, Tensor k, Tensor v, float scale, bool bounded) -> (Tensor, Tensor)",
    _forward,
    _forward_fake,
)
_op_inference = register(
    "attention_triton_inference(Tensor q, Tensor k, Tensor v, float scale, bool bounded) -> Tensor",
    _inference,
    _inference_fake,
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
        dq, dk, dv = backward_op(do, *ctx.saved_tensors, ctx.scale)
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
    o: Tensor = _op_inference(q, k, v, scale, bounded)
    return o


def aot_signatures() -> list[Signature]:
    """Every kernel of this file at the real shapes, for compilation ahead of time."""
    kinds = {"p_lse": "*fp32", "p_po": "*fp32", "c": "fp32"}
    found: list[Signature] = []
    for d in (64, 96):
        size = blocks(d, 4352, 2)
        head = {"D": d, "D1": size.d1, "D2": size.d2, "M": size.m, "N": size.n, "EVEN_N": True}
        variants = ("running maximum", "bounded logits", "split keys")
        for what, bounded, split in zip(variants, (False, True, True), (False, False, True)):
            constants = {**head, "BOUNDED": bounded, "SPLIT": split}
            label = f"attention d={d} {what}"
            found.append(signature(attention_kernel, kinds, constants, size.warps, size.stages, label))
    return found
